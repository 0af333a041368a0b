"""Seconds of one training step by formula: work counted from the model's sizes, rates measured by the probe.

    step = accumulation x (forward + backward + recompute) + optimizer
    forward of a block = linear layers      2 D^2 [BTS (7+3+8) + BTN (3+3+8)] FLOPs        Workload.linear_flops
                       + attention          4 D [BT J^2 + B J T^2 + B J T N] FLOPs         Workload.attention_flops
                       + GELU, LayerNorm, rotary, and elementwise passes over [rows, D] (table below)
                       + operations that move no data x their overhead
    backward  = the same list with the backward rates (linear and attention: twice the FLOPs)
    recompute = one more forward of every block whose policy says so
    optimizer = fused AdamW over all parameters + bytes moved by clipping, EMA and the copy to the compute dtype / bandwidth

Rates are those of rates.py, measured or declared. Of several ranks, the fullest counts; its optimizer has the
parameters of its shard. Not included: what ranks exchange, reading data, encoding video and text, logging, validation,
saving. J = S + N joint tokens; the other letters as in workload.py. Layer 0 only.
"""

from __future__ import annotations

from dataclasses import dataclass

from vchitect_fast.autotune.rates import DeclaredRates, Rates, Seconds, rates_of
from vchitect_fast.cluster import Device
from vchitect_fast.workload import Workload


