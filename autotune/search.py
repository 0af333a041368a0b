"""Chooses, for each VideoShape, how the global batch is split and how many blocks recompute: the fastest that fits.

The space is small and searched whole: every divisor of the batch as microbatch x 0..L recomputed blocks. Recomputed are
the first blocks, because their turn in backward comes last, when the kept ones are already freed; so the block that is
being computed again finds room. `policy` fixes what the blocks do, only the split is searched then; the time of copies to
host memory is not predicted. A mesh is given, not searched: what its ranks exchange is not predicted. Layer 0 only.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.autotune.cost import StepCost, step_cost
from vchitect_fast.autotune.memory import GIB, StepMemory, step_memory
from vchitect_fast.cluster import Device
from vchitect_fast.errors import UserError
from vchitect_fast.offload.policy import offload_budget_bytes
from vchitect_fast.plan import RECOMPUTE, Plan, PlanEntry, Policy, Prediction, ShardSpec
from vchitect_fast.shapes import CODEC_FACTOR, VideoShape
from vchitect_fast.workload import DTYPE_BYTES, Workload

SAFETY = 0.9  # of the memory; the rest is for what memory.py does not count
NUM_RUNNERS_UP = 3
ONE = {"dp_replicate": 1, "dp_shard": 1, "sp": 1}
SHARDS = {"frames": ShardSpec("frames", temporal="tokens"), "tokens": ShardSpec("tokens", spatial="heads")}
MORE_ROWS = 1.05


@dataclass(frozen=True)
class Choice:
    """One point of the space with its predicted cost."""

    microbatch: int  # samples a forward
    accumulation: int  # microbatches a step
    num_recomputed: int  # of the first blocks
    policy: tuple[Policy, ...]
    cost: StepCost
    memory: StepMemory

    def __str__(self) -> str:
        return f"microbatch {self.microbatch} x {self.accumulation}, {self.num_recomputed} of {len(self.policy)} blocks recomputed"

    @property
    def peak_gib(self) -> float:
        """Predicted peak memory in GiB."""
        return self.memory.peak_bytes / GIB


def choices(
    work: Workload, device: Device, dtype: str, policy: tuple[Policy, ...] | None = None, num_shards: int = 1
) -> list[Choice]:
    """The whole space for one shape; `work.batch` is what a step has on one data-parallel rank. `policy` leaves only the split."""
    layers, batch = work.config.num_layers, work.batch
    found = []
    for microbatch in (size for size in range(1, batch + 1) if batch % size == 0):
        one, times = replace(work, batch=microbatch), batch // microbatch
        for recomputed in range(layers + 1) if policy is None else [num_recomputed(policy)]:
            cost = step_cost(one, device, dtype, num_recomputed=recomputed, accumulation=times, num_shards=num_shards)
            memory = step_memory(
                one, device, dtype, num_recomputed=recomputed, accumulation=times, policy=policy, num_shards=num_shards
            )
            chosen = policy or (Policy.recompute(),) * recomputed + (Policy.keep(),) * (layers - recomputed)
            found.append(Choice(microbatch, times, recomputed, chosen, cost, memory))
    return found


def num_recomputed(policy: tuple[Policy, ...]) -> int:
    """Blocks of which anything is recomputed."""
    return sum(RECOMPUTE in asdict(item).values() for item in policy)


def plan_run(
    config: TransformerConfig, shapes: list[VideoShape], device: Device, *, batch: int, num_text_tokens: int, dtype: str,
    limit_bytes: int | None = None, policy: tuple[Policy, ...] | None = None, mesh: Mapping[str, int] = ONE,
) -> Plan:  # fmt: skip
    """The Plan for a run on ranks that are all this device.

    batch            samples a step, of all ranks together, the same for every shape
    num_text_tokens  of the text encoder that the run will use
    dtype            "float32", "bfloat16", or "auto": the one with the shorter steps, summed over the shapes
    limit_bytes      memory that may be used; 0.9 of the device's by default
    policy           of each block, where it is not to be searched
    mesh             ranks by axis: dp_replicate, dp_shard, sp

    Raises UserError when the ranks cannot share the batch evenly, or when a shape fits in no way, with what is missing and the nearest shape that fits.
    """
    if batch < 1 or num_text_tokens < 1 or not shapes:
        raise UserError(
            f"a Plan needs at least one shape, sample and text token, got {len(shapes)}, {batch} and {num_text_tokens}."
        )
    num_dp, num_shards = mesh["dp_replicate"] * mesh["dp_shard"], mesh["dp_shard"] * mesh["sp"]
    if batch % num_dp:
        raise UserError(
            f"a step of {batch} samples does not divide over {num_dp} data-parallel ranks; give a batch that is a multiple of {num_dp}."
        )
    if dtype == "auto":
        return _faster_dtype(config, shapes, device, batch, num_text_tokens, limit_bytes, policy, mesh)
    limit = int(SAFETY * device.memory_bytes) if limit_bytes is None else limit_bytes
    if device.kind == "cuda":
        limit -= device.process_bytes or 0  # of the context; see memory.py
    entries = []
    for shape in dict.fromkeys(shapes):
        _check_grid(config, shape)
        work = sharded(Workload(config, shape, batch // num_dp, num_text_tokens), mesh["sp"])
        entries.append(_entry(work, device, dtype, limit, policy, num_shards))
    return Plan(
        model=config.fingerprint(),
        device=device.fingerprint(),
        device_name=device.name,
        compute_dtype=dtype,
        num_text_tokens=num_text_tokens,
        entries=tuple(entries),
        peak_flops=device.matmul_flops.get(dtype),
        mesh=dict(mesh),
        fsdp_group="global" if num_shards > 1 else "none",
        device_threads=device.num_threads,
        device_gib=device.memory_gib,
    )


def confidence(device: Device) -> str:
    """What the predictions rest on, from the probe's own residuals."""
    held_out = (
        "no held-out sizes"
        if device.fit_error is None
        else f"off by {device.fit_error:.0%} on average at held-out sizes"
    )
    spread = statistics.median(timing.spread for timing in device.timings)
    return (
        f"rates {device.source or 'of unknown source'}; interpolated between sizes, {held_out}; "
        f"repeats spread by {spread:.0%} (large on a machine that others use); reading and encoding data not included"
    )


