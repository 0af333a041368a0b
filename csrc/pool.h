// PinnedPool: one slab of host memory, reserved once, cut into slots by our own best-fit allocator.
//
// Page-locked memory is slow to make (the kernel touches every page), so a process makes one slab
// and never asks again. Bookkeeping lies outside the slab: a stray write into a slot cannot break
// it. Free neighbours are merged at once. What it does not do: grow, move slots, or lock pages by
// itself; a device copier registers the slab with its driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <unordered_map>
#include <utility>

namespace vf {

// The slab has no room for a request; the message says how much is free and what budget would be
// needed.
class BudgetError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A range of the slab: `offset` and `bytes` are multiples of the alignment.
struct Slot {
  std::size_t offset = 0;
  std::size_t bytes = 0;
};

struct PoolStats {
  std::size_t budget_bytes = 0;        // of the slab
  std::size_t used_bytes = 0;          // in slots, rounding included
  std::size_t requested_bytes = 0;     // in slots, as asked for
  std::size_t high_water_bytes = 0;    // largest used_bytes so far
  std::size_t largest_free_bytes = 0;  // largest request that would succeed now
  std::size_t num_slots = 0;
  std::size_t num_free_ranges = 0;
  std::uint64_t num_allocations = 0;  // since the start
};

// Every method may be called from any thread.
class PinnedPool {
 public:
  // Maps the slab. `alignment` is 256 (coalesced device access) or 4096 (a page); the budget is a
  // multiple of it. Throws std::invalid_argument on other values, std::system_error when the system
  // refuses the memory.
  PinnedPool(std::size_t budget_bytes, std::size_t alignment);
  ~PinnedPool();
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  // The smallest free range that fits. Throws BudgetError (nothing changes then),
  // std::invalid_argument on 0 bytes.
  [[nodiscard]] Slot allocate(std::size_t bytes);

  // Gives a slot back. Throws std::logic_error for a slot that is not in use.
  void free(Slot slot);

  // Where a slot lies; valid until the pool is destroyed.
  [[nodiscard]] void* address(Slot slot) const { return slab_ + slot.offset; }

  [[nodiscard]] PoolStats stats() const;

 private:
  struct Use {
    std::size_t reserved_bytes;
    std::size_t requested_bytes;
  };

  void insert_free(std::size_t offset, std::size_t bytes);
  void erase_free(std::map<std::size_t, std::size_t>::iterator range);
  [[nodiscard]] std::size_t largest_free() const;

  const std::size_t budget_bytes_;
  const std::size_t alignment_;
  std::byte* slab_ = nullptr;
  mutable std::mutex mutex_;
  std::map<std::size_t, std::size_t> free_by_offset_;           // offset -> bytes
  std::set<std::pair<std::size_t, std::size_t>> free_by_size_;  // (bytes, offset)
  std::unordered_map<std::size_t, Use> used_;                   // offset -> sizes
  std::size_t used_bytes_ = 0;
  std::size_t requested_bytes_ = 0;
  std::size_t high_water_bytes_ = 0;
  std::uint64_t num_allocations_ = 0;
};

}  // namespace vf
