"""The recipe, in order: how a model becomes one that trains on many ranks as the Plan says.

    parallelize(model, plan, mesh)                    ours: check, start alike, shard
    obey(model, plan.entry(shape), mesh)              before each step: what this VideoShape's entry decides
    parallelize_blocks(model, blocks, mesh, ...)      a model that is not ours, with a list of its repeated blocks

The loop that follows, for all of them:
    for micro in range(accumulation):
        reduce_gradients(model, now=micro == accumulation - 1)
        loss.backward()
    optimizer.step(rate, clip_norm)                   MasterAdamW(model, ...), made after this

Sequence parallelism is for our model only. Refused: a Plan for another mesh; a cut sequence where nothing shares it, and the
other way round; of a cut sequence, chunks and hand-written blocks. Nothing is chosen here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.kernels import tuned
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.parallel.mesh import Mesh, on_all, on_first
from vchitect_fast.parallel.shard import shard
from vchitect_fast.plan import ACTIONS, KEEP, OFFLOAD, RECOMPUTE, Plan, PlanEntry


def parallelize(model: VchitectTransformer, plan: Plan, mesh: Mesh) -> None:
    """Make `model` (fp32, on its device) one rank's part of the Plan's run, in place. UserError as the model and `check`.

    Without ranks (ALONE) it only refuses what the Plan cannot have: the optimizer casts the model then.
    """
    # 1. What no step could obey is refused before the first.
    check(plan, mesh)
    check_tuned(mesh)
    for entry in plan.entries:
        obey(model, entry, mesh)
    # 2. Every rank starts from the weights of rank 0.
    start_alike(model, mesh)
    # 3. Parameters in shards, outermost: around recomputation and offload, which a block applies when it is called, and around
    # whatever computes the block.
    shard(model, list(model.transformer_blocks), mesh, compute_dtype=getattr(torch, plan.compute_dtype))


def obey(model: VchitectTransformer, entry: PlanEntry, mesh: Mesh) -> None:
    """Set the model to one entry: its cut of the sequence, its Policies, prefetch depth, chunks and attention backends."""
    model.set_shard(entry.shard, mesh.sp_group, entry.video_shape.num_frames)
    model.set_policy(entry.policy)
    model.saving.depth = entry.prefetch_depth
    model.set_chunks(entry.num_chunks)
    model.attention_backend = entry.attention


def parallelize_blocks(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: Mesh,
    *,
    actions: Sequence[str] | None = None,
    saving: Saving | None = None,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """The same for a model that is not ours (fp32, on its device), in place; its own calls stay as they are.

    blocks         modules of `model` in the order in which they are called
    actions        "keep", "recompute" or "offload" for what each block saves for backward; keep by default
    saving         with an engine, where something is offloaded; put `saving.step()` around each forward and backward
    compute_dtype  of gathered parameters; inputs of the model and of its blocks are cast to it

    Without ranks the actions are taken and nothing is sharded or cast.
    """
    actions = [KEEP] * len(blocks) if actions is None else actions
    if len(actions) != len(blocks):
        raise UserError(f"expected an action for each of {len(blocks)} blocks, got {len(actions)}; give as many.")
    # 1. Every rank starts from the weights of rank 0.
    start_alike(model, mesh)
    # 2. What each block saves, innermost.
    for index, (block, action) in enumerate(zip(blocks, actions, strict=True)):
        if action not in ACTIONS:
            raise unknown_name(f"action of block {index}", action, ACTIONS)
        if action == RECOMPUTE:
            _wrap(block, partial(checkpoint, use_reentrant=False))
        if action == OFFLOAD:
            if saving is None or saving.engine is None:
                raise UserError(
                    f"block {index} is to be offloaded and there is no engine; give saving=Saving(Engine(...))."
                )
            _wrap(block, partial(_offloaded, saving, f"block {index}"))
    # 3. Parameters in shards, around that.
    shard(model, blocks, mesh, compute_dtype=compute_dtype, cast_inputs=True)


def check(plan: Plan, mesh: Mesh) -> None:
    """UserError where the Plan and the mesh do not go together; the message says how."""
    if plan.mesh != mesh.sizes:
        raise UserError(
            f"this Plan is for the mesh {plan.mesh}, the ranks make {mesh.sizes}; start the ranks that it says."
        )
    for entry in plan.entries:
        axis, sp = entry.shard.axis, mesh.sizes["sp"]
        if (axis == "batch") != (sp == 1):
            raise UserError(
                f"the Plan's {entry.shape} cuts the sequence by {axis} over sp {sp}; an sp above 1 needs frames or tokens, sp 1 batch."
            )


def check_tuned(mesh: Mesh) -> None:
    """UserError on all ranks unless all read the same tuned table: another tile is another order of sums."""
    first = on_first(mesh.host_group, tuned.digest)

    def same() -> None:
        if (own := tuned.digest()) != first:
            raise UserError(
                f"expected one tuned table on all ranks, rank 0 has {first} and rank {mesh.rank} has {own}; name the same file in "
                f"{tuned.ENVIRONMENT} everywhere, or none."
            )

    on_all(mesh.host_group, same)


@torch.no_grad()
def start_alike(model: nn.Module, mesh: Mesh) -> None:
    """Parameters and buffers of rank 0 on every rank: whatever seed or file each one had, they are one model."""
    if mesh.axes is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0)


def _wrap(block: nn.Module, around: Callable[..., Any]) -> None:
    block.forward = partial(around, block.forward)


def _offloaded(saving: Saving, label: str, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with saving.anonymous(label):
        return forward(*args, **options)
