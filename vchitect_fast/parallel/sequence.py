"""Sequence parallelism of the blocks: how a video is cut over the ranks of one group, and what each branch exchanges.

    check(spec, group, num_heads)                                what a ShardSpec may ask for; UserError otherwise
    sharding(spec, group, num_frames, num_visual, num_text, num_heads)    the Sharding that obeys it, for one forward

Outside the blocks every rank has its own frames. Inside it has, by ShardSpec.axis,
    frames   its frames. Spatial local. Temporal: normed rows go to tokens before their projection, the output comes back:
             2 activation volumes a layer, the first hidden behind the spatial branch, in backward too.
    tokens   its share of the visual tokens and its share of the text tokens, of all frames. Temporal local. Spatial:
             "heads"   q, k and v go to heads, the output comes back: 4 volumes (Ulysses)
             "frames"  normed rows go to frames before their projection, the output comes back: 2 volumes
The cross branch needs the first frame's text everywhere: it travels in the same all-to-all as the rows, so a layer has two
exchanges forward and two backward, and no other. In the last block text rows stay where only the dropped text output needs them.
Shares may be uneven and empty; nothing is padded. Not done: hiding the exchanges of "tokens", other cuts of the cross branch,
two cuts at once.

A parameter's gradient on a rank is the part of that rank's rows: the sum over the group is the whole gradient.
Sources: Jacobs et al. 2023 (Ulysses); Zhao et al. 2024 (DSP); Vchitect-2.0, section V.

Letters: B batch, T frames, S visual tokens a frame, N text tokens, J = S + N, D hidden, H heads, C head dim, c latent channels,
h w latent rows and columns, p patch, P ranks.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.model.blocks import Branches
from vchitect_fast.model.embed import PatchEmbed
from vchitect_fast.model.exchange import Exchange, Sharding
from vchitect_fast.parallel.collectives import Axis, Flight, Part, exchange, send, share
from vchitect_fast.plan import ShardSpec

FRAMES, TOKENS, HEADS = 1, 2, 3  # dims of [B, T, J, H, C]


def check(spec: ShardSpec, group: dist.ProcessGroup, num_heads: int) -> None:
    """UserError where a group of so many ranks cannot be cut as `spec` says (ShardSpec checks its own names)."""
    size = group.size()
    if spec.axis == "batch" and size > 1:
        raise UserError(
            f"expected a ShardSpec of axis frames or tokens for a group of {size} ranks, got batch, which cuts nothing; "
            "choose an axis, or plan with sp = 1."
        )
    if spec.spatial == "heads" and size > num_heads:
        raise UserError(
            f"expected at most {num_heads} ranks, one a head, to reshard the spatial branch to heads, got {size}; "
            'use spatial="frames", or a smaller sp.'
        )


def sharding(
    spec: ShardSpec, group: dist.ProcessGroup, num_frames: int, num_visual: int, num_text: int, num_heads: int
) -> Sharding:
    """For a forward over T frames of S visual and N text tokens, all whole counts. The spec has been checked."""
    if spec.axis == "batch":
        return Sharding()  # one rank
    kind = FramesSharded if spec.axis == "frames" else TokensToHeads if spec.spatial == "heads" else TokensToFrames
    return kind(group, num_frames, num_visual, num_text, num_heads)


class _Sharded(Sharding):
    """Whole sizes, and the dims as they are cut."""

    def __init__(
        self, group: dist.ProcessGroup, num_frames: int, num_visual: int, num_text: int, num_heads: int
    ) -> None:
        self.group, self.num_frames = group, num_frames
        self.size, self.rank = group.size(), group.rank()
        self.frames = Axis(FRAMES, (num_frames,))
        self.visual, self.text = Axis(TOKENS, (num_visual,)), Axis(TOKENS, (num_text,))
        self.joint = Axis(TOKENS, (num_visual, num_text))
        self.only_visual = Axis(TOKENS, (num_visual, num_text), num_unsent=1)
        self.heads = Axis(HEADS, (num_heads,))

    def own(self, axis: Axis) -> slice:
        """This rank's share of an axis of one segment."""
        return share(axis.segments[0], self.size, self.rank)

    def check_frames(self, latents_BTchw: Tensor) -> None:
        """UserError for other frames than this rank's."""
        own, num_frames = self.own(self.frames), latents_BTchw.shape[1]
        if num_frames != own.stop - own.start:
            raise UserError(
                f"hidden_states must be frames {own.start} to {own.stop} of {self.num_frames} on rank {self.rank} of {self.size}, "
                f"got {num_frames} frames; cut them with parallel.collectives.share."
            )


class _Exchange(Exchange):
    """Holds the flight of one exchange until its first outcome is asked for."""

    def __init__(self, cut: _Sharded, x_BTSD: Tensor, c_BTND: Tensor, branches: Branches, last: bool) -> None:
        super().__init__(x_BTSD, c_BTND, branches, last)
        self.cut, self.branches, self.last = cut, branches, last
        self.num_frames = cut.num_frames
        self.flight: Flight | None = None
        self.landed: list[Tensor] = []

    def start(self, parts: list[Part], tensors: list[Tensor], first: Axis) -> None:
        """Send these, and the first frame's text, of which this rank has its share along `first`, if the cross branch is on."""
        if self.branches.cross:
            num_first = first.size(self.cut.size, self.cut.rank) if first.dim == FRAMES else 1
            parts, tensors = [*parts, Part(None, first)], [*tensors, self.c[:, :num_first]]
        if parts:
            self.flight = send(parts, tensors, self.cut.group, saved_as="qkv")

    def land(self) -> list[Tensor]:
        """What `start` sent for, in order."""
        if self.flight is not None:
            self.landed, self.flight = list(self.flight.receive()), None
        return self.landed

    def first_text(self) -> Tensor:
        """[B, N, D], from whoever has it."""
        return self.land()[-1][:, 0]


