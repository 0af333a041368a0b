// CudaCopier: the Copier of an NVIDIA GPU, one stream a direction and an event pair a copy.
//
// NEVER RUN: written and compiled on a machine without a GPU. It compiles with nvcc 13.0; nothing
// in it has been executed or measured. It is built only with VF_CUDA=ON, which is off by default.
//
// Both streams are non-blocking, so the default stream of the caller does not serialize them. A
// copy waits for an event recorded in the caller's stream at the moment of the call. Memory that
// the caller frees belongs to the caller's stream: no allocator is told of these streams, the
// caller calls `wait` before it drops a range.
#pragma once

#include <array>
#include <deque>
#include <mutex>
#include <vector>

#include "copier.h"

namespace vf {

class CudaCopier final : public Copier {
 public:
  // On the device that is current now. Throws std::runtime_error when CUDA refuses.
  CudaCopier();
  ~CudaCopier() override;

  // Page-locks the slab, a chunk at a time. Throws std::runtime_error when the driver refuses.
  void attach(void* slab, std::size_t bytes, std::size_t chunk_bytes) override;
  Mark start(Direction direction, const Copy& copy, std::optional<Mark> after,
             Stream stream) override;
  void wait(Mark mark, Stream stream) override;
  void finish(Mark mark) override;
  [[nodiscard]] bool done(Mark mark) const override;
  [[nodiscard]] CopyStats stats(Direction direction) const override;
  [[nodiscard]] Stream stream(Direction direction) const override;

 private:
  // Handles are void* here so that this header needs no CUDA header.
  struct Flight {
    void* begin;  // events around one copy
    void* end;
    std::size_t bytes;
  };
  struct Queue {
    void* stream = nullptr;
    void* ready = nullptr;       // event: what the caller's stream held when a copy was queued
    std::deque<Flight> flights;  // sequences num_done + 1 ... num_started
    std::uint64_t num_started = 0;
    std::uint64_t num_done = 0;
    CopyStats stats;
  };

  [[nodiscard]] Queue& queue(Direction direction) const {
    return queues_[static_cast<std::size_t>(direction)];
  }
  void reap(Queue& of) const;                      // these three with mutex_ held
  [[nodiscard]] void* end_event(Mark mark) const;  // null when the copy is done
  [[nodiscard]] void* take_event() const;
  void destroy() noexcept;

  int device_ = 0;
  mutable std::mutex mutex_;  // guards what follows
  mutable std::array<Queue, 2> queues_;
  mutable std::vector<void*> spare_events_;
  std::vector<void*> registered_;
};

}  // namespace vf
