"""Arithmetic of intervals: how long at least one of many runs, how much of one set lies beside another.

A set is a pair of float64 arrays (start, end), [N] each, in any order, overlapping or not; `merge` makes it the sorted,
disjoint set that the others take. An interval is half open, [start, end): touching ones merge, empty ones vanish. Pure
numpy, no loop over intervals; knows nothing of traces.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Intervals(NamedTuple):
    """Disjoint intervals in order: float64 [N] each."""

    start: np.ndarray
    end: np.ndarray

    @property
    def total(self) -> float:
        """The sum of their lengths."""
        return float((self.end - self.start).sum())


EMPTY = Intervals(np.empty(0), np.empty(0))


def merge(start: np.ndarray, end: np.ndarray) -> Intervals:
    """The union of intervals, disjoint and in order."""
    some = end > start
    start, end = start[some], end[some]
    if not len(start):
        return EMPTY
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(end[order])
    # A new one begins where a start lies beyond everything before it.
    first = np.concatenate([[True], start[1:] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return Intervals(start[first], reach[last])


def union(*sets: Intervals) -> Intervals:
    """What lies in at least one."""
    return merge(np.concatenate([one.start for one in sets]), np.concatenate([one.end for one in sets]))


def intersect(a: Intervals, b: Intervals) -> Intervals:
    """What lies in both."""
    if not len(a.start) or not len(b.start):
        return EMPTY
    # Each of a meets a run of b: the first that ends after it starts, up to the last that starts before it ends.
    low, high = np.searchsorted(b.end, a.start, side="right"), np.searchsorted(b.start, a.end, side="left")
    count = np.maximum(high - low, 0)
    of_a = np.repeat(np.arange(len(a.start)), count)
    of_b = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + low[of_a]
    return merge(np.maximum(a.start[of_a], b.start[of_b]), np.minimum(a.end[of_a], b.end[of_b]))


def complement(a: Intervals, start: float, end: float) -> Intervals:
    """What of [start, end) lies in none."""
    inside = clip(a, start, end)
    return merge(np.concatenate([[start], inside.end]), np.concatenate([inside.start, [end]]))


def subtract(a: Intervals, b: Intervals) -> Intervals:
    """What lies in a and not in b."""
    if not len(a.start):
        return EMPTY
    return intersect(a, complement(b, float(a.start[0]), float(a.end[-1])))


def clip(a: Intervals, start: float, end: float) -> Intervals:
    """What lies in [start, end)."""
    return merge(np.maximum(a.start, start), np.minimum(a.end, end))


def overlap(a: Intervals, b: Intervals) -> float | None:
    """The share of a that lies in b, 0 to 1; None for an empty a."""
    return intersect(a, b).total / a.total if len(a.start) else None


def covered(a: Intervals, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How much of each interval [start, end) lies in a: float64 [N]."""
    if not len(a.start):
        return np.zeros(len(start))
    before = np.concatenate([[0.0], np.cumsum(a.end - a.start)])  # length of a before its k-th interval

    def up_to(at: np.ndarray) -> np.ndarray:
        k = np.searchsorted(a.start, at, side="right")
        inside = np.minimum(at, a.end[np.maximum(k - 1, 0)]) - a.start[np.maximum(k - 1, 0)]
        return before[np.maximum(k - 1, 0)] + np.where(k > 0, inside, 0.0)

    length: np.ndarray = up_to(end) - up_to(start)
    return length
