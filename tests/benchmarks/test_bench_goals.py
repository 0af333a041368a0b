"""Goals against made-up Records of an H100: pass, fall short, and every reason for not measured; the figures are redrawn.

pytest tests/benchmarks/test_bench_goals.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_record import record

from vchitect_fast.benchmarks import figures, goals, model_steps
from vchitect_fast.benchmarks.cases import ATTENTION_SHAPES, BLOCK_SHAPES
from vchitect_fast.benchmarks.goals import GOALS, PASS, PASS_THERE, SHORT, STEP, Goal, judge
from vchitect_fast.benchmarks.record import BOTH, FORWARD, Record, append
from vchitect_fast.benchmarks.suite import Absent
from vchitect_fast.benchmarks.table import duration, headline, reasons, saved

H100 = "NVIDIA H100 80GB HBM3"
AT = {"shape": "40x768x432", "device": H100}


def goal(bench: str, direction: str, measure: str) -> Goal:
    [found] = [
        g for g in GOALS if (g.bench, g.shape, g.direction, g.measure) == (bench, AT["shape"], direction, measure)
    ]
    return found


@pytest.mark.parametrize(
    ("bench", "direction", "measure", "ours", "verdict"),
    [
        ("block", BOTH, "median_s", {"median_s": 0.034}, PASS),
        ("block", BOTH, "median_s", {"median_s": 0.0341}, SHORT),
        ("block fp8", BOTH, "median_s", {"median_s": 0.025}, PASS),
        ("block fp8", BOTH, "median_s", {"median_s": 0.0251}, SHORT),
        ("block", FORWARD, "saved_bytes", {"saved_bytes": 3_000_000_000}, PASS),
        ("block", FORWARD, "saved_bytes", {"saved_bytes": 3_000_000_001}, SHORT),
        ("cross", FORWARD, "ratio", {"median_s": 0.75}, PASS),
        ("cross", FORWARD, "ratio", {"median_s": 0.76}, SHORT),
    ],
)
def test_limits(bench: str, direction: str, measure: str, ours: dict[str, float], verdict: str) -> None:
    at = {**AT, "bench": bench, "direction": direction}
    records = [record(**{**at, **ours}), record(1.0, provider="sdpa flash", **at), record(9.0, provider="eager", **at)]
    assert judge(goal(bench, direction, measure), records).text == verdict


def test_a_rate_is_a_lower_limit() -> None:
    [rate] = [g for g in GOALS if g.measure == "rate" and g.direction == FORWARD]
    at = {"bench": "spatial", "shape": rate.shape, "device": H100}
    assert judge(rate, [record(rate=400.0, **at)]).text == PASS
    assert judge(rate, [record(rate=399.0, **at)]).text == SHORT


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([], "this run did not have it"),
        ([record(bench="cross", shape="40x768x432", device="A100")], "the goal is for an H100, this is A100"),
        ([record(provider="eager", **AT)], "ours did not run"),
        ([record(**AT)], "no alternative ran"),
    ],
)
def test_not_measured_says_why(records: list[Record], why: str) -> None:
    verdict = judge(goal("cross", FORWARD, "ratio"), records)
    assert verdict.text == f"not measured: {why}" and verdict.found is None


def test_the_same_chip_with_faster_memory_can_fall_short_but_not_pass_for_the_other() -> None:
    at = {**AT, "device": "NVIDIA H200", "bench": "block", "direction": BOTH}
    limit = goal("block", BOTH, "median_s")
    assert judge(limit, [record(0.034, **at)]).text == PASS_THERE
    assert judge(limit, [record(0.0341, **at)]).text == SHORT


def test_the_goals_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = {**AT, "bench": STEP, "direction": BOTH, "provider": "hand-written (ours)"}
    append(tmp_path / "a.jsonl", record(1.2, **at))
    append(tmp_path / "b.jsonl", record(0.9, **at))  # measured anew: the newest counts
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    assert goals.main(paths) == 0 and goals.main(paths[::-1]) == 1
    assert "900 ms" in capsys.readouterr().out
    assert goals.main([]) == 2


def test_every_goal_has_a_case() -> None:
    for item in GOALS:
        benches = {
            "block": BLOCK_SHAPES,
            "block fp8": BLOCK_SHAPES,
            "dispatch": ("empty kernel",),
            STEP: model_steps.GPU_CASES.shapes,
        }
        shapes = benches.get(item.bench, ATTENTION_SHAPES)
        assert item.shape in shapes, item
    assert len(set(GOALS)) == len(GOALS)


def test_the_headline_is_a_ratio_over_shapes() -> None:
    other = {"provider": "sdpa flash"}
    records = [
        record(1.0), record(2.0, **other),
        record(3.0, shape="8x16x16"), record(2.0, shape="8x16x16", **other), record(2.5, shape="8x16x16", provider="eager"),
    ]  # fmt: skip
    assert headline("cross", records) == "cross: ours takes forward 0.50 - 1.50 x the time of the best alternative"
    interpreted = record(9.0, provider="triton (ours, interpreted)")
    assert headline("cross", [interpreted, record(**other)]).startswith("cross (kernels interpreted here")


def test_reasons_are_grouped_and_say_where_it_matters() -> None:
    absent = [
        Absent("cross", name, shape, "float32", FORWARD, why, False)
        for name, shape, why in (
            ("a", "1x", "no GPU"), ("a", "2x", "no GPU"), ("b", "1x", "no GPU"), ("b", "2x", "no GPU"), ("c", "2x", "boom"),
        )
    ]  # fmt: skip
    assert reasons(absent) == ["not measured: a, b: no GPU", "not measured: c at 2x forward: boom"]


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.5 us"), (7e-9, "7 ns")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_saved_bytes_are_shown_where_they_were_counted() -> None:
    records = [
        record(saved_bytes=2_851_000_000),
        record(provider="eager", saved_bytes=5_446_000_000),
        record(provider="a"),
    ]
    assert saved(records) == ["saved for backward at 40x768x432: triton (ours) 2,851.000 MB, eager 5,446.000 MB"]
    assert saved([record()]) == []


def test_figures_are_redrawn_to_the_same_bytes(tmp_path: Path) -> None:
    results, drawn = tmp_path / "results", tmp_path / "figures"
    for item in (
        record(1.0), record(2.0, provider="sdpa flash"), record(3.0, bench="planner", rate=None),
        record(9.0, bench="temporal", provider="triton (ours, interpreted)"),
    ):  # fmt: skip
        append(results / "gpu.jsonl", item)
    names = ["gpu-cross.svg", "gpu-roofline.svg"]  # no bars without an alternative, none of the interpreter
    assert [path.name for path in figures.draw_all(results, drawn)] == names
    first = [(drawn / name).read_bytes() for name in names]
    figures.draw_all(results, drawn)
    assert [(drawn / name).read_bytes() for name in names] == first
    assert b"sdpa flash" in first[0]
    assert figures.main([str(tmp_path / "nothing"), str(drawn)]) == 2
