"""What one step of the hand-written block computes, and the same in plain torch: any device, any float dtype.

    steps_of("reference") or steps_of("triton")     a Steps: handwritten.py is written once over these functions
Each writes into the buffers that it is given (slots of merged ones, of any strides) or returns new ones, and has no
gradient of its own: the formulas of the backward stand here written out. A log-sum-exp is whatever its own backward reads.
Attention writes its scores out, so this is for tests, for fp64 and for small shapes. On the kernels: kernels/block_steps.py.

Letters: B batch, T frames, S visual tokens a frame, N text tokens, J = S + N, L rows of one sample, R rows, D columns,
K columns of the MLP, H heads, C head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vchitect_fast.kernels._check import is_reference
from vchitect_fast.kernels.fp8 import Quantised
from vchitect_fast.kernels.reference import rotary_tables, rotate, split

Tensors = tuple[Tensor, ...]
Operand = Tensor | Quantised  # what a product reads: rows as they are, or in fp8
PRODUCTS = ("operand", "linear", "input_gradient", "weight_gradient")  # torch's GEMM, whoever computes the rest


@dataclass(frozen=True)
class Steps:
    """The functions by name; their arguments stand below, in the plain ones."""

    check: Callable[[Tensor, Tensor, int], None]
    norm: Callable[..., tuple[Operand, Tensor, Tensor]]
    norm_backward: Callable[..., Tensor]
    residual_norm: Callable[..., tuple[Operand, Tensor, Tensor]]
    residual: Callable[..., None]
    gate_weights: Callable[..., None]
    gelu: Callable[..., Operand]
    gelu_backward: Callable[..., tuple[Tensor, Operand]]
    operand: Callable[[Tensor], Operand]
    linear: Callable[..., Tensor]
    input_gradient: Callable[..., None]
    weight_gradient: Callable[..., None]
    spatial_attention: Callable[..., Tensor]
    spatial_backward: Callable[..., None]
    temporal_attention: Callable[..., None]
    temporal_backward: Callable[..., None]
    cross_attention: Callable[..., Tensor]
    cross_backward: Callable[..., None]


@cache
def steps_of(impl: str) -> Steps:
    """The table of "triton" or "reference"; UserError for another name."""
    source: Any = globals()
    if not is_reference(impl):
        from vchitect_fast.kernels import block_steps  # Triton is imported where it is first asked for

        source = {name: source[name] for name in PRODUCTS} | vars(block_steps)
    return Steps(**{field.name: source[field.name] for field in fields(Steps)})


def wide(x: Tensor) -> torch.dtype:
    """The dtype to sum in: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def check(x_BTSD: Tensor, c_BTND: Tensor, num_heads: int) -> None:
    """UserError where these steps cannot compute a block of x and c; plain torch takes all that a Layout allows."""


