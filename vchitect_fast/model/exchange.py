"""Where the model touches other ranks, as two small classes that in one process do nothing; parallel/sequence.py does it.

    Sharding    one forward: what a rank has of the sequence when it enters the blocks, and when it leaves them
    Exchange    one block's attention in one forward: the rows that its branches need of other ranks, and their outputs back

The three branches cut the sequence in different ways: the spatial one needs whole frames (or all rows of some heads), the
temporal one all frames of a position, the cross one the first frame's text. Whatever a rank's cut is, blocks.py computes what
the methods here return. Nothing here refuses anything.

Letters: B batch, T frames, S visual tokens a frame, N text tokens, J = S + N, D hidden, H heads, C head dim, c latent channels,
h w latent rows and columns, p patch. Each is what this rank has of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from vchitect_fast.model.blocks import Branches
    from vchitect_fast.model.embed import PatchEmbed


class Exchange:
    """What one block's attention needs of other ranks: nothing, this rank has all rows.

    x_BTSD, c_BTND  normed visual and text rows of this rank
    branches        those that contribute; the others send nothing
    last            the text output is dropped: rows that only it needs are not sent
    """

    sends_heads = False  # the spatial projections are only sent (spatial_heads), not used here

    def __init__(self, x_BTSD: Tensor, c_BTND: Tensor, branches: Branches, last: bool) -> None:
        self.x, self.c = x_BTSD, c_BTND
        self.num_frames = x_BTSD.shape[1]  # of the whole video

    def spatial_rows(self) -> tuple[Tensor, Tensor]:
        """Rows for the spatial projections, visual and text."""
        return self.x, self.c

    def spatial_heads(self, q_BTJHC: Tensor, k_BTJHC: Tensor, v_BTJHC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the spatial attention takes: whole frames, perhaps of some heads only."""
        return q_BTJHC, k_BTJHC, v_BTJHC

    def spatial_back(self, out_BTJHC: Tensor) -> Tensor:
        """The spatial attention's output for this rank's rows [B, T, J, H, C]."""
        return out_BTJHC

    def first_text(self) -> Tensor | None:
        """The first frame's text rows [B, N, D], all of them; None where they are c_BTND[:, 0]."""
        return None

    def temporal_rows(self) -> tuple[Tensor, Tensor]:
        """Rows for the temporal projections, visual and text, with all frames."""
        return self.x, self.c

    def temporal_back(self, out_BTJHC: Tensor) -> Tensor:
        """The temporal attention's output for this rank's rows [B, T, J, H, C]; of the last block perhaps the visual ones only."""
        return out_BTJHC


class Sharding:
    """What a rank has of the sequence: all of it."""

    def enter(self, embed: PatchEmbed, latents_BTchw: Tensor) -> Tensor:
        """Latents of this rank's frames -> its tokens [B, T, S, D]."""
        B, T = latents_BTchw.shape[:2]
        return embed(latents_BTchw.flatten(0, 1)).unflatten(0, (B, T))

    def own_text(self, text_BNW: Tensor) -> Tensor:
        """This rank's text tokens."""
        return text_BNW

    def exchange(self, x_BTSD: Tensor, c_BTND: Tensor, branches: Branches, last: bool) -> Exchange:
        """For one block; it may start to send at once."""
        return Exchange(x_BTSD, c_BTND, branches, last)

    def leave(self, patches_BTSp: Tensor) -> Tensor:
        """Patches of this rank's tokens -> patches of its frames [B, T, S, p p c]."""
        return patches_BTSp


WHOLE = Sharding()
