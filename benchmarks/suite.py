"""Runs cases: every provider checked against fp64, then timed beside the others in interleaved rounds.

Out come Records, and an Absent for each provider that could not run, with its reason: nothing is left out in silence. It
prints nothing and writes nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from vchitect_fast.benchmarks.case import Case, Problem, Provider, is_interpreted
from vchitect_fast.benchmarks.host import HostBench
from vchitect_fast.benchmarks.record import BACKWARD, BOTH, FORWARD, Origin, Record
from vchitect_fast.benchmarks.timing import MAX_HOST_ROUNDS, Clock, Samples, Work, interleaved, reason


@dataclass(frozen=True)
class Absent:
    """A measurement that was wanted and was not made."""

    bench: str
    provider: str
    shape: str
    dtype: str
    direction: str
    reason: str
    attempted: bool  # False: known beforehand that it cannot run here


Outcome = Record | Absent


@dataclass
class Run:
    """What the measurements of one command share."""

    origin: Origin
    ceilings: dict[str, float]
    budget_s: float  # for the rounds of one case in one direction
    rounds: int | None = None  # instead of the budget

    def record(
        self, bench: str, provider: str, shape: str, dtype: str, direction: str, samples: Samples,
        amount: float | None, unit: str | None, error: float | None = None, saved_bytes: int | None = None,
    ) -> Record:  # fmt: skip
        """A Record of samples; `amount` is in FLOPs for TFLOP/s, bytes for GB/s, calls for 1/s."""
        scale = {"TFLOP/s": 1e12, "GB/s": 1e9, "1/s": 1.0}
        rate = amount / samples.median_s / scale[unit] if amount is not None and unit is not None else None
        return Record(
            bench=bench, provider=provider, shape=shape, dtype=dtype, direction=direction, **asdict(samples),
            rate=rate, unit=unit, error_vs_fp64=error, ceiling=self.ceilings.get(unit or ""), saved_bytes=saved_bytes,
            **asdict(self.origin),
        )  # fmt: skip


def run_case(case: Case, clock: Clock, run: Run) -> Iterator[Outcome]:
    """Outcomes of every provider in every direction, in the order of the providers, direction by direction."""
    torch._dynamo.reset()  # its limit of recompilations counts over cases
    torch.manual_seed(0)
    dtype = str(case.dtype).removeprefix("torch.")
    absent = {provider.name: (provider.unavailable, False) for provider in case.providers if provider.unavailable}
    able = [provider for provider in case.providers if provider.name not in absent]
    try:
        errors, failed = check(case, clock.device, able)
        absent |= {name: (why, True) for name, why in failed.items()}
        able = [provider for provider in able if provider.name not in failed]
        problem = case.draw(case.sizes, case.dtype, clock.device)
        douts = [torch.randn_like(out) for out in _first_that_runs(able, problem)]
        given = {True: case.joined(problem), False: problem}
        given_douts = {True: case.join_outputs(douts), False: douts}
    except Exception as error:  # of the definition in fp64, or of the inputs: nobody can be measured
        why = f"the case itself failed: {reason(error)}"
        absent |= {provider.name: (why, True) for provider in able}
        able, errors, given, given_douts = [], {}, {}, {}
    saved = {p.name: _saved_bytes(p, given[p.joint]) for p in able} if BOTH in case.directions else {}
    for direction in case.directions:
        works = {p.name: work_of(p, given[p.joint], given_douts[p.joint], direction) for p in able}
        found, broken = interleaved(clock, works, run.budget_s, rounds=run.rounds)
        absent |= {name: (why, True) for name, why in broken.items()}
        for provider in case.providers:
            name = provider.name
            if name in found:
                yield run.record(
                    case.bench, name, case.shape, dtype, direction, found[name], case.amount(direction), case.unit,
                    errors[name].get(direction), saved.get(name) if direction == FORWARD else None,
                )  # fmt: skip
            else:
                why, attempted = absent[name]
                yield Absent(case.bench, name, case.shape, dtype, direction, why, attempted)
        able = [provider for provider in able if provider.name in found]
    del given, given_douts
    gc.collect()


def run_host_bench(bench: HostBench, run: Run) -> Iterator[Outcome]:
    """Outcomes of what the CPU does, always on the CPU's clock; a sample is `calls` calls."""
    clock = Clock(torch.device("cpu"))
    found, broken = interleaved(clock, bench.works, run.budget_s, max_rounds=MAX_HOST_ROUNDS)
    for name in [*bench.works, *bench.absent]:
        if name in found:
            one = {key: value / bench.calls for key, value in asdict(found[name]).items() if key != "n"}
            samples = Samples(found[name].n, **one)
            yield run.record(bench.name, name, bench.shape, "-", bench.direction, samples, bench.amount, bench.unit)
        else:
            why = broken.get(name) or bench.absent[name]
            yield Absent(bench.name, name, bench.shape, "-", bench.direction, why, name in broken)


