"""How good predictions are, from pairs of predicted and measured: errors, ranking, regret, held against the planner's goals.

    Score.of(pairs)      mean and largest errors, Kendall's tau of the policies of each shape, regret of what would be chosen
    rows(score, after)   the goals as a table: pass, fall short, or not judged and why

Figures only: what is measured, and in which order, is planner.py's. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean

from vchitect_fast.autotune.calibrate import Calibration
from vchitect_fast.autotune.ledger import Pair
from vchitect_fast.benchmarks.goals import PASS, SHORT
from vchitect_fast.errors import UserError


@dataclass(frozen=True)
class Score:
    """Errors are relative: predicted / measured - 1."""

    num_points: int
    num_shapes: int
    step_mean: float  # of |error|
    step_max: float
    peak_mean: float
    peak_max: float
    peak_under: float  # by how much the worst prediction was too low; 0.0 where none was
    tau: float  # mean over the shapes
    tau_least: float
    regret: float  # the largest over shapes and budgets

    @classmethod
    def of(cls, pairs: Sequence[Pair], calibration: Calibration | None = None) -> Score:
        """Of predictions as they were written, or as the calibration would have made them. UserError without pairs.

        Several measurements of one point each count as a point of their own.
        """
        if not pairs:
            raise UserError("expected at least one measured point to score, got none; measure some first.")
        points = [_point(pair, calibration) for pair in pairs]
        by_shape = [[p for p in points if p.shape == shape] for shape in dict.fromkeys(p.shape for p in points)]
        steps = [p.predicted_s / p.measured_s - 1 for p in points]
        peaks = [p.predicted_gib / p.measured_gib - 1 for p in points]
        taus = [
            kendall_tau([p.predicted_s for p in shape], [p.measured_s for p in shape])
            for shape in by_shape
            if len(shape) > 1
        ]
        return cls(
            num_points=len(points),
            num_shapes=len(by_shape),
            step_mean=fmean(map(abs, steps)),
            step_max=max(map(abs, steps)),
            peak_mean=fmean(map(abs, peaks)),
            peak_max=max(map(abs, peaks)),
            peak_under=max(0.0, -min(peaks)),
            tau=fmean(taus) if taus else 1.0,
            tau_least=min(taus, default=1.0),
            regret=max(regret(shape) for shape in by_shape),
        )


@dataclass(frozen=True)
class Point:
    """One policy of one shape."""

    shape: str
    predicted_s: float
    measured_s: float
    predicted_gib: float
    measured_gib: float


@dataclass(frozen=True)
class Row:
    """One goal: `found` against `limit`, in the unit; at_least says which side is good."""

    goal: str
    limit: float
    unit: str
    found: float | None
    at_least: bool = False
    why_not: str = ""  # it is not judged

    @property
    def verdict(self) -> str:
        """In words."""
        if self.found is None:
            return "not measured: one point leaves none to test it on"
        if self.why_not:
            return f"not judged: {self.why_not}"
        return PASS if (self.found >= self.limit if self.at_least else self.found <= self.limit) else SHORT


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """(pairs in the same order - pairs in opposite orders) / pairs; equal ones count as neither. 1.0 of fewer than two."""
    assert len(one) == len(other)
    places = list(combinations(range(len(one)), 2))
    agree = sum(_sign(one[i] - one[j]) * _sign(other[i] - other[j]) for i, j in places)
    return agree / len(places) if places else 1.0


def regret(points: Sequence[Point]) -> float:
    """How much slower than the best the choice by prediction is, at the worst memory budget, of points of one shape.

    Budgets are the predicted peaks: under each, what is predicted to fit is compared, the fastest by prediction against the
    fastest by measurement.
    """
    worst = 0.0
    for budget in {point.predicted_gib for point in points}:
        fitting = [point for point in points if point.predicted_gib <= budget]
        chosen = min(fitting, key=lambda point: point.predicted_s)
        worst = max(worst, chosen.measured_s / min(point.measured_s for point in fitting) - 1)
    return worst


def rows(score: Score, after: Score | None, why_not: str = "") -> list[Row]:
    """The goals of the planner that these scores answer.

    after    of the points that a calibration by one other has not seen; None without one
    why_not  why a device is not the one that the goals were set for; its ranking is still held against the goal of a CPU
    """
    found = [
        Row("points measured", 20, "", score.num_points, at_least=True),
        Row("step time, mean error", 4.0, "%", 100 * score.step_mean),
        Row("step time, largest error", 9.0, "%", 100 * score.step_max),
        Row("peak memory, mean error", 3.0, "%", 100 * score.peak_mean),
        Row("peak memory, largest error", 8.0, "%", 100 * score.peak_max),
        Row("peak memory, predicted too low by at most", 3.0, "%", 100 * score.peak_under),
        Row(
            "peak memory, mean error after one calibration step",
            0.5,
            "%",
            None if after is None else 100 * after.peak_mean,
        ),
        Row("regret of the chosen policy", 3.0, "%", 100 * score.regret),
    ]
    tau = Row(
        "ranking of policies, Kendall's tau, mean over shapes", 0.8 if why_not else 0.9, "", score.tau, at_least=True
    )
    return [*(replace(row, why_not=why_not) for row in found), tau]


def _point(pair: Pair, calibration: Calibration | None) -> Point:
    expected, measured = pair.expected, pair.found.measured
    step_s = expected.predicted.step_s if calibration is None else calibration.step_s(expected)
    peak_gib = expected.predicted.peak_gib if calibration is None else calibration.peak_gib(expected)
    return Point(expected.shape, step_s, measured["step_s"], peak_gib, measured["peak_gib"])


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
