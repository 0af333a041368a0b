// The law: bytes come back as they left, from any thread and under any delay, and no ticket or slot
// is lost or reused.
#include "engine.h"

#include <atomic>
#include <chrono>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "copier_host.h"

namespace {

constexpr std::size_t kMiB = 1 << 20;
using Bytes = std::vector<unsigned char>;

vf::Engine engine(std::size_t budget_bytes, std::function<void(vf::Direction)> before_copy = {}) {
  return vf::Engine(std::make_unique<vf::HostCopier>(std::move(before_copy)),
                    vf::PoolOptions{budget_bytes});
}

void random_delay(vf::Direction) {
  thread_local std::mt19937 random(std::random_device{}());
  std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
}

Bytes pattern(std::size_t bytes, unsigned seed) {
  std::mt19937 random(seed);
  Bytes content(bytes);
  for (auto& byte : content) byte = static_cast<unsigned char>(random());
  return content;
}

void brings_back_what_left() {
  vf::Engine mover = engine(kMiB, random_delay);
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{4095}, std::size_t{4097}, kMiB}) {
    const Bytes original = pattern(bytes, static_cast<unsigned>(bytes));
    Bytes source = original, first(bytes), second(bytes);
    const vf::Ticket ticket = mover.offload({source.data(), bytes});
    mover.wait(ticket);
    std::fill(source.begin(), source.end(), static_cast<unsigned char>(0));  // allowed after wait
    mover.prefetch(ticket, first.data());
    mover.prefetch(ticket, second.data());
    mover.wait(ticket);
    CHECK(first == original && second == original);
    mover.release(ticket);
  }
  CHECK(mover.stats().used_bytes == 0 && mover.stats().num_slots == 0);
}

void a_prefetch_right_behind_its_offload_is_whole() {
  vf::Engine mover = engine(kMiB, random_delay);
  const Bytes source = pattern(100000, 1);
  for (int round = 0; round < 50; ++round) {
    Bytes target(source.size());
    const vf::Ticket ticket = mover.offload({source.data(), source.size()});
    mover.prefetch(ticket, target.data());
    mover.wait(ticket);
    mover.release(ticket);
    CHECK(target == source);
  }
}

void refuses() {
  vf::Engine mover = engine(8192);
  Bytes content(8192);
  CHECK_THROWS((void)mover.offload({nullptr, 1}), std::invalid_argument, "null pointer");
  CHECK_THROWS((void)mover.offload({content.data(), 0}), std::invalid_argument, "at least 1 byte");
  const vf::Ticket ticket = mover.offload({content.data(), 8192});
  CHECK_THROWS((void)mover.offload({content.data(), 1}), vf::BudgetError, "at least 12288 bytes");
  CHECK_THROWS(mover.prefetch(ticket, nullptr), std::invalid_argument, "null pointer");
  CHECK_THROWS(mover.wait(ticket + 1), vf::TicketError, "never given out");
  mover.release(ticket);
  CHECK_THROWS(mover.release(ticket), vf::TicketError, "released already");
  CHECK_THROWS(mover.prefetch(ticket, content.data()), vf::TicketError, "released already");
  mover.settle();
  CHECK(mover.stats().num_slots == 0);
  CHECK_THROWS((void)mover.offload({content.data(), 16, 2, 8}), std::invalid_argument, "overlap");
}

// Rows 24 of 40 bytes leave packed and come back packed or set apart.
void rows_come_back() {
  vf::Engine mover = engine(kMiB, vf::random_delays(300, 1));
  const Bytes source = pattern(40 * 50, 5);
  Bytes packed(24 * 50), apart(40 * 50, 0);
  const vf::Ticket ticket = mover.offload({source.data(), 24, 50, 40});
  mover.prefetch(ticket, packed.data());
  mover.prefetch(ticket, apart.data(), 40);
  mover.wait(ticket);
  CHECK(mover.done(ticket));
  for (std::size_t i = 0; i < 24 * 50; ++i) {
    const std::size_t there = i / 24 * 40 + i % 24;
    CHECK(packed[i] == source[there] && apart[there] == source[there]);
  }
  CHECK(apart[24] == 0 && mover.stats().requested_bytes == 24 * 50);
  mover.release(ticket);
}

// A slot that is still read must not be given to the next: its offload waits for the reader.
void a_released_slot_is_not_overwritten_while_it_is_read() {
  vf::Engine mover = engine(4096, vf::random_delays(500, 2));  // room for one
  for (int round = 0; round < 100; ++round) {
    const Bytes first = pattern(4096, 2 * static_cast<unsigned>(round)),
                second = pattern(4096, 2 * static_cast<unsigned>(round) + 1);
    Bytes target(4096);
    const vf::Ticket reader = mover.offload({first.data(), 4096});
    mover.prefetch(reader, target.data());
    mover.release(reader);  // at once: the copies are in flight
    const vf::Ticket writer = mover.offload({second.data(), 4096});
    mover.wait(writer);
    CHECK(target == first);
    mover.release(writer);
  }
  mover.settle();
  CHECK(mover.stats().num_slots == 0);
}

void of_two_releases_at_once_one_wins() {
  vf::Engine mover = engine(kMiB, random_delay);
  const Bytes source = pattern(5000, 2);
  for (int round = 0; round < 100; ++round) {
    const vf::Ticket ticket = mover.offload({source.data(), source.size()});
    std::atomic<int> num_won{0};
    const auto release = [&] {
      try {
        mover.release(ticket);
        ++num_won;
      } catch (const vf::TicketError&) {
      }
    };
    std::thread other(release);
    release();
    other.join();
    CHECK(num_won == 1);
  }
  mover.settle();
  CHECK(mover.stats().num_slots == 0);
}

void many_threads_share_one_engine() {
  vf::Engine mover = engine(4 * kMiB, random_delay);
  std::vector<std::thread> threads;
  for (unsigned id = 0; id < 6; ++id) {
    threads.emplace_back([&mover, id] {
      std::mt19937 random(id);
      for (int round = 0; round < 60; ++round) {
        const Bytes source = pattern(1 + random() % 100000, random());
        Bytes target(source.size());
        const vf::Ticket ticket = mover.offload({source.data(), source.size()});
        if (random() % 2) mover.wait(ticket);
        mover.prefetch(ticket, target.data());
        mover.wait(ticket);
        mover.release(ticket);
        CHECK(target == source);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  const vf::PoolStats stats = mover.stats();
  CHECK(stats.used_bytes == 0 && stats.num_free_ranges == 1 && stats.num_allocations == 6 * 60);
}

void destruction_waits_for_copies_in_flight() {
  const Bytes source = pattern(100000, 3);
  Bytes target(source.size());
  {
    vf::Engine mover = engine(kMiB, random_delay);
    const vf::Ticket ticket = mover.offload({source.data(), source.size()});
    mover.prefetch(ticket, target.data());
  }
  CHECK(target == source);
}

}  // namespace

int main() {
  brings_back_what_left();
  a_prefetch_right_behind_its_offload_is_whole();
  refuses();
  of_two_releases_at_once_one_wins();
  many_threads_share_one_engine();
  destruction_waits_for_copies_in_flight();
  rows_come_back();
  a_released_slot_is_not_overwritten_while_it_is_read();
}
