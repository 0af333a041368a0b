"""One block of the 2B layout as each way of sequence parallelism runs it: ours, and two that others use, all to compare.

    ours            parallel/sequence.py under its three ShardSpecs
    plain Ulysses   q, k and v of the spatial and of the temporal branch go to heads one by one, both outputs come back: 8
                    volumes. Released Vchitect-2.0 gathers and scatters at these points; Jacobs et al. 2023 for the exchange
    all-gather      every rank gets all spatial keys and values and keeps its queries; the temporal branch is local: 2 P
                    volumes. How context parallelism of Llama 3 does it (2024, section 3.3.2)
All compute the same numbers; tests hold them to one process. The cross branch gets the first frame's text alike everywhere.
For comparison only: nothing of training uses the two alternatives, and they refuse nothing.

Letters: B batch, T frames, S visual tokens a frame, N text tokens, J = S + N, D hidden, H heads, C head dim, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.attention import cross_attention, spatial_attention, temporal_attention
from vchitect_fast.benchmarks.case import Sizes
from vchitect_fast.model.blocks import SPATIAL_WEIGHT, Block, BranchAttention, Branches
from vchitect_fast.model.exchange import WHOLE, Sharding
from vchitect_fast.parallel.collectives import Axis, Part, exchange, share
from vchitect_fast.parallel.sequence import TokensToHeads, sharding
from vchitect_fast.plan import BRANCHES, ShardSpec

BACKEND = dict.fromkeys(BRANCHES, "sdpa")


class PlainUlysses(BranchAttention):
    """Eight all-to-alls of one tensor each, and one of the first frame's text."""

    def forward(
        self, x_BTSD: Tensor, c_BTND: Tensor, backend: dict[str, str], sharding: Sharding = WHOLE
    ) -> tuple[Tensor, Tensor | None]:
        """As BranchAttention, of a rank's tokens."""
        assert isinstance(sharding, TokensToHeads)
        cut, text = sharding, self._text(c_BTND)

        def to_heads(project: nn.Module, text_BTNHC: Tensor) -> Tensor:
            rows = torch.cat((self._heads(project(x_BTSD)), text_BTNHC), dim=2)
            return _move(cut.heads, cut.joint, rows, cut.group)

        def to_tokens(out_BTJHC: Tensor) -> Tensor:
            return _move(cut.joint, cut.heads, out_BTJHC, cut.group).flatten(-2)

        q, k, v = map(to_heads, (self.to_q, self.to_k, self.to_v), text)
        y = SPATIAL_WEIGHT * to_tokens(spatial_attention(q, k, v, backend=backend["spatial"]))
        first_BND = _move(None, cut.text, c_BTND[:, :1], cut.group)[:, 0]
        y = y + _cross(self, x_BTSD, text[0], first_BND, backend)
        q, k, v = map(to_heads, (self.to_q_temp, self.to_k_temp, self.to_v_temp), text)
        temporal = temporal_attention(
            q, k, v, rope_scaling_factor=self.rope_scaling_factor, backend=backend["temporal"]
        )
        return self._sum(y, to_tokens(temporal), x_BTSD.shape[2], x_BTSD.shape[1])


class GatheredKeys(BranchAttention):
    """One collective forward: the keys, the values and the first frame's text of all ranks, packed."""

    def forward(
        self, x_BTSD: Tensor, c_BTND: Tensor, backend: dict[str, str], sharding: Sharding = WHOLE
    ) -> tuple[Tensor, Tensor | None]:
        """As BranchAttention, of a rank's tokens."""
        assert isinstance(sharding, TokensToHeads)
        cut, text = sharding, self._text(c_BTND)

        def joint(*projections: nn.Module) -> list[Tensor]:
            pairs = zip(projections, text, strict=True)
            return [torch.cat((self._heads(project(x_BTSD)), part), dim=2) for project, part in pairs]

        q, k, v = joint(self.to_q, self.to_k, self.to_v)
        parts = [Part(None, cut.joint), Part(None, cut.joint), Part(None, cut.text)]
        k, v, first_BTND = exchange(parts, [k, v, c_BTND[:, :1]], cut.group)
        y = SPATIAL_WEIGHT * spatial_attention(q, k, v, backend=backend["spatial"]).flatten(-2)
        y = y + _cross(self, x_BTSD, text[0], first_BTND[:, 0], backend)
        q, k, v = joint(self.to_q_temp, self.to_k_temp, self.to_v_temp)
        temporal = temporal_attention(
            q, k, v, rope_scaling_factor=self.rope_scaling_factor, backend=backend["temporal"]
        )
        return self._sum(y, temporal.flatten(-2), x_BTSD.shape[2], x_BTSD.shape[1])


