"""A Plan's decisions for one shape in the words of other trainers: what each can be told, and what it cannot.

Pure functions from (Plan, PlanEntry) to Said. Only decisions of the Plan are written, no learning rate and no path; a decision
without a word over there becomes a sentence in `unsaid`, and a mesh that the target refuses is a UserError. Field names and
what they do were read in the sources, the newest on 2026-11-25:

    litegen     github.com/Vchitect/LiteGen 5a3311d: litegen/litegen.py, litegen/distributed/comm_context.py
    torchtitan  github.com/pytorch/torchtitan b5bcd76: torchtitan/config/configs.py, torchtitan/distributed/activation_checkpoint.py
    fastvideo   github.com/hao-ai-lab/FastVideo 2f3d407: examples/train/configs/example.yaml, fastvideo/train/utils/config.py
    automodel   github.com/NVIDIA-NeMo/Automodel 36044ad: nemo_automodel/recipes/diffusion/train.py,
                nemo_automodel/components/distributed/mesh_utils.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from vchitect_fast.errors import UserError
from vchitect_fast.offload.policy import effective, litegen_recomputed, offloads
from vchitect_fast.plan import KEEP, OFFLOAD, Plan, PlanEntry, Policy


@dataclass(frozen=True)
class Said:
    """What a target is told of one shape."""

    values: dict[str, Any]  # nested as its YAML; for torchtitan, flag -> value, None for a word that stands alone
    unsaid: tuple[str, ...]  # a sentence each: what the Plan decides, what the target does instead


@dataclass(frozen=True)
class Blocks:
    """The blocks of an entry, from 0, by what other trainers know: kept whole, recomputed whole, and the rest."""

    kept: tuple[int, ...]
    recomputed: tuple[int, ...]  # all but their input
    mixed: tuple[int, ...]  # by activation group
    moved: tuple[int, ...]  # of `recomputed`, those whose input goes to host memory

    @classmethod
    def of(cls, policies: tuple[Policy, ...]) -> Blocks:
        """Sorts what is really done: the last block is never offloaded."""
        done = effective(policies)
        kept = tuple(i for i, policy in enumerate(done) if policy == Policy.keep())
        whole = tuple(i for i, p in enumerate(done) if replace(p, block_input=KEEP) == Policy.recompute())
        mixed = tuple(i for i in range(len(done)) if i not in {*kept, *whole})
        return cls(kept, whole, mixed, tuple(i for i in whole if done[i].block_input == OFFLOAD))


def litegen(plan: Plan, entry: PlanEntry) -> Said:
    """LiteGen's YAML fields. `selective_ratio` is the fraction of blocks that are not recomputed, as its code has it."""
    blocks, mesh = Blocks.of(entry.policy), plan.mesh
    num_shards, num_blocks = mesh["dp_shard"] * mesh["sp"], len(entry.policy)
    unsaid = _unsaid(plan, entry, "LiteGen", exchanges_heads=True)
    wanted = {*blocks.recomputed, *blocks.mixed}
    ratio = litegen_ratio(wanted, num_blocks)
    again = litegen_recomputed(ratio, num_blocks)
    if again != wanted:
        unsaid.append(
            f"which blocks: the Plan recomputes {_numbers(wanted)}, LiteGen as many, evenly spread, "
            f"{_numbers(again)}; the time is the same, the peak is not."
        )
    if blocks.mixed:
        unsaid.append(_by_group(blocks, "LiteGen recomputes a block whole or not at all; here it recomputes them"))
    if blocks.moved:
        if entry.prefetch_depth != 1:
            unsaid.append(f"prefetch_depth {entry.prefetch_depth}: LiteGen fetches one block ahead.")
        if wanted - set(blocks.moved):
            unsaid.append(
                f"block inputs in host memory of {_numbers(blocks.moved)}: ac_offload moves those of every recomputed block."
            )
    grouped = num_shards > 1 and mesh["dp_replicate"] > 1
    if grouped:
        unsaid.append(
            f"parameters shared by {num_shards} ranks: group_zero shares them within a node, so it is the same on nodes of "
            f"{num_shards} devices only."
        )
    elif num_shards == 1 and plan.compute_dtype != "float32":
        unsaid.append("compute in bfloat16: precision acts through ZeRO only; with zero_degree 0 cast in your loop.")
    samples = entry.microbatch * entry.accumulation
    if entry.accumulation > 1:
        unsaid.append(
            f"{entry.accumulation} microbatches of {entry.microbatch}: LiteGen accumulates nothing, its loader gives {samples} "
            "samples at once; divide them in your loop."
        )
    unsaid.append(
        f"vae_mini_batch {entry.vae_mini_batch}: in LiteGen an argument of vae_encode, micro_batch_size={entry.vae_mini_batch}."
    )
    values = {
        "sp_size": mesh["sp"],
        "zero_degree": 3 if num_shards > 1 else 0,
        "group_zero": grouped,
        "selective_ratio": ratio,
        "ac_offload": bool(blocks.moved),
        "precision": {"bfloat16": "bf16", "float32": "fp32"}[plan.compute_dtype],
        "grad_precision": "fp32",
        "global_batch_size": samples * _num_dp(plan),
    }
    return Said(values, tuple(unsaid))


