// The law: a copier is asynchronous, each direction in order, the two independent, `after`
// respected, nothing dropped.
#include <array>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <vector>

#include "check.h"
#include "copier_faulty.h"
#include "copier_host.h"

namespace {

using vf::Direction;

// Holds the copy threads until opened, one door a direction.
class Gate {
 public:
  void pass(Direction direction) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return open_[static_cast<std::size_t>(direction)]; });
  }
  void open(Direction direction) {
    {
      const std::lock_guard lock(mutex_);
      open_[static_cast<std::size_t>(direction)] = true;
    }
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::array<bool, 2> open_{};
};

void starts_without_blocking_and_in_two_directions() {
  Gate gate;
  vf::HostCopier copier([&](Direction direction) { gate.pass(direction); });
  int a = 1, b = 2, to_a = 0, to_b = 0;
  const vf::Mark out = copier.start(Direction::kOffload, {&to_a, &a, sizeof a}, std::nullopt, 0);
  const vf::Mark in = copier.start(Direction::kPrefetch, {&to_b, &b, sizeof b}, std::nullopt, 0);
  CHECK(!copier.done(out) && !copier.done(in));
  gate.open(Direction::kPrefetch);  // one direction does not wait for the other
  copier.wait(in, 0);
  CHECK(to_b == 2 && !copier.done(out));
  gate.open(Direction::kOffload);
  copier.wait(out, 0);
  CHECK(to_a == 1);
}

void a_copy_waits_for_the_one_it_follows() {
  Gate gate;
  vf::HostCopier copier([&](Direction direction) { gate.pass(direction); });
  gate.open(Direction::kPrefetch);
  int source = 7, middle = 0, target = 0;
  const vf::Mark out =
      copier.start(Direction::kOffload, {&middle, &source, sizeof source}, std::nullopt, 0);
  const vf::Mark in = copier.start(Direction::kPrefetch, {&target, &middle, sizeof middle}, out, 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!copier.done(in));
  gate.open(Direction::kOffload);
  copier.wait(in, 0);
  CHECK(target == 7);
}

void copies_of_one_direction_keep_their_order() {
  vf::HostCopier copier;
  std::vector<int> values(1000);
  std::iota(values.begin(), values.end(), 0);
  int target = -1;
  vf::Mark last{};
  for (const int& value : values) {
    last = copier.start(Direction::kOffload, {&target, &value, sizeof value}, std::nullopt, 0);
  }
  copier.finish(last);
  CHECK(target == 999);
}

void the_destructor_finishes_what_is_queued() {
  std::vector<int> source(500, 3), target(500, 0);
  {
    vf::HostCopier copier;
    for (std::size_t i = 0; i < source.size(); ++i) {
      copier.start(i % 2 ? Direction::kOffload : Direction::kPrefetch,
                   {&target[i], &source[i], sizeof(int)}, std::nullopt, 0);
    }
  }
  CHECK(target == source);
}

void rows_are_packed_and_set_apart() {
  vf::HostCopier copier;
  const std::array<int, 6> source{1, 2, 0, 3, 4, 0};  // two rows of two, three apart
  std::array<int, 4> packed{};
  std::array<int, 6> apart{};
  const std::size_t row = 2 * sizeof(int), pitch = 3 * sizeof(int);
  const vf::Mark out = copier.start(
      Direction::kOffload, {packed.data(), source.data(), row, 2, row, pitch}, std::nullopt, 0);
  const vf::Mark in =
      copier.start(Direction::kPrefetch, {apart.data(), packed.data(), row, 2, pitch, row}, out, 0);
  copier.wait(in, 0);
  CHECK((packed == std::array<int, 4>{1, 2, 3, 4}) && apart == source);
}

void counts_by_direction() {
  vf::HostCopier copier(vf::random_delays(200, 7));
  int source = 1, target = 0;
  for (int i = 0; i < 3; ++i) {
    copier.finish(
        copier.start(Direction::kOffload, {&target, &source, sizeof source}, std::nullopt, 0));
  }
  const vf::CopyStats out = copier.stats(Direction::kOffload);
  CHECK(out.num_copies == 3 && out.bytes == 3 * sizeof(int) && out.busy_s >= 0);
  CHECK(copier.stats(Direction::kPrefetch).num_copies == 0);
}

// What the guard "after" is for: without it the prefetch reads before the offload wrote.
void without_its_guard_a_copy_overtakes() {
  Gate gate;
  vf::FaultyCopier copier("after", [&](Direction direction) { gate.pass(direction); });
  gate.open(Direction::kPrefetch);
  int source = 7, middle = 0, target = -1;
  const vf::Mark out =
      copier.start(Direction::kOffload, {&middle, &source, sizeof source}, std::nullopt, 0);
  const vf::Mark in = copier.start(Direction::kPrefetch, {&target, &middle, sizeof middle}, out, 0);
  copier.finish(in);
  CHECK(target == 0);  // stale: 7 had not arrived
  gate.open(Direction::kOffload);
  CHECK_THROWS(vf::FaultyCopier("luck", {}), std::invalid_argument, "after, wait or done");
}

}  // namespace

int main() {
  starts_without_blocking_and_in_two_directions();
  a_copy_waits_for_the_one_it_follows();
  copies_of_one_direction_keep_their_order();
  the_destructor_finishes_what_is_queued();
  rows_are_packed_and_set_apart();
  counts_by_direction();
  without_its_guard_a_copy_overtakes();
}
