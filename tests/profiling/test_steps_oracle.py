"""The figures of random steps against an oracle that looks at every microsecond by itself, and sums that must hold of any trace.

Events start and end at whole microseconds, so that a step is a list of cells; the oracle asks of each cell what runs in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_trace import event, launched, op, span, write

from vchitect_fast.profiling.analysis import analyse
from vchitect_fast.profiling.chrome import read_chrome
from vchitect_fast.profiling.facts import COMPUTE, IDLE, STREAMS
from vchitect_fast.profiling.reading import read_traces
from vchitect_fast.profiling.steps import analyse_steps
from vchitect_fast.profiling.work import find_work

WALL = 80
# What runs -> (category, the figure that it counts for).
WORK = {
    "sgemm": ("kernel", "gemm"), "flash_fwd": ("kernel", "attention"), "vectorized_elementwise_kernel": ("kernel", "elementwise"),
    "mystery": ("kernel", "other"), "ncclDevKernel_AllReduce": ("kernel", "collective"), "Memcpy DtoH": ("gpu_memcpy", "copy_out"),
    "Memcpy HtoD": ("gpu_memcpy", "copy_in"), "Memcpy DtoD": ("gpu_memcpy", "copy_within"),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(25))
def test_every_figure_of_a_random_step_is_what_looking_at_each_microsecond_gives(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for round_number in range(4):
        events, runs = [span("step/0", 0, WALL)], []
        for number in range(int(rng.integers(1, 15))):
            name = str(rng.choice(list(WORK)))
            start = int(rng.integers(0, WALL - 1))
            end = int(rng.integers(start + 1, WALL + 1))
            events += launched(number, start, name, start, end - start, number % 4, WORK[name][0])
            runs.append((WORK[name][1], start, end))
        trace = read_chrome(write(tmp_path / f"{round_number}.json", events))
        [step] = analyse_steps(trace, find_work(trace))
        cells = [{kind for kind, start, end in runs if start <= cell < end} for cell in range(WALL)]
        computes = [bool(cell & set(COMPUTE)) for cell in cells]

        def us(count: int) -> Any:
            return pytest.approx(count, abs=0.01)

        assert step.compute_us == us(sum(computes))
        assert step.idle_us == us(sum(not cell for cell in cells))
        assert step.exposed_any_us == us(sum(bool(cell) and not c for cell, c in zip(cells, computes, strict=True)))
        for name in STREAMS:
            at, hidden = (
                [name in cell for cell in cells],
                [name in cell and bool(cell & set(COMPUTE)) for cell in cells],
            )
            assert step.stream_us[name] == us(sum(at)) and step.exposed_us[name] == us(sum(at) - sum(hidden))
            assert step.overlap[name] == (pytest.approx(sum(hidden) / sum(at), abs=0.01) if any(at) else None)
        for name in COMPUTE:
            assert step.by_class_us[name] == us(sum(end - start for kind, start, end in runs if kind == name))
        assert sum(step.idle_by_cause_us.values()) == us(sum(not cell for cell in cells))


def tangle(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Events of every kind on several threads and streams, nested or not, with and without the calls behind them."""
    events = []
    names = [
        *WORK,
        "aten::mm",
        "MmBackward0",
        "forward/a",
        "backward/b",
        "collective/c",
        "copy_out/d",
        "gloo:all_reduce",
        "ncclGroup",
    ]
    kinds = ["cpu_op", "user_annotation", "cuda_runtime", "kernel", "gpu_memcpy", "gpu_memset"]
    for number in range(int(rng.integers(1, 40))):
        kind = str(rng.choice(kinds[: int(rng.integers(1, 7))]))
        args = {
            "correlation": int(rng.integers(-1, 9)),
            "Sequence number": int(rng.integers(-1, 5)),
            "Fwd thread id": int(rng.integers(0, 2)),
        }
        start, dur = float(rng.integers(0, 90)), float(rng.integers(0, 40))
        events.append(
            event(kind, str(rng.choice(names)), start, dur, int(rng.integers(1, 4)), External_id=number % 7, **args)
        )
    steps = [span(f"step/{k}", 30 * k, 29) for k in range(int(rng.integers(0, 4)))]
    return events + steps


@pytest.mark.parametrize("seed", range(25))
def test_what_must_hold_of_any_trace(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    for round_number in range(4):
        path = write(tmp_path / f"{round_number}.json", tangle(rng))
        [rank] = analyse(read_traces(path)).ranks
        assert rank.steps or "neither kernels nor ops" in rank.notes[0]
        end = -np.inf
        for step in rank.steps:
            assert step.start_us >= end - 1e-6  # steps do not overlap
            end = step.start_us + step.wall_us
            assert step.compute_us + step.exposed_any_us + step.idle_us == pytest.approx(step.wall_us, abs=1e-6)
            device_us = sum(one.device_us for one in step.by_span)
            assert device_us == pytest.approx(
                sum(us for name, us in step.by_class_us.items() if name != IDLE), abs=1e-6
            )
            assert sum(step.idle_by_cause_us.values()) == pytest.approx(step.idle_us, abs=1e-6)
            assert all(0 <= share <= 1 + 1e-9 for share in step.overlap.values() if share is not None)
            assert 0 <= step.coverage <= 1 + 1e-9 and min(step.idle_by_cause_us.values()) >= 0


@pytest.mark.parametrize("only", ["cuda_runtime", "user_annotation"])
def test_a_trace_without_work_says_so(tmp_path: Path, only: str) -> None:
    [rank] = analyse(read_traces(write(tmp_path / "t.json", [event(only, "x", 0, 5)]))).ranks
    assert rank.steps == () and rank.ops == () and "neither kernels nor ops" in rank.notes[0]


def test_an_op_of_no_length_is_no_work(tmp_path: Path) -> None:
    [rank] = analyse(read_traces(write(tmp_path / "t.json", [op("aten::mm", 0, 0)]))).ranks
    assert rank.steps == ()
