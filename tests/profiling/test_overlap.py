"""Interval arithmetic against an oracle that counts unit cells, on random sets; and the cases at the edges by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vchitect_fast.profiling.overlap import (
    EMPTY,
    Intervals,
    clip,
    complement,
    covered,
    intersect,
    merge,
    overlap,
    subtract,
    union,
)

CELLS = 60  # intervals have whole ends from 0 to CELLS: a set is the set of unit cells that it covers


def random_set(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    num = int(rng.integers(0, 9))
    start = rng.integers(0, CELLS, num)
    return start.astype(float), (start + rng.integers(0, 12, num)).clip(max=CELLS).astype(float)


def cells(start: np.ndarray, end: np.ndarray) -> set[int]:
    """The oracle's view: one loop, no cleverness."""
    return {cell for a, b in zip(start, end, strict=True) for cell in range(int(a), int(b))}


def check(found: Intervals, expected: set[int]) -> None:
    assert cells(*found) == expected
    assert found.total == len(expected)
    assert (found.end > found.start).all() and (
        found.start[1:] > found.end[:-1]
    ).all()  # disjoint, in order, not touching


@pytest.mark.parametrize("seed", range(20))
def test_every_operation_agrees_with_counting_cells(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        raw_a, raw_b = random_set(rng), random_set(rng)
        a, b, in_a, in_b = merge(*raw_a), merge(*raw_b), cells(*raw_a), cells(*raw_b)
        low, high = sorted(rng.integers(0, CELLS, 2).tolist())
        window = set(range(low, high))
        check(a, in_a)
        check(union(a, b), in_a | in_b)
        check(intersect(a, b), in_a & in_b)
        check(subtract(a, b), in_a - in_b)
        check(clip(a, low, high), in_a & window)
        check(complement(a, low, high), window - in_a)
        assert overlap(a, b) == (len(in_a & in_b) / len(in_a) if in_a else None)
        parts = [len(cells(raw_b[0][k : k + 1], raw_b[1][k : k + 1]) & in_a) for k in range(len(raw_b[0]))]
        assert covered(a, *raw_b).tolist() == parts


def test_the_edges() -> None:
    touching = merge(np.array([0.0, 5.0]), np.array([5.0, 9.0]))
    assert (touching.start.tolist(), touching.end.tolist()) == ([0], [9])
    inside = merge(np.array([0.0, 2.0, 10.0]), np.array([9.0, 3.0, 11.0]))
    assert (inside.start.tolist(), inside.end.tolist()) == ([0, 10], [9, 11])
    assert merge(np.array([3.0, 4.0]), np.array([3.0, 2.0])).total == 0  # empty, and upside down
    assert union(EMPTY, EMPTY) == EMPTY and overlap(EMPTY, touching) is None and overlap(touching, EMPTY) == 0
