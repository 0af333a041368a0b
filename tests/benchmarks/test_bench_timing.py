"""The clock by hand-made numbers: percentiles, the order of the rounds, and a callable that raises.

pytest tests/benchmarks/test_bench_timing.py
"""

from __future__ import annotations

import pytest
import torch

from vchitect_fast.benchmarks.timing import MIN_ROUNDS, Clock, Work, ceilings, interleaved, reason, summary

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("samples", "median", "p10", "p90"),
    [
        ([3.0], 3.0, 3.0, 3.0),
        ([1.0, 3.0], 2.0, 1.2, 2.8),
        ([5.0, 1.0, 4.0, 2.0, 3.0], 3.0, 1.4, 4.6),
        (list(range(11)), 5.0, 1.0, 9.0),
        ([1.0] * 9 + [100.0], 1.0, 1.0, 10.9),
    ],
)
def test_percentiles(samples: list[float], median: float, p10: float, p90: float) -> None:
    found = summary(samples)
    assert found.n == len(samples)
    assert (found.median_s, found.p10_s, found.p90_s) == pytest.approx((median, p10, p90))


def test_rounds_are_interleaved_and_preparation_is_not_timed() -> None:
    called: list[str] = []

    class Ticking(Clock):
        def sample_s(self, work: Work) -> float:
            work.run(work.prepare())
            return 2.0 if called[-1] == "b" else 1.0

    works = {
        "a": Work(lambda given: called.append(given), lambda: "a"),
        "b": Work(lambda given: called.append(given), lambda: "b"),
        "once": Work(lambda _: called.append("once"), once=True),
    }
    found, failed = interleaved(Ticking(CPU), works, budget_s=24.0)
    warm_up = ["a", "a", "b", "b", "once"]
    assert not failed and called == warm_up + ["a", "b"] * 8
    assert {name: (s.n, s.median_s) for name, s in found.items()} == {"a": (8, 1.0), "b": (8, 2.0), "once": (1, 1.0)}


def test_what_raises_is_reported_and_the_rest_goes_on() -> None:
    calls = iter(range(100))

    def breaks_later(_: None) -> None:
        if next(calls) > 3:
            raise RuntimeError("no more\nsecond line")

    works = {
        "never": Work(lambda _: 1 / 0),
        "later": Work(breaks_later),
        "fine": Work(lambda _: sum(range(20000))),
    }
    found, failed = interleaved(Clock(CPU), works, budget_s=0.0)
    assert failed == {"never": "ZeroDivisionError: division by zero", "later": "RuntimeError: no more"}
    assert found.keys() == {"fine"} and found["fine"].n == MIN_ROUNDS


def test_a_clock_times_the_call_and_not_what_prepares_it() -> None:
    clock = Clock(CPU)
    slow = Work(lambda _: torch.randn(300, 300) @ torch.randn(300, 300))
    prepared = Work(lambda _: None, lambda: [torch.randn(300, 300) @ torch.randn(300, 300) for _ in range(20)])
    clock.sample_s(slow)
    assert min(clock.sample_s(prepared) for _ in range(5)) < min(clock.sample_s(slow) for _ in range(5))


def test_reasons_are_one_short_line() -> None:
    assert reason(RuntimeError("")) == "RuntimeError"
    assert reason(RuntimeError("\n\n  deep\nrest")) == "RuntimeError: deep"
    assert len(reason(RuntimeError("x" * 500))) == 200
    assert reason(torch.OutOfMemoryError("CUDA out of memory")) == "the GPU's memory ran out"


def test_ceilings_are_rates_of_this_machine() -> None:
    found = ceilings(Clock(CPU), torch.float32)
    assert found.keys() == {"TFLOP/s", "GB/s"} and all(value > 0 for value in found.values())
    assert found["TFLOP/s"] < 100 and found["GB/s"] < 10_000  # 1e12 and 1e9 are not mixed up
