"""Bytes of one training step by formula: what is resident, what each block saves, and the fullest moment of backward.

    resident  = process + parameters (fp32 masters, copy in the compute dtype) + AdamW's two fp32 states + EMA + buffers
    gradients = fp32, a block's appear as its backward runs (with accumulation all are there from the second microbatch)
    saved     = Workload.saved_bytes_per_block of every kept block; of a recomputed one only its input; under given Policies
                what offload.policy says is kept, and on a CPU the offload pool too, which is the same memory there
    working   = gradients between the ops of the block in backward; of a block in chunks all that is there of it

Backward frees what a block saved while its gradients appear, so four kinds of moment compete: the end of forward, and in
each block's backward the text MLP, the visual MLP and the end. Autograd runs the text stream first, it was recorded last.
The peak is the fullest moment, in the terms of metrics.peak_bytes: on a CPU the resident bytes of the process, on a GPU what
torch allocates; there the process (the CUDA context) takes part of the memory but not of the peak, so that search.py
lowers the limit by it instead. Not included: the codec and text encoders, fragmentation and caching of the allocator,
workspaces of libraries. Letters as in workload.py. Layer 0 only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from vchitect_fast.cluster import Device
from vchitect_fast.offload.policy import block_bytes, offload_budget_bytes, step_bytes
from vchitect_fast.plan import KEEP, Policy, ShardSpec
from vchitect_fast.workload import DTYPE_BYTES, Workload

GIB = 2**30
PARKED_BYTES = {"optimizer": 8, "average": 4}  # a parameter
GATHERED = 2  # blocks whose whole parameters are there at once, where they are in shards
MLP_WORKING = (
    4  # at GELU's backward, in [rows, D]: its 4D gradient out and in, less the second linear's 4D input, just freed
)
MLP_SAVED = 10  # of a stream's MLP, freed when it is done: 4D twice, gated output, modulated input
STREAM_WORKING = 2  # gradients of a block's output and of its inner residual, both streams
BLOCK_END_WORKING = 4  # at the attention's projections: gradients of q, k, v summing into that of their input
# Of a block in chunks, its input included: [rows, D] of visual and text at full length, and of the largest chunk. Full are the
# input, the temporal outputs, the inner residual or its gradient, and gradients of inputs; counted by tests/autotune/test_chunks.py
IN_CHUNKS = {"text MLP": (4, 5, 0, 16), "visual MLP": (5, 3, 16, 0), "attention": (5, 5, 16, 15)}
IN_CHUNKS_LAST = {"visual MLP": (5, 1, 16, 0), "attention": (5, 2, 16, 12)}
BY_POSITION = (4, 2, 14, 0)  # the temporal branch, whose chunks are of positions; its rotary is in fp32
CHUNK_GRADIENTS, CHUNK_GRADIENTS_LAST = 27, 25  # D x D: the attention's sum over chunks, and those of one chunk


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the fullest moment of a step."""

    process_bytes: int  # on a CPU what torch and this package take; 0 on a GPU
    states_bytes: int  # masters, compute copy, AdamW, EMA, buffers
    gradients_bytes: int
    saved_bytes: int  # of kept blocks, block inputs of recomputed ones, and the ends
    working_bytes: int
    exchange_bytes: int = 0  # what is packed to be sent to other ranks, and what arrives
    in_flight_bytes: int = 0  # offloaded, and not gone yet, or back before use

    @property
    def peak_bytes(self) -> int:
        """The sum."""
        return sum(vars(self).values())

    def parts_gib(self) -> dict[str, float]:
        """By name, in GiB."""
        return {name.removesuffix("_bytes"): value / GIB for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Moment:
    """A point of the step that may be the fullest."""

    phase: str  # "end of forward" | "text MLP" | "visual MLP" | "attention": of a block's backward
    block: int | None
    memory: StepMemory

    def __str__(self) -> str:
        return self.phase if self.block is None else f"backward of block {self.block}, {self.phase}"


def states_bytes(work: Workload, dtype: str, *, ema: bool = True, num_shards: int = 1) -> int:
    """Masters, AdamW's states, EMA and the position grid in fp32; a copy of the parameters in a narrower compute dtype.

    Of parameters in shards, the copy is that of the blocks that are gathered at once: one, and the next.
    """
    config, number = work.config, work.config.num_parameters(num_shards)
    grid = config.pos_embed_max_size**2 * config.hidden_dim * 4
    if num_shards > 1:
        return number * 4 * (3 + ema) + GATHERED * config.num_block_parameters() * DTYPE_BYTES[dtype] + grid
    copy = number * DTYPE_BYTES[dtype] if dtype != "float32" else 0
    return number * 4 * (3 + ema) + copy + grid


def parked_bytes(work: Workload, parked: Collection[str], *, num_shards: int = 1) -> dict[str, int]:
    """What lies in host memory between its uses, of one rank: AdamW's two fp32 moments, the fp32 average."""
    shard = work.config.num_parameters(num_shards)
    return {name: num_bytes * shard for name, num_bytes in PARKED_BYTES.items() if name in parked}


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
    """The fullest moment of one step; arguments as in cost.step_cost. `policy`, one a block, replaces `num_recomputed`."""
    element_bytes = DTYPE_BYTES[dtype]
    layers = work.config.num_layers
    whole = whole_bytes(work, device, dtype)
    held = [work.block_input_bytes(element_bytes) if i < num_recomputed else whole[i] for i in range(layers)]
    pool = 0
    if policy is not None:
        held = [0] * layers
        for item in step_bytes(work, policy, dtype, device_kind=device.kind):
            held[item.block] += item.num_bytes if item.action == KEEP else 0
        pool = offload_budget_bytes(work, policy, dtype) if device.kind == "cpu" else 0
    found = moments(
        work, device, dtype, held, whole, accumulation=accumulation, ema=ema, num_shards=num_shards, pool_bytes=pool
    )
    return max((moment.memory for moment in found), key=lambda item: item.peak_bytes)


def whole_bytes(work: Workload, device: Device, dtype: str, shard: ShardSpec | None = None) -> list[int]:
    """What plain autograd saves of each block; of the first, whose text is expanded over the frames, as of the others."""
    layers = work.config.num_layers
    blocks = [min(1, layers - 1)] * (layers - 1) + [layers - 1]
    found = {
        block: block_bytes(work, Policy.keep(), block, dtype, device_kind=device.kind, shard=shard)
        for block in set(blocks)
    }
    return [sum(item.num_bytes for item in found[block]) for block in blocks]


def moments(
    work: Workload, device: Device, dtype: str, held: Sequence[int], whole: Sequence[int], *, accumulation: int,
    ema: bool = True, num_shards: int = 1, pool_bytes: int = 0, exchange_bytes: int = 0,
) -> list[Moment]:  # fmt: skip
    """The moments that compete, in order of time: the end of forward, then three of each block's backward, last block first.

    held   bytes that each block keeps on the device between forward and backward
    whole  bytes that are there in its backward, what it makes again or fetches included
    Of parameters in shards, gradients are whole while microbatches add to them, else whole for one block.
    """
    element_bytes = DTYPE_BYTES[dtype]
    layers, d = work.config.num_layers, work.config.hidden_dim
    every_gradient = 4 * work.config.num_parameters()
    whole_block = 4 * work.config.num_block_parameters() if num_shards > 1 else 0
    visual, text, joint = (element_bytes * d * rows for rows in (work.visual_rows, work.text_rows, work.rows))
    process = 0 if device.kind == "cuda" else device.process_bytes or 0
    states = states_bytes(work, dtype, ema=ema, num_shards=num_shards)

    def moment(phase: str, block: int | None, gradients_bytes: int, saved_bytes: int, working_bytes: int) -> Moment:
        gradients = every_gradient if accumulation > 1 else gradients_bytes + (0 if block is None else whole_block)
        return Moment(phase, block, StepMemory(process, states, gradients, saved_bytes, working_bytes, exchange_bytes))

    ends = ends_bytes(work, element_bytes)  # there until the first block's backward begins; the pool all the time
    found = [moment("end of forward", None, 0, sum(held) + ends + pool_bytes, 0)]
    gradients_of = [4 * work.config.num_block_parameters(last=last, num_shards=num_shards) for last in (False, True)]
    done = 0  # gradients of the blocks already passed
    before = sum(held) + pool_bytes
    for index in reversed(range(layers)):
        last = index == layers - 1
        own = gradients_of[last]
        one_mlp = 0 if num_shards > 1 else 4 * 8 * d * d  # in shards, a part of the whole block
        mlp = 0 if last else one_mlp
        before -= held[index]
        if work.num_chunks > 1:
            after = {"visual MLP": mlp, "attention": mlp + one_mlp}
            for phase, working in _in_chunks(work, element_bytes, last, num_shards).items():
                found.append(moment(phase, index, done + after.get(phase, 0), before, working))
            done += own
            continue
        again = whole[index] - held[index]
        if not last:
            working = again + MLP_WORKING * text + STREAM_WORKING * joint
            found.append(moment("text MLP", index, done, before + held[index], working))
        freed = 0 if last else MLP_SAVED * text
        working = again - freed + MLP_WORKING * visual + STREAM_WORKING * joint
        found.append(moment("visual MLP", index, done + mlp, before + held[index], working))
        rest = before + work.block_input_bytes(element_bytes)
        found.append(moment("attention", index, done + own, rest, BLOCK_END_WORKING * joint))
        done += own
    return found


def _in_chunks(work: Workload, element_bytes: int, last: bool, num_shards: int) -> dict[str, int]:
    """Bytes that are there in the backward of one block in chunks, by moment; in shards gradients are counted elsewhere."""
    size, k = element_bytes * work.config.hidden_dim, work.num_chunks
    tokens = work.shape.tokens_per_frame(work.config.patch_size)

    def total(numbers: tuple[int, int, int, int], length: int) -> int:
        share = -(-length // k) / length  # of the largest chunk
        visual, text = (
            rows * (whole + share * chunk)
            for rows, whole, chunk in zip((work.visual_rows, work.text_rows), numbers[:2], numbers[2:], strict=True)
        )
        return int(size * (visual + text))

    found = {n: total(numbers, work.num_frames) for n, numbers in (IN_CHUNKS_LAST if last else IN_CHUNKS).items()}
    summed = 0 if num_shards > 1 else (CHUNK_GRADIENTS_LAST if last else CHUNK_GRADIENTS) * work.config.hidden_dim
    return found | {"attention": max(found["attention"], total(BY_POSITION, tokens)) + size * summed}
