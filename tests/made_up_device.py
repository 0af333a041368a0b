"""A made-up device for tests of the planner: every op runs at a fixed rate, so expected times can be written down."""

from __future__ import annotations

from vchitect_fast.cluster import Cluster, Device, Timing

FLOPS = 1e11
BANDWIDTH = 1e10
OPS = ("multiply", "gelu", "layer_norm", "rotate")


def device(memory_gib: float = 64.0, **changes: object) -> Device:
    """Linear and attention at 100 GFLOP/s (backward half that rate), every pass at 10 GB/s, no overhead beyond 1 us."""
    timings = []
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for rows in (8, 4096):
            for width in (16, 1024):
                seconds = 2 * rows * width**2 / FLOPS
                timings.append(Timing("linear", dtype, rows, width, seconds, 2 * seconds))
            for length in (8, 1024):
                seconds = 4 * rows * 64 * length / FLOPS
                timings.append(Timing("attention", dtype, rows, 64, seconds, 2 * seconds, length=length))
        for op in OPS:
            for rows in (1, 4096):
                seconds = rows * 256 * 3 * size / BANDWIDTH
                timings.append(Timing(op, dtype, rows, 256, seconds, seconds))
    for width in (4096, 2**22):
        timings.append(Timing("adamw", "float32", 1, width, 28 * width / BANDWIDTH))
    timings.append(Timing("view", "float32", 4, 4, 1e-6))
    facts = {
        "name": "made-up CPU", "kind": "cpu", "memory_bytes": int(memory_gib * 2**30), "matmul_flops": {"float32": FLOPS, "bfloat16": FLOPS},
        "memory_bytes_per_s": BANDWIDTH, "num_threads": 1, "op_overhead_s": 1e-6, "process_bytes": 2**28, "timings": tuple(timings),
        "fit_error": 0.1, "source": "made up for tests",
    }  # fmt: skip
    return Device(**{**facts, **changes})  # type: ignore[arg-type]


def cluster(memory_gib: float = 64.0) -> Cluster:
    """A Cluster of that one device."""
    return Cluster(name="made up", device=device(memory_gib))
