"""Bias and GELU (tanh) in one pass over the MLP's widest activation, the bias gradient summed on the way back.

    forward    z = x + bias;  y = z s(2u),  u = sqrt(2/pi) (z + 0.044715 z^3),  s(a) = 1 / (1 + e^-a)
    backward   dx = dy (s + 2 z s (1 - s) u'),  u' = sqrt(2/pi) (1 + 3 * 0.044715 z^2);  dbias = sum over rows of dx
z s(2u) is z (1 + tanh u) / 2 without the cancellation at negative z. Everything between load and store is fp32.
Saved: x (the pre-activation that the floor needs anyway) and bias. dbias: fp32 partials [programs, D], then one sum in a
fixed order. Bytes, with e the element size: forward 2 R D e, backward 3 R D e plus 8 R D / 64 for the partials (written
and read again, one fp32 row for every 64 rows); that over the memory's speed is the floor.
Source: Hendrycks & Gimpel 2016. R rows, D columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vchitect_fast.kernels import _check, tiles
from vchitect_fast.kernels._op import register, rows
from vchitect_fast.kernels.aot import Variant, pointers

# The interpreter multiplies tensor * constexpr but not constexpr * tensor: constants stand on the right.
LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def gate(z):
    """s(2u) of the formula above; e^-2u overflows to inf for very negative z, and the gate is then 0."""
    u = (z + z * z * z * CUBIC) * SQRT_2_OVER_PI
    return 1.0 / (1.0 + tl.exp2(u * (-2.0 * LOG2_E)))


@triton.jit
def gradient(z):
    """dy/dz of the formula above."""
    s = gate(z)
    du = (1.0 + z * z * (3.0 * CUBIC)) * SQRT_2_OVER_PI
    return s + 2.0 * z * s * (1.0 - s) * du


@triton.jit
def _forward_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    stride_xr,
    stride_yr,
    num_rows,
    num_columns,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_sheets = tl.cdiv(num_columns, BLOCK_D)
    pid = tl.program_id(0).to(tl.int64)
    r = (pid // num_sheets) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    d = (pid % num_sheets) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (r < num_rows) & (d < num_columns)
    bias = tl.load(bias_ptr + d, mask=d < num_columns, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + r * stride_xr + d, mask=inside, other=0.0).to(tl.float32) + bias
    tl.store(y_ptr + r * stride_yr + d, (z * gate(z)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    dbias_ptr,
    stride_dyr,
    stride_xr,
    stride_dxr,
    num_rows,
    num_columns,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_sheets = tl.cdiv(num_columns, BLOCK_D)
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid // num_sheets
    d = (pid % num_sheets) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    bias = tl.load(bias_ptr + d, mask=d < num_columns, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for block in range(NUM_BLOCKS):
        r = (chunk * NUM_BLOCKS + block) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (r < num_rows) & (d < num_columns)
        dy = tl.load(dy_ptr + r * stride_dyr + d, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(x_ptr + r * stride_xr + d, mask=inside, other=0.0).to(tl.float32) + bias
        dx = dy * gradient(z)
        tl.store(dx_ptr + r * stride_dxr + d, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        total += dx
    tl.store(dbias_ptr + chunk * num_columns + d, tl.sum(total, axis=0, keep_dims=True), mask=d < num_columns)


def launch_forward(x_RD: Tensor, bias_D: Tensor) -> Tensor:
    """Launch the forward. Nothing is checked."""
    R, D = x_RD.shape
    tile = tiles.BIAS_GELU_FORWARD
    y_RD = x_RD.new_empty(R, D)
    grid = (triton.cdiv(R, tile.block_rows) * triton.cdiv(D, tile.block_columns),)
    _forward_kernel[grid](
        x_RD,
        bias_D,
        y_RD,
        x_RD.stride(0),
        y_RD.stride(0),
        R,
        D,
        BLOCK_R=tile.block_rows,
        BLOCK_D=tile.block_columns,
        num_warps=tile.num_warps,
    )
    return y_RD


def backward_into(dy_RD: Tensor, x_RD: Tensor, bias_D: Tensor, dx_RD: Tensor) -> Tensor:
    """Launch the backward; dx may be dy itself. Returns dbias in fp32. Nothing is checked."""
    R, D = x_RD.shape
    tile = tiles.BIAS_GELU_BACKWARD
    num_chunks = triton.cdiv(R, tile.block_rows * tile.num_blocks)
    partial = x_RD.new_empty(num_chunks, D, dtype=torch.float32)
    _backward_kernel[(num_chunks * triton.cdiv(D, tile.block_columns),)](
        dy_RD,
        x_RD,
        bias_D,
        dx_RD,
        partial,
        dy_RD.stride(0),
        x_RD.stride(0),
        dx_RD.stride(0),
        R,
        D,
        NUM_BLOCKS=tile.num_blocks,
        BLOCK_R=tile.block_rows,
        BLOCK_D=tile.block_columns,
        num_warps=tile.num_warps,
    )
    return partial.sum(0)


def _launch_backward(dy_RD: Tensor, x_RD: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor]:
    dx_RD = x_RD.new_empty(x_RD.shape)
    dbias = backward_into(dy_RD, x_RD, bias_D, dx_RD)
    return dx_RD, dbias.to(bias_D.dtype)


def _fake_forward(x_RD: Tensor, bias_D: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape)


def _fake_backward(dy_RD: Tensor, x_RD: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor]:
    return x_RD.new_empty(x_RD.shape), bias_D.new_empty(bias_D.shape)


_forward = register("bias_gelu_forward", "(Tensor x, Tensor bias) -> Tensor", launch_forward, _fake_forward)
_backward = register(
    "bias_gelu_backward", "(Tensor dy, Tensor x, Tensor bias) -> (Tensor, Tensor)", _launch_backward, _fake_backward
)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, bias_D: Tensor) -> Tensor:
        ctx.save_for_backward(x_RD, bias_D)
        return _forward(x_RD, bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, Tensor]:
        return _backward(rows(dy_RD), *ctx.saved_tensors)


def aot_variants() -> list[Variant]:
    """The MLP's width at 1536: 6144."""
    variants = []
    for dtype in ("bf16", "fp16", "fp32"):
        sizes = {"num_rows": "i32", "num_columns": "i32:16"}
        forward, backward = tiles.BIAS_GELU_FORWARD, tiles.BIAS_GELU_BACKWARD
        signature = pointers(f"{dtype}:16", "x", "bias", "y") | {"stride_xr": "i32:16", "stride_yr": "i32:16"} | sizes
        constants = {"BLOCK_R": forward.block_rows, "BLOCK_D": forward.block_columns}
        variants.append(Variant(_forward_kernel, signature, constants, forward.num_warps, f"bias_gelu forward {dtype}"))
        signature = pointers(f"{dtype}:16", "dy", "x", "bias", "dx") | pointers("fp32:16", "dbias")
        signature |= {f"stride_{name}r": "i32:16" for name in ("dy", "x", "dx")} | sizes
        constants = {
            "NUM_BLOCKS": backward.num_blocks,
            "BLOCK_R": backward.block_rows,
            "BLOCK_D": backward.block_columns,
        }
        label = f"bias_gelu backward {dtype}"
        variants.append(Variant(_backward_kernel, signature, constants, backward.num_warps, label))
    return variants


def bias_gelu(x: Tensor, bias_D: Tensor) -> Tensor:
    """GELU (tanh) of x + bias, x [..., D] with a contiguous last dim, bias [D]; the result is contiguous, dtype of x."""
    _check.runnable("bias_gelu", x)
    _check.tensor("bias_gelu", "x", x, (None,) * x.ndim)
    _check.tensor("bias_gelu", "bias", bias_D, (x.shape[-1],), like=x)
    return _BiasGelu.apply(x.flatten(0, -2), bias_D).view(x.shape)
