"""The fused composition of a block against blocks.py: the same answer and the same gradients, on either implementation.

Run: pytest tests/kernels/test_block.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from close import assert_close_to_exact, relative_error
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.model import Branches, VchitectTransformer, preset
from vchitect_fast.model.blocks import Block
from vchitect_fast.model.fused import fused_block

# One head of 64: the smallest that the attention kernels take.
CONFIG = replace(
    preset("vchitect-nano"),
    num_attention_heads=1,
    attention_head_dim=64,
    caption_projection_dim=64,
    rope_scaling_factor=1.5,
)
SIZES = [(2, 3, 5, 7), (1, 1, 6, 4)]  # B, T, S, N: odd and two samples; an image
BACKEND = {"spatial": "math", "temporal": "math", "cross": "math"}


def make(last: bool, dtype: torch.dtype) -> Block:
    torch.manual_seed(0)
    block = Block(CONFIG, last=last, branches=Branches())
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return block.to(dtype)


def inputs(B: int, T: int, S: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    drawn = (torch.randn(B, T, S, 64), torch.randn(B, T, N, 64), torch.randn(B, 64))
    return [x.to(dtype).requires_grad_() for x in drawn]


def run(block: Block, tensors: list[Tensor], impl: str | None) -> dict[str, Tensor]:
    """Outputs, and the gradients of inputs and parameters, by name; impl None is blocks.py."""
    x, c = block(*tensors, BACKEND) if impl is None else fused_block(block, *tensors, impl=impl)
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    loss = (x * weight).sum() + (0 if c is None else (c * c.detach().cos()).sum())
    block.zero_grad()
    names = {name: parameter for name, parameter in block.named_parameters()} | dict(zip("xct", tensors, strict=True))
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    result = {f"d {name}": gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
    return result | {"x": x.detach()} | ({} if c is None else {"c": c.detach()})


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_composition_is_the_block(size: tuple[int, ...], last: bool) -> None:
    """fp64 on the reference ops: only the order of sums differs."""
    block, tensors = make(last, torch.float64), inputs(*size, torch.float64)
    plain, fused = run(block, tensors, None), run(block, tensors, "reference")
    assert plain.keys() == fused.keys()
    for name, exact in plain.items():
        if exact.norm() == 0:  # an image leaves zero gradients in the temporal weights
            assert fused[name].norm() == 0, name
        else:
            assert relative_error(fused[name], exact) < 1e-10, name


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_give_the_block(size: tuple[int, ...], last: bool) -> None:
    """fp32 on the kernels (interpreted where there is no GPU) against fp64, by the rule of close.py."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    low, tensors = make(last, torch.float32).to(device), inputs(*size, torch.float32)
    tensors = [x.detach().to(device).requires_grad_() for x in tensors]
    double = [x.detach().double().requires_grad_() for x in tensors]
    fused, plain = run(low, tensors, "triton"), run(low, tensors, None)
    exact = run(make(last, torch.float64).to(device), double, None)
    for name, value in exact.items():
        if value.norm() < 1e-9:
            continue  # exactly 0 but for rounding: a bias of spatial keys moves all scores of a query alike
        assert_close_to_exact(fused[name], value, plain[name], reduced=64 * 64, name=name)


def test_the_model_switches_and_refuses() -> None:
    torch.manual_seed(0)
    model = VchitectTransformer(CONFIG).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = (
        torch.randn(2, 3, 16, 4, 4).double(),
        torch.randn(2, 5, 12).double(),
        torch.randn(2, 20).double(),
        torch.tensor([3.0, 900.0]),
    )
    plain = model(*batch)
    model.set_kernels("reference")
    assert relative_error(model(*batch), plain) < 1e-10
    model.set_kernels(None)
    assert torch.equal(model(*batch), plain)
    with pytest.raises(UserError, match="unknown"):
        model.set_kernels("tritn")
    with pytest.raises(UserError, match="all three branches"):
        VchitectTransformer(CONFIG, Branches(cross=False)).set_kernels("reference")
