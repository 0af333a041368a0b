// Copier: moves bytes asynchronously, one queue a direction, each in the order given.
//
// The two directions are independent because the hardware's are: a link carries both at full speed.
// A Mark names a point in one queue, so waiting for a copy also waits for everything queued before
// it in that direction. A Stream is the caller's own queue of device work: a copy starts after what
// the caller has put there, and `wait` holds back what the caller puts there next. On a host the
// caller's work is done when it returns, so the stream says nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace vf {

enum class Direction { kOffload = 0, kPrefetch = 1 };

using Stream = std::uintptr_t;  // a cudaStream_t as an integer; 0 is the default stream

// The end of one copy: `sequence` counts from 1 in its direction.
struct Mark {
  Direction direction;
  std::uint64_t sequence;
};

// `num_rows` rows of `row_bytes`, whose starts lie `pitch` bytes apart on each side. One row is a
// flat copy.
struct Copy {
  void* target;
  const void* source;
  std::size_t row_bytes;
  std::size_t num_rows = 1;
  std::size_t target_pitch = 0;
  std::size_t source_pitch = 0;

  [[nodiscard]] std::size_t bytes() const { return row_bytes * num_rows; }
};

// Of one direction since the start. `busy_s` covers finished copies.
struct CopyStats {
  std::uint64_t num_copies = 0;
  std::uint64_t bytes = 0;
  double busy_s = 0;
};

// Every method may be called from any thread.
class Copier {
 public:
  Copier() = default;
  virtual ~Copier() = default;  // finishes what is queued
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  // Called once, before the first copy, with the slab that all copies begin or end in.
  virtual void attach(void* slab, std::size_t bytes, std::size_t chunk_bytes) = 0;

  // Queues a copy and returns at once; both ranges must stay valid until the Mark is reached. The
  // copy begins only after what `stream` holds now and after `after`, a Mark returned earlier.
  // Throws std::bad_alloc.
  virtual Mark start(Direction direction, const Copy& copy, std::optional<Mark> after,
                     Stream stream) = 0;

  // What the caller puts into `stream` from here on runs after the copy is done. The host copier
  // blocks.
  virtual void wait(Mark mark, Stream stream) = 0;

  // Blocks the calling thread until the copy is done.
  virtual void finish(Mark mark) = 0;

  [[nodiscard]] virtual bool done(Mark mark) const = 0;

  [[nodiscard]] virtual CopyStats stats(Direction direction) const = 0;

  // The stream of a direction's copies, 0 on a host: tests put a slow kernel into it.
  [[nodiscard]] virtual Stream stream(Direction direction) const = 0;
};

}  // namespace vf
