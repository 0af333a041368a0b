"""The steps of a block on the kernels: the launchers below the ops, in the form that model/steps.py asks for.

`check` is for the whole block, once; the steps check nothing and have no gradient of their own: model/handwritten.py knows
the backward. What a step writes into was made by its caller (slots of merged buffers, rows that are no longer needed) or is
returned. The gradients of text q, k, v, which three branches add to, are written by the first and added to by the others.

Letters: B batch, T frames, S visual tokens a frame, N text tokens, L rows of one sample, D columns, H heads, C head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import (
    _check,
    adaln,
    bias_gelu,
    cross,
    fp8_rows,
    gated_residual,
    gated_weight,
    spatial,
    temporal,
    tiles,
)
from vchitect_fast.kernels.fp8 import E4M3

OP = "hand-written block"
Tensors = tuple[Tensor, ...]


def check(x_BTSD: Tensor, c_BTND: Tensor, num_heads: int) -> None:
    """UserError where a kernel cannot compute the block of x and c; shapes, dtypes and strides were checked."""
    B, T, S, D = x_BTSD.shape
    _check.runnable(OP, x_BTSD)
    _check.at_most(OP, "hidden dim", D, tiles.MAX_ROW, "one tile holds whole rows")
    _check.at_most(OP, "frames", T, temporal.MAX_FRAMES, "the temporal backward keeps its statistics in registers")
    num_programs = B * (S + c_BTND.shape[2]) * num_heads * -(-T // 16)
    _check.at_most(OP, "temporal problems", num_programs, temporal.MAX_PROGRAMS, "programs of one launch")
    if D // num_heads not in temporal.HEAD_DIMS:
        raise UserError(
            f'{OP}: expected a head dim of 64 or 128, got {D // num_heads}; pass impl="reference" for others.'
        )


def norm(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensors:
    """LayerNorm and modulation; the rows, and mean and rstd [B, L]."""
    n, mean, rstd = _rows_and_statistics(x_BLD)
    adaln.forward_into(x_BLD, shift_BD, scale_BD, eps, n, mean, rstd)
    return n, mean, rstd


def norm_backward(
    dn_BLD: Tensor, x_BLD: Tensor, scale_BD: Tensor, mean_BL: Tensor, rstd_BL: Tensor, residual_BLD: Tensor | None
) -> Tensor:
    """dn becomes dx, the residual gradient added. Returns [2 or 3, B, D]: dshift, dscale, and with a residual sum dx."""
    return adaln.backward_into(dn_BLD, x_BLD, scale_BD, mean_BL, rstd_BL, dn_BLD, residual_BLD).sum(2)


def residual_norm(
    x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, y_BLD: Tensor
) -> Tensors:
    """Write y = x + gate branch; returns norm(y)."""
    n, mean, rstd = _rows_and_statistics(x_BLD)
    gated_residual.forward_into(x_BLD, branch_BLD, gate_BD, y_BLD, (shift_BD, scale_BD, eps, n, mean, rstd))
    return n, mean, rstd


def norm_fp8(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensors:
    """norm of which the kernel writes fp8: q in e4m3, its scales [B, L], mean and rstd."""
    q, row_scale, mean, rstd = _fp8_and_statistics(x_BLD)
    adaln.forward_into(x_BLD, shift_BD, scale_BD, eps, q, mean, rstd, row_scale)
    return q, row_scale, mean, rstd


def residual_norm_fp8(
    x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, y_BLD: Tensor
) -> Tensors:
    """residual_norm, likewise."""
    q, row_scale, mean, rstd = _fp8_and_statistics(x_BLD)
    norm = (shift_BD, scale_BD, eps, q, mean, rstd)
    gated_residual.forward_into(x_BLD, branch_BLD, gate_BD, y_BLD, norm, row_scale)
    return q, row_scale, mean, rstd


def gelu_fp8(pre_RK: Tensor, bias_K: Tensor) -> Tensors:
    """gelu, likewise: q and its scales [R]."""
    return fp8_rows.launch_rows(pre_RK, bias_K)


def gelu_backward_fp8(dh_RK: Tensor, pre_RK: Tensor, bias_K: Tensor) -> Tensors:
    """gelu_backward, likewise, dh untouched: dbias, and q and its scales [R]."""
    return fp8_rows.launch_gelu_backward(dh_RK, pre_RK, bias_K)


def residual(x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor) -> None:
    """branch becomes x + gate branch."""
    gated_residual.forward_into(x_BLD, branch_BLD, gate_BD, branch_BLD, None)


def gate_weights(
    product_DK: Tensor, weight_DK: Tensor, gate_D: Tensor, gated_DK: Tensor, dweight_DK: Tensor, dgate_D: Tensor, add: bool
) -> None:  # fmt: skip
    """gated = gate W; dweight = gate product, added where `add`; dgate = rowsum(W product)."""
    gated_weight.launch(product_DK, weight_DK, gate_D, gated_DK, dweight_DK, dgate_D, add)


def gelu(pre_RK: Tensor, bias_K: Tensor) -> Tensor:
    """GELU (tanh) of pre + bias."""
    return bias_gelu.launch_forward(pre_RK, bias_K)


def gelu_backward(dh_RK: Tensor, pre_RK: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
    """dh becomes dpre; returns dbias, and dpre as products read it."""
    return bias_gelu.backward_into(dh_RK, pre_RK, bias_K, dh_RK), dh_RK


def spatial_attention(visual: Tensors, text: Tensors, outs: Tensors) -> Tensor:
    """Write both outputs; returns the log-sum-exp."""
    return spatial.launch_forward((*visual, *text), *outs)


def spatial_backward(
    douts: Tensors, visual: Tensors, text: Tensors, outs: Tensors, lse: Tensor, grads: Tensors, text_grads: Tensors,
    add_text: bool,
) -> None:  # fmt: skip
    """Write the gradients of q, k, v; those of text are added where `add_text`."""
    spatial.launch_backward(douts, (*visual, *text, *outs, lse), (*grads, *text_grads), add_text=add_text)


def temporal_attention(visual: Tensors, text: Tensors, rope_scaling_factor: float, outs: Tensors) -> None:
    """Write both outputs."""
    temporal.launch_forward(visual, text, rope_scaling_factor, *outs)


def temporal_backward(
    douts: Tensors, visual: Tensors, text: Tensors, rope_scaling_factor: float, grads: Tensors, text_grads: Tensors,
    add_text: bool,
) -> None:  # fmt: skip
    """As spatial_backward."""
    do, text_do = douts
    temporal.launch_backward(do, text_do, visual, text, rope_scaling_factor, grads, text_grads, add_text=add_text)


def cross_attention(inputs: Tensors, outs: Tensors) -> Tensor:
    """Of q, text q and the first frame's k, v [B, N, H, C]: write both outputs; returns the log-sum-exp."""
    return cross.launch_forward(inputs, *outs)


def cross_backward(douts: Tensors, inputs: Tensors, outs: Tensors, lse: Tensor, grads: Tensors, add_text: bool) -> None:
    """Write the gradients of the inputs; those of text q, k, v are added where `add_text`."""
    cross.launch_backward(douts, (*inputs, *outs, lse), grads, add_text=add_text)


def _rows_and_statistics(x_BLD: Tensor) -> Tensors:
    mean, rstd = (x_BLD.new_empty(x_BLD.shape[:2], dtype=torch.float32) for _ in range(2))
    return x_BLD.new_empty(x_BLD.shape), mean, rstd


def _fp8_and_statistics(x_BLD: Tensor) -> Tensors:
    fp32 = [x_BLD.new_empty(x_BLD.shape[:2], dtype=torch.float32) for _ in range(3)]
    return x_BLD.new_empty(x_BLD.shape, dtype=E4M3), *fp32
