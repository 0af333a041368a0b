// Engine: takes bytes away from the device into the pool and brings them back, by Ticket.
//
// clang-format off
//   ticket = offload(source)   starts the copy out; the source must not change or go until wait(ticket)
//   prefetch(ticket, target)   starts the copy back, after the copy out; the target is whole after wait(ticket)
//   wait(ticket)               blocks until every copy started for the ticket is done
//   release(ticket)            waits likewise, then gives the slot back; the ticket is dead from here on
// clang-format on
//
// It knows nothing of tensors, streams of the caller, or what is worth moving: that is decided
// above it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <unordered_map>

#include "copier.h"
#include "pool.h"

namespace vf {

using Ticket = std::uint64_t;  // never used twice in an engine

// A ticket that was released, or that this engine never gave out.
class TicketError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Every method may be called from any thread. The destructor finishes the copies in flight first.
class Engine {
 public:
  // Throws as PinnedPool does.
  Engine(std::unique_ptr<Copier> copier, std::size_t budget_bytes, std::size_t alignment);

  // Throws BudgetError before anything is copied, std::invalid_argument on a null pointer or 0
  // bytes.
  [[nodiscard]] Ticket offload(const void* source, std::size_t bytes);

  // Copies as many bytes as were offloaded; may be called again for another target.
  // Throws TicketError, std::invalid_argument on a null pointer.
  void prefetch(Ticket ticket, void* target);

  // Throws TicketError.
  void wait(Ticket ticket);

  // Throws TicketError, so that a double release is never silent.
  void release(Ticket ticket);

  [[nodiscard]] PoolStats stats() const { return pool_.stats(); }

 private:
  struct Entry {
    Slot slot;
    std::size_t bytes;
    Mark offloaded;
    std::optional<Mark> prefetched;  // of the latest prefetch; earlier ones are done before it
  };

  [[nodiscard]] Entry& find(Ticket ticket);  // with mutex_ held
  void wait_for(const Entry& entry);         // without

  PinnedPool pool_;
  std::unique_ptr<Copier> copier_;  // after the pool: destroyed first, while its slots still exist
  std::mutex mutex_;                // guards the two below
  std::unordered_map<Ticket, Entry> entries_;
  Ticket next_ticket_ = 1;
};

}  // namespace vf
