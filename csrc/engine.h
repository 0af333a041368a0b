// Engine: takes bytes away from the device into the pool and brings them back, by Ticket.
//
// clang-format off
//   ticket = offload(rows)     starts the copy out, packed; the source must not change or go until wait(ticket)
//   prefetch(ticket, target)   starts the copy back, after the copy out; the target is whole after wait(ticket)
//   wait(ticket)               the caller's next work comes after every copy started for the ticket
//   release(ticket)            the ticket is dead; its slot returns to the pool when its copies are done
// clang-format on
//
// It knows nothing of tensors or of what is worth moving: that is decided above it. `stream` is the
// caller's queue of device work at the moment of the call, never one remembered from before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
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

// Rows that lie `pitch` bytes apart; in the pool they are packed.
struct Rows {
  const void* source;
  std::size_t row_bytes;
  std::size_t num_rows = 1;
  std::size_t pitch = 0;  // 0 for one row
};

// Every method may be called from any thread. The destructor finishes the copies in flight first.
class Engine {
 public:
  // Throws as PinnedPool does.
  Engine(std::unique_ptr<Copier> copier, const PoolOptions& options);

  // Throws BudgetError before anything is copied (after waiting for slots that are on their way
  // back), std::invalid_argument on a null pointer, 0 bytes or rows that overlap.
  [[nodiscard]] Ticket offload(const Rows& rows, Stream stream = 0);

  // Copies as many bytes as were offloaded; may be called again for another target. `pitch` sets
  // the target's rows apart; 0 packs them. Throws TicketError, std::invalid_argument as offload.
  void prefetch(Ticket ticket, void* target, std::size_t pitch = 0, Stream stream = 0);

  // Throws TicketError.
  void wait(Ticket ticket, Stream stream = 0);

  // Every copy started for the ticket is done. Throws TicketError.
  [[nodiscard]] bool done(Ticket ticket);

  // Does not block. Throws TicketError, so that a double release is never silent.
  void release(Ticket ticket);

  // Blocks until the slots of all released tickets are back in the pool.
  void settle();

  // Slots whose copies are done are given back first.
  [[nodiscard]] PoolStats stats();
  [[nodiscard]] PoolSetup setup() const { return pool_.setup(); }
  [[nodiscard]] CopyStats copies(Direction direction) const { return copier_->stats(direction); }
  [[nodiscard]] Stream stream(Direction direction) const { return copier_->stream(direction); }

 private:
  struct Entry {
    Slot slot;
    std::size_t row_bytes;
    std::size_t num_rows;
    Mark offloaded;
    std::optional<Mark> prefetched;  // of the latest prefetch; earlier ones are done before it
  };

  [[nodiscard]] Entry& find(Ticket ticket);  // these four with mutex_ held
  [[nodiscard]] bool done(const Entry& entry) const;
  void collect();
  [[nodiscard]] Slot allocate(std::size_t bytes);

  PinnedPool pool_;
  std::unique_ptr<Copier> copier_;  // after the pool: destroyed first, while its slots still exist
  std::mutex mutex_;                // guards what follows
  std::unordered_map<Ticket, Entry> entries_;
  std::deque<Entry> retired_;  // released, copies perhaps in flight
  Ticket next_ticket_ = 1;
};

}  // namespace vf