class FramesSharded(_Sharded):
    """Every rank has its frames, inside the blocks as well."""

    def enter(self, embed: PatchEmbed, latents_BTchw: Tensor) -> Tensor:
        """Nothing moves."""
        self.check_frames(latents_BTchw)
        return super().enter(embed, latents_BTchw)

    def exchange(self, x_BTSD: Tensor, c_BTND: Tensor, branches: Branches, last: bool) -> Exchange:
        """Rows are on their way from here on."""
        return _FramesExchange(self, x_BTSD, c_BTND, branches, last)


class _FramesExchange(_Exchange):
    def __init__(self, cut: _Sharded, x_BTSD: Tensor, c_BTND: Tensor, branches: Branches, last: bool) -> None:
        super().__init__(cut, x_BTSD, c_BTND, branches, last)
        parts, tensors = [], []
        if branches.temporal:
            parts, tensors = [Part(cut.visual, cut.frames)], [x_BTSD]
            if not last:  # a position attends to itself over the frames: text rows serve the text output only
                parts, tensors = [*parts, Part(cut.text, cut.frames)], [*tensors, c_BTND]
        self.start(parts, tensors, first=Axis(FRAMES, (1,)))

    def temporal_rows(self) -> tuple[Tensor, Tensor]:
        """This rank's share of the positions, of all frames; no text rows in the last block."""
        x, *rest = self.land()
        return x, (x[:, :, :0] if self.last else rest[0])

    def temporal_back(self, out_BTJHC: Tensor) -> Tensor:
        """All positions of this rank's frames."""
        positions = self.cut.visual if self.last else self.cut.joint
        return exchange([Part(self.cut.frames, positions)], [out_BTJHC], self.cut.group, saved_as="branch_out")[0]


class _TokensSharded(_Sharded):
    """Every rank has its tokens inside the blocks; at both ends raw patches, 64 numbers a token, change places."""

    def enter(self, embed: PatchEmbed, latents_BTchw: Tensor) -> Tensor:
        """Patches to tokens, then the projection and positions of the own ones."""
        self.check_frames(latents_BTchw)
        B, T, _, h, w = latents_BTchw.shape
        patches = embed.patches(latents_BTchw.flatten(0, 1)).unflatten(0, (B, T))
        (patches,) = exchange([Part(self.visual, self.frames)], [patches], self.group)
        return embed.project(patches, h, w, self.own(self.visual))

    def own_text(self, text_BNW: Tensor) -> Tensor:
        """The share of this rank."""
        return text_BNW[:, self.own(self.text)]

    def leave(self, patches_BTSp: Tensor) -> Tensor:
        """Patches to frames."""
        return exchange([Part(self.frames, self.visual)], [patches_BTSp], self.group)[0]


class TokensToHeads(_TokensSharded):
    """The spatial branch by heads."""

    def exchange(self, x_BTSD: Tensor, c_BTND: Tensor, branches: Branches, last: bool) -> Exchange:
        """Sends when q, k and v are there."""
        return _HeadsExchange(self, x_BTSD, c_BTND, branches, last)


class _HeadsExchange(_Exchange):
    sends_heads = True

    def spatial_heads(self, q_BTJHC: Tensor, k_BTJHC: Tensor, v_BTJHC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All rows of this rank's heads. In the last block no text row asks."""
        cut = self.cut
        asking = Part(cut.heads, cut.only_visual if self.last else cut.joint)
        asked = Part(cut.heads, cut.joint)
        self.start([asking, asked, asked], [q_BTJHC, k_BTJHC, v_BTJHC], first=cut.text)
        q, k, v, *_ = self.land()
        return q, k, v

    def spatial_back(self, out_BTJHC: Tensor) -> Tensor:
        """All heads of this rank's rows."""
        return _to_tokens(self.cut, out_BTJHC, self.cut.heads, self.last)

    def first_text(self) -> Tensor:
        """Came with q, k and v, or alone where there is no spatial branch."""
        if not self.landed:
            self.start([], [], first=self.cut.text)
        return super().first_text()


class TokensToFrames(_TokensSharded):
    """The spatial branch by frames."""

    def exchange(self, x_BTSD: Tensor, c_BTND: Tensor, branches: Branches, last: bool) -> Exchange:
        """Rows are on their way from here on."""
        return _RowsExchange(self, x_BTSD, c_BTND, branches, last)


class _RowsExchange(_Exchange):
    def __init__(self, cut: _Sharded, x_BTSD: Tensor, c_BTND: Tensor, branches: Branches, last: bool) -> None:
        super().__init__(cut, x_BTSD, c_BTND, branches, last)
        parts = [Part(cut.frames, cut.visual), Part(cut.frames, cut.text)] if branches.spatial else []
        self.start(parts, [x_BTSD, c_BTND] if parts else [], first=cut.text)

    def spatial_rows(self) -> tuple[Tensor, Tensor]:
        """All tokens of this rank's frames."""
        x, c, *_ = self.land()
        return x, c

    def spatial_back(self, out_BTJHC: Tensor) -> Tensor:
        """All frames of this rank's tokens."""
        return _to_tokens(self.cut, out_BTJHC, self.cut.frames, self.last)


def _to_tokens(cut: _Sharded, out_BTJHC: Tensor, gathered: Axis, last: bool) -> Tensor:
    tokens = cut.only_visual if last else cut.joint
    return exchange([Part(tokens, gathered)], [out_BTJHC], cut.group, saved_as="branch_out")[0]
