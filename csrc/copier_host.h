// HostCopier: the Copier of a machine without a GPU, memcpy on one thread a direction.
//
// It keeps the contract of a device copier (asynchronous, ordered, two directions at once), so
// everything above it is tested without a GPU. It does not survive fork(): the child has no copy
// threads.
#pragma once

#include <array>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "copier.h"

namespace vf {

class HostCopier final : public Copier {
 public:
  // `before_copy` runs on the copy thread ahead of each copy; tests delay copies with it. It must
  // not throw.
  explicit HostCopier(std::function<void(Direction)> before_copy = {});
  ~HostCopier() override;

  Mark start(Direction direction, void* target, const void* source, std::size_t bytes,
             std::optional<Mark> after) override;
  void wait(Mark mark) override;
  [[nodiscard]] bool done(Mark mark) const override;

 private:
  struct Copy {
    void* target;
    const void* source;
    std::size_t bytes;
    std::optional<Mark> after;
  };
  struct Queue {
    std::deque<Copy> pending;
    std::uint64_t num_started = 0;
    std::uint64_t num_done = 0;
  };

  void run(Direction direction);
  [[nodiscard]] Queue& queue(Direction direction) {
    return queues_[static_cast<std::size_t>(direction)];
  }
  [[nodiscard]] bool reached(Mark mark) const;

  const std::function<void(Direction)> before_copy_;
  mutable std::mutex mutex_;  // guards queues_ and closing_
  std::condition_variable changed_;
  std::array<Queue, 2> queues_;
  bool closing_ = false;
  std::array<std::thread, 2> threads_;  // last: they use everything above
};

}  // namespace vf
