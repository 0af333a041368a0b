"""The cost model: its sums against hand-made ones, its pass table against what a block dispatches, interpolation at points.

pytest tests/autotune/test_cost.py; on a made-up device whose rates are constants. How well it predicts a real machine is
not a test, that is what `vchitect-fast autotune verify` prints.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_up_device import BANDWIDTH, FLOPS, device
from torch.utils._python_dispatch import TorchDispatchMode

from vchitect_fast.architecture import preset
from vchitect_fast.autotune import block
from vchitect_fast.autotune.cost import block_seconds, step_cost
from vchitect_fast.autotune.rates import Rates
from vchitect_fast.cluster import Timing
from vchitect_fast.errors import UserError
from vchitect_fast.model.blocks import Block, Branches
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

TINY = preset("vchitect-tiny")
WORK = Workload(TINY, VideoShape(8, 256, 256), 2, 16)
SWEEPING = {"add", "mul", "sub", "neg", "cat", "stack", "clone", "sum", "slice_backward", "select_backward"}
MOVING_NOTHING = {
    "view",
    "t",
    "transpose",
    "permute",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "split",
    "unbind",
    "detach",
    "_unsafe_view",
}
ROTARY_FORWARD, ROTARY_BACKWARD = 8, 9  # passes of the rotary on q and k, which has its own timing


def approximately(value: float) -> object:
    """Equal up to the rounding of summing logarithms."""
    return pytest.approx(value, rel=1e-9)


def test_linear_and_attention_follow_the_flops() -> None:
    """On a device of constant rates the block's matmul time is its FLOPs over the rate, plus the modulation."""
    quiet = [
        replace(timing, forward_s=1e-30, backward_s=1e-30) if timing.op not in ("linear", "attention") else timing
        for timing in device().timings
    ]
    found = block_seconds(WORK, Rates(device(timings=tuple(quiet), op_overhead_s=1e-30)), "float32")
    modulation = 2 * 8 * 2 * 6 * TINY.hidden_dim**2  # two rows cost as much as the 8 of the smallest point
    expected = (WORK.linear_flops() + WORK.attention_flops() + modulation) / FLOPS
    assert found.forward_s == approximately(expected)
    assert found.backward_s == approximately(2 * expected)


def test_optimizer_moves_its_bytes() -> None:
    number = TINY.num_parameters()
    found = step_cost(WORK, device(), "float32", num_recomputed=0, accumulation=1)
    assert found.optimizer_s == approximately(number * (28 + 12 + 12) / BANDWIDTH)
    without = step_cost(WORK, device(), "float32", num_recomputed=0, accumulation=1, ema=False)
    assert found.optimizer_s - without.optimizer_s == approximately(number * 12 / BANDWIDTH)


def test_recompute_is_one_more_forward() -> None:
    plain = step_cost(WORK, device(), "bfloat16", num_recomputed=0, accumulation=1)
    rates = Rates(device())
    middle, last = block_seconds(WORK, rates, "bfloat16"), block_seconds(WORK, rates, "bfloat16", last=True)
    for number in range(TINY.num_layers + 1):
        found = step_cost(WORK, device(), "bfloat16", num_recomputed=number, accumulation=1)
        expected = middle.forward_s * min(number, TINY.num_layers - 1) + (
            last.forward_s if number == TINY.num_layers else 0
        )
        assert found.recompute_s == approximately(expected)
        assert (found.forward_s, found.backward_s) == (plain.forward_s, plain.backward_s)
        assert found.step_s == approximately(sum(found.parts().values()))


def test_accumulation_repeats_all_but_the_optimizer() -> None:
    one = step_cost(WORK, device(), "float32", num_recomputed=1, accumulation=1)
    three = step_cost(WORK, device(), "float32", num_recomputed=1, accumulation=3)
    assert three.forward_s == approximately(3 * one.forward_s)
    assert three.recompute_s == approximately(3 * one.recompute_s)
    assert three.optimizer_s == one.optimizer_s
    adding = 2 * 12 * TINY.num_parameters() / BANDWIDTH  # the second and third gradient are added to the first
    assert three.backward_s == approximately(3 * one.backward_s + adding)


