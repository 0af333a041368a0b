"""`vchitect-fast bench` and `bench compare` end to end: Records appended, JSON, exit codes.

pytest tests/benchmarks/test_bench_command.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_record import record

from vchitect_fast import cli
from vchitect_fast.benchmarks import suite
from vchitect_fast.benchmarks.compare import FASTER, SAME, SLOWER, Pair
from vchitect_fast.benchmarks.record import Record, append, load

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asserts what a machine without a GPU prints")


def write(path: Path, *records: Record) -> str:
    for item in records:
        append(path, item)
    return str(path)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (record(1.0), record(1.0), SAME),
        (record(1.0), record(1.04), SAME),  # below the threshold
        (record(1.0), record(1.06), SLOWER),
        (record(1.0, spread=0.07), record(1.06), SAME),  # within the old range
        (record(1.0), record(1.06, spread=0.07), SAME),  # the old one within the new range
        (record(1.06), record(1.0), FASTER),
        (record(1.06, spread=0.07), record(1.0), SAME),
    ],
)
def test_slower_needs_threshold_and_both_ranges(before: Record, after: Record, verdict: str) -> None:
    assert Pair(before, after).verdict(0.05) == verdict


def test_compare_fails_only_when_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backward = record(2.0, direction="backward")
    a = write(tmp_path / "a.jsonl", record(9.0), record(1.0), backward, record(1.0, bench="gone"))
    b = write(tmp_path / "b.jsonl", record(1.2), backward, record(1.0, device="another", bench="new"))
    assert cli.main(["bench", "compare", a, b]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 slower by more than 5%" in out and "1.200" in out  # the last of the two Records of a counts
    assert "only before: gone" in out and "only after: new" in out
    assert cli.main(["bench", "compare", b, a]) == 0
    assert cli.main(["bench", "compare", a, b, "--threshold", "0.25"]) == 0
    assert "0 of 2 slower" in capsys.readouterr().out


def test_compare_says_json_and_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", record(1.0)), write(tmp_path / "b", record(2.0, device="another"))
    assert cli.main(["bench", "compare", a, b]) == 1
    assert "measured on different devices: another; made up" in capsys.readouterr().out
    assert cli.main(["bench", "compare", a, b, "--json"]) == 1
    [pair] = json.loads(capsys.readouterr().out)["pairs"]
    assert pair["ratio"] == 2.0 and pair["verdict"] == SLOWER


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "A"], "compare takes two files, got 1"),
        (["compare", "A", "A", "--threshold", "-1"], "--threshold must be a ratio from 0 up"),
        (["compare", "A", "nowhere"], "cannot read nowhere"),
        (["compare", "A", "OTHER"], "have no measurement in common (1 and 1)"),
        (["--filter", "no such bench"], "no bench contains 'no such bench'; there are: temporal"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "A": write(tmp_path / "a", record(1.0)), "OTHER": write(tmp_path / "b", record(1.0, shape="8x16x16")),
    }  # fmt: skip
    assert cli.main(["bench", *(files.get(argument, argument) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@on_a_cpu
def test_a_run_appends_records_and_prints_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.jsonl"
    for _ in range(2):
        assert cli.main(["bench", "--quick", "--filter", "modulated_norm", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    records = load(out)
    assert len(records) == 2 * 4  # triton and eager, forward and backward; torch.compile is left out
    assert {item.bench for item in records} == {"modulated_norm"}
    assert all(item.command == "vchitect-fast bench --filter 'modulated_norm' --quick" for item in records)
    assert "not measured: torch.compile: left out by --quick on a CPU" in printed
    assert f"appended 4 Records to {out}" in printed and "ceilings of this run: " in printed
    assert cli.main(["bench", "compare", str(out), str(out)]) == 0


@on_a_cpu
def test_what_a_cpu_can_measure_and_its_goal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--quick", "--filter", "dispatch", "--json", "--out", str(tmp_path / "r")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["records"]) == 4 and content["not_measured"] == []
    judged = [goal for goal in content["goals"] if goal["bench"] == "dispatch"]
    assert len(judged) == 2
    for goal in judged:
        assert goal["verdict"] == ("pass" if goal["found"] <= 3 else "fall short")
        assert goal["found"] > 0.5  # ours does what the bare one does, and more
    others = [goal["verdict"] for goal in content["goals"] if goal["bench"] != "dispatch"]
    assert len(others) > 50 and all(verdict.startswith("not measured: ") for verdict in others)


@on_a_cpu
def test_ours_that_fails_is_named_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vchitect_fast.kernels import ops

    real = ops.gated_residual

    def broken(*args: Any, impl: str) -> Any:
        if impl == "triton":
            raise RuntimeError("out of registers")
        return real(*args, impl=impl)

    monkeypatch.setattr(ops, "gated_residual", broken)
    out = tmp_path / "r.jsonl"
    assert cli.main(["bench", "--quick", "--filter", "gated_residual 2x", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "failed: gated_residual: triton (ours, interpreted): RuntimeError: out of registers" in printed
    assert {item.provider for item in load(out)} == {"eager"}


def test_the_engine_is_absent_with_a_reason_where_it_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import vchitect_fast
    from vchitect_fast.benchmarks import host

    monkeypatch.setitem(sys.modules, "vchitect_fast._C", None)
    monkeypatch.delattr(vchitect_fast, "_C", raising=False)
    [slot, copy] = list(host._engine())
    for bench in (slot, copy):
        [found] = suite.run_host_bench(bench, suite.Run(None, {}, 0.01))  # type: ignore[arg-type]
        assert isinstance(found, suite.Absent) and "VCHITECT_FAST_EXT=0" in found.reason and not found.attempted
