#include "pool.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace vf {

namespace {

constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;
constexpr unsigned kMaxThreads = 16;  // beyond it the memory, not the kernel, is the limit

void check(const PoolOptions& options) {
  const std::string alignment = std::to_string(options.alignment);
  if (options.alignment != 256 && options.alignment != 4096) {
    throw std::invalid_argument("expected an alignment of 256 or 4096 bytes, got " + alignment +
                                "; 4096 suits most uses.");
  }
  for (const auto& [name, bytes] :
       {std::pair("budget", options.budget_bytes), std::pair("chunk", options.chunk_bytes)}) {
    if (bytes == 0 || bytes % options.alignment != 0) {
      throw std::invalid_argument("expected a " + std::string(name) +
                                  " that is a positive multiple of " + alignment + " bytes, got " +
                                  std::to_string(bytes) + "; round it up.");
    }
  }
}

// Pages that are touched later must come from this node and no other. By system call: libnuma is
// not everywhere.
void bind_to_node(void* slab, std::size_t bytes, int node) {
  constexpr long kBind = 2;  // MPOL_BIND of the kernel
  constexpr unsigned long kBitsPerWord = 8 * sizeof(unsigned long);
  std::vector<unsigned long> mask(static_cast<std::size_t>(node) / kBitsPerWord + 1, 0);
  mask[static_cast<std::size_t>(node) / kBitsPerWord] = 1UL << (node % kBitsPerWord);
  if (::syscall(SYS_mbind, slab, bytes, kBind, mask.data(), mask.size() * kBitsPerWord + 1, 0) !=
      0) {
    throw std::system_error(
        errno, std::generic_category(),
        "cannot bind the pool to NUMA node " + std::to_string(node) + "; use -1 for any node");
  }
}

// The kernel hands out a page at the first write to it; that work runs in parallel.
void touch(std::byte* slab, std::size_t bytes, unsigned num_threads) {
  const auto work = [=](std::size_t begin, std::size_t end) {
    for (std::size_t offset = begin; offset < end; offset += kPageBytes) {
      *static_cast<volatile std::byte*>(slab + offset) = std::byte{0};
    }
  };
  const std::size_t num_huge = (bytes + kHugePageBytes - 1) / kHugePageBytes;
  const std::size_t share = (num_huge + num_threads - 1) / num_threads * kHugePageBytes;
  std::vector<std::thread> threads;
  for (std::size_t begin = share; begin < bytes; begin += share) {
    try {
      threads.emplace_back(work, begin, std::min(begin + share, bytes));
    } catch (const std::system_error&) {  // no more threads to have: the share is done here
      work(begin, std::min(begin + share, bytes));
    }
  }
  work(0, std::min(share, bytes));
  for (auto& thread : threads) thread.join();
}

// AnonHugePages of the mappings that begin within the range.
std::size_t huge_bytes(const void* begin, std::size_t bytes) {
  std::ifstream smaps("/proc/self/smaps");
  const auto first = reinterpret_cast<std::uintptr_t>(begin);
  std::size_t found = 0;
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    unsigned long from = 0, to = 0, kib = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &from, &to) == 2) {
      inside = from >= first && from < first + bytes;
    } else if (inside && std::sscanf(line.c_str(), "AnonHugePages: %lu kB", &kib) == 1) {
      found += kib * 1024;
    }
  }
  return std::min(found, bytes);
}

}  // namespace

PinnedPool::PinnedPool(const PoolOptions& options)
    : budget_bytes_(options.budget_bytes),
      alignment_(options.alignment),
      chunk_bytes_(options.chunk_bytes) {
  check(options);
  const auto begin = std::chrono::steady_clock::now();
  mapped_bytes_ = budget_bytes_ + kHugePageBytes;
  mapped_ = ::mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                   /*fd=*/-1, /*offset=*/0);
  if (mapped_ == MAP_FAILED) {
    throw std::system_error(
        errno, std::generic_category(),
        "cannot map " + std::to_string(budget_bytes_) + " bytes for the pool; lower the budget");
  }
  const auto address = reinterpret_cast<std::uintptr_t>(mapped_);
  slab_ = static_cast<std::byte*>(mapped_) +
          (kHugePageBytes - address % kHugePageBytes) % kHugePageBytes;
  // Advice only: fewer page-table entries where the system has huge pages, no harm where it has
  // none.
  ::madvise(slab_, budget_bytes_, MADV_HUGEPAGE);
  // A fork that copied a page on the next write would leave the device at the old one, and tables
  // for the whole slab cost a data worker its start.
  ::madvise(slab_, budget_bytes_, MADV_DONTFORK);
  const unsigned cores = std::max(1U, std::thread::hardware_concurrency());
  setup_.num_threads = options.num_threads ? options.num_threads : std::min(cores, kMaxThreads);
  try {
    if (options.numa_node >= 0) bind_to_node(slab_, budget_bytes_, options.numa_node);
    touch(slab_, budget_bytes_, setup_.num_threads);
    setup_.huge_bytes = huge_bytes(slab_, budget_bytes_);
    for (std::size_t offset = 0; offset < budget_bytes_; offset += chunk_bytes_) {
      insert_free(offset, std::min(chunk_bytes_, budget_bytes_ - offset));
    }
  } catch (...) {
    ::munmap(mapped_, mapped_bytes_);
    throw;
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  setup_.seconds = seconds.count();
}

PinnedPool::~PinnedPool() { ::munmap(mapped_, mapped_bytes_); }

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
  // A chunk's first byte is never merged with what lies before it.
  if (after != free_by_offset_.begin() && begin % chunk_bytes_ != 0) {
    const auto before = std::prev(after);
    if (before->first + before->second == begin) {
      begin = before->first;
      erase_free(before);
    }
  }
  if (after != free_by_offset_.end() && after->first == end && end % chunk_bytes_ != 0) {
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
