#include "engine.h"

#include <string>
#include <utility>

namespace vf {

Engine::Engine(std::unique_ptr<Copier> copier, std::size_t budget_bytes, std::size_t alignment)
    : pool_(budget_bytes, alignment), copier_(std::move(copier)) {}

Ticket Engine::offload(const void* source, std::size_t bytes) {
  if (source == nullptr)
    throw std::invalid_argument("expected a source address, got a null pointer.");
  const Slot slot = pool_.allocate(bytes);
  const std::lock_guard lock(mutex_);
  const Ticket ticket = next_ticket_++;
  try {
    const auto entry = entries_.try_emplace(ticket, Entry{slot, bytes, {}, std::nullopt}).first;
    entry->second.offloaded =
        copier_->start(Direction::kOffload, pool_.address(slot), source, bytes, std::nullopt);
  } catch (...) {  // nothing was queued: leave no ticket and no slot behind
    entries_.erase(ticket);
    pool_.free(slot);
    throw;
  }
  return ticket;
}

void Engine::prefetch(Ticket ticket, void* target) {
  if (target == nullptr)
    throw std::invalid_argument("expected a target address, got a null pointer.");
  const std::lock_guard lock(mutex_);
  Entry& entry = find(ticket);
  entry.prefetched = copier_->start(Direction::kPrefetch, target, pool_.address(entry.slot),
                                    entry.bytes, entry.offloaded);
}

void Engine::wait(Ticket ticket) {
  std::unique_lock lock(mutex_);
  const Entry entry = find(ticket);
  lock.unlock();
  wait_for(entry);
}

void Engine::release(Ticket ticket) {
  std::unique_lock lock(mutex_);
  const Entry entry = find(ticket);
  entries_.erase(ticket);  // before waiting: of two releases at once exactly one gets past find()
  lock.unlock();
  wait_for(entry);
  pool_.free(entry.slot);
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

void Engine::wait_for(const Entry& entry) {
  copier_->wait(entry.offloaded);
  if (entry.prefetched) copier_->wait(*entry.prefetched);
}

}  // namespace vf