def _move(scatter: Axis | None, gather: Axis, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return exchange([Part(scatter, gather)], [tensor], group)[0]


def _cross(
    attn: BranchAttention, x_BTSD: Tensor, text_q_BTNHC: Tensor, first_BND: Tensor, backend: dict[str, str]
) -> Tensor:
    q = torch.cat((attn._heads(attn.to_q_cross(x_BTSD)), text_q_BTNHC), dim=2)
    k, v = (attn._heads(project(first_BND)) for project in (attn.add_k_proj, attn.add_v_proj))
    return attn.to_out_context(cross_attention(q, k, v, backend=backend["cross"]).flatten(-2))


@dataclass(frozen=True)
class Way:
    """One way of sequence parallelism: the cut, and whose attention; `volumes` of [B,T,J,D] a layer forward on P ranks."""

    name: str
    spec: ShardSpec
    volumes: Callable[[int], int]
    attention: type[BranchAttention] = BranchAttention


HEADS = ShardSpec("tokens", spatial="heads")
WAYS = (
    Way("frames (ours)", ShardSpec("frames", temporal="tokens"), lambda P: 2),
    Way("tokens to heads (ours)", HEADS, lambda P: 4),
    Way("tokens to frames (ours)", ShardSpec("tokens", spatial="frames"), lambda P: 2),
    Way("plain Ulysses", HEADS, lambda P: 8, PlainUlysses),
    Way("all-gather of keys and values", HEADS, lambda P: 2 * P, GatheredKeys),
)


def make_block(config: TransformerConfig, attention: type[BranchAttention]) -> Block:
    """A block that is not the last, all weights drawn from one seed: the same for every attention."""
    torch.manual_seed(0)
    block = Block(config, last=False, branches=Branches())
    block.attn = attention(config, last=False, branches=Branches())
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


class Layer:
    """One rank's block and inputs under one way; every rank of the group makes it."""

    def __init__(
        self, way: Way, config: TransformerConfig, sizes: Sizes, group: dist.ProcessGroup, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        B, T, S, N = sizes.B, sizes.T, sizes.S, sizes.N
        self.block = make_block(config, way.attention).to(device, dtype)
        self.cut = sharding(way.spec, group, T, S, N, sizes.H)
        draw = torch.Generator().manual_seed(1)
        whole = [torch.randn(B, T, rows, sizes.D, generator=draw) for rows in (S, N)]
        temb = torch.randn(B, sizes.D, generator=draw)
        dim = 1 if way.spec.axis == "frames" else 2
        own = [rows.narrow(dim, *_narrowed(rows.shape[dim], group)) for rows in whole]
        self.x, self.c, self.temb = (leaf.to(device, dtype, copy=True).requires_grad_() for leaf in (*own, temb))

    def run(self) -> tuple[Tensor, Tensor]:
        """Forward and backward of a sum of squares. Gradients are left in the leaves and the block; returns x and c."""
        for tensor in (self.x, self.c, self.temb, *self.block.parameters()):
            tensor.grad = None
        x, c = self.block(self.x, self.c, self.temb, BACKEND, self.cut)
        assert c is not None
        (x.square().sum() + c.square().sum()).backward()
        return x.detach(), c.detach()


def _narrowed(size: int, group: dist.ProcessGroup) -> tuple[int, int]:
    own = share(size, group.size(), group.rank())
    return own.start, own.stop - own.start
