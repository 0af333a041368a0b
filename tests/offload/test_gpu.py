"""What only a GPU can show of the engine: copies overlap compute, a slow copy stream changes no gradient. Never run so far.

pytest -m gpu tests/offload/test_gpu.py; and the table of goals, which says "not measured" here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from offloading import (
    ALL,
    INPUT,
    MIB,
    NUM_BLOCKS,
    assert_no_leaks,
    assert_same,
    gradients,
    make_inputs,
    make_model,
    work_of,
)

from vchitect_fast.architecture import preset
from vchitect_fast.benchmarks import offload_goals
from vchitect_fast.benchmarks.offload_goals import Row
from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.offload.policy import turns
from vchitect_fast.offload.states import Parked, park_budget_bytes
from vchitect_fast.plan import Policy

_C = pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")
needs_copier = pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without VCHITECT_FAST_CUDA=1")


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@needs_copier
@pytest.mark.usefixtures("_deterministic")
def test_a_slow_copy_stream_changes_no_gradient() -> None:
    model, inputs = make_model().cuda(), [x.cuda() for x in make_inputs(work_of())]
    expected = gradients(model, inputs)
    engine = Engine(8 * MIB, "cuda")
    model.saving = Saving(engine, keep_last=0)
    model.set_policy([ALL] * NUM_BLOCKS)
    for _ in range(50):
        for handle in engine.mover.streams():
            with torch.cuda.stream(torch.cuda.ExternalStream(handle)):
                torch.cuda._sleep(5_000_000)
        assert_same(gradients(model, inputs), expected)
    assert_no_leaks(engine)


@pytest.mark.gpu
@needs_copier
def test_a_slow_copy_stream_changes_no_parked_state() -> None:
    tensors = {str(i): torch.full((1000 + i,), float(i), device="cuda") for i in range(30)}
    engine = Engine(park_budget_bytes(tensors), "cuda")
    groups = turns({name: x.nbytes for name, x in tensors.items()}, 20_000)
    parked = Parked(engine, tensors)

    def work(place: int) -> None:
        for name in groups[place]:
            tensors[name].add_(1)

    for _ in range(20):
        for handle in engine.mover.streams():
            with torch.cuda.stream(torch.cuda.ExternalStream(handle)):
                torch.cuda._sleep(5_000_000)
        parked.in_turn(groups, work)
    parked.end()
    assert all(bool((x == int(name) + 20).all()) for name, x in tensors.items())
    assert_no_leaks(engine)


@pytest.mark.gpu
@needs_copier
def test_copies_overlap_compute_in_a_trace(tmp_path) -> None:
    """Of the time of all copies at least half lies under kernels: a 58 MB input beside a block of 5 ms, by arithmetic."""
    config = replace(preset("vchitect-2b"), num_layers=6)
    work = work_of("32x256x256", 1, config, 333)
    with torch.device("cuda"):
        model = make_model(0, config, torch.bfloat16)
    inputs = [x.cuda() for x in make_inputs(work)]
    model.saving = Saving(Engine(2**30, "cuda"))
    model.set_policy([INPUT] * config.num_layers)
    for _ in range(3):
        gradients(model, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gradients(model, inputs)
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = {"gpu_memcpy": [], "kernel": []}
    for event in events:
        if event.get("cat") in spans:
            spans[event["cat"]].append((event["ts"], event["ts"] + event["dur"]))
    covered = sum(
        max(0.0, min(end, stop) - max(begin, start))
        for begin, end in spans["gpu_memcpy"]
        for start, stop in spans["kernel"]
    )
    assert spans["gpu_memcpy"] and covered >= 0.5 * sum(end - begin for begin, end in spans["gpu_memcpy"])


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("a", 0.95, "ratio", at_least=True, found=0.95), "pass"),
        (Row("a", 0.95, "ratio", at_least=True, found=0.94), "fall short"),
        (Row("a", 2.0, "%", found=1.9), "pass"),
        (Row("a", 2.0, "%", found=2.1), "fall short"),
        (Row("a", 0, "tensors", found=0), "pass"),
        (Row("a", 0, "tensors", not_measured="why"), "not measured: why"),
    ],
)
def test_verdicts(row: Row, verdict: str) -> None:
    assert row.verdict == verdict


def test_without_a_gpu_every_row_says_not_measured(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert offload_goals.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(offload_goals.ROWS) and {row["found"] for row in rows} == {None}
    assert {row["verdict"] for row in rows} == {"not measured: torch sees no GPU"}
    assert offload_goals.main([]) == 0
    assert "bytes freed by offloading block inputs" in capsys.readouterr().out


def test_a_measurement_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def broken(sizes) -> list[float]:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(offload_goals, "_missing", lambda sizes: "")
    monkeypatch.setitem(offload_goals.MEASUREMENTS, "set-up", (("set-up",), broken))
    copies = ("copy out", "copy back", "both"), lambda sizes: [0.97, 0.9, 0.95]
    monkeypatch.setitem(offload_goals.MEASUREMENTS, "copies", copies)
    monkeypatch.setattr(offload_goals, "FULL", offload_goals.tiny())
    assert offload_goals.main(["--only", "set-up", "copies"]) == 1
    *printed, last = capsys.readouterr().out.splitlines()
    assert last == "4 rows: 2 pass" and len(printed) == 4
    assert "failed with ZeroDivisionError: oops" in printed[0] and "0.97 ratio; pass" in printed[1]
    assert "0.9 ratio; fall short" in printed[2]


def test_the_same_code_runs_at_toy_sizes(capsys) -> None:
    assert offload_goals.main(["--tiny", "--json"]) == 0
    rows = {row["goal"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == len(offload_goals.ROWS) and None not in {row["found"] for row in rows.values()}
    assert rows[offload_goals.ROWS["spin"].goal]["found"] == 0


def test_as_many_blocks_get_a_mix_as_fit_under_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stack:
        num_blocks = 10

        @staticmethod
        def peak_bytes(policies: list[Policy]) -> int:
            return sum(
                5 if policy.branch_out == "keep" else 1 for policy in policies if policy.branch_out != "recompute"
            )

    kept, moved = offload_goals._mixes(Stack(), 20)
    assert [policy.branch_out for policy in kept] == ["keep"] * 4 + ["recompute"] * 6
    assert [policy.branch_out for policy in moved] == ["offload"] * 9 + ["recompute"]
    assert [mix[0].branch_out for mix in offload_goals._mixes(Stack(), 4)] == ["offload"]  # one kept is too much
