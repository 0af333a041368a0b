"""TransformerConfig: the sizes of a Vchitect-2.0 transformer, under the release's config.json field names.

Numbers only, no torch: the planner counts parameters and FLOPs from here, the model is built from here.
`sample_size` and `pos_embed_max_size` differ between checkpoints and are always read from the file, never assumed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vchitect_fast.errors import UserError, unknown_name

# Written into config.json by diffusers and by the release; they carry no size.
IGNORED_FIELDS = frozenset({"tp_size", "_class_name", "_diffusers_version"})


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; D = num_attention_heads x attention_head_dim.

    Raises UserError where sizes contradict each other.
    """

    sample_size: int  # latent cells a side of the base image, before the patch; scales the position grid
    patch_size: int  # latent cells a token, each way
    in_channels: int  # latent channels c
    out_channels: int
    num_layers: int  # blocks L
    attention_head_dim: int  # C
    num_attention_heads: int  # H
    joint_attention_dim: int  # width of the text embeddings
    caption_projection_dim: int  # = D
    pooled_projection_dim: int  # width of the pooled text embedding
    pos_embed_max_size: int  # M: side of the position grid in tokens
    rope_scaling_factor: float = 1.0  # divides the frame index in the temporal rotary

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind, kinds = ("whole number", int) if field.type == "int" else ("number", (int, float))
            if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
                raise UserError(
                    f"config field {field.name!r} must be a positive {kind}, got {value!r}; correct config.json."
                )
        if self.caption_projection_dim != self.hidden_dim:
            raise UserError(
                f"caption_projection_dim must equal num_attention_heads x attention_head_dim = {self.hidden_dim}, "
                f"got {self.caption_projection_dim}; correct config.json."
            )
        if self.attention_head_dim % 2 or self.hidden_dim % 4:
            raise UserError(
                f"the head dim must be even (rotary pairs) and the hidden size a multiple of 4 (position grid), "
                f"got {self.attention_head_dim} and {self.hidden_dim}."
            )
        if self.in_channels != self.out_channels:
            raise UserError(
                f"in_channels and out_channels must agree (velocity), got {self.in_channels}, {self.out_channels}."
            )

    @property
    def hidden_dim(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """From a parsed config.json. Unknown fields are refused with the nearest name, missing ones are listed."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known | IGNORED_FIELDS:
                raise unknown_name("config field", name, known)
        missing = sorted(known - values.keys() - {"rope_scaling_factor"})
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}; copy them from the checkpoint's own config.json.")
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes as config.json."""
        return {"_class_name": "VchitectTransformer", **asdict(self)}

    def fingerprint(self) -> str:
        """Twelve hex digits that change when any size changes; a Plan carries it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def num_parameters(self, num_shards: int = 1) -> int:
        """Trainable parameters, counted by the state-dict names of the release.

        num_shards  ranks over which dim 0 of each is cut (FSDP2); those of the first rank, which has most
        """
        d, patch = self.hidden_dim, self.patch_size**2 * self.in_channels
        embed = [(d, patch), (d, 256), (d, self.pooled_projection_dim), (d, self.joint_attention_dim)] + [(d, d)] * 2
        number = _number([*embed, (2 * d, d), (patch, d)], num_shards)
        number += (self.num_layers - 1) * self.num_block_parameters(num_shards=num_shards)
        return number + self.num_block_parameters(last=True, num_shards=num_shards)

    def num_block_parameters(self, *, last: bool = False, num_shards: int = 1) -> int:
        """Those of one block, counted as `num_parameters` does."""
        d = self.hidden_dim
        mlp = [(4 * d, d), (d, 4 * d)]
        if last:  # no to_add_out, no ff_context, 2D modulation
            return _number([(d, d)] * 14 + [(6 * d, d), (2 * d, d)] + mlp, num_shards)
        return _number([(d, d)] * 15 + [(6 * d, d)] * 2 + mlp * 2, num_shards)  # attention, modulation, feed-forward


def _number(linears: list[tuple[int, int]], num_shards: int) -> int:
    """Weights and biases of linear layers (out, in) on the first rank."""
    return sum([-(-rows // num_shards) * (columns + 1) for rows, columns in linears])


# sample_size and pos_embed_max_size of the 2B preset are SD3-medium's, from which it is initialised.
_2B = TransformerConfig(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
    num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=192,
)  # fmt: skip

PRESETS: dict[str, TransformerConfig] = {
    "vchitect-2b": _2B,
    # Learns a handful of clips on two CPU cores in minutes; every part of the architecture is there.
    "vchitect-tiny": replace(
        _2B, sample_size=32, num_layers=4, attention_head_dim=64, num_attention_heads=3, joint_attention_dim=64,
        caption_projection_dim=192, pooled_projection_dim=64, pos_embed_max_size=32,
    ),
    # For tests: every width differs, so that a swapped axis cannot hide.
    "vchitect-nano": replace(
        _2B, sample_size=16, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=20, pos_embed_max_size=12,
    ),
}  # fmt: skip


def preset(name: str) -> TransformerConfig:
    """A named size; UserError with the nearest name otherwise."""
    if name not in PRESETS:
        raise unknown_name("model preset", name, PRESETS)
    return PRESETS[name]
