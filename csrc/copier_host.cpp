#include "copier_host.h"

#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <utility>

namespace vf {

namespace {

void copy_rows(const Copy& copy) {
  auto* target = static_cast<std::byte*>(copy.target);
  const auto* source = static_cast<const std::byte*>(copy.source);
  for (std::size_t row = 0; row < copy.num_rows; ++row) {
    std::memcpy(target, source, copy.row_bytes);
    target += copy.target_pitch;
    source += copy.source_pitch;
  }
}

}  // namespace

HostCopier::HostCopier(std::function<void(Direction)> before_copy)
    : before_copy_(std::move(before_copy)) {
  threads_[0] = std::thread([this] { run(Direction::kOffload); });
  try {
    threads_[1] = std::thread([this] { run(Direction::kPrefetch); });
  } catch (...) {  // the destructor does not run for a half-made object, and a joinable thread
                   // would terminate us
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    threads_[0].join();
    throw;
  }
}

HostCopier::~HostCopier() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void HostCopier::attach(void*, std::size_t, std::size_t) {}  // memcpy needs nothing of the slab

Mark HostCopier::start(Direction direction, const Copy& copy, std::optional<Mark> after, Stream) {
  Mark mark{direction, 0};
  {
    const std::lock_guard lock(mutex_);
    Queue& to = queue(direction);
    to.pending.push_back({copy, after});
    mark.sequence = ++to.num_started;
  }
  changed_.notify_all();
  return mark;
}

void HostCopier::wait(Mark mark, Stream) { finish(mark); }

void HostCopier::finish(Mark mark) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return reached(mark); });
}

bool HostCopier::done(Mark mark) const {
  const std::lock_guard lock(mutex_);
  return reached(mark);
}

CopyStats HostCopier::stats(Direction direction) const {
  const std::lock_guard lock(mutex_);
  return queues_[static_cast<std::size_t>(direction)].stats;
}

Stream HostCopier::stream(Direction) const { return 0; }

bool HostCopier::reached(Mark mark) const {
  return queues_[static_cast<std::size_t>(mark.direction)].num_done >= mark.sequence;
}

void HostCopier::run(Direction direction) {
  using Clock = std::chrono::steady_clock;
  Queue& own = queue(direction);
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return !own.pending.empty() || closing_; });
    if (own.pending.empty()) return;
    const Queued next = own.pending.front();
    own.pending.pop_front();
    // No deadlock: `after` was queued earlier, and each queue is worked through in order.
    if (next.after) changed_.wait(lock, [&] { return reached(*next.after); });
    lock.unlock();
    if (before_copy_) before_copy_(direction);
    const Clock::time_point begin = Clock::now();
    copy_rows(next.copy);
    const std::chrono::duration<double> seconds = Clock::now() - begin;
    lock.lock();
    ++own.num_done;
    ++own.stats.num_copies;
    own.stats.bytes += next.copy.bytes();
    own.stats.busy_s += seconds.count();
    changed_.notify_all();
  }
}

std::function<void(Direction)> random_delays(std::uint32_t max_us, std::uint32_t seed) {
  // One generator a direction: each is used by one copy thread only.
  const auto random = std::make_shared<std::array<std::mt19937, 2>>(
      std::array<std::mt19937, 2>{std::mt19937(seed), std::mt19937(seed + 1)});
  return [random, max_us](Direction direction) {
    const std::uint32_t us = (*random)[static_cast<std::size_t>(direction)]() % (max_us + 1);
    std::this_thread::sleep_for(std::chrono::microseconds(us));
  };
}

}  // namespace vf
