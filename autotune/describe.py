"""Layouts and Policies in words: what a choice is, and in what another one differs. Nothing is predicted or compared.

    layout_in_words    "4 sharded data-parallel ranks x 2 sequence-parallel ranks (frames cut, resharded to tokens), ..."
    blocks_in_words    "blocks 0 to 9: recompute all but the input; blocks 10 to 23: keep everything"
    difference         "recomputes in 14 instead of 10 blocks, microbatch 2 instead of 1"

Layer 0 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

from vchitect_fast.autotune.layout import Layout
from vchitect_fast.autotune.reasons import num_doing
from vchitect_fast.plan import ACTIONS, KEEP, OFFLOAD, RECOMPUTE, Plan, PlanEntry, Policy

MOST_STRETCHES = 4
COUNTS = {
    "microbatch": "samples a microbatch", "num_chunks": "chunks", "prefetch_depth": "blocks fetched ahead",
    "vae_mini_batch": "frames encoded at once",
}  # fmt: skip
AXES = {"dp_replicate": "replicas", "dp_shard": "sharded data-parallel ranks", "sp": "sequence-parallel ranks"}


def layout_of(plan: Plan, entry: PlanEntry) -> Layout:
    """The Layout that a Plan's entry stands for."""
    return Layout(
        **plan.mesh, shard=entry.shard, microbatch=entry.microbatch, accumulation=entry.accumulation,
        num_chunks=entry.num_chunks, vae_mini_batch=entry.vae_mini_batch, prefetch_depth=entry.prefetch_depth,
    )  # fmt: skip


def layout_in_words(layout: Layout) -> str:
    """The ranks, the cut, the division of the step; what is 1 is left out."""
    ranks = " x ".join(f"{layout.mesh[axis]} {words}" for axis, words in AXES.items() if layout.mesh[axis] > 1)
    parts = [ranks or "one rank"]
    if layout.sp > 1:
        parts[0] += f" ({_cut(layout)})"
    parts.append(f"microbatch {layout.microbatch} x {layout.accumulation}")
    if layout.num_chunks > 1:
        parts.append(f"{layout.num_chunks} chunks")
    if layout.prefetch_depth > 1:
        parts.append(f"{layout.prefetch_depth} blocks fetched ahead")
    return ", ".join(parts)


def policy_in_words(policy: Policy) -> str:
    """What a block does."""
    if policy == Policy.keep():
        return "keep everything"
    if policy == Policy.recompute():
        return "recompute all but the input"
    actions = asdict(policy)
    if policy.stats == policy.branch_out:  # made by the same op: one thing to a person
        del actions["stats"]
    if set(actions.values()) == {OFFLOAD}:
        return "offload everything"
    if set(actions.values()) == {OFFLOAD, RECOMPUTE} and list(actions.values()).count(OFFLOAD) == 1:
        return "offload the input, recompute the rest"
    found = []
    for action in reversed(ACTIONS):  # what costs first
        names = [name for name, done in actions.items() if done == action]
        if names and action != KEEP:
            found.append(f"{action} {_listed(names)}")
    return ", ".join(found)


def blocks_in_words(policies: Sequence[Policy]) -> str:
    """Stretches of blocks that do the same; of many stretches, how many blocks do what."""
    stretches = [(policy, len(list(same))) for policy, same in groupby(policies)]
    if len(stretches) > MOST_STRETCHES:
        counts = {policy: list(policies).count(policy) for policy in dict.fromkeys(policies)}
        return "; ".join(f"{number} of {len(policies)} blocks: {policy_in_words(p)}" for p, number in counts.items())
    said, first = [], 0
    for policy, number in stretches:
        which = f"block {first}" if number == 1 else f"blocks {first} to {first + number - 1}"
        said.append(f"{which}: {policy_in_words(policy)}")
        first += number
    return "; ".join(said)


def difference(other: Layout, others: Sequence[Policy], mine: Layout, policies: Sequence[Policy]) -> str:
    """What the other choice does that mine does not; empty where they are the same."""
    said = []
    for axis, words in AXES.items():
        if other.mesh[axis] != mine.mesh[axis]:
            said.append(f"{other.mesh[axis]} instead of {mine.mesh[axis]} {words}")
    if other.shard != mine.shard:
        said.append(f"{_cut(other)} instead of {_cut(mine)}")
    for name, words in COUNTS.items():
        if getattr(other, name) != getattr(mine, name):
            said.append(f"{getattr(other, name)} instead of {getattr(mine, name)} {words}")
    for action, verb in ((RECOMPUTE, "recomputes"), (OFFLOAD, "offloads")):
        theirs, ours = num_doing(action, others), num_doing(action, policies)
        if theirs != ours:
            said.append(f"{verb} in {theirs} instead of {ours} blocks")
    if not said and tuple(others) != tuple(policies):
        said.append(blocks_in_words(others))
    return ", ".join(said)


def _cut(layout: Layout) -> str:
    """ "frames cut, resharded to tokens"; of a sample that is not cut, that."""
    axis, to = layout.shard.axis, {"frames": layout.shard.temporal, "tokens": layout.shard.spatial}
    return f"{axis} cut, resharded to {to[axis]}" if axis in to else "not cut"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
