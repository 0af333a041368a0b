"""Workload: what one microbatch costs in FLOPs and bytes, by formula, before anything runs.

model sizes x VideoShape x batch -> FLOPs of a forward and of a training step, rows, parameter bytes and the bytes that
the reference block keeps for backward. Letters as in the model: B batch, T frames, S visual tokens a frame, N text
tokens, D hidden. MFU everywhere in this project is `train_flops` / time / peak: three forwards, recomputation not counted.
Standard library only; tests hold each formula against the running model.
"""

from __future__ import annotations

from dataclasses import dataclass

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.shapes import VideoShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Workload:
    """One microbatch: `batch` samples of `shape` with `num_text_tokens` text tokens each."""

    config: TransformerConfig
    shape: VideoShape
    batch: int
    num_text_tokens: int

    @property
    def visual_rows(self) -> int:
        """B x T x S."""
        return self.batch * self.shape.num_visual_tokens(self.config.patch_size)

    @property
    def text_rows(self) -> int:
        """B x T x N: the text stream is per frame."""
        return self.batch * self.shape.num_frames * self.num_text_tokens

    @property
    def rows(self) -> int:
        """B x T x (S + N)."""
        return self.visual_rows + self.text_rows

    def linear_flops(self) -> int:
        """Forward FLOPs of one block's linear layers: 2 D^2 [BTS (7+3+8) + BTN (3+3+8)]."""
        d = self.config.hidden_dim
        return 2 * d * d * (self.visual_rows * 18 + self.text_rows * 14)

    def attention_flops(self) -> int:
        """Forward FLOPs of one block's three branches: 4 D [BT (S+N)^2 + B (S+N) T^2 + BT (S+N) N]."""
        joint = self.shape.tokens_per_frame(self.config.patch_size) + self.num_text_tokens
        frames = self.shape.num_frames
        pairs = frames * joint**2 + joint * frames**2 + frames * joint * self.num_text_tokens
        return 4 * self.config.hidden_dim * self.batch * pairs

    def forward_flops(self) -> int:
        """Forward FLOPs of all blocks (embeddings and output projection are left out: below 1 % at the 2B size)."""
        return self.config.num_layers * (self.linear_flops() + self.attention_flops())

    def train_flops(self) -> int:
        """Model FLOPs of forward and backward: three forwards."""
        return 3 * self.forward_flops()

    def saved_bytes_per_block(self, element_bytes: int) -> int:
        """Bytes that one block of the plain reference path saves for backward when nothing is recomputed.

        Counted by hand from model/blocks.py in units of [rows, D]; tests/test_workload.py counts the same with
        saved-tensor hooks. Attention statistics (one fp32 a row, head and branch) are included.
        """
        d, heads = self.config.hidden_dim, self.config.num_attention_heads
        return element_bytes * d * (SAVED_VISUAL * self.visual_rows + SAVED_TEXT * self.text_rows) + 4 * heads * 3 * self.rows

    def block_input_bytes(self, element_bytes: int) -> int:
        """Bytes of one block's input, visual and text rows: all that a recomputed block keeps."""
        return element_bytes * self.config.hidden_dim * self.rows


# Tensors of [rows, D] that a reference block saves, visual and text; see Workload.saved_bytes_per_block.
SAVED_VISUAL = 32
SAVED_TEXT = 28
