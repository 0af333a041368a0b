#include "copier_host.h"

#include <cstring>
#include <utility>

namespace vf {

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

Mark HostCopier::start(Direction direction, void* target, const void* source, std::size_t bytes,
                       std::optional<Mark> after) {
  Mark mark{direction, 0};
  {
    const std::lock_guard lock(mutex_);
    Queue& to = queue(direction);
    to.pending.push_back({target, source, bytes, after});
    mark.sequence = ++to.num_started;
  }
  changed_.notify_all();
  return mark;
}

void HostCopier::wait(Mark mark) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return reached(mark); });
}

bool HostCopier::done(Mark mark) const {
  const std::lock_guard lock(mutex_);
  return reached(mark);
}

bool HostCopier::reached(Mark mark) const {
  return queues_[static_cast<std::size_t>(mark.direction)].num_done >= mark.sequence;
}

void HostCopier::run(Direction direction) {
  Queue& own = queue(direction);
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return !own.pending.empty() || closing_; });
    if (own.pending.empty()) return;
    const Copy copy = own.pending.front();
    own.pending.pop_front();
    // No deadlock: `after` was queued earlier, and each queue is worked through in order.
    if (copy.after) changed_.wait(lock, [&] { return reached(*copy.after); });
    lock.unlock();
    if (before_copy_) before_copy_(direction);
    std::memcpy(copy.target, copy.source, copy.bytes);
    lock.lock();
    ++own.num_done;
    changed_.notify_all();
  }
}

}  // namespace vf
