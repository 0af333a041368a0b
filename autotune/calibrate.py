"""Calibration: what measured steps say about the formulas of one model on one device, so that other shapes come out nearer.

    calibration = calibrate(Ledger("plan.ledger.jsonl").pairs())        from `autotune verify`, one measured step is enough
    calibration.memory(step_memory, row_bytes), .forward, .backward, .optimizer      taken by StepModel
    Calibration.of(plan)                                                 the one that a Plan's predictions were made with

Memory has two unknowns, both of which one measured step answers:
    extra_bytes   what is there between steps and no formula counts: libraries' workspaces, what the process has loaded.
                  standing bytes measured between two steps - (process + states). It does not grow with the work.
    extra_rows    temporaries inside one block, and holes in the heap, that the formulas do not list: so many [rows, D].
                  (measured peak - standing - predicted rest) / bytes of one [rows, D]. It grows with rows, not with the
                  Policy or the number of blocks, because only one block at a time is in its forward or backward.
A run's log has no standing bytes. From one such peak only the constant is taken (one equation, one unknown, and the constant
promises nothing for larger shapes); from peaks whose rows differ by a factor of two, the line through them.
Time has one factor for each of forward, backward (with what is made again) and optimizer: the median of measured / predicted.
Refused: another model, device or dtype; predictions that were calibrated already. Layer 0 only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from vchitect_fast.autotune.ledger import Expectation, Pair
from vchitect_fast.autotune.memory import GIB, StepMemory
from vchitect_fast.errors import UserError
from vchitect_fast.plan import Plan

STANDING = ("process", "states")  # parts of a predicted peak that are there between steps
RECOMPUTED = ("backward_s", "recompute_s")  # the log's backward_s holds both
PLAIN = ("forward_s", "optimizer_s", *RECOMPUTED)
MAX_OTHER = 0.05  # of the predicted step: exposed copies, exchanges, pressure, which belong to no factor
MIN_RANGE = 2.0  # of the rows of the peaks, for a line through them
CALIBRATED = "calibrated by"  # in the words of a Calibration, by which a Prediction's confidence shows that it had one


@dataclass(frozen=True)
class Calibration:
    """What to add to, and multiply, the predictions of one model on one device in one dtype."""

    model: str  # fingerprints, as in the Plan
    device: str
    dtype: str
    extra_bytes: int  # may be negative: the probe's process held more than the run's
    extra_rows: float  # tensors of [rows, D] in the compute dtype
    forward: float  # measured / predicted seconds
    backward: float
    optimizer: float
    num_points: int  # measurements behind the memory
    num_timed: int  # and behind the seconds; 0: the factors are 1.0
    peak_error: float | None  # mean relative error of each point, predicted from the others; None below two
    step_error: float | None
    source: str

    def check(self, *, model: str, device: str, dtype: str) -> None:
        """UserError unless it was made for this model, device and dtype; the message says which differs."""
        for what, own, other in (
            ("model", self.model, model),
            ("device", self.device, device),
            ("dtype", self.dtype, dtype),
        ):
            if own != other:
                raise UserError(
                    f"the calibration is of {what} {own}, this is planned for {other}; run `vchitect-fast autotune verify` for it "
                    "and calibrate from that ledger."
                )

    def memory(self, found: StepMemory, row_bytes: int) -> StepMemory:
        """The prediction with what the formulas left out; `row_bytes` of one [rows, D], as Expectation.row_bytes."""
        return replace(
            found,
            process_bytes=found.process_bytes + self.extra_bytes,
            working_bytes=found.working_bytes + round(self.extra_rows * row_bytes),
        )

    def peak_gib(self, expected: Expectation) -> float:
        """The peak of a prediction that was made without this calibration."""
        return expected.predicted.peak_gib + (self.extra_bytes + self.extra_rows * expected.row_bytes) / GIB

    def step_s(self, expected: Expectation) -> float:
        """Its step time; exposed waiting as it was predicted."""
        return _scaled_step_s(expected, (self.forward, self.backward, self.optimizer))

    def words(self) -> str:
        """For a Prediction's confidence."""
        timed = f"seconds from {self.num_timed}" if self.num_timed else "seconds not calibrated"
        off = [
            f"{name} off by {error:.1%} on average at points left out"
            for name, error in (("peak", self.peak_error), ("step", self.step_error))
            if error is not None
        ]
        measured = f"{CALIBRATED} {self.num_points} step{'s' if self.num_points > 1 else ''} of {self.source} ({timed})"
        return ", ".join([measured, *(off or ["no second point to test it on"])])

    @classmethod
    def of(cls, plan: Plan) -> Calibration | None:
        """None: the Plan's predictions were not calibrated. UserError where the Plan's calibration is damaged."""
        if plan.calibration is None:
            return None
        try:
            found = cls(**plan.calibration)
            factors = found.forward, found.backward, found.optimizer
            good = all(map(math.isfinite, (*factors, found.extra_bytes, found.extra_rows))) and min(factors) > 0
        except TypeError as error:
            raise UserError(f"the Plan's calibration is damaged ({error}); plan it again with --calibrate.") from None
        if not good:
            raise UserError(
                f"expected the Plan's calibration to have factors above 0 and finite figures, got {plan.calibration}; "
                "plan it again with --calibrate."
            )
        return found


