"""A trace of the hand-written block has no glue on rows: no concatenation, fill, copy, add or slice backward.

Run: pytest tests/kernels/test_handwritten_trace.py. Glue is any concatenation, and an aten op of GLUE that touches a tensor of
rows; on [B, D] vectors and [D, D] weights it is allowed. In plain torch the steps themselves copy, and on a CPU a product copies
its bias first: what runs inside those is passed over there. On a GPU the steps are kernels and nothing is passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from block_cases import Run, make_block, make_inputs
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from vchitect_fast.model import handwritten
from vchitect_fast.model.fused import fused_block
from vchitect_fast.model.handwritten import handwritten_block
from vchitect_fast.model.steps import PRODUCTS, Steps, steps_of

SIZE = B, T, S, N = 3, 5, 11, 13  # no size of a weight, nor a number of slots or chunks
ROW_SIZES = {S, N, T * S, T * N, B * T * S, B * T * N, S + N, T * (S + N)}
JOINS = {"aten::cat", "aten::stack"}  # a trace has no shapes of a list
GLUE = {
    *("aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"),
    *("aten::zero_", "aten::fill_", "aten::zeros_like", "aten::new_zeros", "aten::add", "aten::add_"),
    *("aten::slice_backward", "aten::select_backward", "aten::split_backward", "aten::cat_backward"),
    *("aten::index_put_", "aten::index_add_", "aten::constant_pad_nd", "aten::repeat"),
}
SILENT = {"empty", "empty_like", "new_empty", "detach", "_unsafe_view", "t", "split", "unbind"}
STEP = "step "
OWN = (STEP, "aten::addmm", "aten::mm")


def marked(impl: str) -> Steps:
    """The steps, each within a range of the trace; products show what they run."""

    def within(name: str, step: Callable) -> Callable:
        def called(*args):
            with record_function(STEP + name):
                return step(*args)

        return called

    steps = vars(steps_of(impl)).items()
    return Steps(**{name: step if name in PRODUCTS else within(name, step) for name, step in steps})


def trace(run: Run, dtype: torch.dtype, device: torch.device | str, last: bool) -> list[FunctionEvent]:
    """Events of one forward and backward, gradients of everything."""
    block = make_block(dtype, last=last).to(device)
    tensors = [x.detach().to(device).requires_grad_() for x in make_inputs(*SIZE, dtype)]
    wanted = [*tensors, *(p for name, p in block.named_parameters() if not (last and "to_add_out" in name))]

    def once() -> None:
        outs = [out for out in run(block, *tensors) if out is not None]
        torch.autograd.grad(outs, wanted, douts[: len(outs)])

    douts = [torch.randn_like(x) for x in tensors[:2]]
    once()  # kernels are compiled and tables made before
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, record_shapes=True) as profiler:
        once()
    return list(profiler.events())


def glue(events: list[FunctionEvent], *, everywhere: bool) -> Counter:
    """Names and shapes of the glue; not `everywhere` passes over what runs inside a step or a product."""
    found: Counter = Counter()
    for event in events:
        sizes = {size for shape in event.input_shapes for size in shape}
        is_glue = event.name in JOINS or (event.name in GLUE and sizes & ROW_SIZES)
        if is_glue and (everywhere or not inside(event)):
            found[event.name, str([shape for shape in event.input_shapes if shape])] += 1
    return found


def inside(event: FunctionEvent) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith(OWN) or inside(parent))


@pytest.fixture
def reference_steps(monkeypatch: pytest.MonkeyPatch) -> Run:
    steps = marked("reference")
    monkeypatch.setattr(handwritten, "steps_of", lambda impl: steps)
    return partial(handwritten_block, impl="reference")


@pytest.mark.parametrize("last", [False, True])
def test_the_structure_has_no_glue(last: bool, reference_steps: Run) -> None:
    events = trace(reference_steps, torch.float32, "cpu", last)
    assert glue(events, everywhere=False) == Counter()
    names = Counter(event.name for event in events)
    assert names[STEP + "spatial_attention"] == names[STEP + "spatial_backward"] == 1, "the trace must show the steps"
    assert names["aten::mm"] > 20, "and the products of backward"


def test_the_composition_has_all_of_it() -> None:
    found = {
        name
        for name, _ in glue(trace(partial(fused_block, impl="reference"), torch.float32, "cpu", False), everywhere=True)
    }
    assert {"aten::cat", "aten::copy_", "aten::add_", "aten::slice_backward"} <= found


def cat_rows(qkv: tuple[Tensor, Tensor]) -> object:
    return torch.cat([x[..., :64] for x in qkv], dim=1)


def zeros_of_rows(qkv: tuple[Tensor, Tensor]) -> object:
    return torch.zeros_like(qkv[0])


def copied_slots(qkv: tuple[Tensor, Tensor]) -> object:
    return qkv[0][..., :64].contiguous()


def added_slices(qkv: tuple[Tensor, Tensor]) -> object:
    return qkv[0][..., :64] + qkv[0][..., 64:128]


@pytest.mark.parametrize("plant", [cat_rows, zeros_of_rows, copied_slots, added_slices])
def test_planted_glue_is_found(plant: Callable, reference_steps: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = handwritten._attend

    def planted(steps, at, qkv):
        plant(qkv)
        return attend(steps, at, qkv)

    monkeypatch.setattr(handwritten, "_attend", planted)
    assert glue(trace(reference_steps, torch.float32, "cpu", False), everywhere=False)


def test_vectors_and_weights_are_not_rows(reference_steps: Run) -> None:
    """The rule lets something through: weights side by side, pieces of the modulation's gradient, sums of two biases."""
    events = trace(reference_steps, torch.float32, "cpu", False)
    allowed = {event.name for event in events if event.name in GLUE and not inside(event)}
    assert {"aten::copy_", "aten::add"} <= allowed


