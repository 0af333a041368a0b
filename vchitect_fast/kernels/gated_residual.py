"""The gated residual of a block and the LayerNorm + modulation that reads it next, in one pass over the rows.

    forward    y = x + gate branch;  xhat = (y - mean) rstd;  n = xhat (1 + scale) + shift     gate, shift, scale [B, D]
    backward   g = dn (1 + scale);  dx = dy + rstd (g - mean(g) - xhat mean(g xhat));  dbranch = gate dx
               dgate = sum dx branch;  dshift = sum dn;  dscale = sum dn xhat
The sums run over the rows of one sample. The block's end has the residual alone: no n, and dx is dy itself.
The row is rounded to y's type before its mean is taken, as the next reader of y would; the rest is fp32 up to the store.
Saved: y (the residual, which the block keeps anyway), branch, gate, scale, and mean and rstd in fp32 [B, L].
dgate, dshift, dscale: every program sums its rows into one fp32 row, one sum in a fixed order adds those; no atomics.
Bytes, e the element size: forward 4 B L D e (3 alone), backward 6 B L D e (3 alone: dy, branch, dbranch), and 24 B L D / 32
(8 alone) for the partials; over the memory's speed that is the floor. One tile holds whole rows, so D <= 4096.
Source: Peebles & Xie 2023. B samples, L rows of one sample, D columns.
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
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    y_ptr,
    n_ptr,
    row_scale_ptr,
    mean_ptr,
    rstd_ptr,
    stride_xb,
    stride_xl,
    stride_branchb,
    stride_branchl,
    stride_gateb,
    stride_shiftb,
    stride_scaleb,
    stride_yb,
    stride_yl,
    stride_nb,
    stride_nl,
    num_rows,
    num_columns,
    eps,
    NORM: tl.constexpr,
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
    branch = load_tile(branch_ptr, b, row, d, stride_branchb, stride_branchl, inside)
    y = x + load_vector(gate_ptr, b, stride_gateb, d, is_column) * branch
    store_tile(y_ptr, y, b, row, d, stride_yb, stride_yl, inside)
    if NORM:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        shift = load_vector(shift_ptr, b, stride_shiftb, d, is_column)
        scale = load_vector(scale_ptr, b, stride_scaleb, d, is_column)
        mean, rstd = statistics(y, is_column, num_columns, eps)
        n = (y - mean) * rstd * (scale + 1.0) + shift
        if FP8:
            store_rows(n_ptr, row_scale_ptr, n, b, row, d, stride_nb, stride_nl, num_rows, num_columns, INTERPRETED)
        else:
            store_tile(n_ptr, n, b, row, d, stride_nb, stride_nl, inside)
        tl.store(mean_ptr + b * num_rows + row, mean, mask=is_row)
        tl.store(rstd_ptr + b * num_rows + row, rstd, mask=is_row)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dn_ptr,
    y_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dbranch_ptr,
    dgate_ptr,
    dshift_ptr,
    dscale_ptr,
    stride_dyb,
    stride_dyl,
    stride_dnb,
    stride_dnl,
    stride_yb,
    stride_yl,
    stride_branchb,
    stride_branchl,
    stride_gateb,
    stride_scaleb,
    stride_dxb,
    stride_dxl,
    stride_dbranchb,
    stride_dbranchl,
    num_rows,
    num_columns,
    NORM: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunks_per_sample = tl.cdiv(num_rows, BLOCK_L * NUM_BLOCKS)
    pid = tl.program_id(0).to(tl.int64)
    b, chunk = pid // chunks_per_sample, pid % chunks_per_sample
    d = tl.arange(0, BLOCK_D)[None, :]
    is_column = d < num_columns
    gate = load_vector(gate_ptr, b, stride_gateb, d, is_column)
    dgate = tl.zeros((1, BLOCK_D), tl.float32)
    if NORM:
        factor = load_vector(scale_ptr, b, stride_scaleb, d, is_column) + 1.0
        dshift, dscale = tl.zeros((1, BLOCK_D), tl.float32), tl.zeros((1, BLOCK_D), tl.float32)
    for block in range(NUM_BLOCKS):
        row = (chunk * NUM_BLOCKS + block) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
        is_row = row < num_rows
        inside = is_row & is_column
        dx = load_tile(dy_ptr, b, row, d, stride_dyb, stride_dyl, inside)
        branch = load_tile(branch_ptr, b, row, d, stride_branchb, stride_branchl, inside)
        if NORM:
            dn = load_tile(dn_ptr, b, row, d, stride_dnb, stride_dnl, inside)
            y = load_tile(y_ptr, b, row, d, stride_yb, stride_yl, inside)
            mean = tl.load(mean_ptr + b * num_rows + row, mask=is_row, other=0.0)
            rstd = tl.load(rstd_ptr + b * num_rows + row, mask=is_row, other=0.0)
            xhat = tl.where(is_column, (y - mean) * rstd, 0.0)
            dx += norm_gradient(dn * factor, xhat, rstd, num_columns)
            store_tile(dx_ptr, dx, b, row, d, stride_dxb, stride_dxl, inside)
            dshift += tl.sum(dn, axis=0, keep_dims=True)
            dscale += tl.sum(dn * xhat, axis=0, keep_dims=True)
        store_tile(dbranch_ptr, gate * dx, b, row, d, stride_dbranchb, stride_dbranchl, inside)
        dgate += tl.sum(dx * branch, axis=0, keep_dims=True)
    tl.store(dgate_ptr + pid * num_columns + d, dgate, mask=is_column)
    if NORM:
        tl.store(dshift_ptr + pid * num_columns + d, dshift, mask=is_column)
        tl.store(dscale_ptr + pid * num_columns + d, dscale, mask=is_column)


def forward_into(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    y: Tensor,
    norm: tuple[Tensor, Tensor, float, Tensor, Tensor, Tensor] | None,
    row_scale: Tensor | None = None,
) -> None:
    """Launch the forward; `norm` is (shift, scale, eps, n, mean, rstd) or None, with scales of rows n is e4m3.

    y may be x or branch. Nothing is checked.
    """
    B, L, D = x.shape
    tile = tiles.rows_forward(D)
    shift, scale, eps, n, mean, rstd = norm or (gate, gate, 0.0, y, y, y)
    _forward_kernel[(B * triton.cdiv(L, tile.block_rows),)](
        *(x, branch, gate, shift, scale, y, n, mean if row_scale is None else row_scale, mean, rstd),
        *x.stride()[:2],
        *branch.stride()[:2],
        *(gate.stride(0), shift.stride(0), scale.stride(0)),
        *y.stride()[:2],
        *n.stride()[:2],
        *(L, D, eps),
        NORM=norm is not None,
        FP8=row_scale is not None,
        INTERPRETED=_check.interpreted(),
        BLOCK_L=tile.block_rows,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=tile.num_warps,
    )


def backward_into(
    dy: Tensor,
    branch: Tensor,
    gate: Tensor,
    dbranch: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None,
) -> list[Tensor]:
    """Launch the backward; `norm` is (dn, y, scale, mean, rstd, dx) or None. dx may be dy or dn, dbranch may be branch.

    Returns dgate, and with a norm dshift and dscale, [B, D] in fp32. Nothing is checked.
    """
    B, L, D = dy.shape
    tile = tiles.gated_backward(D)
    num_chunks = triton.cdiv(L, tile.block_rows * tile.num_blocks)
    partial = dy.new_empty(3 if norm else 1, B, num_chunks, D, dtype=torch.float32)
    dn, y, scale, mean, rstd, dx = norm or (dy, dy, gate, dy, dy, dbranch)
    _backward_kernel[(B * num_chunks,)](
        *(dy, dn, y, branch, gate, scale, mean, rstd, dx, dbranch),
        *(partial if norm else (partial, partial, partial)),
        *(stride for t in (dy, dn, y, branch) for stride in t.stride()[:2]),
        *(gate.stride(0), scale.stride(0)),
        *(stride for t in (dx, dbranch) for stride in t.stride()[:2]),
        *(L, D),
        NORM=norm is not None,
        NUM_BLOCKS=tile.num_blocks,
        BLOCK_L=tile.block_rows,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=tile.num_warps,
    )
    return [one.sum(1) for one in partial]  # one sum each: the outputs of an op must not share storage


def _launch_forward(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    y = _fake_forward(x, branch, gate)
    forward_into(x, branch, gate, y, None)
    return y


def _launch_backward(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dbranch = branch.new_empty(branch.shape)
    [dgate] = backward_into(dy, branch, gate, dbranch, None)
    return dbranch, dgate.to(gate.dtype)


def _launch_norm_forward(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, n, mean, rstd = _fake_norm_forward(x, branch, gate, shift, scale, eps)
    forward_into(x, branch, gate, y, (shift, scale, eps, n, mean, rstd))
    return y, n, mean, rstd


def _launch_norm_backward(
    dy: Tensor, dn: Tensor, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dbranch = y.new_empty(y.shape), branch.new_empty(branch.shape)
    sums = backward_into(dy, branch, gate, dbranch, (dn, y, scale, mean, rstd, dx))
    dgate, dshift, dscale = (one.to(gate.dtype) for one in sums)
    return dx, dbranch, dgate, dshift, dscale


def _fake_forward(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape)


def _fake_norm_forward(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, rstd


def _fake_norm_backward(
    dy: Tensor, dn: Tensor, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dgate, dshift, dscale = (gate.new_empty(gate.shape) for _ in range(3))
    return y.new_empty(y.shape), branch.new_empty(branch.shape), dgate, dshift, dscale


_forward = register(
    "gated_residual_forward", "(Tensor x, Tensor branch, Tensor gate) -> Tensor", _launch_forward, _fake_forward
)
_backward = register(
    "gated_residual_backward",
    "(Tensor dy, Tensor branch, Tensor gate) -> (Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
_norm_forward = register(
    "gated_residual_norm_forward",
    "(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_norm_forward,
    _fake_norm_forward,
)
_norm_backward = register(
    "gated_residual_norm_backward",
    "(Tensor dy, Tensor dn, Tensor y, Tensor branch, Tensor gate, Tensor scale, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_norm_backward,
    _fake_norm_backward,
)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(branch, gate)
        return _forward(x, branch, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dy, *_backward(rows(dy), *ctx.saved_tensors)


class _GatedResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, n, mean, rstd = _norm_forward(x, branch, gate, shift, scale, eps)
        ctx.save_for_backward(y, branch, gate, scale, mean, rstd)
        return y, n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dn: Tensor) -> tuple[Tensor | None, ...]:
        return *_norm_backward(rows(dy), rows(dn), *ctx.saved_tensors), None


def aot_variants() -> list[Variant]:
    """D = 1536 (released), and 4096 (the widest) in bf16; with the norm and alone."""
    variants = []
    for D, dtype, norm in [
        *((1536, dtype, norm) for dtype in ("bf16", "fp16", "fp32") for norm in (True, False)),
        (4096, "bf16", True),
    ]:
        low, block_d = f"{dtype}:16", triton.next_power_of_2(D)
        statistic = "fp32:16" if norm else low  # alone, the unused arguments are other tensors
        name = f"{dtype} D={D}{'' if norm else ' alone'}"
        sizes = {"num_rows": "i32", "num_columns": "i32:16"}
        tile = tiles.rows_forward(D)
        signature = pointers(low, "x", "branch", "gate", "shift", "scale", "y", "n") | pointers(
            statistic, "row_scale", "mean", "rstd"
        )
        constants = {"NORM": norm, "FP8": False, "INTERPRETED": False, "BLOCK_L": tile.block_rows, "BLOCK_D": block_d}
        inputs = ("xb", "xl", "branchb", "branchl", "gateb", "shiftb", "scaleb", "yb", "yl", "nb", "nl")
        signature |= {f"stride_{name}": "i32:16" for name in inputs} | sizes | {"eps": "fp32"}
        variants.append(
            Variant(_forward_kernel, signature, constants, tile.num_warps, f"gated_residual forward {name}")
        )
        if norm and dtype == "bf16":
            signature, constants = signature | pointers("fp8e4nv:16", "n"), constants | {"FP8": True}
            label = f"gated_residual forward {name} to fp8"
            variants.append(Variant(_forward_kernel, signature, constants, tile.num_warps, label, first_cc=FIRST_CC))
        tile = tiles.gated_backward(D)
        signature = pointers(low, "dy", "dn", "y", "branch", "gate", "scale", "dx", "dbranch")
        signature |= pointers(statistic, "mean", "rstd") | pointers("fp32:16", "dgate", "dshift", "dscale") | sizes
        strides = ("dyb", "dyl", "dnb", "dnl", "yb", "yl", "branchb", "branchl", "gateb", "scaleb", "dxb", "dxl")
        signature |= {f"stride_{name}": "i32:16" for name in (*strides, "dbranchb", "dbranchl")}
        constants = {"NORM": norm, "NUM_BLOCKS": tile.num_blocks, "BLOCK_L": tile.block_rows, "BLOCK_D": block_d}
        variants.append(
            Variant(_backward_kernel, signature, constants, tile.num_warps, f"gated_residual backward {name}")
        )
    return variants


def _check_inputs(op: str, x_BLD: Tensor, branch_BLD: Tensor, **vectors: Tensor) -> None:
    _check.runnable(op, x_BLD)
    _check.tensor(op, "x", x_BLD, (None, None, None))
    B, _, D = x_BLD.shape
    _check.at_most(op, "hidden dim", D, tiles.MAX_ROW, "one tile holds whole rows")
    _check.tensor(op, "branch", branch_BLD, tuple(x_BLD.shape), like=x_BLD)
    for name, vector in vectors.items():
        _check.tensor(op, name, vector, (B, D), like=x_BLD)


def gated_residual(x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """x + gate branch, contiguous, in the dtype of x; all in one dtype, last dims contiguous."""
    _check_inputs("gated_residual", x_BLD, branch_BLD, gate=gate_BD)
    return _GatedResidual.apply(x_BLD, branch_BLD, gate_BD)


def gated_residual_norm(
    x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """y = x + gate branch, and LayerNorm(y) (1 + scale) + shift; dtypes and strides as gated_residual."""
    _check_inputs("gated_residual_norm", x_BLD, branch_BLD, gate=gate_BD, shift=shift_BD, scale=scale_BD)
    return _GatedResidualNorm.apply(x_BLD, branch_BLD, gate_BD, shift_BD, scale_BD, eps)
