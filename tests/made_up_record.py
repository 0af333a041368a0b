"""A made-up Record for tests of the benchmark suite, with whatever fields a test changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vchitect_fast.benchmarks.record import Record

RECORD = Record(
    bench="cross", provider="triton (ours)", shape="40x768x432", dtype="bfloat16", direction="forward", n=20,
    median_s=1.5e-3, p10_s=1.4e-3, p90_s=1.75e-3, rate=88.5, unit="TFLOP/s", error_vs_fp64=2.5e-3, ceiling=790.0,
    saved_bytes=None, machine="Linux", device="made up", torch="2.11", triton=None, commit="abc+dirty",
    command="vchitect-fast bench", date="2026-01-01T00:00:00+00:00",
)  # fmt: skip


def record(median_s: float = 1.5e-3, spread: float = 0.02, **changes: Any) -> Record:
    """p10 and p90 lie `spread` below and above the median."""
    times = {"median_s": median_s, "p10_s": median_s * (1 - spread), "p90_s": median_s * (1 + spread)}
    return replace(RECORD, **{**times, **changes})