class OverRows(TorchDispatchMode):
    """Counts every op but views and allocations that reads or writes rows; what an op of ours calls is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [item for item in tree_leaves((args, kwargs, out)) if isinstance(item, Tensor)]
        namespace, _, name = func._schema.name.partition("::")
        if not func.is_view and name not in SILENT and any(set(item.shape) & ROW_SIZES for item in tensors):
            self.counts[name if namespace == "aten" else namespace] += 1
        return out


def test_over_rows_run_products_kernels_and_sums_of_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample, not the last block. The figures of docs/log.md."""

    def unseen(step: Callable) -> Callable:
        def called(*args):
            with _disable_current_modes():
                return step(*args)

        return called

    every = vars(steps_of("reference")).items()
    steps = Steps(**{name: step if name in PRODUCTS else unseen(step) for name, step in every})
    monkeypatch.setattr(handwritten, "steps_of", lambda impl: steps)
    found = {}
    for name, run in (
        ("hand-written", partial(handwritten_block, impl="reference")),
        ("composed", partial(fused_block, impl="triton")),
    ):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        block = make_block(torch.float32).to(device)
        tensors = [x.detach().to(device).requires_grad_() for x in make_inputs(1, *SIZE[1:], torch.float32)]
        douts = [torch.randn_like(x) for x in tensors[:2]]
        with OverRows() as counting:
            torch.autograd.grad(run(block, *tensors), [*tensors, *block.parameters()], douts)
        found[name] = counting.counts
    assert found["hand-written"] == Counter(mm=20, addmm=6, sum=4)
    composed = found["composed"]
    assert composed["mm"] + composed["addmm"] == 24
    assert composed >= Counter(cat=4, add=8, sum=6, fill_=2, select_backward=2)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
def test_the_kernels_have_no_glue(last: bool) -> None:
    """Nothing is passed over: what the launchers call counts too."""
    events = trace(partial(handwritten_block, impl="triton"), torch.bfloat16, "cuda", last)
    assert glue(events, everywhere=True) == Counter()
    names = Counter(event.name for event in events)
    assert names["aten::mm"] > 20 and sum("_backward_kernel" in name for name in names.elements()) > 3
