// FaultyCopier: a HostCopier with one of its guards removed, so that tests can show what the guard
// is for.
//
// Only tests make one. A test of a race runs twice: with the real copier it passes, with the guard
// removed its assertion must fail; otherwise it tests nothing.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <utility>

#include "copier_host.h"

namespace vf {

class FaultyCopier final : public Copier {
 public:
  // clang-format off
  //   "after"   a copy does not wait for the one it follows (a prefetch reads before its offload wrote)
  //   "wait"    wait returns at once (bytes are used, or overwritten, before they arrived)
  //   "done"    every copy counts as done (a slot is given to the next while it is still read)
  // clang-format on
  // Throws std::invalid_argument for another name.
  FaultyCopier(std::string without, std::function<void(Direction)> before_copy)
      : without_(std::move(without)), inner_(std::move(before_copy)) {
    if (without_ != "after" && without_ != "wait" && without_ != "done") {
      throw std::invalid_argument("expected the guard after, wait or done, got '" + without_ +
                                  "'; name one of them.");
    }
  }

  void attach(void* slab, std::size_t bytes, std::size_t chunk_bytes) override {
    inner_.attach(slab, bytes, chunk_bytes);
  }
  Mark start(Direction direction, const Copy& copy, std::optional<Mark> after,
             Stream stream) override {
    return inner_.start(direction, copy, without_ == "after" ? std::nullopt : after, stream);
  }
  void wait(Mark mark, Stream stream) override {
    if (without_ != "wait") inner_.wait(mark, stream);
  }
  void finish(Mark mark) override { inner_.finish(mark); }
  [[nodiscard]] bool done(Mark mark) const override {
    return without_ == "done" || inner_.done(mark);
  }
  [[nodiscard]] CopyStats stats(Direction direction) const override {
    return inner_.stats(direction);
  }
  [[nodiscard]] Stream stream(Direction direction) const override {
    return inner_.stream(direction);
  }

 private:
  const std::string without_;
  HostCopier inner_;
};

}  // namespace vf
