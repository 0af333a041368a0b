"""Seconds of one block of the reference path by part: so that a Policy can be priced, and exchanges find what hides them.

    products into the branches     visual: 3 spatial, 3 temporal, 1 cross; text: 3, shared by the branches
    attention                      spatial (J keys), temporal (T), cross (N); J = S + N
    products out                   3 visual, 2 text (0 in the last block), and the second of each MLP
    first product of each MLP
    cheap                          norms, GELU, rotary, modulation, elementwise passes, operations that move no data

FLOPs: Workload.linear_flops and attention_flops; passes: the tables below, counted again by tests/autotune/test_cost.py.
Rows are those of the fullest rank, lengths those of the whole sequence. In chunks (model/chunks.py) a product has the rows
of one chunk, as many times as there are chunks, and backward contains one more forward. Letters as in workload.py. Layer 0 only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from vchitect_fast.autotune.rates import DeclaredRates, Rates, Seconds, added_seconds
from vchitect_fast.cluster import Device
from vchitect_fast.workload import Workload

FEED_FORWARD = 4  # the MLP is 4 D wide
NONE = Seconds(0.0, 0.0)
AGAIN = {"checkpoint": (), "frame": ("cheap", "out")}  # parts that it computes again at least; () is all


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
# In chunks: outputs are put together, sums begin with zeros, gradients are put in their place; views are those of one chunk.
# What backward makes again is not among its passes.
CHUNK_FORWARD_PASSES = Passes(visual=15, text=15, joint=9, views=204)
CHUNK_BACKWARD_PASSES = Passes(visual=32, text=33, joint=11, views=318)
CHUNK_FORWARD_PASSES_LAST = Passes(visual=15, text=0, joint=9, views=137)
CHUNK_BACKWARD_PASSES_LAST = Passes(visual=35, text=12, joint=5, views=223)
CHUNK_GRADIENTS, CHUNK_GRADIENTS_LAST = 34, 21  # D x D elements of weight gradients that each chunk adds


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
    # What a Policy adds, the host's time; both halves at the rate of a forward. Part of no sum.
    checkpoint: Seconds = NONE
    frame: Seconds = NONE

    def sum(self, *names: str) -> Seconds:
        """Of the named parts; without a name of all that every block has."""
        total = NONE
        for name in names or PARTS:
            total += getattr(self, name)
        return total

    def scaled(self, forward: float, backward: float) -> BlockSeconds:
        """Every part so many times as long."""
        parts = {name: getattr(self, name) for name in PARTS}
        scaled = {n: Seconds(part.forward_s * forward, part.backward_s * backward) for n, part in parts.items()}
        return BlockSeconds(**scaled, checkpoint=self.checkpoint * forward, frame=self.frame * forward)

    def made_again(self) -> BlockSeconds:
        """Backward with one more forward inside, as a block in chunks has it."""
        parts: list[Seconds] = [getattr(self, name) for name in PARTS]
        return BlockSeconds(*(Seconds(part.forward_s, part.backward_s + part.forward_s) for part in parts))


PARTS = tuple(field.name for field in fields(BlockSeconds) if field.name not in ("checkpoint", "frame"))


@dataclass(frozen=True)
class _InPieces:
    """Rates of rows that are computed in so many pieces, one after the other."""

    rates: Rates | DeclaredRates
    number: int

    def linear(self, dtype: str, rows: int, fan_in: int, fan_out: int) -> Seconds:
        return self.rates.linear(dtype, -(-rows // self.number), fan_in, fan_out) * self.number

    def attention(self, dtype: str, rows: int, width: int, length: int) -> Seconds:
        return self.rates.attention(dtype, -(-rows // self.number), width, length) * self.number

    def elementwise(self, op: str, dtype: str, elements: int) -> Seconds:
        return self.rates.elementwise(op, dtype, -(-elements // self.number)) * self.number


def block_parts(
    work: Workload, rates: Rates | DeclaredRates, dtype: str, *, last: bool = False, text_twice: bool = False
) -> BlockSeconds:
    """One block. `last`: without text output. `text_twice`: rows are resharded, the text is projected for each cut."""
    d, shape, in_chunks = work.config.hidden_dim, work.shape, work.num_chunks > 1
    visual, text, joint = work.visual_rows, work.text_rows, work.rows
    joint_tokens = shape.tokens_per_frame(work.config.patch_size) + work.num_text_tokens
    streams = [visual] if last else [visual, text]
    pieces = _InPieces(rates, min(work.num_chunks, work.num_frames))
    of_visual, of_text = pieces.linear(dtype, visual, d, d), pieces.linear(dtype, text, d, d)
    mlp = NONE
    for rows in streams:
        mlp += pieces.linear(dtype, rows, d, FEED_FORWARD * d)
    out = of_visual * 2 + of_text * (0 if last else 2) + pieces.linear(dtype, joint, d, d)  # to_out_context takes both
    parts = BlockSeconds(
        spatial_in=of_visual * 3,
        temporal_in=of_visual * 3,
        cross_in=of_visual,
        text_in=of_text * (6 if text_twice or (in_chunks and not last) else 3),
        spatial=pieces.attention(dtype, joint, d, joint_tokens),
        temporal=pieces.attention(dtype, joint, d, shape.num_frames),
        cross=pieces.attention(dtype, joint, d, work.num_text_tokens),
        out=out + mlp,
        mlp_in=mlp,
        cheap=_modulation(work, rates, dtype, last) + _cheap(work, pieces, dtype, last),
    )
    ahead, behind = _passes(work, last)
    overhead_s = (rates.device.op_overhead_s or 0.0) * pieces.number
    host = Seconds(ahead.views * overhead_s, behind.views * overhead_s)
    whole = parts.sum()
    if rates.device.kind == "cuda":  # the host runs ahead of the device; the slower of the two is the time
        parts = parts.scaled(
            max(1.0, host.forward_s / whole.forward_s if whole.forward_s else 1.0),
            max(1.0, host.backward_s / whole.backward_s if whole.backward_s else 1.0),
        )
    else:
        parts = replace(parts, cheap=parts.cheap + host)
    if in_chunks:
        return parts.made_again()
    share = ahead.views / FORWARD_PASSES.views  # the last block has fewer ops, and of these as many fewer
    added = {name: _added(rates.device, name, host, parts, again) * share for name, again in AGAIN.items()}
    return replace(parts, **added)


def _added(device: Device, name: str, host: Seconds, parts: BlockSeconds, again: tuple[str, ...]) -> Seconds:
    """By a checkpoint or a Frame; on a GPU only where the host then takes longer than the device."""
    added = added_seconds(device, name)
    if device.kind != "cuda":
        return added
    there, twice_s = parts.sum(), parts.sum(*again).forward_s
    return Seconds(
        max(0.0, host.forward_s + added.forward_s - there.forward_s),
        max(0.0, host.forward_s + host.backward_s + added.backward_s - there.backward_s - twice_s),
    )


def _passes(work: Workload, last: bool) -> tuple[Passes, Passes]:
    """Forward and backward."""
    if work.num_chunks > 1:
        if last:
            return CHUNK_FORWARD_PASSES_LAST, CHUNK_BACKWARD_PASSES_LAST
        return CHUNK_FORWARD_PASSES, CHUNK_BACKWARD_PASSES
    return (FORWARD_PASSES_LAST, BACKWARD_PASSES_LAST) if last else (FORWARD_PASSES, BACKWARD_PASSES)


def _modulation(work: Workload, rates: Rates | DeclaredRates, dtype: str, last: bool) -> Seconds:
    d = work.config.hidden_dim
    return rates.linear(dtype, work.batch, d, 6 * d) + rates.linear(dtype, work.batch, d, (2 if last else 6) * d)


def _cheap(work: Workload, rates: _InPieces, dtype: str, last: bool) -> Seconds:
    d, in_chunks = work.config.hidden_dim, work.num_chunks > 1
    visual, text, joint = work.visual_rows, work.text_rows, work.rows
    total = rates.elementwise("gelu", dtype, visual * FEED_FORWARD * d)
    if not last:
        total += rates.elementwise("gelu", dtype, text * FEED_FORWARD * d)
    # In chunks the temporal branch has a norm of its own; in the last block no text.
    total += rates.elementwise("layer_norm", dtype, visual * d) * (3 if in_chunks else 2)
    total += rates.elementwise("layer_norm", dtype, text * d) * (1 if last else 3 if in_chunks else 2)
    total += rates.elementwise("rotate", dtype, (visual if in_chunks and last else joint) * d) * 2  # temporal q and k
    ahead, behind = _passes(work, last)
    one = {rows: rates.elementwise("multiply", dtype, rows * d).forward_s for rows in {visual, text, joint}}

    def swept(passes: Passes) -> float:
        return passes.visual * one[visual] + passes.text * one[text] + passes.joint * one[joint]

    total += Seconds(swept(ahead), swept(behind))
    if in_chunks:  # weight gradients of the chunks are summed
        added = (CHUNK_GRADIENTS_LAST if last else CHUNK_GRADIENTS) * d * d * rates.number
        total += Seconds(0.0, rates.elementwise("multiply", dtype, added).forward_s)
    return total
