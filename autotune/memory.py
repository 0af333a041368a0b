"""Bytes of one training step by formula: what is resident, what each block saves, and the fullest moment of backward.

    resident  = process + parameters (fp32 masters, copy in the compute dtype) + AdamW's two fp32 states + EMA + buffers
    gradients = fp32, a block's appear as its backward runs (with accumulation all are there from the second microbatch)
    saved     = Workload.saved_bytes_per_block of every kept block; of a recomputed one only its input; under given Policies
                what offload.policy says is kept, and on a CPU the offload pool too, which is the same memory there
    working   = gradients between the ops of the block in backward

Backward frees what a block saved while its gradients appear, so four kinds of moment compete: the end of forward, and in
each block's backward the text MLP, the visual MLP and the end. Autograd runs the text stream first, it was recorded last.
The peak is the fullest moment, in the terms of metrics.peak_bytes: on a CPU the resident bytes of the process, on a GPU what
torch allocates; there the process (the CUDA context) takes part of the memory but not of the peak, so that search.py
lowers the limit by it instead. Not included: the codec and text encoders, fragmentation and caching of the allocator,
workspaces of libraries. Letters as in workload.py. Layer 0 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vchitect_fast.cluster import Device
from vchitect_fast.offload.policy import offload_budget_bytes, step_bytes
from vchitect_fast.plan import KEEP, Policy
from vchitect_fast.workload import DTYPE_BYTES, Workload

GIB = 2**30
GATHERED = 2  # blocks whose whole parameters are there at once, where they are in shards
MLP_WORKING = (
    4  # at GELU's backward, in [rows, D]: its 4D gradient out and in, less the second linear's 4D input, just freed
)
MLP_SAVED = 10  # of a stream's MLP, freed when it is done: 4D twice, gated output, modulated input
STREAM_WORKING = 2  # gradients of a block's output and of its inner residual, both streams
BLOCK_END_WORKING = 4  # at the attention's projections: gradients of q, k, v summing into that of their input


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the fullest moment of a step."""

    process_bytes: int  # on a CPU what torch and this package take; 0 on a GPU
    states_bytes: int  # masters, compute copy, AdamW, EMA, buffers
    gradients_bytes: int
    saved_bytes: int  # of kept blocks, block inputs of recomputed ones, and the ends
    working_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The sum."""
        return self.process_bytes + self.states_bytes + self.gradients_bytes + self.saved_bytes + self.working_bytes

    def parts_gib(self) -> dict[str, float]:
        """By name, in GiB."""
        return {
            "process": self.process_bytes / GIB,
            "states": self.states_bytes / GIB,
            "gradients": self.gradients_bytes / GIB,
            "saved": self.saved_bytes / GIB,
            "working": self.working_bytes / GIB,
        }


def states_bytes(work: Workload, dtype: str, *, ema: bool = True, num_shards: int = 1) -> int:
    """Masters, AdamW's states, EMA and the position grid in fp32; a copy of the parameters in a narrower compute dtype.

    Of parameters in shards, the copy is that of the blocks that are gathered at once: one, and the next.
    """
    config, number = work.config, work.config.num_parameters()
    grid = config.pos_embed_max_size**2 * config.hidden_dim * 4
    if num_shards > 1:
        return -(-number // num_shards) * 4 * (3 + ema) + GATHERED * block_parameters(work) * DTYPE_BYTES[dtype] + grid
    copy = number * DTYPE_BYTES[dtype] if dtype != "float32" else 0
    return number * 4 * (3 + ema) + copy + grid


def block_parameters(work: Workload, *, last: bool = False) -> int:
    """Parameters of one block, as TransformerConfig.num_parameters counts them."""
    d = work.config.hidden_dim
    return (30 if last else 43) * d * d + (27 if last else 37) * d


def ends_bytes(work: Workload, element_bytes: int) -> int:
    """What the output norm and projection save, and the latents, velocity, target and loss around them."""
    config = work.config
    patch = config.patch_size**2 * config.in_channels
    text = work.batch * work.num_text_tokens * (config.joint_attention_dim + config.hidden_dim)
    return (
        element_bytes * (3 * config.hidden_dim * work.visual_rows + 2 * patch * work.visual_rows + text)
        + 16 * patch * work.visual_rows
    )


def step_memory(
    work: Workload, device: Device, dtype: str, *, num_recomputed: int, accumulation: int, ema: bool = True,
    policy: Sequence[Policy] | None = None, num_shards: int = 1,
) -> StepMemory:  # fmt: skip
    """The fullest moment of one step; arguments as in cost.step_cost. `policy`, one a block, replaces `num_recomputed`.

    Of parameters in shards, gradients are whole while microbatches add to them, else whole for one block.
    """
    element_bytes = DTYPE_BYTES[dtype]
    statistics_bytes = 4 if device.kind == "cuda" else element_bytes
    layers, d = work.config.num_layers, work.config.hidden_dim
    full = [
        work.saved_bytes_per_block(element_bytes, last=index == layers - 1, statistics_bytes=statistics_bytes)
        for index in range(layers)
    ]
    held = [work.block_input_bytes(element_bytes) if index < num_recomputed else full[index] for index in range(layers)]
    pool = 0
    if policy is not None:
        held = [0] * layers
        for item in step_bytes(work, policy, dtype, device_kind=device.kind):
            held[item.block] += item.num_bytes if item.action == KEEP else 0
        pool = offload_budget_bytes(work, policy, dtype) if device.kind == "cpu" else 0
    before_blocks = ends_bytes(work, element_bytes) + pool
    every_gradient = 4 * work.config.num_parameters()
    whole_block = 4 * block_parameters(work) if num_shards > 1 else 0
    visual, text, joint = (element_bytes * d * rows for rows in (work.visual_rows, work.text_rows, work.rows))

    def moment(gradients_bytes: int, saved_bytes: int, working_bytes: int) -> StepMemory:
        return StepMemory(
            process_bytes=0 if device.kind == "cuda" else device.process_bytes or 0,
            states_bytes=states_bytes(work, dtype, ema=ema, num_shards=num_shards),
            gradients_bytes=every_gradient if accumulation > 1 else gradients_bytes // num_shards + whole_block,
            saved_bytes=saved_bytes,
            working_bytes=working_bytes,
        )

    moments = [moment(0, sum(held) + before_blocks, 0)]  # the pool is there all the time, the ends only now
    done = 0  # gradients of the blocks already passed
    for index in reversed(range(layers)):
        last = index == layers - 1
        own, mlp = 4 * block_parameters(work, last=last), 0 if last else 4 * 8 * d * d
        earlier, again = sum(held[:index]) + pool, full[index] - held[index]
        if not last:
            moments.append(moment(done, earlier + held[index], again + MLP_WORKING * text + STREAM_WORKING * joint))
        freed = 0 if last else MLP_SAVED * text
        moments.append(
            moment(done + mlp, earlier + held[index], again - freed + MLP_WORKING * visual + STREAM_WORKING * joint)
        )
        moments.append(moment(done + own, earlier + work.block_input_bytes(element_bytes), BLOCK_END_WORKING * joint))
        done += own
    return max(moments, key=lambda item: item.peak_bytes)
