"""Seconds of one block of the reference path by part: so that a Policy can be priced, and exchanges find what hides them.

    products into the branches     visual: 3 spatial, 3 temporal, 1 cross; text: 3, shared by the branches
    attention                      spatial (J keys), temporal (T), cross (N); J = S + N
    products out                   3 visual, 2 text (0 in the last block), and the second of each MLP
    first product of each MLP
    cheap                          norms, GELU, rotary, modulation, elementwise passes, operations that move no data

FLOPs: Workload.linear_flops and attention_flops; passes: the tables below, counted again by tests/autotune/test_cost.py.
Rows are those of the fullest rank, lengths those of the whole sequence. Letters as in workload.py. Layer 0 only.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

from vchitect_fast.autotune.rates import DeclaredRates, Rates, Seconds
from vchitect_fast.workload import Workload

FEED_FORWARD = 4  # the MLP is 4 D wide
NONE = Seconds(0.0, 0.0)


@dataclass(frozen=True)
class Passes:
    """Elementwise passes of one reference block over its rows x D."""

    visual: int
    text: int
    joint: int
    views: int  # operations that move no data


# Products, sums, concatenations, copies and reductions that one block dispatches outside the rotary, each one pass; the
# backward of a slice is two (zeros, then a copy); bias gradients belong to the linear layers.
FORWARD_PASSES = Passes(visual=14, text=14, joint=9, views=144)
BACKWARD_PASSES = Passes(visual=30, text=28, joint=11, views=272)
# Last block: no text output, so its text rows stop at the branches.
FORWARD_PASSES_LAST = Passes(visual=14, text=2, joint=9, views=122)
BACKWARD_PASSES_LAST = Passes(visual=30, text=15, joint=5, views=228)


@dataclass(frozen=True)
class BlockSeconds:
    """Forward and backward of one block by part, one microbatch on one rank."""

    spatial_in: Seconds  # visual q, k, v
    temporal_in: Seconds
    cross_in: Seconds
    text_in: Seconds  # twice where rows are resharded: once for each cut
    spatial: Seconds
    temporal: Seconds
    cross: Seconds
    out: Seconds  # products behind attention and the second of each MLP
    mlp_in: Seconds
    cheap: Seconds

    def sum(self, *names: str) -> Seconds:
        """Of the named parts; of all without a name."""
        total = NONE
        for name in names or [field.name for field in fields(self)]:
            total += getattr(self, name)
        return total

    def scaled(self, forward: float, backward: float) -> BlockSeconds:
        """Every part so many times as long."""
        return BlockSeconds(
            *(
                Seconds(ahead * forward, behind * backward)
                for ahead, behind in (astuple(getattr(self, field.name)) for field in fields(self))
            )
        )


def block_parts(
    work: Workload, rates: Rates | DeclaredRates, dtype: str, *, last: bool = False, text_twice: bool = False
) -> BlockSeconds:
    """One block. `last`: without text output. `text_twice`: rows are resharded, the text is projected for each cut."""
    d, shape = work.config.hidden_dim, work.shape
    visual, text, joint = work.visual_rows, work.text_rows, work.rows
    joint_tokens = shape.tokens_per_frame(work.config.patch_size) + work.num_text_tokens
    streams = [visual] if last else [visual, text]
    of_visual, of_text = rates.linear(dtype, visual, d, d), rates.linear(dtype, text, d, d)
    mlp = NONE
    for rows in streams:
        mlp += rates.linear(dtype, rows, d, FEED_FORWARD * d)
    out = of_visual * 2 + of_text * (0 if last else 2) + rates.linear(dtype, joint, d, d)  # to_out_context takes both
    parts = BlockSeconds(
        spatial_in=of_visual * 3,
        temporal_in=of_visual * 3,
        cross_in=of_visual,
        text_in=of_text * (6 if text_twice else 3),
        spatial=rates.attention(dtype, joint, d, joint_tokens),
        temporal=rates.attention(dtype, joint, d, shape.num_frames),
        cross=rates.attention(dtype, joint, d, work.num_text_tokens),
        out=out + mlp,
        mlp_in=mlp,
        cheap=_cheap(work, rates, dtype, streams, last),
    )
    ahead, behind = (FORWARD_PASSES_LAST, BACKWARD_PASSES_LAST) if last else (FORWARD_PASSES, BACKWARD_PASSES)
    overhead_s = rates.device.op_overhead_s or 0.0
    host = Seconds(ahead.views * overhead_s, behind.views * overhead_s)
    whole = parts.sum()
    if rates.device.kind == "cuda":  # the host runs ahead of the device; the slower of the two is the time
        return parts.scaled(
            max(1.0, host.forward_s / whole.forward_s if whole.forward_s else 1.0),
            max(1.0, host.backward_s / whole.backward_s if whole.backward_s else 1.0),
        )
    cheap = parts.cheap + host
    return BlockSeconds(**{field.name: getattr(parts, field.name) for field in fields(parts)} | {"cheap": cheap})


def _cheap(work: Workload, rates: Rates | DeclaredRates, dtype: str, streams: list[int], last: bool) -> Seconds:
    d = work.config.hidden_dim
    visual, text, joint = work.visual_rows, work.text_rows, work.rows
    total = rates.linear(dtype, work.batch, d, 6 * d) + rates.linear(dtype, work.batch, d, (2 if last else 6) * d)
    for rows in streams:
        total += rates.elementwise("gelu", dtype, rows * FEED_FORWARD * d)
    total += rates.elementwise("layer_norm", dtype, visual * d) * 2
    total += rates.elementwise("layer_norm", dtype, text * d) * (1 if last else 2)
    total += rates.elementwise("rotate", dtype, joint * d) * 2  # q and k of the temporal branch
    ahead, behind = (FORWARD_PASSES_LAST, BACKWARD_PASSES_LAST) if last else (FORWARD_PASSES, BACKWARD_PASSES)
    one = {rows: rates.elementwise("multiply", dtype, rows * d).forward_s for rows in {visual, text, joint}}

    def swept(passes: Passes) -> float:
        return passes.visual * one[visual] + passes.text * one[text] + passes.joint * one[joint]

    return total + Seconds(swept(ahead), swept(behind))