def norm(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensors:
    """LayerNorm and modulation; the rows, and mean and rstd [B, L]."""
    x = x_BLD.to(wide(x_BLD))
    mean = x.mean(-1)
    rstd = ((x - mean[..., None]).square().mean(-1) + eps).rsqrt()
    y = (x - mean[..., None]) * rstd[..., None] * (1 + scale_BD[:, None]) + shift_BD[:, None]
    return y.to(x_BLD.dtype), mean, rstd


def norm_backward(
    dn_BLD: Tensor, x_BLD: Tensor, scale_BD: Tensor, mean_BL: Tensor, rstd_BL: Tensor, residual_BLD: Tensor | None
) -> Tensor:
    """dn becomes dx, the residual gradient added. Returns [2 or 3, B, D]: dshift, dscale, and with a residual sum dx."""
    dn, rstd = dn_BLD.to(wide(dn_BLD)), rstd_BL[..., None]
    xhat = (x_BLD - mean_BL[..., None]) * rstd
    g = dn * (1 + scale_BD[:, None])
    dx = rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    sums = [dn.sum(1), (dn * xhat).sum(1)]
    if residual_BLD is not None:
        dx = dx + residual_BLD
        sums.append(dx.sum(1))
    dn_BLD.copy_(dx)
    return torch.stack(sums)


def residual_norm(
    x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, y_BLD: Tensor
) -> Tensors:
    """Write y = x + gate branch; returns norm(y)."""
    y_BLD.copy_(x_BLD + gate_BD[:, None] * branch_BLD)
    return norm(y_BLD, shift_BD, scale_BD, eps)


def residual(x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor) -> None:
    """branch becomes x + gate branch."""
    branch_BLD.mul_(gate_BD[:, None]).add_(x_BLD)


def gate_weights(
    product_DK: Tensor, weight_DK: Tensor, gate_D: Tensor, gated_DK: Tensor, dweight_DK: Tensor, dgate_D: Tensor, add: bool
) -> None:  # fmt: skip
    """gated = gate W; dweight = gate product, added where `add`; dgate = rowsum(W product)."""
    product, gate = product_DK.to(dgate_D.dtype), gate_D[:, None].to(dgate_D.dtype)
    torch.sum(product * weight_DK, 1, out=dgate_D)
    gated_DK.copy_(gate * weight_DK)
    dweight_DK.add_(gate * product) if add else dweight_DK.copy_(gate * product)


def gelu(pre_RK: Tensor, bias_K: Tensor) -> Tensor:
    """GELU (tanh) of pre + bias."""
    return F.gelu(pre_RK + bias_K, approximate="tanh")


def gelu_backward(dh_RK: Tensor, pre_RK: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
    """dh becomes dpre; returns dbias, and dpre as products read it."""
    z = (pre_RK + bias_K).to(wide(pre_RK))
    gate = torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    dpre = dh_RK * (gate + 2 * z * gate * (1 - gate) * slope)
    dh_RK.copy_(dpre)
    return dpre.sum(0), dh_RK


def operand(x: Tensor) -> Tensor:
    """Rows, or a weight [columns out, columns in], as the three products below read them."""
    return x


def linear(x: Tensor, weight_DK: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """x W^T + b; x [..., K]."""
    return F.linear(x, weight_DK, bias_D)


def input_gradient(d: Tensor, weight_DK: Tensor, out: Tensor) -> None:
    """Write d W; d [..., D], out [..., K], contiguous."""
    torch.mm(d.flatten(0, -2), weight_DK, out=out.view(-1, out.shape[-1]))


def weight_gradient(d: Tensor, parts: Sequence[Tensor], out_DK: Tensor) -> None:
    """Write d^T x, summed over the rows; d [..., D], x in parts [..., K_i] whose columns follow each other."""
    for x, out in zip(parts, out_DK.split([x.shape[-1] for x in parts], dim=1), strict=True):
        torch.mm(d.flatten(0, -2).T, x.flatten(0, -2), out=out)


def spatial_attention(visual: Tensors, text: Tensors, outs: Tensors) -> Tensor:
    """Write both outputs; returns the log-sum-exp [B, T, H, J]."""
    out, lse = _attend(*_heads_first(visual, text))
    _put(outs, out.transpose(2, 3))
    return lse


def spatial_backward(
    douts: Tensors, visual: Tensors, text: Tensors, outs: Tensors, lse: Tensor, grads: Tensors, text_grads: Tensors,
    add_text: bool,
) -> None:  # fmt: skip
    """Write the gradients of q, k, v; those of text are added where `add_text`."""
    do, out = _heads_first(douts[:1], douts[1:])[0], _heads_first(outs[:1], outs[1:])[0]
    q, k, v = _heads_first(visual, text)
    found = _attend_backward(do, q, k, v, (do * out).sum(-1), lse)
    for pair in zip(grads, text_grads, found, strict=True):
        _put(pair[:2], pair[2].transpose(2, 3), add_text=add_text)


def temporal_attention(visual: Tensors, text: Tensors, rope_scaling_factor: float, outs: Tensors) -> None:
    """Write both outputs."""
    out, _ = _attend(*_frames_last(visual, text, rope_scaling_factor))
    _put(outs, out.permute(0, 3, 1, 2, 4))


def temporal_backward(
    douts: Tensors, visual: Tensors, text: Tensors, rope_scaling_factor: float, grads: Tensors, text_grads: Tensors,
    add_text: bool,
) -> None:  # fmt: skip
    """As spatial_backward; nothing but q, k, v was saved, so the output is made again."""
    q, k, v = _frames_last(visual, text, rope_scaling_factor)
    do = torch.cat(douts, dim=2).to(q.dtype).permute(0, 2, 3, 1, 4)
    out, lse = _attend(q, k, v)
    dq, dk, dv = (x.permute(0, 3, 1, 2, 4) for x in _attend_backward(do, q, k, v, (do * out).sum(-1), lse))
    cos, sin = rotary_tables(q.shape[-2], q.shape[-1], rope_scaling_factor, q.device)
    for pair in zip(grads, text_grads, (rotate(dq, cos, -sin), rotate(dk, cos, -sin), dv), strict=True):
        _put(pair[:2], pair[2], add_text=add_text)


def cross_attention(inputs: Tensors, outs: Tensors) -> Tensor:
    """Of q, text q and the first frame's k, v [B, N, H, C]: write both outputs; returns the log-sum-exp [B, H, T J]."""
    T, J = inputs[0].shape[1], inputs[0].shape[2] + inputs[1].shape[2]
    out, lse = _attend(*_one_sequence(inputs))
    _put(outs, out.transpose(1, 2).unflatten(1, (T, J)))
    return lse


def cross_backward(douts: Tensors, inputs: Tensors, outs: Tensors, lse: Tensor, grads: Tensors, add_text: bool) -> None:
    """Write the gradients of the inputs; those of text q, k, v are added where `add_text`."""
    T, J = inputs[0].shape[1], inputs[0].shape[2] + inputs[1].shape[2]
    do, out = (_one_sequence((*pair, *inputs[2:]))[0] for pair in (douts, outs))
    q, k, v = _one_sequence(inputs)
    dq, dk, dv = (x.transpose(1, 2) for x in _attend_backward(do, q, k, v, (do * out).sum(-1), lse))
    _put(grads[:2], dq.unflatten(1, (T, J)), add_text=add_text)
    for target, value in zip(grads[2:], (dk, dv), strict=True):
        target.add_(value) if add_text else target.copy_(value)


def _heads_first(visual: Tensors, text: Tensors) -> list[Tensor]:
    """[B, T, H, J, C] of each pair, in the wide dtype."""
    return [torch.cat(pair, dim=2).transpose(2, 3).to(wide(pair[0])) for pair in zip(visual, text, strict=True)]


def _frames_last(visual: Tensors, text: Tensors, rope_scaling_factor: float) -> list[Tensor]:
    """q, k turned, and v, [B, J, H, T, C], in the wide dtype."""
    q, k, v = (torch.cat(pair, dim=2).to(wide(pair[0])) for pair in zip(visual, text, strict=True))
    cos, sin = rotary_tables(q.shape[1], q.shape[-1], rope_scaling_factor, q.device)
    return [x.permute(0, 2, 3, 1, 4) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v)]


def _one_sequence(inputs: Tensors) -> list[Tensor]:
    """q [B, H, T J, C] and k, v [B, H, N, C], in the wide dtype."""
    q = torch.cat(inputs[:2], dim=2).flatten(1, 2)
    return [x.transpose(1, 2).to(wide(x)) for x in (q, *inputs[2:])]


def _put(targets: Tensors, joint: Tensor, *, add_text: bool = False) -> None:
    """Visual and text rows of [B, T, J, H, C] into their buffers."""
    visual, text = split(joint, targets[0].shape[2])
    targets[0].copy_(visual)
    targets[1].add_(text) if add_text else targets[1].copy_(text)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(C)) v over [..., L, C], and the log-sum-exp [..., L]."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v, lse


def _attend_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor) -> Tensors:
    """dq, dk, dv; delta = rowsum(do o)."""
    root = 1 / math.sqrt(q.shape[-1])
    p = (q @ k.transpose(-1, -2) * root - lse[..., None]).exp()
    ds = p * (do @ v.transpose(-1, -2) - delta[..., None]) * root
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do
