"""What the tests of a whole block share: a small one with random weights, its inputs, its outputs and gradients by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.model import Branches, preset
from vchitect_fast.model.blocks import Block

MATH = {"spatial": "math", "temporal": "math", "cross": "math"}
ALL = Branches()
Run = Callable[..., Any]  # of block, x, c, temb


def config_of(num_heads: int = 1, head_dim: int = 64) -> TransformerConfig:
    """One head of 64 is the smallest that the attention kernels take."""
    return replace(
        preset("vchitect-nano"), num_attention_heads=num_heads, attention_head_dim=head_dim,
        caption_projection_dim=num_heads * head_dim, rope_scaling_factor=1.5,
    )  # fmt: skip


def make_block(
    dtype: torch.dtype, *, last: bool = False, branches: Branches = ALL, num_heads: int = 1, head_dim: int = 64
) -> Block:
    torch.manual_seed(0)
    block = Block(config_of(num_heads, head_dim), last=last, branches=branches)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return block.to(dtype)


def make_inputs(B: int, T: int, S: int, N: int, dtype: torch.dtype, D: int = 64) -> list[Tensor]:
    drawn = (torch.randn(B, T, S, D), torch.randn(B, T, N, D), torch.randn(B, D))
    return [x.to(dtype).requires_grad_() for x in drawn]


def plain(block: Block, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
    """blocks.py, its softmax written out."""
    return block(*tensors, MATH)


def values(block: Block, tensors: list[Tensor], run: Run) -> dict[str, Tensor]:
    """Outputs of run(block, x, c, temb), and the gradients of inputs and parameters that get one, by name."""
    x, c = run(block, *tensors)
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
    loss = (x * weight).sum() + (0 if c is None else (c * c.detach().cos()).sum())
    names = {name: parameter for name, parameter in block.named_parameters()} | dict(zip("xct", tensors, strict=True))
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    result = {f"d {name}": gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
    return result | {"x": x.detach()} | ({} if c is None else {"c": c.detach()})