def check(
    case: Case, device: torch.device, providers: Iterable[Provider]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Relative error against fp64 by provider and direction, at the check sizes; and who raised, with the reason."""
    problem = case.draw(case.check, case.dtype, device)
    exact_problem = problem.double()
    exact = list(case.exact(exact_problem))
    douts = [torch.randn_like(out, dtype=case.dtype) for out in exact]
    exact_grads = torch.autograd.grad(exact, exact_problem.wanted(), [dout.double() for dout in douts])
    exact = [output.detach() for output in exact]
    num_leaves = len(problem.leaves)
    errors, failed = {}, {}
    for provider in providers:
        try:
            if provider.joint:
                given, given_douts = case.joined(problem), case.join_outputs(douts)
                wanted, want_grads = case.join_outputs(exact), case.join(exact_grads[:num_leaves])
            else:
                given, given_douts, wanted, want_grads = problem, douts, exact, list(exact_grads)
            outputs = list(provider.run(given))
            grads = torch.autograd.grad(outputs, given.wanted(), given_douts)
            forward, backward = relative_error(outputs, wanted), relative_error(grads, want_grads)
            errors[provider.name] = {FORWARD: forward, BACKWARD: backward, BOTH: max(forward, backward)}
        except Exception as error:
            failed[provider.name] = reason(error)
    return errors, failed


def relative_error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """|actual - exact| / |exact| in the 2-norm, of the worst tensor; tensors that are exactly 0 are held to 0."""
    worst = 0.0
    for found, wanted in zip(actual, exact, strict=True):
        size = float(wanted.norm())
        off = float((found.detach().double() - wanted).norm())
        worst = max(worst, off / size if size else float(off > 0))
    return worst


def _first_that_runs(able: Sequence[Provider], problem: Problem) -> Sequence[Tensor]:
    """Outputs at the case's sizes, for the shapes of their gradients."""
    failed: Exception = RuntimeError("no provider solved the check")
    for provider in able:
        if not provider.joint and not is_interpreted(provider.name):
            try:
                return [output.detach() for output in provider.run(problem)]
            except Exception as error:
                failed = error
    raise failed


def work_of(provider: Provider, problem: Problem, douts: list[Tensor], direction: str) -> Work:
    """What the clock gets for one direction; before backward alone, its forward is prepared."""

    def backward(outputs: Sequence[Tensor]) -> object:
        return torch.autograd.grad(list(outputs), problem.wanted(), douts)

    once = is_interpreted(provider.name)
    if direction == FORWARD:
        return Work(lambda _: provider.run(problem), once=once)
    if direction == BACKWARD:
        return Work(backward, lambda: provider.run(problem), once)
    return Work(lambda _: backward(provider.run(problem)), once=once)


def _saved_bytes(provider: Provider, problem: Problem) -> int | None:
    """Bytes a forward leaves for its backward, without the parameters; None where it cannot be told or did not run.

    On a GPU what is allocated after the forward and was not before: the outputs count, the inputs (as large) do not. On a
    CPU the storages that autograd saves: inputs count; torch.compile is not asked, hooks would change what it compiles.
    """
    try:
        if problem.leaves[0].is_cuda:
            provider.run(problem)  # workspaces come once and stay
            before = torch.cuda.memory_allocated()
            outputs = provider.run(problem)
            return torch.cuda.memory_allocated() - before if outputs else None
        if provider.compiled:
            return None
        parameters = {p.untyped_storage().data_ptr() for p in (problem.module.parameters() if problem.module else ())}
        with _saved_storages() as storages:
            outputs = provider.run(problem)
            total = sum(size for address, size in storages().items() if address not in parameters)
        return total if outputs else None
    except Exception:  # the timing that follows says why
        return None


@contextmanager
def _saved_storages() -> Iterator[Callable[[], dict[int, int]]]:
    """Address -> bytes of every storage saved in the block."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
