"""LayerNorm without affine and the modulation of AdaLN-Zero in one pass over the rows.

    forward    xhat = (x - mean) rstd;  y = xhat (1 + scale) + shift        shift, scale [B, D]: one row a sample
    backward   g = dy (1 + scale);  dx = rstd (g - mean(g) - xhat mean(g xhat));  dshift = sum dy;  dscale = sum dy xhat
               RESIDUAL: dx += residual, the gradient of x's other reader, and total = sum dx (the bias gradient behind x)
mean and the variance are of one row, in fp32, as is all between load and store; the sums run over the rows of one sample.
Saved: x (the residual, which the block keeps anyway), scale, and mean and rstd in fp32 [B, L].
dshift and dscale: every program sums its rows into one fp32 row, one sum in a fixed order adds those; no atomics.
Bytes, e the element size: forward 2 B L D e, backward 3 B L D e plus 16 B L D / 32 for the partials (with the residual one
pass and half of those more); over the memory's speed that is the floor. One tile holds whole rows, so D <= 4096.
The forward can write y in fp8, rows as quantised_rows of reference.py but rounded once: 1.5 B L D e in 16 bits.
Source: Peebles & Xie 2023.
B samples, L rows of one sample, D columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vchitect_fast.kernels import _check, tiles
from vchitect_fast.kernels._fp8 import FIRST_CC, store_rows
from vchitect_fast.kernels._op import register, rows
from vchitect_fast.kernels._rows import load_tile, load_vector, norm_gradient, statistics, store_tile
from vchitect_fast.kernels.aot import Variant, pointers


@triton.jit
def _forward_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    y_ptr,
    row_scale_ptr,
    mean_ptr,
    rstd_ptr,
    stride_xb,
    stride_xl,
    stride_shiftb,
    stride_scaleb,
    stride_yb,
    stride_yl,
    num_rows,
    num_columns,
    eps,
    FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks_per_sample = tl.cdiv(num_rows, BLOCK_L)
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks_per_sample
    row = (pid % blocks_per_sample) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    is_row, is_column = row < num_rows, d < num_columns
    inside = is_row & is_column
    x = load_tile(x_ptr, b, row, d, stride_xb, stride_xl, inside)
    shift = load_vector(shift_ptr, b, stride_shiftb, d, is_column)
    scale = load_vector(scale_ptr, b, stride_scaleb, d, is_column)
    mean, rstd = statistics(x, is_column, num_columns, eps)
    y = (x - mean) * rstd * (scale + 1.0) + shift
    if FP8:
        store_rows(y_ptr, row_scale_ptr, y, b, row, d, stride_yb, stride_yl, num_rows, num_columns, INTERPRETED)
    else:
        store_tile(y_ptr, y, b, row, d, stride_yb, stride_yl, inside)
    tl.store(mean_ptr + b * num_rows + row, mean, mask=is_row)
    tl.store(rstd_ptr + b * num_rows + row, rstd, mask=is_row)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    residual_ptr,
    dx_ptr,
    dshift_ptr,
    dscale_ptr,
    total_ptr,
    stride_dyb,
    stride_dyl,
    stride_xb,
    stride_xl,
    stride_scaleb,
    stride_residualb,
    stride_residuall,
    stride_dxb,
    stride_dxl,
    num_rows,
    num_columns,
    RESIDUAL: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunks_per_sample = tl.cdiv(num_rows, BLOCK_L * NUM_BLOCKS)
    pid = tl.program_id(0).to(tl.int64)
    b, chunk = pid // chunks_per_sample, pid % chunks_per_sample
    d = tl.arange(0, BLOCK_D)[None, :]
    is_column = d < num_columns
    factor = load_vector(scale_ptr, b, stride_scaleb, d, is_column) + 1.0
    dshift, dscale = tl.zeros((1, BLOCK_D), tl.float32), tl.zeros((1, BLOCK_D), tl.float32)
    if RESIDUAL:
        total = tl.zeros((1, BLOCK_D), tl.float32)
    for block in range(NUM_BLOCKS):
        row = (chunk * NUM_BLOCKS + block) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
        is_row = row < num_rows
        inside = is_row & is_column
        dy = load_tile(dy_ptr, b, row, d, stride_dyb, stride_dyl, inside)
        x = load_tile(x_ptr, b, row, d, stride_xb, stride_xl, inside)
        mean = tl.load(mean_ptr + b * num_rows + row, mask=is_row, other=0.0)
        rstd = tl.load(rstd_ptr + b * num_rows + row, mask=is_row, other=0.0)
        xhat = tl.where(is_column, (x - mean) * rstd, 0.0)
        dx = norm_gradient(dy * factor, xhat, rstd, num_columns)
        if RESIDUAL:
            dx += load_tile(residual_ptr, b, row, d, stride_residualb, stride_residuall, inside)
            total += tl.sum(dx, axis=0, keep_dims=True)  # 0 in rows beyond the end
        store_tile(dx_ptr, dx, b, row, d, stride_dxb, stride_dxl, inside)
        dshift += tl.sum(dy, axis=0, keep_dims=True)
        dscale += tl.sum(dy * xhat, axis=0, keep_dims=True)
    tl.store(dshift_ptr + pid * num_columns + d, dshift, mask=is_column)
    tl.store(dscale_ptr + pid * num_columns + d, dscale, mask=is_column)
    if RESIDUAL:
        tl.store(total_ptr + pid * num_columns + d, total, mask=is_column)


def forward_into(
    x_BLD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    y_BLD: Tensor,
    mean_BL: Tensor,
    rstd_BL: Tensor,
    row_scale_BL: Tensor | None = None,
) -> None:
    """Launch the forward; mean, rstd and scales of rows contiguous fp32; with scales y is e4m3. Nothing is checked."""
    B, L, D = x_BLD.shape
    tile = tiles.rows_forward(D)
    _forward_kernel[(B * triton.cdiv(L, tile.block_rows),)](
        x_BLD,
        shift_BD,
        scale_BD,
        y_BLD,
        mean_BL if row_scale_BL is None else row_scale_BL,
        mean_BL,
        rstd_BL,
        *x_BLD.stride()[:2],
        shift_BD.stride(0),
        scale_BD.stride(0),
        *y_BLD.stride()[:2],
        L,
        D,
        eps,
        FP8=row_scale_BL is not None,
        INTERPRETED=_check.interpreted(),
        BLOCK_L=tile.block_rows,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=tile.num_warps,
    )


def backward_into(
    dy_BLD: Tensor,
    x_BLD: Tensor,
    scale_BD: Tensor,
    mean_BL: Tensor,
    rstd_BL: Tensor,
    dx_BLD: Tensor,
    residual_BLD: Tensor | None = None,
) -> Tensor:
    """Launch the backward, dx may be dy or the residual. Nothing is checked.

    Returns partial sums [2 or 3, B, programs of a sample, D] in fp32: dshift, dscale, and with a residual total.
    """
    B, L, D = x_BLD.shape
    tile = tiles.rows_backward(D)
    num_chunks = triton.cdiv(L, tile.block_rows * tile.num_blocks)
    partial = x_BLD.new_empty(2 if residual_BLD is None else 3, B, num_chunks, D, dtype=torch.float32)
    residual = dx_BLD if residual_BLD is None else residual_BLD
    _backward_kernel[(B * num_chunks,)](
        dy_BLD,
        x_BLD,
        scale_BD,
        mean_BL,
        rstd_BL,
        residual,
        dx_BLD,
        *partial[:2],
        partial[-1],
        *dy_BLD.stride()[:2],
        *x_BLD.stride()[:2],
        scale_BD.stride(0),
        *residual.stride()[:2],
        *dx_BLD.stride()[:2],
        L,
        D,
        RESIDUAL=residual_BLD is not None,
        NUM_BLOCKS=tile.num_blocks,
        BLOCK_L=tile.block_rows,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=tile.num_warps,
    )
    return partial


def _launch_forward(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _fake_forward(x_BLD, shift_BD, scale_BD, eps)
    forward_into(x_BLD, shift_BD, scale_BD, eps, y, mean, rstd)
    return y, mean, rstd


def _launch_backward(
    dy_BLD: Tensor, x_BLD: Tensor, scale_BD: Tensor, mean_BL: Tensor, rstd_BL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x_BLD.new_empty(x_BLD.shape)
    partial = backward_into(dy_BLD, x_BLD, scale_BD, mean_BL, rstd_BL, dx)
    dshift, dscale = (one.sum(1) for one in partial)  # two sums: the outputs of an op must not share storage
    return dx, dshift.to(scale_BD.dtype), dscale.to(scale_BD.dtype)


def _fake_forward(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x_BLD.new_empty(x_BLD.shape[:2], dtype=torch.float32) for _ in range(2))
    return x_BLD.new_empty(x_BLD.shape), mean, rstd


def _fake_backward(
    dy_BLD: Tensor, x_BLD: Tensor, scale_BD: Tensor, mean_BL: Tensor, rstd_BL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x_BLD.new_empty(x_BLD.shape), scale_BD.new_empty(scale_BD.shape), scale_BD.new_empty(scale_BD.shape)


_forward = register(
    "modulated_norm_forward",
    "(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward = register(
    "modulated_norm_backward",
    "(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _forward(x_BLD, shift_BD, scale_BD, eps)
        ctx.save_for_backward(x_BLD, scale_BD, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_backward(rows(dy_BLD), *ctx.saved_tensors), None


def aot_variants() -> list[Variant]:
    """D = 1536 (released), and 4096 (the widest) in bf16."""
    variants = []
    for D, dtype in [(1536, "bf16"), (1536, "fp16"), (1536, "fp32"), (4096, "bf16")]:
        low, fp32, block_d = f"{dtype}:16", "fp32:16", triton.next_power_of_2(D)
        sizes = {"num_rows": "i32", "num_columns": "i32:16"}
        tile = tiles.rows_forward(D)
        signature = pointers(low, "x", "shift", "scale", "y") | pointers(fp32, "row_scale", "mean", "rstd") | sizes
        signature |= {f"stride_{name}": "i32:16" for name in ("xb", "xl", "shiftb", "scaleb", "yb", "yl")}
        signature |= {"eps": "fp32"}
        constants = {"FP8": False, "INTERPRETED": False, "BLOCK_L": tile.block_rows, "BLOCK_D": block_d}
        label = f"adaln forward {dtype} D={D}"
        variants.append(Variant(_forward_kernel, signature, constants, tile.num_warps, label))
        if dtype == "bf16":
            signature, constants = signature | pointers("fp8e4nv:16", "y"), constants | {"FP8": True}
            variants.append(
                Variant(_forward_kernel, signature, constants, tile.num_warps, f"{label} to fp8", first_cc=FIRST_CC)
            )
        tile = tiles.rows_backward(D)
        signature = pointers(low, "dy", "x", "scale", "residual", "dx") | sizes
        signature |= pointers(fp32, "mean", "rstd", "dshift", "dscale", "total")
        strides = ("dyb", "dyl", "xb", "xl", "scaleb", "residualb", "residuall", "dxb", "dxl")
        signature |= {f"stride_{name}": "i32:16" for name in strides}
        for residual in (False, True):
            constants = {"NUM_BLOCKS": tile.num_blocks, "BLOCK_L": tile.block_rows, "BLOCK_D": block_d}
            label = f"adaln backward {dtype} D={D}{' residual' if residual else ''}"
            constants["RESIDUAL"] = residual
            variants.append(Variant(_backward_kernel, signature, constants, tile.num_warps, label))
    return variants


def modulated_norm(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, contiguous, in the dtype of x; all three in one dtype, last dims contiguous."""
    op = "modulated_norm"
    _check.runnable(op, x_BLD)
    _check.tensor(op, "x", x_BLD, (None, None, None))
    B, _, D = x_BLD.shape
    _check.at_most(op, "hidden dim", D, tiles.MAX_ROW, "one tile holds whole rows")
    for name, vector in (("shift", shift_BD), ("scale", scale_BD)):
        _check.tensor(op, name, vector, (B, D), like=x_BLD)
    return _ModulatedNorm.apply(x_BLD, shift_BD, scale_BD, eps)
