"""The fit of a latency and a rate: exact where the machine is exact, within what can be where it is noisy.

pytest tests/autotune/test_probe_fit.py; arithmetic only.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from vchitect_fast.autotune.probe.fit import fit
from vchitect_fast.cluster import Link

SIZES = [2.0**k for k in range(10, 30, 2)]


def test_an_exact_machine_comes_out() -> None:
    found = fit([(size, 30e-6 + size / 7e9) for size in SIZES])
    assert found.latency_s == pytest.approx(30e-6)
    assert found.bytes_per_s == pytest.approx(7e9)
    assert found.residual < 1e-9


def test_efficiency_that_depends_on_size_is_in_the_points() -> None:
    """Half the rate below a megabyte: two numbers cannot say it, the residual does, and the points give the times back."""
    times = [(size, 10e-6 + size / (5e9 if size < 2**20 else 10e9)) for size in SIZES]
    found = fit(times)
    assert found.residual > 0.03
    link = Link("disk", found.bytes_per_s, found.latency_s, "made up", points=found.points)
    for size, seconds in times:
        assert link.seconds(size) == pytest.approx(seconds)


def test_noise_stays_within_what_can_be() -> None:
    draw = random.Random(0)
    for _ in range(200):
        alpha, rate, noise = 10 ** draw.uniform(-7, -2), 10 ** draw.uniform(8, 12), draw.choice([0.1, 0.5, 3.0])
        found = fit([(size, (alpha + size / rate) * math.exp(draw.gauss(0, noise))) for size in SIZES])
        link = Link("disk", found.bytes_per_s, found.latency_s, "made up", points=found.points)
        assert found.latency_s >= 0 and all(rate > 0 for _, rate in found.points)
        times = [link.seconds(2.0**k) for k in range(5, 33)]
        assert all(after >= before * (1 - 1e-9) for before, after in pairwise(times))


def test_one_outlier_does_not_lift_what_is_longer() -> None:
    times = [(size, 30e-6 + size / 7e9) for size in SIZES]
    found = fit([(times[0][0], 100 * times[0][1]), *times[1:]])
    assert found.points[-1][1] == pytest.approx(7e9, rel=0.05)


def test_one_size_has_no_latency_and_repeats_count_by_their_median() -> None:
    found = fit([(1e6, 1e-3), (1e6, 2e-3), (1e6, 9.0)])
    assert found.latency_s == 0.0
    assert found.points == ((1000000, pytest.approx(5e8)),)
    assert found.bytes_per_s == pytest.approx(5e8)
    assert found.residual < 1e-12
