"""Fits a latency and a rate to timed messages: t = alpha + bytes / rate, and the rate of every size beside it.

Least squares of relative errors, so that small messages count as much as large ones. Noise is held within what can be: a
longer message takes as long as a shorter one at least; a latency is not negative and below the quickest message.
Arithmetic only, no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BELOW = 0.999  # of the quickest message: the most that latency may be, so that every size has a rate


@dataclass(frozen=True)
class Fit:
    """What a Link is made of."""

    latency_s: float
    bytes_per_s: float  # of the largest message
    points: tuple[
        tuple[int, float], ...
    ]  # (bytes, bytes/s), latency taken off: with them every message comes out as timed
    residual: float  # mean relative error of the two numbers alone, without the points


def fit(messages: Sequence[tuple[float, float]]) -> Fit:
    """Of (bytes, seconds), all positive; sizes may repeat, the median of each counts. One size alone has no latency."""
    assert messages and all(size > 0 and seconds > 0 for size, seconds in messages)
    sizes = sorted({size for size, _ in messages})
    medians = [statistics.median(seconds for other, seconds in messages if other == size) for size in sizes]
    timed = list(zip(sizes, _never_falling(medians), strict=True))
    alpha = min(max(0.0, _latency(timed)), BELOW * min(seconds for _, seconds in timed)) if len(timed) > 1 else 0.0
    slope = _slope(timed, alpha)
    residual = statistics.mean(abs(alpha + slope * size - seconds) / seconds for size, seconds in timed)
    points = tuple((round(size), size / (seconds - alpha)) for size, seconds in timed)
    return Fit(alpha, points[-1][1], points, residual)


def _never_falling(times: Sequence[float]) -> list[float]:
    """Neighbours that fall become their geometric mean, until none does (isotonic regression, pool adjacent violators)."""
    runs: list[tuple[float, int]] = []  # (sum of logarithms, how many)
    for seconds in times:
        run = (math.log(seconds), 1)
        while runs and runs[-1][0] / runs[-1][1] > run[0] / run[1]:
            before = runs.pop()
            run = (before[0] + run[0], before[1] + run[1])
        runs.append(run)
    return [math.exp(total / number) for total, number in runs for _ in range(number)]


def _latency(timed: Sequence[tuple[float, float]]) -> float:
    """The alpha of least sum((alpha + beta size) / seconds - 1)^2."""
    x, y = [1 / seconds for _, seconds in timed], [size / seconds for size, seconds in timed]
    xx, xy, yy = sum(a * a for a in x), sum(a * b for a, b in zip(x, y, strict=True)), sum(b * b for b in y)
    return (sum(x) * yy - sum(y) * xy) / (xx * yy - xy * xy)


def _slope(timed: Sequence[tuple[float, float]], alpha: float) -> float:
    """The best beta for a given alpha; positive, since alpha is below every time."""
    rest = [(size / seconds, 1 - alpha / seconds) for size, seconds in timed]
    return sum(b * r for b, r in rest) / sum(b * b for b, _ in rest)
