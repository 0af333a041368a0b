"""A rough prediction of a Choice in a tenth of a millisecond, to rank hundreds of them; what it ranks first StepModel predicts.

A block is one piece of compute forward and one backward, as long as the prediction of keeping everything shows them, waits
for other ranks included; copies run in two streams beside them at one rate, which a prediction with copies shows. Memory is that
of the same prediction, less what is not kept, plus what has not left yet or is back already. What runs together does not slow
down. `error_bytes` is how much more memory a prediction had than the sketch: it is added from then on.

The rules of fetching are those of tasks.py. Letters: b block, L their number. Refuses nothing. Layer 0 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vchitect_fast.autotune.memory import GIB
from vchitect_fast.autotune.ways import Way

if TYPE_CHECKING:
    from vchitect_fast.autotune.model import Outcome


@dataclass(frozen=True)
class Limit:
    """Bytes a rank may have at its fullest moment, and from where on memory pressure costs how much."""

    peak_bytes: float
    pressed_bytes: float
    pressure_s_per_gib: float  # of a microbatch


class Sketch:
    """Of one Layout."""

    def __init__(self, keep: Outcome, limit: Limit, whole_bytes: Sequence[int]) -> None:
        self.limit, self.whole_bytes, self.times = limit, whole_bytes, keep.layout.accumulation
        self.whole_sum = sum(whole_bytes)
        self.error_bytes = 0.0
        self.out_s = self.in_s = 0.0  # of a byte; see `learn`
        self.forward_s, self.between_s, self.backward_s = _spans(keep, len(whole_bytes))
        self.ahead_bytes, self.behind_bytes = _peaks(keep, len(whole_bytes))
        self.outside_s = keep.cost.step_s - keep.cost.parts()["pressure_s"] - self.times * keep.timeline.total_s

    def learn_rates(self, outcome: Outcome) -> None:
        """Seconds of a copied byte, from a prediction that has copies."""
        moved = sum(way.moved_bytes for way in outcome.ways)
        if moved:
            self.out_s = outcome.timeline.busy_s("out") / moved
            self.in_s = outcome.timeline.busy_s("in") / moved

    def learn_bytes(self, outcome: Outcome) -> None:
        """What the memory of a prediction was beyond the sketch of the same."""
        _, peak = self.of(outcome.ways, outcome.layout.prefetch_depth)
        self.error_bytes += max(0.0, outcome.memory.peak_bytes - peak)

    def cost(self, ways: Sequence[Way], depth: int) -> tuple[float, float]:
        """(bytes above the limit, seconds of a step with what memory pressure costs)."""
        seconds, peak = self.of(ways, depth)
        pressed = max(0.0, peak - self.limit.pressed_bytes) / GIB * self.limit.pressure_s_per_gib * self.times
        return max(0.0, peak - self.limit.peak_bytes), seconds + pressed

    def of(self, ways: Sequence[Way], depth: int) -> tuple[float, float]:
        """Seconds of a step without memory pressure, and its peak in bytes; one Way a block."""
        layers = len(ways)
        now = free = 0.0
        left = [0.0] * layers  # when a block's bytes have left
        moving = []
        kept = self.whole_sum
        for b, way in enumerate(ways):
            now += self.forward_s[b]
            kept -= way.kept_bytes
            if moved := way.moved_bytes:
                free = left[b] = (free if free > now else now) + moved * self.out_s
                moving.append(b)
        moving.reverse()
        peak = self.ahead_bytes - kept
        if free > now:
            peak += sum([ways[b].moved_bytes for b in moving if left[b] > now])
        now += self.between_s
        place, asked = 0, min(depth, len(moving))  # of `moving`: how many backward has come to, and has asked for
        free, back, ready = 0.0, [0.0] * layers, [0.0] * layers
        for other in moving[:asked]:  # when backward reaches the last block
            back[other] = max(free, now, left[other])
            free = ready[other] = back[other] + ways[other].moved_bytes * self.in_s
        for b in range(layers - 1, -1, -1):
            way = ways[b]
            if way.moved_bytes:
                place += 1
                for other in moving[asked : place + depth]:
                    back[other] = max(free, now, left[other])
                    free = ready[other] = back[other] + ways[other].moved_bytes * self.in_s
                asked = max(asked, place + depth)
            begin = ready[b] if ready[b] > now else now
            now = begin + way.again_s + self.backward_s[b]
            kept -= self.whole_bytes[b] - way.kept_bytes
            here = self.behind_bytes[b] - kept
            for position in range(place, len(moving)):
                other = moving[position]
                if left[other] > begin or (position < asked and back[other] <= now):
                    here += ways[other].moved_bytes
            if here > peak:
                peak = here
        return self.outside_s + self.times * now, peak + self.error_bytes


def _spans(keep: Outcome, layers: int) -> tuple[list[float], float, list[float]]:
    """Seconds from the start of each block's compute to that of the next one: forward, between the two, backward."""
    halves = [[-1.0] * layers, [-1.0] * layers]
    for task in keep.timeline.tasks:
        if task.stream != "compute" or task.block is None:
            continue
        half = halves[task.name == "backward"]
        if half[task.block] < 0:
            half[task.block] = task.start_s
    ends = [task for task in keep.timeline.tasks if task.stream == "compute" and task.block is None]
    middle = ends[0].start_s if ends else halves[1][-1]
    starts = [[*halves[0], middle], [keep.timeline.total_s, *halves[1]]]
    forward = [starts[0][b + 1] - starts[0][b] for b in range(layers)]
    backward = [starts[1][b] - starts[1][b + 1] for b in range(layers)]
    return forward, halves[1][-1] - middle, backward


def _peaks(keep: Outcome, layers: int) -> tuple[float, list[float]]:
    """At the end of forward, and the most in each block's backward, when everything is kept; in the order of memory.moments."""
    first, *others = (float(num_bytes) for _, num_bytes in keep.timeline.memory)
    behind = [0.0] * layers
    for number, num_bytes in enumerate(others):  # two moments of the last block, three of each other one
        block = max(0, layers - 1 - (number + 1) // 3)
        behind[block] = max(behind[block], num_bytes)
    return first, behind
