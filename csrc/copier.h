// Copier: moves bytes asynchronously, one queue a direction, each in the order given.
//
// The two directions are independent because the hardware's are: a link carries both at full speed.
// A Mark names a point in one queue, so waiting for a copy also waits for everything queued before
// it in that direction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace vf {

enum class Direction { kOffload = 0, kPrefetch = 1 };

// The end of one copy: `sequence` counts from 1 in its direction.
struct Mark {
  Direction direction;
  std::uint64_t sequence;
};

// Every method may be called from any thread.
class Copier {
 public:
  Copier() = default;
  virtual ~Copier() = default;  // finishes what is queued
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  // Queues a copy and returns at once; both ranges must stay valid until the Mark is reached. The
  // copy begins only after `after`, a Mark returned earlier. Throws std::bad_alloc.
  virtual Mark start(Direction direction, void* target, const void* source, std::size_t bytes,
                     std::optional<Mark> after) = 0;

  // Blocks until the copy is done.
  virtual void wait(Mark mark) = 0;

  [[nodiscard]] virtual bool done(Mark mark) const = 0;
};

}  // namespace vf