def litegen_ratio(recomputed: Collection[int], num_blocks: int) -> float:
    """The selective_ratio under which LiteGen recomputes these blocks; else one under which it recomputes as many.

    Several ratios give one number of blocks and not always the same blocks: the fraction itself is tried first, then two
    decimals, then four.
    """
    num_kept = num_blocks - len(recomputed)
    for whole in (num_blocks, 100, 10_000):
        low, high = (whole * (2 * num_kept + sign) // (2 * num_blocks) for sign in (-1, 1))
        for part in range(max(0, low), min(whole, high + 1) + 1):
            if litegen_recomputed(part / whole, num_blocks) == set(recomputed):
                return part / whole
    return num_kept / num_blocks


def torchtitan(plan: Plan, entry: PlanEntry) -> Said:
    """torchtitan's flags, with the subcommand of activation checkpointing last, as its parser wants it.

    Tokens of a sample are counted as its FLUX does: latent tokens of the whole sample and the text's once.
    """
    unsaid = _unsaid(plan, entry, "torchtitan", exchanges_heads=False)
    unsaid += _all_or_nothing(entry, "torchtitan")
    tokens = entry.video_shape.num_visual_tokens() + plan.num_text_tokens
    a_forward = tokens * entry.microbatch
    if entry.accumulation > 1:
        unsaid.append(
            f"{entry.accumulation} microbatches a step: torchtitan's trainer does it, its FLUX trainer refuses."
        )
    unsaid.append(
        "these flags: torchtitan calls them frozen and to be removed; its config functions have the same names."
    )
    again = bool(Blocks.of(entry.policy).recomputed or Blocks.of(entry.policy).mixed)
    flags = {
        "--parallelism.data_parallel_replicate_degree": plan.mesh["dp_replicate"],
        "--parallelism.data_parallel_shard_degree": plan.mesh["dp_shard"],
        "--parallelism.context_parallel_degree": plan.mesh["sp"],
        "--training.mixed_precision_param": plan.compute_dtype,
        "--training.max_context_length": tokens,
        "--training.num_tokens_per_microbatch_per_dp_rank": a_forward,
        "--training.num_tokens_per_train_step": a_forward * entry.accumulation * _num_dp(plan),
        f"activation-checkpoint:{'full' if again else 'none'}": None,
    }
    return Said(flags, tuple(unsaid))


def fastvideo(plan: Plan, entry: PlanEntry) -> Said:
    """FastVideo's `training` section. It shards parameters over hsdp_shard_dim ranks, those of sp among them, as a Plan does."""
    mesh, shape, blocks = plan.mesh, entry.video_shape, Blocks.of(entry.policy)
    unsaid = _unsaid(plan, entry, "FastVideo", exchanges_heads=True) + _all_or_nothing(entry, "FastVideo")
    unsaid.append(
        f"num_latent_t {shape.num_frames}: of the Plan's codec, which keeps every frame; FastVideo's own does not."
    )
    if plan.compute_dtype != "bfloat16":
        unsaid.append(f"compute in {plan.compute_dtype}: FastVideo computes in bfloat16.")
    values = {
        "training": {
            "distributed": {
                "num_gpus": math.prod(mesh.values()),
                "sp_size": mesh["sp"],
                "tp_size": 1,
                "hsdp_replicate_dim": mesh["dp_replicate"],
                "hsdp_shard_dim": mesh["dp_shard"] * mesh["sp"],
            },
            "data": {
                "train_batch_size": entry.microbatch,
                "num_frames": shape.num_frames,
                "num_latent_t": shape.num_frames,
                "num_height": shape.height,
                "num_width": shape.width,
            },
            "loop": {"gradient_accumulation_steps": entry.accumulation},
            "model": {"enable_gradient_checkpointing_type": "full" if blocks.recomputed or blocks.mixed else None},
            "dit_precision": "fp32",
        }
    }
    return Said(values, tuple(unsaid))


def automodel(plan: Plan, entry: PlanEntry) -> Said:
    """NeMo Automodel's diffusion recipe. Its dp_size leaves the ranks of cp out, and parameters are sharded over both.

    Raises UserError for a mesh that its FSDP2 refuses: replicas of which none is sharded over dp_shard, with sp.
    """
    mesh, blocks, num_dp = plan.mesh, Blocks.of(entry.policy), _num_dp(plan)
    unsaid = _unsaid(plan, entry, "Automodel", exchanges_heads=True) + _all_or_nothing(entry, "Automodel")
    again = bool(blocks.recomputed or blocks.mixed)
    plain = mesh["dp_replicate"] > 1 and mesh["dp_shard"] * mesh["sp"] == 1
    if mesh["dp_replicate"] > 1 and mesh["dp_shard"] == 1 and not plain:
        raise UserError(
            f"expected dp_shard above 1 beside dp_replicate {mesh['dp_replicate']} and sp {mesh['sp']}, Automodel refuses replicas "
            "of a size of 1; plan with `vchitect-fast autotune --mesh dp_replicate=...,dp_shard=2,...`, or export another format."
        )
    values: dict[str, Any] = {
        "step_scheduler": {
            "global_batch_size": entry.microbatch * entry.accumulation * num_dp,
            "local_batch_size": entry.microbatch,
        }
    }
    if plain:
        values["ddp"] = {"activation_checkpointing": again}
        unsaid.append("fp32 masters: with ddp Automodel holds parameters and computes in one dtype, model.torch_dtype.")
    else:
        values["model"] = {"torch_dtype": "float32", "compute_dtype": plan.compute_dtype}
        values["fsdp"] = {
            "tp_size": 1,
            "cp_size": mesh["sp"],
            "pp_size": 1,
            "dp_replicate_size": mesh["dp_replicate"],
            "dp_size": num_dp,
            "activation_checkpointing": again,
        }
    return Said(values, tuple(unsaid))


TARGETS: dict[str, Callable[[Plan, PlanEntry], Said]] = {
    "litegen": litegen,
    "torchtitan": torchtitan,
    "fastvideo": fastvideo,
    "automodel": automodel,
}


def _unsaid(plan: Plan, entry: PlanEntry, target: str, *, exchanges_heads: bool) -> list[str]:
    """What none of the targets can be told, as far as this entry asks for it."""
    found = []
    if target != "LiteGen":
        found.append(f"the model: {target} has no Vchitect-2.0 transformer; this is how a step is divided, no more.")
    shard = entry.shard
    if plan.mesh["sp"] > 1 and not (exchanges_heads and shard.spatial == "heads"):
        how = {
            "frames": "frames, rows of the temporal branch exchanged",
            "tokens": f"tokens, exchanged to {shard.spatial}",
        }
        theirs = "tokens, exchanged to heads" if exchanges_heads else "the sequence, by its own context parallelism"
        found.append(f"sp cuts {how.get(shard.axis, shard.axis)}: {target} cuts {theirs}.")
    if entry.num_chunks > 1:
        found.append(f"num_chunks {entry.num_chunks}: {target} computes a block at once.")
    if not set(entry.attention.values()) <= {"auto", "sdpa"}:
        chosen = ", ".join(f"{branch} {backend}" for branch, backend in entry.attention.items())
        found.append(f"attention backends ({chosen}): {target} chooses its own.")
    if plan.parked:
        found.append(f"{' and '.join(plan.parked)} in host memory between uses: {target} keeps them on the device.")
    return found


def _all_or_nothing(entry: PlanEntry, target: str) -> list[str]:
    """What a target that recomputes every block or none, and offloads nothing, does with this entry instead."""
    blocks, found = Blocks.of(entry.policy), []
    if blocks.kept and (blocks.recomputed or blocks.mixed):
        found.append(
            f"{len(blocks.kept)} of {len(entry.policy)} blocks kept ({_numbers(blocks.kept)}): {target} recomputes all or none; "
            "here all, which is slower and smaller."
        )
    if blocks.mixed:
        found.append(_by_group(blocks, f"{target} recomputes all or none; here all"))
    moved = [block for block, policy in enumerate(effective(entry.policy)) if offloads(policy)]
    if moved:
        found.append(
            f"activations of {_numbers(moved)} in host memory, {entry.offload_bytes / 2**30:.2f} GiB: {target} offloads none; "
            "see that they fit on the device."
        )
    return found


def _by_group(blocks: Blocks, instead: str) -> str:
    return f"activation groups of {_numbers(blocks.mixed)}, each with its own policy: {instead}."


def _num_dp(plan: Plan) -> int:
    return plan.mesh["dp_replicate"] * plan.mesh["dp_shard"]


def _numbers(blocks: Collection[int]) -> str:
    """Block numbers for a person: "blocks 0-3, 7"."""
    if not blocks:
        return "no block"
    spans = ", ".join(f"{low}-{high}" if high > low else str(low) for low, high in _spans(blocks))
    return f"{'block' if len(blocks) == 1 else 'blocks'} {spans}"


def _spans(numbers: Iterable[int]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return spans