def _faster_dtype(
    config: TransformerConfig, shapes: list[VideoShape], device: Device, batch: int, num_text_tokens: int,
    limit_bytes: int | None, policy: tuple[Policy, ...] | None, mesh: Mapping[str, int],
) -> Plan:  # fmt: skip
    plans, refusals = [], []
    for dtype in DTYPE_BYTES:
        try:
            plan = plan_run(
                config,
                shapes,
                device,
                batch=batch,
                num_text_tokens=num_text_tokens,
                dtype=dtype,
                limit_bytes=limit_bytes,
                policy=policy,
                mesh=mesh,
            )
            plans.append(plan)
        except UserError as error:
            refusals.append(error)
    if not plans:
        raise refusals[-1]  # of the narrower dtype: the nearest to fitting
    return min(plans, key=lambda plan: sum(entry.predicted.step_s for entry in plan.entries))


def sharded(work: Workload, sp: int) -> Workload:
    """The workload on `sp` ranks, by frames where that leaves no rank with over 5 % more rows than by tokens.

    Frames exchange half as much: 2 volumes of activations a layer forward against 4 (parallel/sequence.py).
    """
    if sp == 1:
        return work
    frames, tokens = replace(work, sp=sp, axis="frames"), replace(work, sp=sp, axis="tokens")
    few_heads = work.config.num_attention_heads < sp
    return frames if few_heads or frames.rows <= MORE_ROWS * tokens.rows else tokens


def _entry(
    work: Workload, device: Device, dtype: str, limit: int, policy: tuple[Policy, ...] | None, num_shards: int
) -> PlanEntry:
    space = choices(work, device, dtype, policy, num_shards)
    fitting = [choice for choice in space if choice.memory.peak_bytes <= limit]
    if not fitting:
        raise _nothing_fits(
            work, device, dtype, limit, num_shards, min(space, key=lambda choice: choice.memory.peak_bytes)
        )
    best = min(fitting, key=lambda choice: (choice.cost.step_s, choice.memory.peak_bytes))
    others = sorted((choice for choice in space if choice is not best), key=lambda choice: choice.cost.step_s)
    moved = offload_budget_bytes(replace(work, batch=best.microbatch), best.policy, dtype)
    rests_on = confidence(device) + ("; the time of copies to host memory not included" if moved else "")
    rests_on += "; what ranks exchange not included" if max(num_shards, work.sp) > 1 else ""
    return PlanEntry(
        shape=str(work.shape),
        policy=best.policy,
        offload_bytes=moved,
        microbatch=best.microbatch,
        accumulation=best.accumulation,
        shard=SHARDS[work.axis] if work.sp > 1 else ShardSpec(),
        predicted=Prediction(best.cost.step_s, best.cost.parts(), best.peak_gib, best.memory.parts_gib(), rests_on),
        runners_up=tuple(_runner_up(other, best, limit) for other in others[:NUM_RUNNERS_UP]),
    )


def _runner_up(other: Choice, best: Choice, limit: int) -> dict[str, object]:
    if other.memory.peak_bytes > limit:
        why = f"does not fit: {other.peak_gib:.2f} of {limit / GIB:.2f} GiB"
    else:
        reasons = []
        if other.num_recomputed > best.num_recomputed:
            reasons.append(f"recomputes {other.num_recomputed - best.num_recomputed} blocks more than memory asks for")
        if other.microbatch != best.microbatch:
            reasons.append("larger microbatches" if other.microbatch > best.microbatch else "smaller microbatches")
        why = f"slower by {other.cost.step_s / best.cost.step_s - 1:.1%}: {' and '.join(reasons) or 'recomputes less but costs more'}"
    return {"choice": str(other), "step_s": other.cost.step_s, "peak_gib": other.peak_gib, "why": why}


def _check_grid(config: TransformerConfig, shape: VideoShape) -> None:
    side = config.pos_embed_max_size * config.patch_size * CODEC_FACTOR
    if shape.width > side or shape.height > side:
        raise UserError(
            f"{shape} exceeds the model's position grid of {side} x {side} pixels; choose a smaller shape or another model."
        )


def _nothing_fits(
    work: Workload, device: Device, dtype: str, limit: int, num_shards: int, leanest: Choice
) -> UserError:
    def fits(frames: int) -> bool:
        one = replace(work, batch=1, shape=replace(work.shape, num_frames=frames))
        layers = work.config.num_layers
        memory = step_memory(one, device, dtype, num_recomputed=layers, accumulation=work.batch, num_shards=num_shards)
        return memory.peak_bytes <= limit

    low, high = 0, work.shape.num_frames  # `low` frames fit or are 0, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    resident_gib = (leanest.memory.states_bytes + leanest.memory.process_bytes) / GIB
    nearest = (
        f"the nearest that fits is {replace(work.shape, num_frames=low)}"
        if low
        else f"not even one frame fits, parameters and optimizer alone take {resident_gib:.2f} GiB"
    )
    return UserError(
        f"{work.shape} in {dtype} needs {leanest.peak_gib:.2f} GiB at the least ({leanest}), {limit / GIB:.2f} GiB may be used "
        f"on {device.name}, {leanest.peak_gib - limit / GIB:.3f} GiB are missing; {nearest}."
    )
