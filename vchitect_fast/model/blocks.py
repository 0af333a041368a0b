"""One MM-DiT block with three parallel attention branches: the readable reference path, in plain torch.

    nx = LN(x)(1 + scale) + shift                          (AdaLN-Zero; text likewise with its own linear)
    y  = 1.1 spatial(nx, nc) + to_out_context(cross(nx, nc))
    x += gate (to_out(y) + to_out_temporal(temporal(nx, nc)));   x += gate2 FF(LN(x)(1 + scale2) + shift2)

This file defines the answer; fused kernels come behind the same modules and parameter names (those of the release).
It names the activation groups that it makes (`group`) and does not choose what becomes of them: the Plan's Policy does.
Where other ranks have a part of the rows, the attention asks an Exchange for what it needs (exchange.py); alone it gets its own.
Source: model_spec, "Block" and "Attention"; Peebles & Xie 2023 (AdaLN-Zero); Esser et al. 2024 (MM-DiT).

Letters: B batch, T frames, S visual tokens a frame, N text tokens, J = S + N, D hidden, H heads, C head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.attention import cross_attention, spatial_attention, temporal_attention
from vchitect_fast.model.exchange import WHOLE, Sharding
from vchitect_fast.offload.groups import group
from vchitect_fast.profiling.span import span

NORM_EPS = 1e-6
SPATIAL_WEIGHT = 1.1  # of the spatial branch in the sum, as released


@dataclass(frozen=True)
class Branches:
    """Which branches contribute; a branch that is off costs nothing and its own weights get no gradient."""

    spatial: bool = True
    temporal: bool = True
    cross: bool = True


def modulate(x_BTLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """LayerNorm without affine, then y (1 + scale) + shift; scale and shift per sample."""
    normed = F.layer_norm(x_BTLD, x_BTLD.shape[-1:], eps=NORM_EPS)
    return normed * (1 + scale_BD[:, None, None]) + shift_BD[:, None, None]


def attend(branch: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """A branch of attention.py. A rank without a row asks no kernel, not all take an empty batch, but is in every backward."""
    if not q.numel():
        return q + 0 * (k.sum() + v.sum())
    with group("branch_out"):
        return branch(q, k, v, **options)


class AdaLN(nn.Module):
    """The modulation of one stream: temb [B, D] -> chunks [B, D]."""

    def __init__(self, hidden_dim: int, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(hidden_dim, num_chunks * hidden_dim)

    def forward(self, temb_BD: Tensor) -> tuple[Tensor, ...]:
        """Six chunks: shift, scale, gate of attention, then of the MLP. Two chunks (output, last text): scale, shift."""
        return self.linear(F.silu(temb_BD)).chunk(self.num_chunks, dim=-1)


class FeedForward(nn.Module):
    """Linear D -> 4D, GELU (tanh), Linear 4D -> D; released names net.0.proj and net.2."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        first = nn.Module()
        first.add_module("proj", nn.Linear(hidden_dim, 4 * hidden_dim))
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * hidden_dim, hidden_dim)])

    @span("forward/mlp")
    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        with group("mlp_pre"):
            hidden = self.net[0].get_submodule("proj")(x)
        return self.net[2](F.gelu(hidden, approximate="tanh"))


