// The law: slots never overlap, freed neighbours become one range, a refused request changes
// nothing.
#include "pool.h"

#include <sys/mman.h>

#include <cstring>
#include <random>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "check.h"

namespace {

using Options = vf::PoolOptions;
constexpr std::size_t kPage = 4096;

void rounds_up_and_counts() {
  vf::PinnedPool pool({8 * kPage, kPage});
  const vf::Slot one = pool.allocate(1);
  const vf::Slot two = pool.allocate(kPage + 1);
  CHECK(one.bytes == kPage && two.bytes == 2 * kPage);
  CHECK(reinterpret_cast<std::uintptr_t>(pool.address(two)) % kPage == 0);
  const vf::PoolStats stats = pool.stats();
  CHECK(stats.used_bytes == 3 * kPage && stats.requested_bytes == kPage + 2);
  CHECK(stats.num_slots == 2 && stats.num_allocations == 2);
  CHECK(stats.largest_free_bytes == 5 * kPage);
  pool.free(one);
  pool.free(two);
  CHECK(pool.stats().used_bytes == 0 && pool.stats().requested_bytes == 0);
  CHECK(pool.stats().high_water_bytes == 3 * kPage);
  CHECK(pool.stats().num_free_ranges == 1);
}

void takes_the_smallest_range_that_fits() {
  vf::PinnedPool pool({16 * kPage, kPage});
  const vf::Slot large = pool.allocate(4 * kPage);
  const vf::Slot wall = pool.allocate(kPage);
  const vf::Slot small = pool.allocate(2 * kPage);
  (void)pool.allocate(kPage);
  pool.free(large);
  pool.free(small);  // free now: 4 pages at 0, 2 pages at 5, 8 pages at 8
  CHECK(pool.allocate(2 * kPage).offset == small.offset);
  CHECK(pool.allocate(3 * kPage).offset == large.offset);
  CHECK(wall.offset == 4 * kPage);
}

void merges_on_both_sides() {
  vf::PinnedPool pool({3 * kPage, kPage});
  const vf::Slot a = pool.allocate(kPage), b = pool.allocate(kPage), c = pool.allocate(kPage);
  pool.free(a);
  pool.free(c);
  CHECK(pool.stats().num_free_ranges == 2 && pool.stats().largest_free_bytes == kPage);
  pool.free(b);
  CHECK(pool.stats().num_free_ranges == 1 && pool.stats().largest_free_bytes == 3 * kPage);
}

void refuses() {
  CHECK_THROWS(vf::PinnedPool(Options{kPage, 512}), std::invalid_argument, "256 or 4096");
  CHECK_THROWS(vf::PinnedPool(Options{0, kPage}), std::invalid_argument, "positive multiple");
  CHECK_THROWS(vf::PinnedPool(Options{100, 256}), std::invalid_argument, "positive multiple");
  vf::PinnedPool pool({4 * kPage, kPage});
  const vf::Slot slot = pool.allocate(3 * kPage);
  CHECK_THROWS((void)pool.allocate(2 * kPage), vf::BudgetError, "at least 20480 bytes");
  CHECK_THROWS((void)pool.allocate(SIZE_MAX), vf::BudgetError, "4096 of 16384 bytes free");
  CHECK_THROWS((void)pool.allocate(0), std::invalid_argument, "at least 1 byte");
  CHECK(pool.stats().used_bytes == 3 * kPage && pool.stats().num_allocations == 1);
  pool.free(slot);
  CHECK_THROWS(pool.free(slot), std::logic_error, "not in use");
  CHECK((pool.allocate(4 * kPage).bytes == 4 * kPage));
}

void touches_every_page_and_says_what_it_took() {
  for (const unsigned num_threads : {1U, 3U, 64U}) {
    const vf::PinnedPool pool({(std::size_t{5} << 20) + kPage, kPage, num_threads});
    const vf::PoolSetup setup = pool.setup();
    CHECK(setup.num_threads == num_threads && setup.seconds > 0);
    CHECK(setup.huge_bytes <= (std::size_t{5} << 20) + kPage);
    std::vector<unsigned char> resident((std::size_t{5} << 20) / kPage + 1);
    CHECK(::mincore(pool.slab(), resident.size() * kPage, resident.data()) == 0);
    for (const unsigned char page : resident) CHECK(page & 1);
  }
  CHECK_THROWS(vf::PinnedPool(Options{kPage, kPage, 0, kPage, 900}), std::system_error,
               "NUMA node 900");
}

// No slot crosses a chunk, and chunks are not merged when everything is free.
void slots_stay_within_a_chunk() {
  vf::PinnedPool pool({8 * kPage, kPage, 1, 4 * kPage});
  CHECK(pool.stats().num_free_ranges == 2);
  CHECK_THROWS((void)pool.allocate(5 * kPage), vf::BudgetError, "largest range 16384");
  const vf::Slot a = pool.allocate(3 * kPage), b = pool.allocate(3 * kPage);
  CHECK(a.offset / (4 * kPage) != b.offset / (4 * kPage));
  const vf::Slot c = pool.allocate(kPage), d = pool.allocate(kPage);
  for (const vf::Slot slot : {c, a, d, b}) pool.free(slot);
  CHECK(pool.stats().num_free_ranges == 2 && pool.stats().largest_free_bytes == 4 * kPage);
  CHECK_THROWS(vf::PinnedPool(Options{kPage, kPage, 1, 100}), std::invalid_argument, "chunk");
}

// Fills each slot with its own byte; an overlap overwrites somebody's.
void random_use_keeps_every_slot_whole(std::size_t alignment, unsigned seed) {
  struct Held {
    vf::Slot slot;
    std::size_t bytes;
    unsigned char mark;
  };
  vf::PinnedPool pool({1 << 20, alignment});
  std::mt19937 random(seed);
  std::vector<Held> held;
  std::size_t used = 0, num_refused = 0;
  for (int round = 0; round < 4000; ++round) {
    if (held.empty() || random() % 5 < 3) {
      const std::size_t bytes = 1 + random() % 40000;
      try {
        const vf::Slot slot = pool.allocate(bytes);
        CHECK(slot.offset % alignment == 0 && slot.bytes >= bytes &&
              slot.bytes < bytes + alignment);
        held.push_back({slot, bytes, static_cast<unsigned char>(random())});
        std::memset(pool.address(slot), held.back().mark, bytes);
        used += slot.bytes;
      } catch (const vf::BudgetError&) {
        ++num_refused;
        CHECK(pool.stats().largest_free_bytes < (bytes + alignment - 1) / alignment * alignment);
      }
    } else {
      std::swap(held[random() % held.size()], held.back());
      const Held last = held.back();
      held.pop_back();
      const auto* content = static_cast<const unsigned char*>(pool.address(last.slot));
      for (std::size_t i = 0; i < last.bytes; ++i) CHECK(content[i] == last.mark);
      used -= last.slot.bytes;
      pool.free(last.slot);
    }
    CHECK(pool.stats().used_bytes == used && pool.stats().num_slots == held.size());
  }
  CHECK(num_refused > 0);  // the run did reach the budget
  for (const Held& rest : held) pool.free(rest.slot);
  CHECK(pool.stats().num_free_ranges == 1 && pool.stats().largest_free_bytes == 1 << 20);
}

}  // namespace

int main() {
  touches_every_page_and_says_what_it_took();
  slots_stay_within_a_chunk();
  rounds_up_and_counts();
  takes_the_smallest_range_that_fits();
  merges_on_both_sides();
  refuses();
  for (unsigned seed = 0; seed < 4; ++seed) {
    random_use_keeps_every_slot_whole(256, seed);
    random_use_keeps_every_slot_whole(4096, seed);
  }
}
