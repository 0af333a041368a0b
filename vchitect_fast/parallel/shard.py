"""Parameters, gradients and optimizer state in shards: torch's fully_shard (FSDP2) over mesh.fsdp, each block by itself.

    shard(model, blocks, mesh, compute_dtype=torch.bfloat16)
    for micro in ...:
        reduce_gradients(model, now=micro == last)      before its forward
        loss.backward()
    shard_frozen(text_encoder, mesh)

The sharded parameters stay in the dtype they had, fp32 in training: they are the masters that the optimizer updates. A
block's are gathered in `compute_dtype` before its forward and again before its backward, its neighbour's are on their way by
then. Ranks of an sp group hold parts of one loss and dp groups hold losses of their own, so a gradient is the sum over sp
and the mean over dp. Buffers are not sharded. Not decided here: which modules are blocks, when memory is short (apply.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from vchitect_fast.parallel.mesh import Mesh

PREFETCH = 1  # blocks whose parameters are gathered ahead of use


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: Mesh,
    *,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    cast_inputs: bool = False,
    prefetch: int = PREFETCH,
) -> None:
    """Shard each block, then what is left of the model, in place; nothing where the mesh has no ranks (ALONE).

    blocks         modules of `model` that are called one after the other, in that order
    compute_dtype  of gathered parameters, activations and matrix products; that of the parameters by default
    reduce_dtype   in which gradients are added over ranks and microbatches; fp32 by default, fp64 for an fp64 model
    cast_inputs    cast the floating-point inputs of the model and of each block to compute_dtype: for models that do not
                   do it themselves, as ours does, whose timestep must keep its bits
    """
    if mesh.fsdp is None:
        return
    stored = next(model.parameters()).dtype
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=reduce_dtype or torch.promote_types(stored, torch.float32),
        cast_forward_inputs=cast_inputs,
    )
    for block in blocks:
        fully_shard(block, mesh=mesh.fsdp, mp_policy=precision)
    # The root as well gives its parameters up after forward: an evaluation has no backward that would, and they are old
    # after the next update or exchange with the average.
    fully_shard(model, mesh=mesh.fsdp, mp_policy=precision, reshard_after_forward=True)
    for module in sharded_modules(model):
        # A sum and one division on the shard: the same on gloo and NCCL, whatever the sizes.
        module.set_force_sum_reduction_for_comms(True)
        # One rank a shard (dp_replicate alone): the default is this mean, and torch 2.14 divides twice by a given factor.
        if mesh.fsdp.size(mesh.fsdp.ndim - 1) > 1:
            module.set_gradient_divide_factor(float(mesh.num_dp))
    _prefetch(model, blocks, prefetch)


def _prefetch(model: nn.Module, blocks: Sequence[nn.Module], depth: int) -> None:
    """The next `depth` blocks in forward, the ones before in backward, whose order is known before the first step."""
    order: list[FSDPModule] = [module for module in (model, *blocks) if isinstance(module, FSDPModule)]
    for index, module in enumerate(order):
        module.set_modules_to_forward_prefetch(order[index + 1 : index + 1 + depth])
        before = order[max(1, index - depth) : index] if index else order[max(1, len(order) - depth) :]
        module.set_modules_to_backward_prefetch(before[::-1])


def reduce_gradients(model: nn.Module, *, now: bool, keep_gathered: bool = False) -> None:
    """Before each microbatch: its gradients stay on this rank, or (now, with the last one) all are reduced over the ranks.

    Until then they lie unsharded in reduce_dtype. keep_gathered leaves the parameters gathered after the backward as well,
    so that the next microbatch gathers nothing: faster, for the memory of all parameters in compute_dtype.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        model.set_reshard_after_backward(now or not keep_gathered)


def shard_frozen(
    module: nn.Module, mesh: Mesh, *, blocks: Sequence[nn.Module] | None = None, methods: Sequence[str] = ()
) -> None:
    """Shard a model that is only run (a text encoder, a VAE), in place: every rank must call it at the same time then.

    blocks   gathered one by one; by default the members of the ModuleList that holds most parameters
    methods  besides forward, the methods that gather the parameters, "encode" of a VAE

    Its parameters keep their dtype and need no gradients. Nothing where the mesh has no ranks.
    """
    module.requires_grad_(False)
    if mesh.fsdp is None:
        return
    for part in (*(repeated_blocks(module) if blocks is None else blocks), module):
        fully_shard(part, mesh=mesh.fsdp, reshard_after_forward=True)
    for name in methods:
        register_fsdp_forward_method(module, name)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the ModuleList with most parameters; empty without one."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return list(max(lists, key=lambda part: sum(p.numel() for p in part.parameters()), default=[]))


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """The model and its blocks, as far as they are sharded."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


@torch.no_grad()
def local_shard(tensor: Tensor) -> Tensor:
    """What lies on this rank, sharing storage: a DTensor's shard (maybe empty), any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """2-norm of all gradients as one vector, a scalar that is the same on every rank; replicas count once.

    Without shards it is torch's get_total_norm, bit by bit. Shards of one mesh only; fp64 between the ranks.
    """
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = torch.nn.utils.get_total_norm([gradient for gradient in gradients if not isinstance(gradient, DTensor)])
    if not sharded:
        return whole
    norm = torch.nn.utils.get_total_norm([local_shard(gradient) for gradient in sharded])
    square = norm.double().square()
    mesh, placements = sharded[0].device_mesh, sharded[0].placements
    assert all(gradient.device_mesh == mesh and gradient.placements == placements for gradient in sharded)
    for axis, placement in enumerate(placements):
        if placement.is_shard():
            torch.distributed.all_reduce(square, group=mesh.get_group(axis))
    return (square + whole.to(square).square()).sqrt().to(norm.dtype)
