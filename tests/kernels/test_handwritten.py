"""The hand-written block as a function: strides, missing gradients, bits twice, torch.compile, and what it refuses.

Run: pytest tests/kernels/test_handwritten.py. Interpreted where there is no GPU; its values are held in test_block.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from block_cases import make_block, make_inputs, values
from close import relative_error
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.model import Branches
from vchitect_fast.model.blocks import Block
from vchitect_fast.model.handwritten import handwritten_block

IMPLEMENTATIONS = ["reference", "triton"]
SIZE = (2, 2, 1, 3)  # small: the interpreter takes its time for every program
reference = partial(handwritten_block, impl="reference")
Given = tuple[Block, list[Tensor]]


def given(dtype: torch.dtype, device: torch.device | str = "cpu", **options) -> Given:
    tensors = [x.detach().to(device).requires_grad_() for x in make_inputs(*SIZE, dtype)]
    return make_block(dtype, **options).to(device), tensors


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_same_bits_twice(impl: str, device: torch.device) -> None:
    """Also from a kept graph: nothing that was saved, and no gradient that came in, is written to."""
    block, tensors = given(torch.float32, device)
    x, c = handwritten_block(block, *tensors, impl=impl)
    other_x, other_c = handwritten_block(block, *tensors, impl=impl)
    assert torch.equal(x, other_x) and torch.equal(c, other_c)
    wanted = [*tensors, *block.parameters()]
    douts = [torch.randn_like(x), torch.randn_like(c)]
    before = [dout.clone() for dout in douts]
    first = torch.autograd.grad([x, c], wanted, douts, retain_graph=True)
    second = torch.autograd.grad([x, c], wanted, douts)
    other = torch.autograd.grad([other_x, other_c], wanted, douts)
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, other))
    assert all(map(torch.equal, douts, before))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides_do_not_matter(impl: str, device: torch.device) -> None:
    block, tensors = given(torch.float32, device)
    with torch.no_grad():
        tensors[1][:] = tensors[1][:, :1]  # text that is the same in every frame, as in the first block
    run = partial(handwritten_block, impl=impl)
    plain = values(block, tensors, run)
    x, c, temb = (t.detach() for t in tensors)
    strange = [
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),  # the patch embedding's
        c[:, :1].expand_as(c),
        temb.repeat_interleave(2, dim=1)[:, ::2],
    ]
    assert not any(t.is_contiguous() for t in strange)
    other = values(block, [t.requires_grad_() for t in strange], run)
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_of_any_strides(impl: str, device: torch.device) -> None:
    block, tensors = given(torch.float32, device)
    wanted = [*tensors, *block.parameters()]
    outs = handwritten_block(block, *tensors, impl=impl)
    ones = [torch.ones((), device=device).expand_as(out) for out in outs]  # what out.sum() hands over
    expanded = torch.autograd.grad(outs, wanted, ones, retain_graph=True)
    full = torch.autograd.grad(outs, wanted, [one.contiguous() for one in ones])
    assert all(map(torch.equal, expanded, full))


@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_that_nobody_uses_has_a_zero_gradient(unused: int) -> None:
    block, tensors = given(torch.float64)
    wanted = [*tensors, *block.parameters()]
    outs = reference(block, *tensors)
    douts = [torch.randn_like(out) * (i != unused) for i, out in enumerate(outs)]
    used = 1 - unused
    alone = torch.autograd.grad(outs[used], wanted, douts[used], retain_graph=True, materialize_grads=True)
    both = torch.autograd.grad(outs, wanted, douts, materialize_grads=True)
    assert all(map(torch.equal, alone, both))


def test_without_gradients_nothing_is_saved() -> None:
    block, tensors = given(torch.float64)
    expected = reference(block, *tensors)[0]
    kept: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda held: held):
        x, _ = reference(block, *tensors)
    assert torch.equal(x, expected) and not x.requires_grad and not kept


def test_frozen_parameters_and_inputs_change_nothing_else() -> None:
    block, tensors = given(torch.float64)
    expected = values(block, tensors, reference)
    block.attn.to_q.weight.requires_grad_(False)
    x, c = reference(block, tensors[0].detach(), *tensors[1:])
    (x.sum() + c.sum()).backward()
    assert block.attn.to_q.weight.grad is None and tensors[1].grad is not None
    assert relative_error(x, expected["x"]) == 0


def test_torch_compile_runs_it_outside_its_graph() -> None:
    block, tensors = given(torch.float32)

    def around(block: Block, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        x, c = reference(block, *(2 * t for t in tensors))
        return x + 1, c

    compiled = torch.compile(around, backend="eager")
    expected, found = values(block, tensors, around), values(block, tensors, compiled)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="launches its kernels itself"):
        torch.compile(around, backend="eager", fullgraph=True)(block, *tensors)


def test_a_second_derivative_is_refused() -> None:
    block, tensors = given(torch.float64)
    x, _ = reference(block, *tensors)
    with pytest.raises(UserError, match="no second derivative.*set_kernels\\(None\\)"):
        torch.autograd.grad(x.sum(), tensors, create_graph=True)


def autocast(block: Block, tensors: list[Tensor]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference(block, *tensors)


REFUSED: dict[str, tuple[Callable[[Block, list[Tensor]], object], str]] = {
    "x of other rank": (lambda block, t: reference(block, t[0][0], *t[1:]), "x of shape \\[any, any, any, any\\]"),
    "x of other width": (lambda block, t: reference(block, t[0][..., :32], *t[1:]), "x of shape \\[2, 2, any, 64\\]"),
    "text of other frames": (lambda block, t: reference(block, t[0], t[1][:, :1], t[2]), "c of shape \\[2, 2, any, 64\\]"),
    "temb of other samples": (lambda block, t: reference(block, *t[:2], t[2][:1]), "temb of shape \\[2, 64\\]"),
    "no frame": (lambda block, t: reference(block, *(x[:, :0] for x in t[:2]), t[2]), "at least one element"),
    "no text": (lambda block, t: reference(block, t[0], t[1][:, :, :0], t[2]), "at least one element"),
    "other dtype": (lambda block, t: reference(block, t[0].double(), *t[1:]), "x in float32, got float64"),
    "mixed inputs": (lambda block, t: reference(block, t[0], t[1].double(), t[2]), "c in float32, got float64"),
    "mixed parameters": (lambda block, t: reference(block.double().attn.float() and block, *t), "x in float64"),
    "one parameter": (lambda block, t: block.ff.double() and reference(block, *t), "another in ff.net"),
    "other device": (lambda block, t: reference(block, t[0], t[1].to("meta"), t[2]), "c on cpu, got meta"),
    "autocast": (autocast, "outside torch.autocast"),
    "implementation": (lambda block, t: handwritten_block(block, *t, impl="cuda"), "unknown impl 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        call(*given(torch.float32))


def test_refused_by_the_kernels(device: torch.device) -> None:
    narrow = make_block(torch.float32, num_heads=2, head_dim=16).to(device)
    tensors = [x.to(device) for x in make_inputs(*SIZE, torch.float32, 32)]
    with pytest.raises(UserError, match="head dim of 64 or 128, got 16"):
        handwritten_block(narrow, *tensors, impl="triton")
    block, tensors = given(torch.float64, device)
    with pytest.raises(UserError, match="float32, bfloat16 or float16, got float64"):
        handwritten_block(block, *tensors, impl="triton")
    block = make_block(torch.float32).to(device)
    long = [x.to(device) for x in make_inputs(1, 513, 1, 1, torch.float32)]
    with pytest.raises(UserError, match="frames of at most 512"):
        handwritten_block(block, *long, impl="triton")


def test_no_branch_is_refused() -> None:
    block, tensors = given(torch.float32, branches=Branches(False, False, False))
    with pytest.raises(UserError, match="expected an attention branch to compute, got .* at 2 frames"):
        reference(block, *tensors)
