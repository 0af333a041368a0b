"""The planner's own cost: how many steps it simulates, which no load of the machine changes; the script's rows and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vchitect_fast.autotune.scaling import stages_of
from vchitect_fast.benchmarks import planning
from vchitect_fast.benchmarks.planning import RECIPE, Case, Measured, measure, of_recipe, on_nodes, simulated
from vchitect_fast.benchmarks.record import load
from vchitect_fast.benchmarks.timing import Samples


def test_few_steps_are_simulated() -> None:
    """27, and 129 without a time to beat for what ranks of a mesh wait for; with eight times the nodes 42, and 213."""
    assert simulated(on_nodes(8, ["32x256x256"])) <= 40
    assert simulated(on_nodes(64, ["32x256x256"])) <= 60


def test_every_stage_of_a_recipe_is_planned() -> None:
    assert simulated(of_recipe(RECIPE, nodes=(512,))) >= len(stages_of(RECIPE)[1])


def test_records_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(planning, "cases", lambda _: [Case("one", 5.0, on_nodes(1, ["32x256x256"]))])
    out = tmp_path / "results.jsonl"
    assert planning.main(["--rounds", "2", "--out", str(out)]) == 0
    assert "at most 5 s" in capsys.readouterr().out
    (record,) = load(out)
    assert (record.bench, record.shape, record.n) == ("planning", "one", 2)
    assert planning.main(["--rounds", "1", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["shape"] == "one"


def test_a_goal_that_is_missed_is_said() -> None:
    case = Case("slow", 1e-9, lambda: sum(range(100_000)))
    assert measure(case, 1).verdict == "fall short"
    assert Measured(case, Samples(1, 1e-9, 1e-9, 1e-9), 0).verdict == "pass"


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--recipe", "no-such.yaml"]])
def test_bad_arguments_are_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert planning.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