class BranchAttention(nn.Module):
    """The three branches and their sum. `last` drops the text output, as the last block does."""

    def __init__(self, config: TransformerConfig, *, last: bool, branches: Branches) -> None:
        super().__init__()
        D = config.hidden_dim
        self.num_heads, self.rope_scaling_factor = config.num_attention_heads, config.rope_scaling_factor
        self.last, self.branches = last, branches
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.to_q_temp, self.to_k_temp, self.to_v_temp = (nn.Linear(D, D) for _ in range(3))
        self.to_q_cross = nn.Linear(D, D)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(D, D) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(D, D)])
        self.to_out_temporal, self.to_out_context = nn.Linear(D, D), nn.Linear(D, D)
        if not last:
            self.to_add_out = nn.Linear(D, D)
        self.to_add_out_temporal = nn.Linear(D, D)  # the release has it in the last block too, unused

    def forward(
        self, x_BTSD: Tensor, c_BTND: Tensor, backend: dict[str, str], sharding: Sharding = WHOLE
    ) -> tuple[Tensor, Tensor | None]:
        """Normed visual and text rows -> their attention outputs, the text one None in the last block."""
        S = x_BTSD.shape[2]
        exchange = sharding.exchange(x_BTSD, c_BTND, self.branches, self.last)
        own_text = self._text(c_BTND)

        def joint(*projections: nn.Linear, rows: tuple[Tensor, Tensor], sent: bool = False) -> list[Tensor]:
            """q, k, v [B, T, J, H, C] of visual and text rows; as many as projections."""
            x, c = rows
            text, found = own_text if c is c_BTND else self._text(c), []
            for project, part in zip(projections, text, strict=False):
                with group("qkv", sent=sent):
                    visual = self._heads(project(x))
                found.append(torch.cat((visual, part), dim=2))
            return found

        y = temporal = None  # [B, T, J, D] each
        if self.branches.spatial:
            with span("forward/spatial"):
                q, k, v = joint(
                    self.to_q, self.to_k, self.to_v, rows=exchange.spatial_rows(), sent=exchange.sends_heads
                )
                q, k, v = exchange.spatial_heads(q, k, v)
                spatial = attend(spatial_attention, q, k, v, backend=backend["spatial"])
                y = SPATIAL_WEIGHT * exchange.spatial_back(spatial).flatten(-2)
        if self.branches.cross:
            with span("forward/cross"):
                (q,) = joint(self.to_q_cross, rows=(x_BTSD, c_BTND))
                first = exchange.first_text()
                if first is None:
                    k, v = (part[:, 0] for part in own_text[1:])
                else:
                    with group("qkv"):
                        k, v = (self._heads(project(first)) for project in (self.add_k_proj, self.add_v_proj))
                cross = attend(cross_attention, q, k, v, backend=backend["cross"])
                cross = self.to_out_context(cross.flatten(-2))
                y = cross if y is None else y + cross
        if y is None:
            y = x_BTSD.new_zeros(*x_BTSD.shape[:2], S + c_BTND.shape[2], x_BTSD.shape[3])
        if self.branches.temporal:
            with span("forward/temporal"):
                q, k, v = joint(self.to_q_temp, self.to_k_temp, self.to_v_temp, rows=exchange.temporal_rows())
                scaling = self.rope_scaling_factor
                temporal = attend(temporal_attention, q, k, v, rope_scaling_factor=scaling, backend=backend["temporal"])
                temporal = exchange.temporal_back(temporal).flatten(-2)
        return self._sum(y, temporal, S, exchange.num_frames)

    def _text(self, c_BTND: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [B, T, N, H, C] of text rows."""
        with group("qkv"):
            return tuple(self._heads(f(c_BTND)) for f in (self.add_q_proj, self.add_k_proj, self.add_v_proj))

    @span("forward/branch_sum")
    def _sum(self, y: Tensor, temporal: Tensor | None, S: int, num_frames: int) -> tuple[Tensor, Tensor | None]:
        """The output products of the joint rows, visual and text."""
        # An image multiplies the temporal term by 0: its weights get zero gradients, not missing ones.
        weight = 0.0 if num_frames == 1 else 1.0
        out_x = self.to_out[0](y[:, :, :S])
        if temporal is not None:
            out_x = out_x + weight * self.to_out_temporal(temporal[:, :, :S])
        if self.last:
            return out_x, None
        out_c = self.to_add_out(y[:, :, S:])
        if temporal is not None:
            out_c = out_c + weight * self.to_add_out_temporal(temporal[:, :, S:])
        return out_x, out_c

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class Block(nn.Module):
    """x [B, T, S, D], c [B, T, N, D], temb [B, D] -> x, c; c is None after the last block."""

    def __init__(self, config: TransformerConfig, *, last: bool, branches: Branches) -> None:
        super().__init__()
        D = config.hidden_dim
        self.last = last
        self.norm1 = AdaLN(D, 6)
        self.norm1_context = AdaLN(D, 2 if last else 6)
        self.attn = BranchAttention(config, last=last, branches=branches)
        self.ff = FeedForward(D)
        if not last:
            self.ff_context = FeedForward(D)

    def forward(
        self,
        x_BTSD: Tensor,
        c_BTND: Tensor,
        temb_BD: Tensor,
        backend: dict[str, str],
        sharding: Sharding = WHOLE,
        instead: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`backend` names the attention backend of each branch (attention.py); `sharding` says what this rank's rows are.

        instead   another way to compute this block, called as instead(self, x, c, temb): the module is called all the same,
                  so that whoever hooks it (FSDP2 gathers its parameters so) is asked
        """
        if instead is not None:
            return instead(self, x_BTSD, c_BTND, temb_BD)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(temb_BD)
        text = self.norm1_context(temb_BD)
        shift_c, scale_c = (
            (text[1], text[0]) if self.last else (text[0], text[1])
        )  # the last norm orders them otherwise
        normed = modulate(x_BTSD, shift, scale), modulate(c_BTND, shift_c, scale_c)
        attn_x, attn_c = self.attn(*normed, backend, sharding)
        x = x_BTSD + gate[:, None, None] * attn_x
        x = x + gate_mlp[:, None, None] * self.ff(modulate(x, shift_mlp, scale_mlp))
        if attn_c is None:
            return x, None
        gate_c, shift_mlp_c, scale_mlp_c, gate_mlp_c = text[2:]
        c = c_BTND + gate_c[:, None, None] * attn_c
        c = c + gate_mlp_c[:, None, None] * self.ff_context(modulate(c, shift_mlp_c, scale_mlp_c))
        return x, c
