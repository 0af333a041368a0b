#include "pool.h"

#include <sys/mman.h>

#include <cerrno>
#include <iterator>
#include <string>
#include <system_error>

namespace vf {

PinnedPool::PinnedPool(std::size_t budget_bytes, std::size_t alignment)
    : budget_bytes_(budget_bytes), alignment_(alignment) {
  if (alignment != 256 && alignment != 4096) {
    throw std::invalid_argument("expected an alignment of 256 or 4096 bytes, got " +
                                std::to_string(alignment) + "; 4096 suits most uses.");
  }
  if (budget_bytes == 0 || budget_bytes % alignment != 0) {
    throw std::invalid_argument("expected a budget that is a positive multiple of " +
                                std::to_string(alignment) + " bytes, got " +
                                std::to_string(budget_bytes) + "; round it up.");
  }
  void* slab = ::mmap(nullptr, budget_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                      /*fd=*/-1, /*offset=*/0);
  if (slab == MAP_FAILED) {
    throw std::system_error(
        errno, std::generic_category(),
        "cannot map " + std::to_string(budget_bytes) + " bytes for the pool; lower the budget");
  }
  // Advice only: fewer page-table entries where the system has huge pages, no harm where it has
  // none.
  ::madvise(slab, budget_bytes, MADV_HUGEPAGE);
  slab_ = static_cast<std::byte*>(slab);
  insert_free(0, budget_bytes);
}

PinnedPool::~PinnedPool() { ::munmap(slab_, budget_bytes_); }

Slot PinnedPool::allocate(std::size_t bytes) {
  if (bytes == 0) {
    throw std::invalid_argument("expected at least 1 byte, got 0; an empty tensor needs no slot.");
  }
  const std::lock_guard lock(mutex_);
  // Compared before rounding, which could overflow.
  const bool too_large = bytes > budget_bytes_;
  const std::size_t reserved =
      too_large ? bytes : (bytes + alignment_ - 1) / alignment_ * alignment_;
  const auto best = free_by_size_.lower_bound({reserved, 0});
  if (too_large || best == free_by_size_.end()) {
    throw BudgetError("the pinned pool has " + std::to_string(budget_bytes_ - used_bytes_) +
                      " of " + std::to_string(budget_bytes_) + " bytes free (largest range " +
                      std::to_string(largest_free()) + "), a slot of " + std::to_string(reserved) +
                      " was asked for; offload less, or give it at least " +
                      std::to_string(used_bytes_ + reserved) + " bytes.");
  }
  const auto [range_bytes, offset] = *best;
  erase_free(free_by_offset_.find(offset));
  if (range_bytes > reserved) insert_free(offset + reserved, range_bytes - reserved);
  used_.emplace(offset, Use{reserved, bytes});
  used_bytes_ += reserved;
  requested_bytes_ += bytes;
  if (used_bytes_ > high_water_bytes_) high_water_bytes_ = used_bytes_;
  ++num_allocations_;
  return Slot{offset, reserved};
}

void PinnedPool::free(Slot slot) {
  const std::lock_guard lock(mutex_);
  const auto use = used_.find(slot.offset);
  if (use == used_.end() || use->second.reserved_bytes != slot.bytes) {
    throw std::logic_error("the slot at offset " + std::to_string(slot.offset) + " is not in use.");
  }
  used_bytes_ -= use->second.reserved_bytes;
  requested_bytes_ -= use->second.requested_bytes;
  used_.erase(use);

  std::size_t begin = slot.offset;
  std::size_t end = slot.offset + slot.bytes;
  const auto after = free_by_offset_.lower_bound(begin);
  if (after != free_by_offset_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == begin) {
      begin = before->first;
      erase_free(before);
    }
  }
  if (after != free_by_offset_.end() && after->first == end) {
    end += after->second;
    erase_free(after);
  }
  insert_free(begin, end - begin);
}

PoolStats PinnedPool::stats() const {
  const std::lock_guard lock(mutex_);
  PoolStats stats;
  stats.budget_bytes = budget_bytes_;
  stats.used_bytes = used_bytes_;
  stats.requested_bytes = requested_bytes_;
  stats.high_water_bytes = high_water_bytes_;
  stats.largest_free_bytes = largest_free();
  stats.num_slots = used_.size();
  stats.num_free_ranges = free_by_offset_.size();
  stats.num_allocations = num_allocations_;
  return stats;
}

void PinnedPool::insert_free(std::size_t offset, std::size_t bytes) {
  free_by_offset_.emplace(offset, bytes);
  free_by_size_.emplace(bytes, offset);
}

void PinnedPool::erase_free(std::map<std::size_t, std::size_t>::iterator range) {
  free_by_size_.erase({range->second, range->first});
  free_by_offset_.erase(range);
}

std::size_t PinnedPool::largest_free() const {
  return free_by_size_.empty() ? 0 : free_by_size_.rbegin()->first;
}

}  // namespace vf
