"""Several linears of one input as one GEMM: the seven visual and the three text projections of a block.

    forward    [y_1 | ... | y_n] = x [W_1; ...; W_n]^T + [b_1 | ... | b_n], one buffer [rows, n, D_out]; the y are views of it
    backward   dx = [dy_1 | ... | dy_n] [W_1; ...; W_n];  [dW_1; ...] = [dy_1 | ...]^T x;  [db_1 | ...] = sum over rows
The parameters keep their names and their own storage: the weights are laid side by side at each call, once forward and once
backward (at D = 1536 seven take 33 MB in bf16, beside a GEMM of 65536 rows that moves 1.6 GB), and each gets its slice of
the one weight gradient, a view. The dy_i are read in place where they lie as the y_i do, in one buffer; else they are
stacked, one copy. Saved: x and the parameters. FLOPs: 2 rows D n D_out forward, twice that backward; that over the GEMM's
speed is the floor. Torch's GEMM, any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import _check


def in_one_buffer(parts: Sequence[Tensor]) -> Tensor | None:
    """The [R, n D] tensor whose n equal column slices are `parts` [R, D], in this order, or None: nothing is copied."""
    first, (R, D) = parts[0], parts[0].shape
    if torch.compiler.is_compiling() or first.stride(0) < len(parts) * D or first.stride(1) != 1:
        return None
    for i, part in enumerate(parts):
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.dtype == first.dtype
        if not same or part.stride() != first.stride() or part.storage_offset() != first.storage_offset() + i * D:
            return None
    return first.as_strided((R, len(parts) * D), first.stride())


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_RD, *parameters)
        num = len(parameters) // 2
        weight, bias = (torch.cat(half).to(x_RD.dtype) for half in (parameters[:num], parameters[num:]))
        return F.linear(x_RD, weight, bias).chunk(num, dim=-1)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, *parameters = ctx.saved_tensors
        num = len(dys)
        dy = in_one_buffer(dys)
        dy = torch.cat(dys, dim=-1) if dy is None else dy
        dx = dy @ torch.cat(parameters[:num]).to(x_RD.dtype) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(dy.dtype, torch.float32)
        dtype = parameters[0].dtype
        dweights, dbiases = (dy.T @ x_RD).to(dtype), dy.sum(0, dtype=wide).to(dtype)
        return dx, *dweights.chunk(num), *dbiases.chunk(num)


def project(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x [..., D] with weights [D_out, D] and biases [D_out] -> as many [..., D_out], views of one buffer [..., n, D_out].

    The parameters share one shape and one dtype, which may be wider than that of x. unflatten(-1, (H, C)) gives heads, still
    a view. Any device and float dtype; x with a contiguous last dim.
    """
    op = "project"
    if not weights or len(weights) != len(biases):
        raise UserError(f"{op}: expected a bias for each weight, got {len(weights)} weights and {len(biases)} biases.")
    _check.tensor(op, "x", x, (None,) * x.ndim)
    shape = (weights[0].shape[0], x.shape[-1])
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _check.tensor(op, f"weight {i}", weight, shape, like=x, dtype=weights[0].dtype)
        _check.tensor(op, f"bias {i}", bias, shape[:1], like=x, dtype=weights[0].dtype)
    outputs = _Project.apply(x.flatten(0, -2), *weights, *biases)
    return tuple(y.view(*x.shape[:-1], shape[0]) for y in outputs)
