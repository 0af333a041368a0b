"""The innermost of nested ranges against an oracle that looks at every moment by itself, on random nestings and tangles."""

from __future__ import annotations

import numpy as np
import pytest

from vchitect_fast.profiling.nesting import Innermost, innermost


def oracle(start: np.ndarray, end: np.ndarray, at: float) -> int:
    """The last that began among those open; of equal starts the later in the list, which is the child."""
    is_open = [k for k in range(len(start)) if start[k] <= at < end[k]]
    return max(is_open, key=lambda k: (start[k], k), default=-1)


@pytest.mark.parametrize("seed", range(100))
def test_every_moment_has_the_owner_that_the_oracle_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num = int(rng.integers(0, 12))
    start = rng.integers(0, 30, num).astype(float)
    end = start + rng.integers(0, 15, num)  # tangles too: not only nested
    order = np.lexsort((-(end - start), start))
    start, end = start[order], end[order]
    found = innermost(start, end)
    moments = np.arange(-1, 50) + 0.0
    expected = [oracle(start, end, at) for at in moments]
    assert found.at(moments).tolist() == expected
    for cuts in (np.empty(0), rng.integers(0, 40, 5) + 0.5):
        check_stretches(found.cut(cuts), num, expected, cuts)


def check_stretches(found: Innermost, num: int, expected: list[int], cuts: np.ndarray) -> None:
    a, b, owner = found.stretches()
    assert not any(low < cut < high for low, high in zip(a, b, strict=True) for cut in cuts)
    time_of = np.bincount(owner, weights=b - a, minlength=num) if len(owner) else np.zeros(num)
    assert time_of.tolist() == [expected.count(k) for k in range(num)]


def test_self_time_of_a_parent_excludes_its_children() -> None:
    start, end, owner = innermost(np.array([0.0, 2.0, 3.0]), np.array([10.0, 6.0, 4.0])).stretches()
    assert list(zip(start.tolist(), end.tolist(), owner.tolist(), strict=True)) == [
        (0, 2, 0), (2, 3, 1), (3, 4, 2), (4, 6, 1), (6, 10, 0),
    ]  # fmt: skip
