"""The block of blocks.py in chunks of frames or positions: for shapes at which one block's working set does not fit.

    temporal branch              by positions: norm, projections, attention over all frames
    spatial, cross, their sum    by frames: norm, projections, attention, output projections, gate, residual
    MLP of each stream           by frames: norm, 4D hidden, gate, residual

Only block inputs, the temporal outputs and the inner residual exist at full size, [rows, D] each; everything wider exists for
one chunk at a time. Backward computes each chunk again, so a block costs one forward more. Same modules, same parameters, the
same answer up to the order in which weight gradients are summed. It saves no activation groups: a Policy that keeps or
offloads some of them is refused (transformer.py). No second derivatives.

Letters: B batch, T frames, S visual tokens a frame, N text tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vchitect_fast.attention import cross_attention, spatial_attention, temporal_attention
from vchitect_fast.model.blocks import SPATIAL_WEIGHT, Block, BranchAttention, FeedForward, modulate

FRAMES, POSITIONS = 1, 2  # dims of [B, T, S or N, D]


class _InChunks(torch.autograd.Function):
    """fn over slices of the first `num_cut` tensors; the others go whole to each call, parameters through fn's closure."""

    @staticmethod
    def forward(ctx: Any, fn: Any, bounds: Any, dim: int, num_cut: int, num_shared: int, *tensors: Tensor) -> Any:
        ctx.fn, ctx.bounds, ctx.dim, ctx.num_cut, ctx.num_shared = fn, bounds, dim, num_cut, num_shared
        ctx.save_for_backward(*tensors)
        cut, shared = tensors[:num_cut], tensors[num_cut : num_cut + num_shared]
        whole: list[Tensor] = []
        for begin, end in bounds:
            outputs = fn(*(x.narrow(dim, begin, end - begin) for x in cut), *shared)
            if not whole:
                for y in outputs:
                    size = list(y.shape)
                    size[dim] = bounds[-1][1]
                    whole.append(y.new_empty(size))
            for y, into in zip(outputs, whole, strict=True):
                into.narrow(dim, begin, end - begin).copy_(y)
        return tuple(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> Any:
        tensors, dim, num_cut = ctx.saved_tensors, ctx.dim, ctx.num_cut
        num_inputs = num_cut + ctx.num_shared
        wanted = ctx.needs_input_grad[5:]
        sums: list[Tensor | None] = [
            torch.zeros_like(x) if i < num_cut and w else None
            for i, (x, w) in enumerate(zip(tensors, wanted, strict=True))
        ]
        for begin, end in ctx.bounds:
            here = [x.narrow(dim, begin, end - begin) if i < num_cut else x for i, x in enumerate(tensors[:num_inputs])]
            here = [x.detach().requires_grad_(w) for x, w in zip(here, wanted[:num_inputs], strict=True)]
            with torch.enable_grad():
                outputs = ctx.fn(*here)
            sources = [*here, *tensors[num_inputs:]]
            asked = [i for i, w in enumerate(wanted) if w]
            found = torch.autograd.grad(
                outputs, [sources[i] for i in asked], [dy.narrow(dim, begin, end - begin) for dy in dys], allow_unused=True
            )  # fmt: skip
            for i, gradient in zip(asked, found, strict=True):
                if gradient is None:  # of a parameter that fn does not use: it gets none, not zeros
                    continue
                into = sums[i]
                if i < num_cut:
                    cast(Tensor, into).narrow(dim, begin, end - begin).copy_(gradient)
                elif into is None:
                    sums[i] = gradient.clone()
                else:
                    into.add_(gradient)
        return None, None, None, None, None, *sums


def in_chunks(
    fn: Callable[..., Sequence[Tensor]], cut: Sequence[Tensor], shared: Sequence[Tensor], parameters: Sequence[nn.Parameter],
    *, num_chunks: int, dim: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """fn(*cut, *shared) with `cut` sliced along `dim` into at most `num_chunks` near-equal pieces.

    fn returns tensors that are as long along `dim` as its slices. `parameters` are those that fn uses.
    """
    length = cut[0].shape[dim]
    number = min(num_chunks, length)
    edges = [length * i // number for i in range(number + 1)]
    bounds = tuple(pairwise(edges))
    return _InChunks.apply(fn, bounds, dim, len(cut), len(shared), *cut, *shared, *parameters)


def chunked_block(
    block: Block, x_BTSD: Tensor, c_BTND: Tensor, temb_BD: Tensor, *, backend: dict[str, str], num_chunks: int
) -> tuple[Tensor, Tensor | None]:
    """What block(x, c, temb, backend) returns."""
    attn = block.attn
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(temb_BD)
    text = block.norm1_context(temb_BD)
    shift_c, scale_c = (text[1], text[0]) if block.last else (text[0], text[1])
    temporal: list[Tensor] = []
    if attn.branches.temporal:
        visual = [attn.to_q_temp, attn.to_k_temp, attn.to_v_temp]
        projections = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        temporal.append(_temporal(attn, visual, x_BTSD, shift, scale, backend, num_chunks))
        if not block.last:
            temporal.append(_temporal(attn, projections, c_BTND, shift_c, scale_c, backend, num_chunks))

    gates = [gate] if block.last else [gate, text[2]]
    by_frame = _by_frame(attn, x_BTSD.shape[1], backend)
    parameters = [p for p in attn.parameters() if p.requires_grad]
    mid = in_chunks(
        by_frame, [x_BTSD, c_BTND, *temporal], [c_BTND[:, :1], shift, scale, shift_c, scale_c, *gates], parameters,
        num_chunks=num_chunks, dim=FRAMES,
    )  # fmt: skip
    x = _mlp(block.ff, mid[0], shift_mlp, scale_mlp, gate_mlp, num_chunks)
    if block.last:
        return x, None
    return x, _mlp(block.ff_context, mid[1], text[3], text[4], text[5], num_chunks)


def _temporal(
    attn: BranchAttention, projections: list[nn.Linear], rows_BTLD: Tensor, shift: Tensor, scale: Tensor,
    backend: dict[str, str], num_chunks: int,
) -> Tensor:  # fmt: skip
    def positions(rows: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor]:
        normed = modulate(rows, shift, scale)
        q, k, v = (attn._heads(project(normed)) for project in projections)
        out = temporal_attention(q, k, v, rope_scaling_factor=attn.rope_scaling_factor, backend=backend["temporal"])
        return (out.flatten(-2),)

    parameters = [p for project in projections for p in project.parameters()]
    return in_chunks(positions, [rows_BTLD], [shift, scale], parameters, num_chunks=num_chunks, dim=POSITIONS)[0]


def _by_frame(attn: BranchAttention, num_frames: int, backend: dict[str, str]) -> Callable[..., tuple[Tensor, ...]]:
    """x, c, [temporal of x, of c], first frame's c, modulations, gates -> the inner residuals of x and c."""
    branches, weight = attn.branches, 0.0 if num_frames == 1 else 1.0
    num_streams = 1 if attn.last else 2

    def frames(x: Tensor, c: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        temporal = rest[:num_streams] if branches.temporal else ()
        first, shift, scale, shift_c, scale_c, *gates = rest[len(temporal) :]
        nx, nc = modulate(x, shift, scale), modulate(c, shift_c, scale_c)
        text_q, text_k, text_v = (attn._heads(f(nc)) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))

        def joint(project: nn.Linear, text: Tensor) -> Tensor:
            return torch.cat((attn._heads(project(nx)), text), dim=2)

        y = nx.new_zeros(*nx.shape[:2], nx.shape[2] + nc.shape[2], nx.shape[3])
        if branches.spatial:
            q, k, v = joint(attn.to_q, text_q), joint(attn.to_k, text_k), joint(attn.to_v, text_v)
            y = SPATIAL_WEIGHT * spatial_attention(q, k, v, backend=backend["spatial"]).flatten(-2)
        if branches.cross:
            normed = modulate(first, shift_c, scale_c)[:, 0]
            k, v = attn._heads(attn.add_k_proj(normed)), attn._heads(attn.add_v_proj(normed))
            out = cross_attention(joint(attn.to_q_cross, text_q), k, v, backend=backend["cross"])
            y = y + attn.to_out_context(out.flatten(-2))
        S = x.shape[2]
        outs = [attn.to_out[0](y[:, :, :S])]
        if not attn.last:
            outs.append(attn.to_add_out(y[:, :, S:]))
        for i, (rows, project) in enumerate(
            zip(temporal, (attn.to_out_temporal, attn.to_add_out_temporal), strict=False)
        ):
            outs[i] = outs[i] + weight * project(rows)
        return tuple(rows + gate[:, None, None] * out for rows, gate, out in zip((x, c), gates, outs, strict=False))

    return frames


def _mlp(ff: FeedForward, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, num_chunks: int) -> Tensor:
    def frames(x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> tuple[Tensor]:
        return (x + gate[:, None, None] * ff(modulate(x, shift, scale)),)

    parameters = list(ff.parameters())
    return in_chunks(frames, [x], [shift, scale, gate], parameters, num_chunks=num_chunks, dim=FRAMES)[0]
