"""What no choice of a Layout can beat, from one prediction: the arithmetic by which policies.py looks at little and misses nothing.

    fits(outcome, limits) whether it is within them
    dominant(ways)        the Ways that no other beats in every respect
    lower_hull(points)    of (bytes spared, seconds), the corners of the convex lower hull
    Bounds                step seconds and peak bytes that an assignment at least has; `relaxed_s`, that every fitting one has

The least is the relaxation in which blocks may be divided: recomputation costs a, a copy back m seconds, a block that does so
spares s bytes, and d bytes must be spared. For every weight t in [0, 1] the step takes at least
    (1 - t) (compute + accumulation x sum a) + t (forward and optimizer + accumulation x sum m)
which under sum s >= d is a knapsack of divisible things: down the hull by the price of a byte (Dantzig 1957); the largest over
several t counts. Layer 0 only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from operator import le
from typing import TYPE_CHECKING

from vchitect_fast.autotune.cost import StepCost
from vchitect_fast.autotune.layout import Problem
from vchitect_fast.autotune.ways import Way
from vchitect_fast.cluster import Link
from vchitect_fast.plan import RECOMPUTE

if TYPE_CHECKING:
    from vchitect_fast.autotune.model import Limits, Outcome

WEIGHTS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 1.0)  # t: small ones count where the link is slow
Point = tuple[float, float]


def fits(outcome: Outcome, limits: Limits) -> bool:
    """On the device at every moment, and in host memory."""
    host = limits.host_bytes
    return outcome.memory.peak_bytes <= limits.device_bytes and (host is None or outcome.host_bytes <= host)


def dominant(ways: Sequence[Way]) -> list[Way]:
    """Without those that another equals or beats in time, bytes on the device, bytes moved and exchanges; in their order."""
    priced = sorted(((_prices(way), place) for place, way in enumerate(ways)))
    found: list[tuple[tuple[float, ...], int]] = []
    for prices, place in priced:  # only one that comes before may be as good in everything
        if not any(all(map(le, other, prices)) for other, _ in found):
            found.append((prices, place))
    return [ways[place] for place in sorted(place for _, place in found)]


def _prices(way: Way) -> tuple[float, ...]:
    policy = way.policy  # what an exchange brought is sent again where its group is recomputed
    sent = policy.qkv == RECOMPUTE, policy.branch_out == RECOMPUTE
    return (way.again_s, way.kept_bytes, way.moved_bytes, way.host_bytes, way.kept_bytes + way.working_bytes, *sent)


def lower_hull(points: Sequence[Point]) -> list[int]:
    """Places of the corners, by rising x from the point of least x: more is bought at the least y, at rising prices."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], points[i][1]))
    corners: list[int] = []
    for i in order:
        if corners and points[i][0] == points[corners[-1]][0]:
            continue
        while len(corners) > 1 and _slope(points, corners[-2], corners[-1]) >= _slope(points, corners[-1], i):
            corners.pop()
        corners.append(i)
    return corners


def _slope(points: Sequence[Point], a: int, b: int) -> float:
    return (points[b][1] - points[a][1]) / (points[b][0] - points[a][0])


@dataclass(frozen=True)
class Kind:
    """Blocks that are alike, and what each may do; the first Way keeps everything."""

    number: int
    ways: Sequence[Way]
    _known: dict[tuple[float, float], list[Point]] = field(default_factory=dict, compare=False)

    def spares(self, way: Way) -> int:
        """Bytes less between forward and backward than when everything is kept."""
        return self.ways[0].kept_bytes - way.kept_bytes

    def stretches(self, weight: float, in_s: float) -> list[Point]:
        """Of the hull of all these blocks: (weighed seconds a byte spared, bytes); in_s, of a byte copied back."""
        if (weight, in_s) not in self._known:
            points = [
                (float(self.spares(way)), (1 - weight) * way.again_s + weight * way.moved_bytes * in_s)
                for way in self.ways
            ]
            self._known[weight, in_s] = [
                (_slope(points, a, b), self.number * (points[b][0] - points[a][0]))
                for a, b in pairwise(lower_hull(points))
            ]
        return self._known[weight, in_s]


class Bounds:
    """Of one Layout, from what keeping everything takes: a step, and bytes at its fullest moment."""

    def __init__(
        self, cost: StepCost, peak_bytes: int, accumulation: int, kinds: Callable[[], Sequence[Kind]], problem: Problem,
        limit_bytes: int,
    ) -> None:  # fmt: skip
        parts = cost.parts()
        self.kinds, self.times = kinds, accumulation
        self.deficit_bytes = peak_bytes - limit_bytes
        self.ends_s = parts["forward_s"] + parts["optimizer_s"] + parts["encode_s"]
        self.compute_s = self.ends_s + parts["backward_s"]
        self.keep_s = cost.step_s - parts["pressure_s"]
        self.in_s, self._out_s = (_seconds_a_byte(problem, name) for name in ("host_to_device", "device_to_host"))

    def step_s(self, again_s: float, moved_bytes: float) -> float:
        """That a step at least takes, which makes so much again and moves so much, a microbatch."""
        copied = max(self.ends_s + self.times * moved_bytes * self.in_s, self.times * moved_bytes * self._out_s)
        return max(self.keep_s, self.compute_s + self.times * again_s, copied)

    @cached_property
    def relaxed_s(self) -> float:
        """That the compute and the copies of every fitting choice take; math.inf where none fits."""
        if self.deficit_bytes <= 0:
            return self.compute_s
        return max(self._relaxed(weight) for weight in WEIGHTS)

    def _relaxed(self, weight: float) -> float:
        stretches = [item for kind in self.kinds() for item in kind.stretches(weight, self.in_s)]
        seconds, left = 0.0, float(self.deficit_bytes)
        for slope, num_bytes in sorted(stretches):
            seconds += slope * min(left, num_bytes)
            left -= num_bytes
            if left <= 0:
                return (1 - weight) * self.compute_s + weight * self.ends_s + self.times * seconds
        return math.inf  # even the leanest blocks spare too little


def _seconds_a_byte(problem: Problem, name: str) -> float:
    """At the best rate that the link has for this run, in which all devices of a node copy at once; 0.0 without a link."""
    shared = min(problem.num_devices, problem.cluster.num_devices_per_node) > 1
    found = [link for link in problem.cluster.links if link.name == name]
    return min((_crowd(link, shared) / _best(link) for link in found), default=0.0)


def _crowd(link: Link, shared: bool) -> float:
    return link.bytes_per_s / link.together_bytes_per_s if shared and link.together_bytes_per_s else 1.0


def _best(link: Link) -> float:
    return max([link.bytes_per_s, *(rate for _, rate in link.points)])