@pytest.mark.parametrize(
    "change",
    [{"shape": VideoShape(9, 256, 256)}, {"shape": VideoShape(8, 272, 256)}, {"batch": 3}, {"num_text_tokens": 17}],
)
def test_more_work_takes_longer(change: dict[str, object]) -> None:
    less = step_cost(WORK, device(), "float32", num_recomputed=2, accumulation=1)
    more = step_cost(replace(WORK, **change), device(), "float32", num_recomputed=2, accumulation=1)
    assert more.forward_s > less.forward_s
    assert more.backward_s > less.backward_s


class Census(TorchDispatchMode):
    """Counts elements of elementwise passes and operations that move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.views = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        self.views += name in MOVING_NOTHING
        if name in SWEEPING:
            moved = args[0] if name == "sum" else out
            self.elements += moved.numel() * (2 if name == "slice_backward" else 1)
        return out


def passes(last: bool, visual: int, text: int) -> tuple[float, float, int, int]:
    """Elements over D x frames of one block's forward and backward, bias gradients left out, and the views of both."""
    config, frames = TINY, 8
    block = Block(config, last=last, branches=Branches())
    x, c = (torch.randn(1, frames, rows, config.hidden_dim, requires_grad=True) for rows in (visual, text))
    temb = torch.randn(1, config.hidden_dim, requires_grad=True)
    with Census() as ahead:
        out = [
            item
            for item in block(x, c, temb, dict.fromkeys(("spatial", "temporal", "cross"), "sdpa"))
            if item is not None
        ]
    gradients = [torch.randn_like(item) for item in out]
    with Census() as behind:
        torch.autograd.backward(out, gradients)
    # Each linear sums its output's gradient for the bias: visual 9 + 5 in the MLP, text likewise, joint 1.
    bias = 15 * visual + (4 if last else 11) * text
    unit = config.hidden_dim * frames
    return ahead.elements / unit, behind.elements / unit - bias, ahead.views, behind.views


@pytest.mark.parametrize("last", [False, True])
def test_pass_table_is_what_a_block_dispatches(last: bool) -> None:
    ahead, behind = (
        (block.FORWARD_PASSES_LAST, block.BACKWARD_PASSES_LAST)
        if last
        else (block.FORWARD_PASSES, block.BACKWARD_PASSES)
    )
    few, more_visual, more_text = passes(last, 24, 24), passes(last, 72, 24), passes(last, 24, 72)
    for index, table, rotary in ((0, ahead, ROTARY_FORWARD), (1, behind, ROTARY_BACKWARD)):
        assert (more_visual[index] - few[index]) / 48 == approximately(table.visual + table.joint + rotary)
        assert (more_text[index] - few[index]) / 48 == approximately(table.text + table.joint + rotary)
    assert few[2:] == (ahead.views, behind.views)


def test_rates_are_exact_at_measured_points_and_between_them() -> None:
    points = tuple(
        Timing("linear", "float32", rows, width, rows * width / 1e6, rows**2 * width / 1e6)
        for rows in (10, 1000)
        for width in (4, 64)
    )
    rates = Rates(replace(device(), timings=points))
    assert rates.linear("float32", 10, 64, 64).forward_s == approximately(640 / 1e6)
    between = rates.linear("float32", 100, 8, 32)  # width 16 in the geometric mean
    assert between.forward_s == approximately(1600 / 1e6)
    assert between.backward_s == approximately(100**2 * 16 / 1e6)
    assert rates.linear("float32", 2000, 64, 64).forward_s == approximately(2 * 64000 / 1e6)  # the largest size's rate
    assert rates.linear("float32", 1, 4, 4).forward_s == approximately(40 / 1e6)  # never below the smallest size


def test_a_gpu_waits_for_the_slower_of_host_and_device() -> None:
    slow_host = replace(device(), kind="cuda", op_overhead_s=1.0)
    assert block_seconds(WORK, Rates(slow_host), "float32").forward_s == block.FORWARD_PASSES.views
    fast_host = replace(device(), kind="cuda", op_overhead_s=1e-12)
    assert block_seconds(WORK, Rates(fast_host), "float32").forward_s < block.FORWARD_PASSES.views


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timings": ()}, "declares no attention_points of made-up CPU in float32"),
        ({"memory_bytes_per_s": None}, "no timings of made-up CPU"),
        ({"timings": device().timings[1:]}, "do not form a grid"),
        ({"timings": tuple(t for t in device().timings if t.op != "gelu")}, "no timings of gelu in float32"),
    ],
)
def test_rejects_a_device_without_the_needed_timings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        step_cost(WORK, device(**changes), "float32", num_recomputed=0, accumulation=1)
