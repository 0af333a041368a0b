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

from dataclasses import asdict, dataclass

from vchitect_fast.autotune.block import block_parts
from vchitect_fast.autotune.rates import DeclaredRates, Rates, Seconds, rates_of
from vchitect_fast.cluster import Device
from vchitect_fast.workload import Workload

# Bytes a parameter that the optimizer moves in place beside AdamW, at the memory's bandwidth.
CLIP_BYTES = 4 + 8  # norm reads the gradient, clipping reads and writes it
EMA_BYTES = 12  # reads average and master, writes the average
COPY_BYTES = 4 + 2  # reads the master, writes bfloat16


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step, all microbatches included. Compute alone, then what the rest adds to it."""

    forward_s: float
    backward_s: float
    recompute_s: float
    optimizer_s: float
    exchange_s: float = 0.0  # exposed: of sequence parallelism
    gather_s: float = 0.0  # exposed: parameters gathered, gradients reduced
    copy_s: float = 0.0  # exposed: to host memory and back
    encode_s: float = 0.0  # the codec
    pressure_s: float = 0.0  # the allocator gives memory back and takes it again

    @property
    def step_s(self) -> float:
        """The sum."""
        return sum(vars(self).values())

    def parts(self) -> dict[str, float]:
        """By the names that the training log uses; recomputation happens inside its backward."""
        return asdict(self)


def block_seconds(work: Workload, rates: Rates | DeclaredRates, dtype: str, *, last: bool = False) -> Seconds:
    """Forward and backward of one block of the reference path, one microbatch."""
    return block_parts(work, rates, dtype, last=last).sum()


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
    number = work.config.num_parameters(num_shards)
    moved = CLIP_BYTES + (EMA_BYTES if ema else 0) + (COPY_BYTES if dtype != "float32" else 0)
    return rates.elementwise("adamw", "float32", number).forward_s + number * moved / rates.memory_bytes_per_s


def accumulation_seconds(work: Workload, rates: Rates | DeclaredRates, dtype: str, accumulation: int) -> float:
    """Gradients are added to fp32 ones from the second microbatch on; narrower ones are widened first."""
    moved = 12 * (accumulation - 1) + (6 * accumulation if dtype != "float32" else 0)
    return moved * work.config.num_parameters() / rates.memory_bytes_per_s


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
    return StepCost(
        forward_s=accumulation * passed.forward_s,
        backward_s=accumulation * passed.backward_s + accumulation_seconds(work, rates, dtype, accumulation),
        recompute_s=accumulation * again,
        optimizer_s=optimizer_seconds(work, rates, dtype, ema=ema, num_shards=num_shards),
    )
