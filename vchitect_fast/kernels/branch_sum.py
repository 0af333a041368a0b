"""The sum of the three branches behind their output linears, as one GEMM over the concatenated K axis.

    chained    y = to_out(w spatial + to_out_context(cross)) + to_out_temporal(temporal)              w = 1.1 as released
    merged     y = [spatial | cross | temporal] [w Wo | Wo Wc | Wt]^T + (Wo bc + bo + bt)
    backward   dX = dy M with the merged weight M; [dA | dP | dT] = dy^T X;  s = sum over rows of dy
               dWo = w dA + dP Wc^T + s bc^T;  dWc = Wo^T dP;  dWt = dT;  dbc = Wo^T s;  dbo = dbt = s
The chained form is the definition. The merged one has its FLOPs, 6 R D^2 forward and 12 backward, which over the GEMM's
speed are the floor, and never writes the rows between the steps: the outputs of to_out_context, of to_out and of
to_out_temporal, and the sum that to_out reads. Forming M costs 2 D^3 FLOPs a call, D / 3R of the forward.
M is formed in the parameters' dtype, each element accumulated in fp32 and rounded once, then cast to that of the rows;
the bias is summed in fp32. It is formed anew in backward. Saved: the rows X (of the attentions) and the parameters.
Text rows: the same with to_add_out and to_add_out_temporal. An image (T = 1) takes the temporal term times 0: its columns
are not read, its parameters get zero gradients, not missing ones. There is no kernel of ours here: torch's GEMM, any device.

R rows, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import _check

Linear = tuple[Tensor, Tensor]  # weight [D, D] and bias [D]


def merged_parameters(out: Linear, context: Linear, temporal: Linear, w: float, K: int, dtype: torch.dtype) -> Linear:
    """The merged weight [D, K], K = 2 D or 3 D, and bias [D], in `dtype`; with K = 2 D the temporal part is left out."""
    (Wo, bo), (Wc, bc), (Wt, bt) = out, context, temporal
    D = Wo.shape[0]
    weight = torch.empty(D, K, dtype=dtype, device=Wo.device)
    weight[:, :D] = w * Wo
    weight[:, D : 2 * D] = Wo @ Wc
    wide = torch.promote_types(Wo.dtype, torch.float32)
    bias = Wo.to(wide) @ bc.to(wide) + bo
    if K == 3 * D:
        weight[:, 2 * D :] = Wt
        bias = bias + bt
    return weight, bias.to(dtype)


class _BranchSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_R3D: Tensor, w: float, K: int, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x_R3D, *parameters)
        ctx.w, ctx.K = w, K
        weight, bias = merged_parameters(*_pairs(parameters), w, K, x_R3D.dtype)
        return F.linear(x_R3D[:, :K], weight, bias)

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_R3D, *parameters = ctx.saved_tensors
        w, K, D = ctx.w, ctx.K, dy_RD.shape[-1]
        weight, _ = merged_parameters(*_pairs(parameters), w, K, x_R3D.dtype)
        dx = x_R3D.new_empty(x_R3D.shape)
        torch.mm(dy_RD, weight, out=dx[:, :K])
        dx[:, K:] = 0
        dWs, dWp, *dWts = (dy_RD.T @ x_R3D[:, :K]).split(D, dim=1)

        (Wo, bo), (Wc, bc), (Wt, bt) = _pairs(parameters)
        wide = torch.promote_types(Wo.dtype, torch.float32)
        s = dy_RD.sum(0, dtype=wide)
        dWp = dWp.to(Wo.dtype)
        dWo = w * dWs.to(wide) + dWp @ Wc.T + torch.outer(s, bc.to(wide))
        dbc = Wo.T.to(wide) @ s
        dWt, dbt = (dWts[0].to(Wt.dtype), s) if dWts else (torch.zeros_like(Wt), torch.zeros_like(s))
        gradients = (dWo.to(Wo.dtype), s.to(bo.dtype), Wo.T @ dWp, dbc.to(bc.dtype), dWt, dbt.to(bt.dtype))
        return dx, None, None, *gradients


def _pairs(parameters: Any) -> tuple[Linear, Linear, Linear]:
    """Wo, bo, Wc, bc, Wt, bt -> ((Wo, bo), (Wc, bc), (Wt, bt))."""
    Wo, bo, Wc, bc, Wt, bt = parameters
    return (Wo, bo), (Wc, bc), (Wt, bt)


def _chained(x_R3D: Tensor, out: Linear, context: Linear, temporal: Linear, w: float, is_image: bool) -> Tensor:
    spatial, cross, time = x_R3D.chunk(3, dim=-1)
    y = F.linear(w * spatial + F.linear(cross, *context), *out)
    if is_image:
        time = torch.zeros_like(time)
    return y + (0.0 if is_image else 1.0) * F.linear(time, *temporal)


def branch_sum(
    x_R3D: Tensor,
    out: Linear,
    context: Linear,
    temporal: Linear,
    *,
    spatial_weight: float,
    is_image: bool,
    chained: bool = False,
) -> Tensor:
    """Rows [R, 3 D] whose columns are [spatial | cross | temporal], any row stride -> y [R, D] in their dtype.

    Each linear is (weight [D, D], bias [D]), the six in one dtype, which may be wider than that of the rows.
    `is_image`: T = 1, the temporal term times 0. `chained`: the two linears one after the other, parameters cast to the rows'
    dtype. Any device and float dtype.
    """
    op, D = "branch_sum", x_R3D.shape[-1] // 3
    if not x_R3D.is_floating_point() or D == 0:
        raise UserError(f"{op}: expected float rows [R, 3 D], got {list(x_R3D.shape)} {str(x_R3D.dtype)[6:]}.")
    _check.tensor(op, "rows", x_R3D, (None, 3 * D))
    for name, (weight, bias) in (("out", out), ("context", context), ("temporal", temporal)):
        _check.tensor(op, f"{name} weight", weight, (D, D), like=x_R3D, dtype=out[0].dtype)
        _check.tensor(op, f"{name} bias", bias, (D,), like=x_R3D, dtype=out[0].dtype)
    if chained:
        cast = [(weight.to(x_R3D.dtype), bias.to(x_R3D.dtype)) for weight, bias in (out, context, temporal)]
        return _chained(x_R3D, cast[0], cast[1], cast[2], spatial_weight, is_image)
    return _BranchSum.apply(x_R3D, spatial_weight, (2 if is_image else 3) * D, *out, *context, *temporal)
