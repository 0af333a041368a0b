#include "engine.h"

#include <algorithm>
#include <string>
#include <utility>

namespace vf {

namespace {

void check(const void* address, const char* what, std::size_t row_bytes, std::size_t num_rows,
           std::size_t pitch) {
  if (address == nullptr) {
    throw std::invalid_argument("expected a " + std::string(what) +
                                " address, got a null pointer.");
  }
  if (num_rows > 1 && pitch < row_bytes) {
    throw std::invalid_argument("expected rows at least " + std::to_string(row_bytes) +
                                " bytes apart, got a pitch of " + std::to_string(pitch) +
                                "; rows must not overlap.");
  }
}

}  // namespace

Engine::Engine(std::unique_ptr<Copier> copier, const PoolOptions& options)
    : pool_(options), copier_(std::move(copier)) {
  copier_->attach(pool_.slab(), options.budget_bytes, options.chunk_bytes);
}

Ticket Engine::offload(const Rows& rows, Stream stream) {
  check(rows.source, "source", rows.row_bytes, rows.num_rows, rows.pitch);
  const std::lock_guard lock(mutex_);
  const Slot slot = allocate(rows.row_bytes * rows.num_rows);
  const Ticket ticket = next_ticket_++;
  try {
    const auto entry =
        entries_.try_emplace(ticket, Entry{slot, rows.row_bytes, rows.num_rows, {}, std::nullopt})
            .first;
    const Copy copy{pool_.address(slot), rows.source,    rows.row_bytes,
                    rows.num_rows,       rows.row_bytes, rows.pitch};
    entry->second.offloaded = copier_->start(Direction::kOffload, copy, std::nullopt, stream);
  } catch (...) {  // nothing was queued: leave no ticket and no slot behind
    entries_.erase(ticket);
    pool_.free(slot);
    throw;
  }
  return ticket;
}

void Engine::prefetch(Ticket ticket, void* target, std::size_t pitch, Stream stream) {
  const std::lock_guard lock(mutex_);
  Entry& entry = find(ticket);
  const std::size_t apart = pitch == 0 ? entry.row_bytes : pitch;
  check(target, "target", entry.row_bytes, entry.num_rows, apart);
  const Copy copy{target,         pool_.address(entry.slot), entry.row_bytes, entry.num_rows, apart,
                  entry.row_bytes};
  entry.prefetched = copier_->start(Direction::kPrefetch, copy, entry.offloaded, stream);
}

void Engine::wait(Ticket ticket, Stream stream) {
  std::unique_lock lock(mutex_);
  const Entry entry = find(ticket);
  lock.unlock();
  copier_->wait(entry.offloaded, stream);
  if (entry.prefetched) copier_->wait(*entry.prefetched, stream);
}

bool Engine::done(Ticket ticket) {
  const std::lock_guard lock(mutex_);
  return done(find(ticket));
}

void Engine::release(Ticket ticket) {
  const std::lock_guard lock(mutex_);
  retired_.push_back(find(ticket));  // of two releases at once exactly one gets past find()
  entries_.erase(ticket);
  collect();
}

void Engine::settle() {
  const std::lock_guard lock(mutex_);
  for (const Entry& entry : retired_) {
    copier_->finish(entry.prefetched.value_or(entry.offloaded));
  }
  collect();
}

PoolStats Engine::stats() {
  const std::lock_guard lock(mutex_);
  collect();
  return pool_.stats();
}

Engine::Entry& Engine::find(Ticket ticket) {
  const auto entry = entries_.find(ticket);
  if (entry == entries_.end()) {
    throw TicketError("ticket " + std::to_string(ticket) +
                      (ticket != 0 && ticket < next_ticket_
                           ? " was released already."
                           : " was never given out by this engine."));
  }
  return entry->second;
}

bool Engine::done(const Entry& entry) const {
  // A prefetch begins after its offload, so it alone decides where there is one.
  return copier_->done(entry.prefetched.value_or(entry.offloaded));
}

void Engine::collect() {
  const auto gone = [this](const Entry& entry) {
    if (!done(entry)) return false;
    pool_.free(entry.slot);
    return true;
  };
  retired_.erase(std::remove_if(retired_.begin(), retired_.end(), gone), retired_.end());
}

Slot Engine::allocate(std::size_t bytes) {
  collect();
  while (true) {
    try {
      return pool_.allocate(bytes);
    } catch (const BudgetError&) {
      if (retired_.empty()) throw;
    }
    copier_->finish(retired_.front().prefetched.value_or(retired_.front().offloaded));
    collect();
  }
}

}  // namespace vf
