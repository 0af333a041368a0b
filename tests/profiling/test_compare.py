"""Two profiles side by side: differences that are there are found, noise is not, and CI gets its exit code."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_trace import launched, span, write

from vchitect_fast.errors import UserError
from vchitect_fast.profiling.analysis import analyse
from vchitect_fast.profiling.compare import ALPHA, Comparison, compare, mann_whitney, run_compare
from vchitect_fast.profiling.facts import Analysis
from vchitect_fast.profiling.reading import read_traces


def by_hand(a: list[float], b: list[float]) -> float:
    """The definition: of all ways to call as many of the values `a`, the share with as extreme a rank sum, twice."""
    both = a + b
    ranks = [(sum(y < x for y in both) + sum(y <= x for y in both) + 1) / 2 for x in both]
    sums = [sum(ranks[k] for k in choice) for choice in combinations(range(len(both)), len(a))]
    seen = sum(ranks[: len(a)])
    return min(1.0, 2 * min(sum(s <= seen for s in sums), sum(s >= seen for s in sums)) / len(sums))


@pytest.mark.parametrize("seed", range(40))
def test_the_exact_test_is_what_counting_gives_ties_included(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 8, int(rng.integers(1, 7))).astype(float).tolist()
    b = rng.integers(2, 10, int(rng.integers(1, 7))).astype(float).tolist()
    assert mann_whitney(a, b) == pytest.approx(by_hand(a, b))
    assert mann_whitney(b, a) == pytest.approx(mann_whitney(a, b))


def test_the_normal_approximation_meets_the_exact_test(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.5, 1.0):
        a, b = rng.normal(size=30).round(1).tolist(), (rng.normal(size=30) + shift).round(1).tolist()
        exact = mann_whitney(a, b)
        monkeypatch.setattr("vchitect_fast.profiling.compare.MAX_EXACT", 0)
        assert abs(mann_whitney(a, b) - exact) < 0.005
        monkeypatch.undo()
    assert mann_whitney([1.0] * 50, [1.0] * 50) == 1


def test_false_alarms_are_as_rare_as_the_test_says() -> None:
    rng = np.random.default_rng(1)
    alarms = sum(mann_whitney(rng.normal(size=6).tolist(), rng.normal(size=6).tolist()) <= ALPHA for _ in range(2000))
    assert alarms < 2000 * ALPHA + 4 * (2000 * ALPHA) ** 0.5  # four standard deviations


def steps_of(spatial: list[float], temporal: list[float]) -> list[dict[str, Any]]:
    """A step: a GEMM in forward/spatial, then elementwise in forward/temporal, no gap between them."""
    events, at = [], 0.0
    for number, (one, two) in enumerate(zip(spatial, temporal, strict=True)):
        events += [
            span(f"step/{number}", at, one + two),
            span("forward/spatial", at, 10), *launched(2 * number, at + 1, "sgemm", at, one),
            span("forward/temporal", at + 20, 10), *launched(2 * number + 1, at + 21, "elementwise_kernel", at + one, two),
        ]  # fmt: skip
        at += one + two
    return events


def profile(path: Path, spatial: list[float], temporal: list[float]) -> Analysis:
    return analyse(read_traces(write(path / "t.json", steps_of(spatial, temporal))))


STEADY = [1000.0, 1010, 990, 1005, 995, 1002]
LATER = [value + 3 for value in STEADY]
SLOW = [value * 1.2 for value in STEADY]


def verdicts(found: Comparison) -> dict[str, str]:
    return {row.name: row.verdict for row in found.rows}


def test_what_got_slower_and_what_faster_is_named(tmp_path: Path) -> None:
    before = profile(tmp_path, STEADY, [2 * value for value in STEADY])
    after = profile(tmp_path, SLOW, [value / 2 for value in STEADY])
    found = compare(before, after)
    assert verdicts(found) == {
        "wall": "faster", "elementwise": "faster", "forward/temporal": "faster", "gemm": "slower", "forward/spatial": "slower"
    }  # fmt: skip
    row = next(row for row in found.rows if row.name == "forward/spatial")
    assert (row.before_us, row.after_us, row.ratio) == (pytest.approx(1001), pytest.approx(1201.2), pytest.approx(1.2))
    assert row.p == pytest.approx(2 / 924) and found.exit_code == 0
    assert compare(after, before).exit_code == 1


def test_noise_a_small_change_and_an_outlier_are_no_difference(tmp_path: Path) -> None:
    before = profile(tmp_path, STEADY, STEADY)
    for other in (LATER, [*STEADY[:5], 5000.0], STEADY[::-1]):
        found = compare(before, profile(tmp_path, other, other))
        assert set(verdicts(found).values()) == {"same"} and found.exit_code == 0
    # Sure, but below the threshold; then above a smaller one.
    two_percent = [1.02 * value for value in range(1000, 1006)]
    steady = profile(tmp_path, [*map(float, range(1000, 1006))], STEADY)
    slower = profile(tmp_path, two_percent, STEADY)
    assert verdicts(compare(steady, slower))["forward/spatial"] == "same"
    assert verdicts(compare(steady, slower, threshold=0.01))["forward/spatial"] == "slower"


def test_a_span_that_is_new_or_gone_counts_as_time_from_or_to_nothing(tmp_path: Path) -> None:
    before = profile(tmp_path, STEADY, STEADY)
    events = steps_of(STEADY, STEADY)
    renamed = [{**one, "name": "forward/cross"} if one["name"] == "forward/temporal" else one for one in events]
    found = compare(before, analyse(read_traces(write(tmp_path / "t.json", renamed))))
    assert (verdicts(found)["forward/cross"], verdicts(found)["forward/temporal"]) == ("slower", "faster")
    assert next(row for row in found.rows if row.name == "forward/cross").ratio is None
    assert found.exit_code == 0  # the step is the same


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    few, enough = profile(tmp_path, STEADY[:4], STEADY[:4]), profile(tmp_path, STEADY, STEADY)
    with pytest.raises(UserError, match="got 4 and 4; record at least 5 in both"):
        compare(few, few)
    with pytest.raises(UserError, match="--threshold must be above 0, got 0"):
        compare(enough, enough, threshold=0)
    cpu = analyse(read_traces(write(tmp_path / "cpu.json", [
        {**one, "cat": "cpu_op"} for one in steps_of(STEADY, STEADY) if one["cat"] == "kernel"
    ])))  # fmt: skip
    with pytest.raises(UserError, match="one kind of device, got a GPU and a CPU"):
        compare(enough, cpu)


def test_the_command_prints_and_gives_ci_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, spatial in (("a", STEADY), ("b", SLOW)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "trace-rank0.json", steps_of(spatial, STEADY))
        write(tmp_path / folder / "trace-rank1.json", steps_of(STEADY, STEADY))
        (tmp_path / folder / "memory-rank0.json").write_text("{}")
    words = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert run_compare([*words, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 1 and told["rows"][0]["verdict"] == "slower"
    # Of two ranks the slower decides the step, the mean counts for a span.
    assert told["rows"][0]["after_us"] == pytest.approx(2202.2, abs=2)
    assert told["rows"][0]["ratio"] == pytest.approx(2202.2 / 2002, abs=1e-3)
    spatial = next(row for row in told["rows"] if row["name"] == "forward/spatial")
    assert spatial["after_us"] == pytest.approx((1201.2 + 1001) / 2, abs=0.1)
    assert run_compare(words[::-1]) == 0
    shown = capsys.readouterr().out
    assert "forward/spatial" in shown and "faster" in shown and "medians over 6 and 6 steps" in shown
    assert run_compare([*words, "--threshold", "0.5"]) == 0
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="must hold traces"):
        run_compare([str(tmp_path / "c"), words[0]])
