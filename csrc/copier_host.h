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

  void attach(void* slab, std::size_t bytes, std::size_t chunk_bytes) override;
  Mark start(Direction direction, const Copy& copy, std::optional<Mark> after,
             Stream stream) override;
  void wait(Mark mark, Stream stream) override;
  void finish(Mark mark) override;
  [[nodiscard]] bool done(Mark mark) const override;
  [[nodiscard]] CopyStats stats(Direction direction) const override;
  [[nodiscard]] Stream stream(Direction direction) const override;

 private:
  struct Queued {
    Copy copy;
    std::optional<Mark> after;
  };
  struct Queue {
    std::deque<Queued> pending;
    std::uint64_t num_started = 0;
    std::uint64_t num_done = 0;
    CopyStats stats;
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

// A `before_copy` that sleeps 0 to `max_us` microseconds, drawn from `seed`, one series a
// direction.
[[nodiscard]] std::function<void(Direction)> random_delays(std::uint32_t max_us,
                                                           std::uint32_t seed);

}  // namespace vf
