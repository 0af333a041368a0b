"""A profile as Records: one measured line a span, a class and the whole step, to compare over machines and commits.

The samples are the recorded steps of the first rank. Recording itself slows a step, so the bench is named profile/... and
no Record of it stands beside one of `vchitect-fast bench`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from vchitect_fast.benchmarks.record import Record, append, origin
from vchitect_fast.config import TrainConfig
from vchitect_fast.plan import Plan
from vchitect_fast.profiling.facts import CLASSES, IDLE, Analysis

NONE = "-"  # no direction


def write_records(path: Path, analysis: Analysis, config: TrainConfig, command: str) -> int:
    """Write the file, which is this profile's alone; returns how many."""
    plan = Plan.load(config.plan)
    shape = plan.entries[0].shape if len(plan.entries) == 1 else "all shapes of the Plan"
    common = {"shape": shape, "dtype": plan.compute_dtype, "direction": NONE, **asdict(origin(command))}
    samples = step_samples(analysis)
    path.unlink(missing_ok=True)
    for (bench, provider), values in samples.items():
        low, middle, high = (float(np.percentile(values, share)) for share in (10, 50, 90))
        record = Record(
            bench=bench, provider=provider, n=len(values), median_s=middle, p10_s=low, p90_s=high, rate=None, unit=None,
            error_vs_fp64=None, ceiling=None, saved_bytes=None, **common,
        )  # fmt: skip
        append(path, record)
    return len(samples)


def step_samples(analysis: Analysis) -> dict[tuple[str, str], list[float]]:
    """(bench, what) -> seconds, a sample a step; a step without a span has 0 of it."""
    steps = analysis.ranks[0].steps
    found: dict[tuple[str, str], list[float]] = {}
    if not steps:
        return found
    found["profile/step", "wall"] = [step.wall_us / 1e6 for step in steps]
    for name in (*CLASSES, IDLE):
        found["profile/class", name] = [step.by_class_us.get(name, 0.0) / 1e6 for step in steps]
    for name in dict.fromkeys(item.name for step in steps for item in step.by_span):
        times = [next((item for item in step.by_span if item.name == name), None) for step in steps]
        found["profile/span, begin to end", name] = [item.cpu_us / 1e6 if item else 0.0 for item in times]
        found["profile/span, on the device", name] = [item.device_us / 1e6 if item else 0.0 for item in times]
    return found