@dataclass(frozen=True)
class Passes:
    """Elementwise passes of one reference block over its rows x D, as counted (tests/autotune/test_cost.py counts again)."""

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
FEED_FORWARD = 4  # the MLP is 4 D wide
# Bytes a parameter that the optimizer moves in place beside AdamW, at the memory's bandwidth.
CLIP_BYTES = 4 + 8  # norm reads the gradient, clipping reads and writes it
EMA_BYTES = 12  # reads average and master, writes the average
COPY_BYTES = 4 + 2  # reads the master, writes bfloat16


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step, all microbatches included."""

    forward_s: float
    backward_s: float
    recompute_s: float
    optimizer_s: float

    @property
    def step_s(self) -> float:
        """The sum."""
        return self.forward_s + self.backward_s + self.recompute_s + self.optimizer_s

    def parts(self) -> dict[str, float]:
        """By the names that the training log uses; recomputation happens inside its backward."""
        return {
            "forward_s": self.forward_s,
            "backward_s": self.backward_s,
            "recompute_s": self.recompute_s,
            "optimizer_s": self.optimizer_s,
        }


def block_seconds(work: Workload, rates: Rates | DeclaredRates, dtype: str, *, last: bool = False) -> Seconds:
    """Forward and backward of one block of the reference path, one microbatch."""
    d, shape = work.config.hidden_dim, work.shape
    visual, text, joint = work.visual_rows, work.text_rows, work.rows  # of this rank, over sequences of all
    frames, text_tokens = shape.num_frames, work.num_text_tokens
    joint_tokens = shape.tokens_per_frame(work.config.patch_size) + text_tokens

    linear = rates.linear(dtype, visual, d, d) * 9 + rates.linear(dtype, text, d, d) * (3 if last else 5)
    linear += rates.linear(dtype, joint, d, d)  # to_out_context, visual and text rows alike
    streams = [visual] if last else [visual, text]
    for rows in streams:
        linear += rates.linear(dtype, rows, d, FEED_FORWARD * d) * 2
    linear += rates.linear(dtype, work.batch, d, 6 * d) + rates.linear(dtype, work.batch, d, (2 if last else 6) * d)

    attention = Seconds(0.0, 0.0)
    for length in (joint_tokens, frames, text_tokens):  # spatial, temporal, cross
        attention += rates.attention(dtype, joint, d, length)

    plain = Seconds(0.0, 0.0)
    for rows in streams:
        plain += rates.elementwise("gelu", dtype, rows * FEED_FORWARD * d)
    plain += rates.elementwise("layer_norm", dtype, visual * d) * 2 + rates.elementwise(
        "layer_norm", dtype, text * d
    ) * (1 if last else 2)
    plain += rates.elementwise("rotate", dtype, joint * d) * 2  # q and k of the temporal branch
    ahead, behind = (FORWARD_PASSES_LAST, BACKWARD_PASSES_LAST) if last else (FORWARD_PASSES, BACKWARD_PASSES)
    one = {rows: rates.elementwise("multiply", dtype, rows * d).forward_s for rows in {visual, text, joint}}

    def swept(passes: Passes) -> float:
        return passes.visual * one[visual] + passes.text * one[text] + passes.joint * one[joint]

    overhead_s = rates.device.op_overhead_s or 0.0
    kernels = linear + attention + plain + Seconds(swept(ahead), swept(behind))
    host = Seconds(ahead.views * overhead_s, behind.views * overhead_s)
    if rates.device.kind == "cuda":  # the host runs ahead of the device; the slower of the two is the time
        return Seconds(max(kernels.forward_s, host.forward_s), max(kernels.backward_s, host.backward_s))
    return kernels + host


def ends_seconds(work: Workload, rates: Rates | DeclaredRates, dtype: str) -> Seconds:
    """What surrounds the blocks: patch and text embedding, timestep, output norm and projection."""
    config, d = work.config, work.config.hidden_dim
    patch = config.patch_size**2 * config.in_channels
    text_rows = work.batch * work.num_text_tokens
    total = rates.linear(dtype, work.visual_rows, patch, d) + rates.linear(dtype, work.visual_rows, d, patch)
    total += rates.linear(dtype, text_rows, config.joint_attention_dim, d)
    total += rates.linear(dtype, work.batch, 256, d) + rates.linear(dtype, work.batch, config.pooled_projection_dim, d)
    total += rates.linear(dtype, work.batch, d, d) * 2 + rates.linear(dtype, work.batch, d, 2 * d)
    one = rates.elementwise("multiply", dtype, work.visual_rows * d).forward_s
    return total + rates.elementwise("layer_norm", dtype, work.visual_rows * d) + Seconds(4 * one, 7 * one)


def optimizer_seconds(
    work: Workload, rates: Rates | DeclaredRates, dtype: str, *, ema: bool, num_shards: int = 1
) -> float:
    """AdamW over fp32 masters, norm and clipping; the copy to the compute dtype and the EMA where there is one."""
    number = -(-work.config.num_parameters() // num_shards)
    moved = CLIP_BYTES + (EMA_BYTES if ema else 0) + (COPY_BYTES if dtype != "float32" else 0)
    return rates.elementwise("adamw", "float32", number).forward_s + number * moved / rates.memory_bytes_per_s


def step_cost(
    work: Workload, device: Device, dtype: str, *, num_recomputed: int, accumulation: int, ema: bool = True,
    num_shards: int = 1,
) -> StepCost:  # fmt: skip
    """One training step.

    work            one microbatch
    dtype           of activations and matmuls, "float32" or "bfloat16"
    num_recomputed  of the first blocks, run forward once more in backward
    accumulation    microbatches a step
    num_shards      ranks that share the parameters
    """
    rates = rates_of(device)
    layers = work.config.num_layers
    middle = block_seconds(work, rates, dtype)
    last = block_seconds(work, rates, dtype, last=True)
    passed = middle * (layers - 1) + last + ends_seconds(work, rates, dtype)
    again = middle.forward_s * min(num_recomputed, layers - 1) + (last.forward_s if num_recomputed == layers else 0.0)
    # Gradients are added to fp32 ones from the second microbatch on; narrower ones are widened first.
    gathered = 12 * (accumulation - 1) + (6 * accumulation if dtype != "float32" else 0)
    gathered_s = gathered * work.config.num_parameters() / rates.memory_bytes_per_s
    return StepCost(
        forward_s=accumulation * passed.forward_s,
        backward_s=accumulation * passed.backward_s + gathered_s,
        recompute_s=accumulation * again,
        optimizer_s=optimizer_seconds(work, rates, dtype, ema=ema, num_shards=num_shards),
    )
