"""A case end to end on made-up providers: errors against fp64, rates by formula, joint providers, failures with reasons.

pytest tests/benchmarks/test_bench_suite.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vchitect_fast.architecture import preset
from vchitect_fast.benchmarks import cases
from vchitect_fast.benchmarks.attention_cases import temporal
from vchitect_fast.benchmarks.case import Case, Problem, Provider, Sizes, draw_leaves
from vchitect_fast.benchmarks.cases import TINY_SHAPE, all_cases, block_case, block_config, fp8_block_case
from vchitect_fast.benchmarks.record import BACKWARD, BOTH, FORWARD, Origin, Record
from vchitect_fast.benchmarks.suite import Absent, Run, _saved_bytes, check, relative_error, run_case
from vchitect_fast.benchmarks.timing import Clock
from vchitect_fast.model.fp8_steps import check_device
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

CPU = torch.device("cpu")
SIZES = Sizes(B=1, T=2, S=3, N=2, H=2, C=4)
RUN = Run(Origin("m", "d", "t", None, None, "c", "now"), {"GB/s": 10.0, "TFLOP/s": 1.0}, 0.01, rounds=3)


def double_it(problem: Problem) -> Sequence[Tensor]:
    a, b = problem.leaves
    return 2 * a, 2 * b


def made_up(*providers: Provider) -> Case:
    """y = 2 x of two sources; a joint provider gets both in one tensor."""

    def draw(at: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
        return Problem(draw_leaves([(at.S, at.D), (at.N, at.D)], dtype, device))

    def join(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(tensors))]

    return Case(
        "made up", "1x16x16", SIZES, SIZES, torch.float32, draw, double_it, providers, "GB/s",
        lambda at, element_bytes: (2.0 * at.J * at.D * element_bytes, 1.0), join=join, join_outputs=join,
    )  # fmt: skip


def test_every_provider_is_listed_and_a_failure_has_its_reason() -> None:
    def fails(problem: Problem) -> Sequence[Tensor]:
        raise RuntimeError("no such kernel")

    case = made_up(
        Provider("kernel (ours)", fails),
        Provider("eager", double_it),
        Provider("library", double_it, "it is not installed"),
        Provider("together", lambda problem: (2 * problem.leaves[0],), joint=True),
        Provider("no gradient", lambda problem: [2 * leaf.detach() for leaf in problem.leaves]),
    )
    found = list(run_case(case, Clock(CPU), RUN))
    names = ["kernel (ours)", "eager", "library", "together", "no gradient"]
    assert [outcome.provider for outcome in found] == names * 2
    assert [outcome.direction for outcome in found] == [FORWARD] * 5 + [BACKWARD] * 5
    ours, eager, library, together, no_gradient = found[5:]
    assert isinstance(ours, Absent) and ours.attempted and ours.reason == "RuntimeError: no such kernel"
    assert isinstance(library, Absent) and not library.attempted and library.reason == "it is not installed"
    assert isinstance(no_gradient, Absent) and "does not require grad" in no_gradient.reason
    for record in (eager, together):
        assert isinstance(record, Record) and record.error_vs_fp64 == 0.0 and record.n == 3

    forward = found[1]
    assert isinstance(forward, Record) and forward.rate is not None
    assert forward.rate * forward.median_s == pytest.approx(2 * 5 * 8 * 4 / 1e9)
    assert (forward.unit, forward.ceiling, forward.dtype) == ("GB/s", 10.0, "float32")


def test_errors_are_seen_in_outputs_and_in_gradients() -> None:
    wrong_gradient = Provider("w", lambda problem: [2 * x + 0.5 * (x - x.detach()) for x in problem.leaves])
    swapped = Provider("s", lambda problem: (2 * problem.leaves[0].flip(0), 2 * problem.leaves[1]))
    case = made_up(wrong_gradient, swapped)
    errors, failed = check(case, CPU, case.providers)
    assert not failed
    assert errors["w"][FORWARD] == 0.0 and errors["w"][BACKWARD] == pytest.approx(0.25)
    assert errors["w"][BOTH] == errors["w"][BACKWARD]
    assert errors["s"][FORWARD] > 0.5


def test_relative_error_of_the_worst_tensor() -> None:
    exact = [torch.tensor([3.0, 4.0]).double(), torch.zeros(2).double()]
    assert relative_error([torch.tensor([3.0, 4.5]), torch.zeros(2)], exact) == pytest.approx(0.1)
    assert relative_error([torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1e-9])], exact) == 1.0


def test_a_case_that_fails_itself_lists_everybody() -> None:
    def broken(problem: Problem) -> Sequence[Tensor]:
        raise RuntimeError("no definition")

    case = replace(made_up(Provider("eager", double_it)), exact=broken)
    found = list(run_case(case, Clock(CPU), RUN))
    assert [type(outcome) for outcome in found] == [Absent, Absent]
    assert all("the case itself failed: RuntimeError: no definition" in outcome.reason for outcome in found)  # type: ignore[union-attr]


def test_every_op_has_a_case_with_the_plain_path_beside_it() -> None:
    found = all_cases(quick=True)
    assert [case.bench for case in found] == [
        "temporal", "spatial", "cross", "modulated_norm", "gated_residual", "gated_residual_norm", "bias_gelu",
        "branch_sum", "project", "block", "block fp8",
    ]  # fmt: skip
    for case in found:
        names = [provider.name for provider in case.providers]
        assert "(ours" in names[0] and any("eager" in name for name in names)
        assert ("torch.compile" in names) != (case.bench == "block fp8")  # there it stands in the block's own rows
        assert len(set(names)) == len(names)


def test_fp8_is_a_bench_of_its_own_beside_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the block's own rows it would pass for the goal in bf16; our block in 16 bits is an alternative here."""
    sizes = Sizes(1, 2, 3, 2, 2, 64)
    case = fp8_block_case("tiny", sizes, sizes, torch.float32, True)
    assert [provider.is_ours for provider in case.providers] == [True, True, False, False]
    errors, _ = check(case, CPU, [case.providers[1], case.providers[3]])
    rounded, eager = (errors[case.providers[i].name][FORWARD] for i in (1, 3))
    assert 1e-3 < rounded < 0.1 and eager < 1e-6
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(cases, "check_device", lambda device, *rest: check_device(torch.device("cuda"), *rest))
    without = fp8_block_case("tiny", sizes, sizes, torch.bfloat16, True)
    assert ["sm_80" in provider.unavailable for provider in without.providers] == [True, True, False, False]