def calibrate(pairs: Sequence[Pair], source: str) -> Calibration:
    """From measured predictions of one model on one device in one dtype.

    source  where they come from, for the reader: the ledger's name and its last date

    Predictions that were calibrated themselves are left out. Raises UserError when nothing is left, or for a mixture.
    """
    points = [pair for pair in pairs if CALIBRATED not in pair.expected.predicted.confidence]
    if not points:
        raise UserError(
            f"expected at least one measured prediction that was not calibrated itself in {source}, got {len(pairs)} that were; "
            "plan without --calibrate, run `vchitect-fast autotune verify`, and calibrate from its ledger."
        )
    kinds = list(dict.fromkeys((p.expected.model, p.expected.device, p.expected.dtype) for p in points))
    if len(kinds) > 1:
        told = "; ".join(f"model {model}, device {device}, {dtype}" for model, device, dtype in kinds)
        raise UserError(
            f"expected measurements of one model on one device in one dtype in {source}, got {told}; use a ledger for each."
        )
    timed = [pair for pair in points if _is_plain(pair)]
    extra_bytes, extra_rows = _memory(points)
    forward, backward, optimizer = _factors(timed)
    return Calibration(
        *kinds[0],
        extra_bytes=round(extra_bytes),
        extra_rows=extra_rows,
        forward=forward,
        backward=backward,
        optimizer=optimizer,
        num_points=len(points),
        num_timed=len(timed),
        peak_error=_left_out(points, _peak_error),
        step_error=_left_out(timed, _step_error),
        source=source,
    )


def _standing(pair: Pair) -> float:
    parts = pair.expected.predicted.peak_parts_gib
    return GIB * sum(parts.get(name, 0.0) for name in STANDING)


def _peak(pair: Pair) -> float:
    return GIB * pair.found.measured["peak_gib"]


def _memory(points: Sequence[Pair]) -> tuple[float, float]:
    """extra_bytes and extra_rows."""
    known = [pair for pair in points if "standing_gib" in pair.found.measured]
    if known:
        standing = median(GIB * pair.found.measured["standing_gib"] - _standing(pair) for pair in known)
        return standing, median((_missing(pair) - standing) / pair.expected.row_bytes for pair in points)
    rows = [pair.expected.row_bytes for pair in points]
    if max(rows) < MIN_RANGE * min(rows):
        return median(_missing(pair) for pair in points), 0.0
    mean, middle = fmean(map(_missing, points)), fmean(rows)
    slope = sum((row - middle) * _missing(pair) for row, pair in zip(rows, points, strict=True))
    slope /= sum((row - middle) ** 2 for row in rows)
    return mean - slope * middle, slope


def _missing(pair: Pair) -> float:
    """Bytes of the measured peak that were not predicted."""
    return _peak(pair) - GIB * pair.expected.predicted.peak_gib


def _is_plain(pair: Pair) -> bool:
    """Its seconds are compute: what the three factors multiply. Exposed copies and exchanges are no part of them."""
    predicted = pair.expected.predicted
    other = sum(value for name, value in predicted.step_parts_s.items() if name not in PLAIN)
    return other <= MAX_OTHER * predicted.step_s


def _factors(points: Sequence[Pair]) -> tuple[float, float, float]:
    """Measured / predicted of forward, backward and optimizer."""
    ratios: dict[str, list[float]] = {"forward_s": [], "backward_s": [], "optimizer_s": []}
    for pair in points:
        for name, predicted in _compute(pair.expected).items():
            ratios[name].append(pair.found.measured[name] / predicted)
    forward, backward, optimizer = (median(found) if found else 1.0 for found in ratios.values())
    return forward, backward, optimizer


def _compute(expected: Expectation) -> dict[str, float]:
    """Predicted seconds as the log measures them, exposed waiting left out."""
    parts = expected.predicted.step_parts_s
    return {
        "forward_s": parts["forward_s"],
        "backward_s": sum(parts.get(name, 0.0) for name in RECOMPUTED),
        "optimizer_s": parts["optimizer_s"],
    }


def _left_out(points: Sequence[Pair], error: Callable[[Pair, Sequence[Pair]], float]) -> float | None:
    """Mean of |error| of each point under what the others say; None below two points."""
    if len(points) < 2:
        return None
    return fmean(abs(error(pair, [*points[:i], *points[i + 1 :]])) for i, pair in enumerate(points))


def _peak_error(pair: Pair, others: Sequence[Pair]) -> float:
    extra_bytes, extra_rows = _memory(others)
    missing = _missing(pair) - extra_bytes - extra_rows * pair.expected.row_bytes
    return missing / _peak(pair)


def _step_error(pair: Pair, others: Sequence[Pair]) -> float:
    return _scaled_step_s(pair.expected, _factors(others)) / pair.found.measured["step_s"] - 1


def _scaled_step_s(expected: Expectation, factors: tuple[float, float, float]) -> float:
    seconds = _compute(expected)
    waiting = expected.predicted.step_s - sum(seconds.values())
    return waiting + sum(value * factor for value, factor in zip(seconds.values(), factors, strict=True))
