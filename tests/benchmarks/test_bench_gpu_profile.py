"""The profile of a GPU step: verdicts by hand, and the same code at a toy size.

pytest tests/benchmarks/test_bench_gpu_profile.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vchitect_fast.benchmarks import gpu_profile
from vchitect_fast.benchmarks.gpu_profile import judge
from vchitect_fast.profiling.facts import STREAMS, RankAnalysis, StepAnalysis

NOTHING = dict.fromkeys(STREAMS, 0.0)
STEP = StepAnalysis(
    step=3, start_us=0.0, wall_us=1e6, compute_us=9e5, exposed_any_us=0.0, idle_us=1e5, by_span=(), by_class_us={},
    stream_us={**NOTHING, "copy_out": 3e4, "copy_in": 2e4}, exposed_us=NOTHING, overlap=dict.fromkeys(STREAMS, 1.0),
    idle_by_cause_us={}, launch_bound=(), coverage=1.0, attributed=0.995, num_device_allocations=0,
    num_allocator_retries=0,
)  # fmt: skip


def rank(*steps: StepAnalysis) -> RankAnalysis:
    return RankAnalysis(0, "made up", "torch", True, steps, (), ())


def test_verdicts_by_hand() -> None:
    """Two steps copy 60 ms out and 40 ms back by the trace."""
    counters = {"offload_busy_s": 0.0595, "prefetch_busy_s": 0.038}
    rows = judge(rank(STEP, replace(STEP, step=4, attributed=0.991)), counters)
    assert [row.found for row in rows] == [pytest.approx(99.1), pytest.approx(100 / 119), pytest.approx(100 / 19)]
    assert [row.verdict for row in rows] == ["pass", "pass", "fall short"]  # 40 against 38 ms: 5.3 %
    rows = judge(rank(STEP, replace(STEP, attributed=0.98)), {"offload_busy_s": 0.0, "prefetch_busy_s": 0.04})
    assert [row.verdict for row in rows] == ["fall short", "not measured: the engine copied nothing", "pass"]


def test_the_same_code_runs_at_a_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_profile.main(["--tiny", "--out", str(tmp_path), "--cluster", str(tmp_path / "none.json")]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"3 rows: rehearsed, no figure counts; page in {tmp_path / 'report.html'}"
    assert [line.split(":")[0] for line in lines if line.startswith("step ")] == ["step 3", "step 4"]
    assert "vchitect-nano at 2x32x32" in (tmp_path / "report.html").read_text()


def test_the_counters_are_those_of_the_recorded_steps(tmp_path: Path) -> None:
    """One block of two is moved, its two inputs once a step; back, unless backward asks before they have left."""
    counters = gpu_profile.record(gpu_profile.TINY_CASE, tmp_path)
    assert counters["offload_num_copies"] == 2 * gpu_profile.NUM_STEPS
    assert counters["prefetch_num_copies"] <= 2 * gpu_profile.NUM_STEPS


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_profile.main([]) == 2 and "not measured: torch sees no GPU" in capsys.readouterr().out
