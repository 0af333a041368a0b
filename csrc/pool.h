// PinnedPool: one slab of host memory, reserved once, cut into slots by our own best-fit allocator.
//
// Page-locked memory is slow to make (the kernel touches every page), so a process makes one slab
// and never asks again; several threads touch the pages, which is what takes the time. Bookkeeping
// lies outside the slab: a stray write into a slot cannot break it. Free neighbours are merged at
// once. What it does not do: grow, move slots, or lock pages by itself; a device copier registers
// the slab with its driver, chunk by chunk, and no slot crosses from one chunk into the next.
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

struct PoolOptions {
  std::size_t budget_bytes;
  std::size_t alignment = 4096;                     // 256 (coalesced device access) or a page
  unsigned num_threads = 0;                         // that touch pages; 0 = one a core, at most 16
  std::size_t chunk_bytes = std::size_t{64} << 30;  // drivers refuse to register much more at once
  int numa_node = -1;                               // that the pages must lie on; -1 = any
};

// What making the slab took.
struct PoolSetup {
  double seconds = 0;
  unsigned num_threads = 0;
  std::size_t huge_bytes = 0;  // of the slab in huge pages; 0 also where the system does not say
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
  // Maps the slab and touches every page. Budget and chunk are multiples of the alignment. Throws
  // std::invalid_argument on other values, std::system_error when the system refuses the memory or
  // the NUMA node.
  explicit PinnedPool(const PoolOptions& options);
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

  [[nodiscard]] void* slab() const { return slab_; }

  [[nodiscard]] PoolStats stats() const;
  [[nodiscard]] PoolSetup setup() const { return setup_; }

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
  const std::size_t chunk_bytes_;
  void* mapped_ = nullptr;  // a little more than the slab, which begins at a huge page
  std::size_t mapped_bytes_ = 0;
  std::byte* slab_ = nullptr;
  PoolSetup setup_;
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
