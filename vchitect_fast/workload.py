"""Workload: what one microbatch costs in FLOPs and bytes, by formula, before anything runs.

model sizes x VideoShape x batch -> FLOPs of a forward and of a training step, rows, parameter bytes and the bytes that
the reference block keeps for backward. Letters as in the model: B batch, T frames, S visual tokens a frame, N text
tokens, D hidden. MFU everywhere in this project is `train_flops` / time / peak: three forwards, recomputation not counted.
Where `sp` ranks share a sample, rows and bytes are those of the fullest rank; FLOPs stay those of the whole.
Standard library only; tests hold each formula against the running model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.shapes import VideoShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Workload:
    """One microbatch: `batch` samples of `shape` with `num_text_tokens` text tokens each.

    sp          ranks that share each sample
    axis        what they share: "frames", or "tokens" (visual and text each by themselves)
    num_chunks  pieces in which each block is computed (model/chunks.py)
    """

    config: TransformerConfig
    shape: VideoShape
    batch: int
    num_text_tokens: int
    sp: int = 1
    axis: str = "frames"
    num_chunks: int = 1

    @property
    def num_frames(self) -> int:
        """T, of the fullest rank."""
        return self._share(self.shape.num_frames, "frames")

    @property
    def visual_rows(self) -> int:
        """B x T x S."""
        tokens = self.shape.tokens_per_frame(self.config.patch_size)
        return self.batch * self.num_frames * self._share(tokens, "tokens")

    @property
    def text_rows(self) -> int:
        """B x T x N: the text stream is per frame."""
        return self.batch * self.num_frames * self._share(self.num_text_tokens, "tokens")

    def _share(self, size: int, axis: str) -> int:
        return -(-size // self.sp) if axis == self.axis else size

    @property
    def rows(self) -> int:
        """B x T x (S + N)."""
        return self.visual_rows + self.text_rows

    def linear_flops(self, *, last: bool = False) -> int:
        """Forward FLOPs of one block's linear layers on one rank: 2 D^2 [BTS (7+3+8) + BTN (3+3+8)].

        The last block has no text output: of its text only the 3 projections in and to_out_context are computed.
        """
        d = self.config.hidden_dim
        return 2 * d * d * (self.visual_rows * 18 + self.text_rows * (4 if last else 14))

    def attention_flops(self) -> int:
        """Forward FLOPs of one block's three branches, all ranks together: 4 D [BT (S+N)^2 + B (S+N) T^2 + BT (S+N) N]."""
        joint = self.shape.tokens_per_frame(self.config.patch_size) + self.num_text_tokens
        frames = self.shape.num_frames
        pairs = frames * joint**2 + joint * frames**2 + frames * joint * self.num_text_tokens
        return 4 * self.config.hidden_dim * self.batch * pairs

    def forward_flops(self) -> int:
        """Forward FLOPs of all blocks (embeddings and output projection are left out: below 1 % at the 2B size)."""
        layers, whole = self.config.num_layers, replace(self, sp=1)
        linear = (layers - 1) * whole.linear_flops() + whole.linear_flops(last=True)
        return linear + layers * self.attention_flops()

    def train_flops(self) -> int:
        """Model FLOPs of forward and backward: three forwards."""
        return 3 * self.forward_flops()

    def saved_bytes_per_block(
        self, element_bytes: int, *, last: bool = False, statistics_bytes: int | None = None
    ) -> int:
        """Bytes that one block of the plain reference path saves for backward when nothing is recomputed.

        Counted from model/blocks.py in units of [rows, D], its input included; tests/test_workload.py counts the same with
        saved-tensor hooks. `last`: the last block has no text output. `statistics_bytes`: of a LayerNorm's mean or rstd,
        the element's on a CPU and 4 on a GPU.
        """
        config, d = self.config, self.config.hidden_dim
        text = SAVED_TEXT_LAST if last else SAVED_TEXT
        rows = SAVED_VISUAL * self.visual_rows + text * self.text_rows + SAVED_JOINT * self.rows
        if self.batch * self.num_frames == 1:  # a slice of the joint rows is then a view of what is saved anyway
            rows += self.text_rows - self.visual_rows if last else -self.rows
        norms = 4 * self.visual_rows + (2 if last else 4) * self.text_rows  # mean and rstd of each LayerNorm
        modulation = (12 if last else 19) * self.batch * d  # chunks, 1 + scale, SiLU of temb; temb itself
        softmax = 4 * 3 * config.num_attention_heads * self.rows  # fp32 log-sum-exp of each branch
        rotary = 4 * self.shape.num_frames * config.attention_head_dim  # fp32 cos and sin
        return element_bytes * (d * rows + modulation) + (statistics_bytes or element_bytes) * norms + softmax + rotary

    def chunked_saved_bytes(self, element_bytes: int, *, first: bool = False, last: bool = False) -> int:
        """Bytes that one block of model/chunks.py saves for backward when it keeps everything, in any number of chunks.

        In units of [rows, D]: its input, the temporal outputs and the inner residual; the last block has no text behind its
        input. `first`: its text is one row set a sample. Beside them the modulation of both streams, SiLU of temb, and temb.
        """
        text = 0 if last else 2 * self.text_rows
        text += self.batch * self.num_text_tokens if first else self.text_rows
        modulation = (11 if last else 15) * self.batch
        return element_bytes * self.config.hidden_dim * (3 * self.visual_rows + text + modulation)

    def handwritten_saved_bytes(
        self, element_bytes: int, *, first: bool = False, last: bool = False, recomputed: Collection[str] = ()
    ) -> dict[str, int]:
        """Bytes that one block of model/handwritten.py saves for backward, by activation group, all branches on.

        In units of [rows, D]: its input; 7 visual and 3 text projections; the outputs of the spatial and the cross branch
        and the residual behind them (temporal is made again); the 4D input of GELU; of spatial and cross an fp32
        log-sum-exp a row and head (fp64 in fp64). The last block keeps no text behind its projections. `first`: its text
        is one row set a sample, expanded over the frames. An image has no temporal branch. `recomputed` groups are left
        out. tests/kernels/test_handwritten_saved.py counts the same.
        """
        config, row = self.config, element_bytes * self.config.hidden_dim
        joint = self.visual_rows if last else self.rows
        num_visual = 4 if self.shape.num_frames == 1 else 7
        text_input = self.batch * self.num_text_tokens if first else self.text_rows
        found = {
            "block_input": row * (self.visual_rows + text_input),
            "qkv": row * (num_visual * self.visual_rows + 3 * self.text_rows),
            "branch_out": row * 3 * joint,
            "mlp_pre": row * 4 * joint,
            "stats": max(4, element_bytes) * 2 * config.num_attention_heads * self.rows,
        }
        return {name: num_bytes for name, num_bytes in found.items() if name not in recomputed}

    def block_input_bytes(self, element_bytes: int) -> int:
        """Bytes of one block's input, visual and text rows: all that a recomputed block keeps."""
        return element_bytes * self.config.hidden_dim * self.rows


# Tensors of [rows, D] that a reference block saves; see Workload.saved_bytes_per_block. Joint rows: q, k, v and output of
# the spatial and the temporal branch, q and output of the cross branch. Visual: 8 in the MLP (its 4D input and output of
# GELU), two inputs and two outputs of LayerNorm, two modulated, two slices for the output projections, two gated. Text: the
# same and the first frame's keys and values, which hold on to the whole text projections; in the last block the LayerNorm's
# input and output, the modulated and those two.
SAVED_VISUAL = 18
SAVED_TEXT = 20
SAVED_TEXT_LAST = 5
SAVED_JOINT = 10
