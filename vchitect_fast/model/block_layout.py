"""Where the hand-written block's tensors lie: columns by branch, parameters by stream, saved tensors by group.

    layout = layout_of(block, x, c, temb, names, policy)     checked: shapes, dtypes, a branch at all; UserError otherwise
Merged projections: a column slot of D for each name of `visual` (up to 7) and of TEXT. Branch outputs: a slot for spatial,
for cross, and a last one, in which temporal's output lies and then y = x + gate (their sum).
An image (T = 1) multiplies the temporal term by 0: it is left out of every buffer, its parameters get zero gradients.
No arithmetic on tensors here, and nothing is copied: views.

Letters: B batch, T frames, S visual tokens a frame, N text tokens, L rows of one sample, D hidden, H heads, C head dim,
K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import _check
from vchitect_fast.model.blocks import Block
from vchitect_fast.plan import RECOMPUTE, Policy

OP = "hand-written block"
BRANCHES = {  # in the order of their columns of branch_out, each with its visual projections in the order of theirs
    "spatial": ("to_q", "to_k", "to_v"),
    "cross": ("to_q_cross",),
    "temporal": ("to_q_temp", "to_k_temp", "to_v_temp"),
}
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj")
CONTEXT = "attn.to_out_context"
GROUPS = ("block_input", "qkv", "branch_out", "mlp_pre", "stats")  # two tensors each, some of them None


class Stream(NamedTuple):
    """Names of the parameters of the visual or of the text rows."""

    modulation: str
    out: str
    out_temporal: str
    first: str
    second: str


STREAMS = (
    Stream("norm1.linear", "attn.to_out.0", "attn.to_out_temporal", "ff.net.0.proj", "ff.net.2"),
    Stream(
        "norm1_context.linear",
        "attn.to_add_out",
        "attn.to_add_out_temporal",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
)


@dataclass(frozen=True)
class Layout:
    """What one call computes and where it lies."""

    num_frames: int
    num_heads: int
    last: bool
    branches: tuple[str, ...]  # that are computed
    zero: tuple[str, ...]  # modules whose gradients are zero, and not missing
    rope_scaling_factor: float
    recomputed: frozenset[str]  # groups that are not saved
    names: tuple[str, ...]  # of the parameters

    @property
    def streams(self) -> range:
        """Which of STREAMS go on behind the attentions; in the last block the visual rows alone."""
        return range(1 if self.last else 2)

    @property
    def visual(self) -> tuple[str, ...]:
        """Visual projections in the order of their columns."""
        return tuple(name for branch in self.branches for name in BRANCHES[branch])

    @property
    def num_outputs(self) -> int:
        """Column slots of the branch outputs: temporal, which is the last of `branches`, shares its slot with y."""
        return len([name for name in self.branches if name != "temporal"]) + 1

    @property
    def projections(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the merged projections of the visual and of the text rows."""
        return self.visual, TEXT

    def slots(self, rows_BLK: Tensor, num_slots: int) -> tuple[Tensor, ...]:
        """The equal column slots of a merged buffer, [B, T, S or N, H, C] each."""
        B, _, K = rows_BLK.shape
        sizes = (B, self.num_frames, -1, num_slots, self.num_heads, K // (num_slots * self.num_heads))
        return rows_BLK.view(sizes).unbind(3)

    def of(self, branch: str, slots: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A branch's slots among those of `visual`."""
        return tuple(slots[self.visual.index(name)] for name in BRANCHES[branch])

    def saved_groups(self) -> list[str]:
        """The group of each tensor that is saved, in their order."""
        num = dict.fromkeys(GROUPS, 2) | dict.fromkeys(("branch_out", "mlp_pre"), len(self.streams))
        num["stats"] = len({"spatial", "cross"} & set(self.branches))
        return [name for name in GROUPS if name not in self.recomputed for _ in range(num[name])]


def layout_of(
    block: Block, x_BTSD: Tensor, c_BTND: Tensor, temb_BD: Tensor, names: tuple[str, ...], policy: Policy
) -> Layout:
    """The Layout of block(x, c, temb), its arguments checked."""
    _check.tensor(OP, "x", x_BTSD, (None,) * 4)
    B, T, _, D = x_BTSD.shape
    weight = block.norm1.linear.weight
    _check.tensor(OP, "x", x_BTSD, (B, T, None, weight.shape[1]), like=weight)
    _check.tensor(OP, "c", c_BTND, (B, T, None, D), like=x_BTSD)
    _check.tensor(OP, "temb", temb_BD, (B, D), like=x_BTSD)
    if torch.is_autocast_enabled(x_BTSD.device.type):
        raise UserError(f"{OP}: expected a call outside torch.autocast, got one inside; cast the model instead.")
    if mixed := {name for name, p in block.named_parameters() if p.dtype != x_BTSD.dtype}:
        raise UserError(
            f"{OP}: expected parameters in {x_BTSD.dtype} as x, got another in {min(mixed)}; cast the model."
        )
    switched = block.attn.branches
    on = {"spatial": switched.spatial, "cross": switched.cross, "temporal": switched.temporal}
    is_image = T == 1
    branches = tuple(name for name in BRANCHES if on[name] and not (name == "temporal" and is_image))
    if not branches:
        raise UserError(
            f"{OP}: expected an attention branch to compute, got {switched} at {T} frames; use model.set_kernels(None)."
        )
    zero: tuple[str, ...] = ()
    if is_image and on["temporal"]:
        outputs = tuple(s.out_temporal for s in STREAMS[: 1 if block.last else 2])
        zero = (*(f"attn.{name}" for name in BRANCHES["temporal"]), *outputs)
    recomputed = frozenset(name for name in GROUPS if getattr(policy, name) == RECOMPUTE)
    attn = block.attn
    return Layout(T, attn.num_heads, block.last, branches, zero, attn.rope_scaling_factor, recomputed, names)
