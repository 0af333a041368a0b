"""The same cases under pytest-benchmark: `pytest benchmarks`, with its tables, storage and comparison.

One test a case, direction and provider; inputs are made before each round and not timed, on a GPU the device is waited for.
Providers are not interleaved here and rates, ceilings and errors are missing: `vchitect-fast bench` has them. `make test`
does not collect this folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vchitect_fast.benchmarks.case import Case, Provider, is_interpreted, prepare_process

prepare_process()  # before a kernel's module is imported

from vchitect_fast.benchmarks.cases import all_cases  # noqa: E402
from vchitect_fast.benchmarks.host import HostBench, host_benches  # noqa: E402
from vchitect_fast.benchmarks.record import BACKWARD, FORWARD  # noqa: E402
from vchitect_fast.benchmarks.timing import Work, reason  # noqa: E402

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _params() -> list[Any]:
    return [
        pytest.param(case, provider, direction, id=f"{case.bench}-{case.shape}-{direction}-{provider.name}")
        for case in all_cases(quick=True)
        for direction in (FORWARD, BACKWARD)
        for provider in case.providers
    ]


@pytest.mark.parametrize(("case", "provider", "direction"), _params())
def test_case(case: Case, provider: Provider, direction: str, benchmark: Any) -> None:
    """One provider, one direction; skipped with the reason where it cannot run."""
    if provider.unavailable:
        pytest.skip(provider.unavailable)
    benchmark.group = f"{case.bench} {case.shape} {direction}"
    torch._dynamo.reset()
    torch.manual_seed(0)
    problem = case.draw(case.sizes, case.dtype, DEVICE)
    problem = case.joined(problem) if provider.joint else problem
    try:
        douts = [torch.randn_like(output) for output in provider.run(problem)]
    except Exception as error:
        if provider.is_ours:
            raise
        pytest.skip(reason(error))

    def backward(outputs: Sequence[Tensor]) -> None:
        torch.autograd.grad(list(outputs), problem.wanted(), douts)
        _wait()

    def forward() -> None:
        provider.run(problem)
        _wait()

    rounds = 1 if is_interpreted(provider.name) else 10
    if direction == FORWARD:
        benchmark.pedantic(forward, rounds=rounds)
        return

    def prepared() -> tuple[tuple[Sequence[Tensor]], dict[str, Any]]:
        outputs = provider.run(problem)
        _wait()
        return (outputs,), {}

    benchmark.pedantic(backward, setup=prepared, rounds=rounds)


@pytest.mark.parametrize(
    ("bench", "name"),
    [
        pytest.param(bench, name, id=f"{bench.name}-{bench.shape}-{bench.direction}-{name}")
        for bench in host_benches()
        for name in bench.works
    ],
)
def test_host(bench: HostBench, name: str, benchmark: Any) -> None:
    """What a CPU can measure; a round is `bench.calls` calls."""
    benchmark.group = f"{bench.name} {bench.shape} {bench.direction}"
    work: Work = bench.works[name]
    benchmark.pedantic(work.run, setup=lambda: ((work.prepare(),), {}), rounds=20, warmup_rounds=1)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
