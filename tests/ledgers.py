"""A made-up Plan with one entry, and measurements of it, for tests of the ledger and of calibration."""

from __future__ import annotations

from typing import Any

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.ledger import Measurement, Pair, expect
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction

PARTS_S = {"forward_s": 2.0, "backward_s": 5.0, "recompute_s": 1.0, "optimizer_s": 2.0}  # of 10 s
PARTS_GIB = {"process": 0.25, "states": 0.25, "gradients": 0.1, "saved": 0.3, "working": 0.1}  # of 1 GiB


def plan(shape: str = "2x32x32", *, predicted_s: float = 10.0, confidence: str = "made up", **parts_s: float) -> Plan:
    """For vchitect-nano on a made-up device: one rank, float32, 4 text tokens; 10 s and 1 GiB predicted."""
    config = preset("vchitect-nano")
    parts = {name: value * predicted_s / 10 for name, value in (PARTS_S | parts_s).items()}
    predicted = Prediction(predicted_s, parts, 1.0, PARTS_GIB, confidence)
    entry = PlanEntry(shape, (Policy.recompute(),) * config.num_layers, 1, 1, predicted)
    return Plan(config.fingerprint(), "0123", "made-up CPU", "float32", 4, (entry,))


def found(**measured: float) -> Measurement:
    """What three steps measured."""
    return Measurement(3, measured)


def pair(
    shape: str = "2x32x32", *, stated_error: float | None = None, predicted: dict[str, Any] | None = None,
    predicted_s: float = 10.0, **measured: float,
) -> Pair:  # fmt: skip
    """A prediction of `plan` and its measurement."""
    made = plan(shape, predicted_s=predicted_s, **(predicted or {}))
    return Pair(expect(made, made.entries[0], preset("vchitect-nano"), stated_error=stated_error), found(**measured))
