"""The block of blocks.py once more, on the fused ops: same modules, same parameters, same answer.

    nx = modulated_norm(x);  q k v of all branches = one GEMM (7 visual, 3 text);  three attentions over two sources
    y = branch_sum([spatial | cross | temporal]);  x, nx = gated_residual_norm(x, y);  x = gated_residual(x, W2 gelu(W1 nx))
Nothing concatenates visual and text rows. This is the composition under autograd: each op saves its own inputs, and the
three branch outputs are copied once into the buffer that branch_sum reads. The model runs handwritten.py instead; this stays
as what the benchmark holds that against. blocks.py defines the answer.

Letters: B batch, T frames, S visual tokens a frame, N text tokens, D hidden, H heads, C head dim.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vchitect_fast.kernels import ops
from vchitect_fast.kernels.branch_sum import branch_sum
from vchitect_fast.kernels.projections import project
from vchitect_fast.kernels.reference import QKV
from vchitect_fast.model.blocks import NORM_EPS, SPATIAL_WEIGHT, Block, BranchAttention, FeedForward
from vchitect_fast.offload.groups import group


def fused_block(
    block: Block, x_BTSD: Tensor, c_BTND: Tensor, temb_BD: Tensor, *, impl: str
) -> tuple[Tensor, Tensor | None]:
    """What block(x, c, temb) returns; impl "triton" or "reference" names who computes the ops (kernels/ops.py)."""
    B, T, S, D = x_BTSD.shape
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(temb_BD)
    text = block.norm1_context(temb_BD)
    shift_c, scale_c = (text[1], text[0]) if block.last else (text[0], text[1])
    x_BLD, c_BLD = x_BTSD.flatten(1, 2), c_BTND.flatten(1, 2)
    nx = ops.modulated_norm(x_BLD, shift, scale, NORM_EPS, impl=impl).view(B, T, S, D)
    nc = ops.modulated_norm(c_BLD, shift_c, scale_c, NORM_EPS, impl=impl).view(c_BTND.shape)
    attn_x, attn_c = _attention(block.attn, nx, nc, impl)

    x_BLD, nx = ops.gated_residual_norm(x_BLD, attn_x, gate, shift_mlp, scale_mlp, NORM_EPS, impl=impl)
    x = ops.gated_residual(x_BLD, _feed_forward(block.ff, nx, impl), gate_mlp, impl=impl).view(x_BTSD.shape)
    if attn_c is None:
        return x, None
    gate_c, shift_mlp_c, scale_mlp_c, gate_mlp_c = text[2:]
    c_BLD, nc = ops.gated_residual_norm(c_BLD, attn_c, gate_c, shift_mlp_c, scale_mlp_c, NORM_EPS, impl=impl)
    c = ops.gated_residual(c_BLD, _feed_forward(block.ff_context, nc, impl), gate_mlp_c, impl=impl)
    return x, c.view(c_BTND.shape)


def _attention(attn: BranchAttention, nx_BTSD: Tensor, nc_BTND: Tensor, impl: str) -> tuple[Tensor, Tensor | None]:
    """Normed rows -> attention outputs [B, T S, D] and [B, T N, D], the text one None in the last block."""
    visual = [attn.to_q, attn.to_k, attn.to_v, attn.to_q_temp, attn.to_k_temp, attn.to_v_temp, attn.to_q_cross]
    with group("qkv"):
        q, k, v, q_temp, k_temp, v_temp, q_cross = _project(nx_BTSD, visual, attn.num_heads)
        text: QKV = _project(nc_BTND, [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj], attn.num_heads)  # type: ignore[assignment]
    with group("branch_out"):
        spatial = ops.spatial_attention((q, k, v), text, impl=impl)
        temporal = ops.temporal_attention(
            (q_temp, k_temp, v_temp), text, rope_scaling_factor=attn.rope_scaling_factor, impl=impl
        )
        cross = ops.cross_attention(q_cross, text[0], text[1][:, 0], text[2][:, 0], impl=impl)

    def summed(source: int, out: torch.nn.Linear, out_temporal: torch.nn.Linear) -> Tensor:
        branches = [branch[source].flatten(-2) for branch in (spatial, cross, temporal)]
        rows = torch.cat(branches, dim=-1)  # [B, T, S or N, 3 D]
        y = branch_sum(
            rows.flatten(0, 2), _pair(out), _pair(attn.to_out_context), _pair(out_temporal),
            spatial_weight=SPATIAL_WEIGHT, is_image=rows.shape[1] == 1,
        )  # fmt: skip
        return y.view(rows.shape[0], -1, y.shape[-1])

    out_x = summed(0, cast(torch.nn.Linear, attn.to_out[0]), attn.to_out_temporal)
    return out_x, None if attn.last else summed(1, attn.to_add_out, attn.to_add_out_temporal)


def _project(x_BTLD: Tensor, linears: list[torch.nn.Linear], num_heads: int) -> tuple[Tensor, ...]:
    outputs = project(x_BTLD, [linear.weight for linear in linears], [linear.bias for linear in linears])
    return tuple(y.unflatten(-1, (num_heads, -1)) for y in outputs)


def _feed_forward(ff: FeedForward, x_BLD: Tensor, impl: str) -> Tensor:
    first = cast(torch.nn.Linear, ff.net[0].get_submodule("proj"))
    with group("mlp_pre"):
        pre = F.linear(x_BLD, first.weight)
    return ff.net[2](ops.bias_gelu(pre, first.bias, impl=impl))


def _pair(linear: torch.nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight, linear.bias