def test_the_blocks_flops_are_those_of_the_workload() -> None:
    sizes = Sizes.of(VideoShape(40, 768, 432), 333, 24, 64)
    case = block_case("40x768x432", sizes, None, torch.bfloat16, True)
    forward = case.amount(FORWARD)
    assert case.amount(BOTH) == 3 * forward
    # 23.1 ms at 790 TFLOP/s, forward and backward: the floor of the whole block
    assert 3 * forward / 790e12 == pytest.approx(23.1e-3, rel=0.005)
    load = Workload(preset("vchitect-2b"), VideoShape(40, 768, 432), 1, 333)
    assert forward == load.linear_flops() + load.attention_flops()


def test_the_saved_bytes_of_the_hand_written_block_are_those_of_the_workload() -> None:
    case = block_case("tiny", replace(SIZES, C=8), None, torch.float32, True)
    problem = case.draw(case.sizes, torch.float32, CPU)
    providers = {provider.name: provider for provider in case.providers}
    load = Workload(block_config(case.sizes), VideoShape(SIZES.T, 16 * SIZES.S, 16), SIZES.B, SIZES.N)
    temb_bytes = 4 * SIZES.B * case.sizes.D  # an input, and every input counts on a CPU
    found = _saved_bytes(providers["hand-written, plain steps (ours)"], problem)
    assert found == sum(load.handwritten_saved_bytes(4).values()) + temb_bytes
    composed, eager = (_saved_bytes(providers[name], problem) for name in ("composed, plain ops (ours)", "eager"))
    assert composed is not None and eager is not None and 2 * found < 1.1 * min(composed, eager)


def test_the_temporal_floor_is_the_bytes_of_its_tensors() -> None:
    case = temporal("40x768x432", Sizes.of(VideoShape(40, 768, 432), 333, 24, 64), None, torch.bfloat16, True)
    floors = [case.amount(way) / 3.0e12 for way in (FORWARD, BACKWARD)]  # at 3.0 TB/s
    assert floors == pytest.approx([0.267e-3, 0.467e-3], rel=0.005)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the case at its real size")
def test_a_real_case_runs_interpreted_and_agrees_with_fp64() -> None:
    [case] = [case for case in all_cases(quick=True) if case.bench == "bias_gelu"]
    assert case.shape.startswith(TINY_SHAPE)
    found = list(run_case(case, Clock(CPU), RUN))
    ours = [outcome for outcome in found if "(ours" in outcome.provider]
    assert len(ours) == 2
    for record in ours:
        assert isinstance(record, Record) and record.error_vs_fp64 is not None and 0 < record.error_vs_fp64 < 1e-6
