"""What the ranks of tests/parallel/test_shard.py do: the same training steps on shards, handed back whole.

A case is a dict that can be sent. Ranks of an sp group see the same samples, and each has the loss of its
own frames, as with sequence parallelism; without it they compute the other frames too and leave them out of their loss.

Letters: B batch, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from offloading import MIB, NUM_BLOCKS, make_inputs, make_model, work_of
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from vchitect_fast.ema import EMA
from vchitect_fast.errors import UserError
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.offload.policy import offloads
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.parallel.mesh import CPU, Mesh, make_mesh
from vchitect_fast.parallel.shard import local_shard, reduce_gradients, shard, shard_frozen
from vchitect_fast.plan import Plan, Policy
from vchitect_fast.train import park

STEPS, RATES, CLIP = 3, (1e-2, 5e-3, 2e-3), 0.05
NAMES = ("dp_replicate", "dp_shard", "sp")


def sizes(dp_replicate: int, dp_shard: int, sp: int) -> dict[str, int]:
    return dict(zip(NAMES, (dp_replicate, dp_shard, sp), strict=True))


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def samples(step: int, index: int, dtype: torch.dtype) -> list[Tensor]:
    """The whole batch of a step has samples 0, 1, ...; this is one of them, [1, ...] each."""
    return [x.to(dtype) for x in make_inputs(work_of("3x32x32", batch=1), seed=1000 * step + index)]


def microbatch(step: int, first: int, B: int, dtype: torch.dtype) -> list[Tensor]:
    parts = [samples(step, first + i, dtype) for i in range(B)]
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def own_loss(model: VchitectTransformer, inputs: list[Tensor], mesh: Mesh) -> Tensor:
    """Mean of the squares over the frames of this rank, of the count of all frames."""
    out = model(*inputs)
    sp, rank = mesh.sizes["sp"], mesh.sp_rank
    T = out.shape[1]
    bounds = [r * (T // sp) + min(r, T % sp) for r in range(sp + 1)]
    return out[:, bounds[rank] : bounds[rank + 1]].square().sum() / out.numel()


def train(mesh: Mesh, case: dict[str, Any]) -> dict[str, Any]:
    """STEPS optimizer steps; losses and norms a step, gradients of the first, masters, states and averages at the end."""
    dtype = getattr(torch, case.get("dtype", "float64"))
    compute = getattr(torch, case.get("compute_dtype", "float64"))
    B, accumulation = case["B"], case["accumulation"]
    model = make_model(dtype=dtype)
    policy = case.get("policy", (Policy.keep(),) * NUM_BLOCKS)
    engine = Engine(8 * MIB) if any(offloads(item) for item in policy) else None
    model.saving = Saving(engine, keep_last=0)
    model.set_policy(policy)
    model.set_chunks(case.get("num_chunks", 1))
    model.set_kernels(case.get("kernels"))
    shard(model, list(model.transformer_blocks), mesh, compute_dtype=compute)
    optimizer = MasterAdamW(model, weight_decay=0.1, betas=(0.9, 0.95), dtype=compute)
    ema = EMA(optimizer.masters, 0.5)
    result: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(accumulation):
            last = micro == accumulation - 1
            reduce_gradients(model, now=last, keep_gathered=case.get("keep_gathered", False))
            first = (mesh.dp_rank * accumulation + micro) * B
            loss = own_loss(model, microbatch(step, first, B, dtype), mesh) / accumulation
            with model.saving.step():
                loss.backward()
            total += loss.detach().double()
        if mesh.axes is not None:
            dist.all_reduce(total)
            total /= mesh.num_dp
        result["losses"].append(float(total))
        if not step:
            result["gradients"] = {
                name: full(master.grad) for name, master in optimizer.masters.items() if master.grad is not None
            }
        result["norms"].append(float(optimizer.step(RATES[step], CLIP)))
        ema.update(step)
    result["masters"] = {name: full(tensor) for name, tensor in optimizer.masters.items()}
    result["state"] = {name: full(tensor) for name, tensor in optimizer.state().items()}
    result["average"] = {name: full(tensor) for name, tensor in ema.average.items()}
    return result


def train_on(case: dict[str, Any]) -> dict[str, Any] | None:
    """On the ranks; rank 0 answers."""
    mesh = make_mesh(sizes(*case["mesh"]), case.get("fsdp_group", "global"), CPU)
    result = train(mesh, case)
    return result if mesh.is_first else None


def gathered_while(policy: Sequence[Policy], keep_gathered: bool) -> dict[str, list[int]]:
    """Two microbatches: all-gathers and reductions in each, and how many modules stay gathered after forward and backward."""
    mesh = make_mesh(sizes(1, 2, 1), "global", CPU)
    model = make_model()
    model.saving = Saving(Engine(8 * MIB), keep_last=0)
    model.set_policy(policy)
    shard(model, list(model.transformer_blocks), mesh)
    counted: dict[str, list[int]] = {"gathers": [], "reductions": [], "after_forward": [], "after_backward": []}
    for micro in range(2):
        reduce_gradients(model, now=micro == 1, keep_gathered=keep_gathered)
        with CommDebugMode() as counter:
            loss = own_loss(model, microbatch(0, micro, 1, torch.float32), mesh)
            counted["after_forward"].append(num_gathered(model))
            loss.backward()
            counted["after_backward"].append(num_gathered(model))
        calls = {str(op): number for op, number in counter.get_comm_counts().items()}
        counted["gathers"].append(sum(number for op, number in calls.items() if "gather" in op))
        counted["reductions"].append(sum(number for op, number in calls.items() if "reduce" in op))
    return counted


def gathers_so_far(prefetch: int) -> list[int]:
    """How many all-gathers were begun when block 0, 1, 2, 3 starts in forward, then 3, 2, 1, 0 in backward."""
    mesh = make_mesh(sizes(1, 2, 1), "global", CPU)
    layers = [nn.Linear(4, 4) for _ in range(4)]
    model = nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 4))
    shard(model, layers, mesh, prefetch=prefetch)
    found: list[int] = []
    with CommDebugMode() as counter:

        def note(*_args: Any) -> None:
            found.append(sum(n for op, n in counter.get_comm_counts().items() if "gather" in str(op)))

        for layer in layers:
            layer.register_forward_pre_hook(note)
            layer.register_full_backward_pre_hook(note)
        model(torch.randn(2, 4)).sum().backward()
    return found


def num_gathered(model: VchitectTransformer) -> int:
    """Of the root and its blocks, those whose parameters are whole on this rank."""
    return sum(not isinstance(next(part.parameters()), DTensor) for part in (model.norm_out, *model.transformer_blocks))


def average_standing_in() -> dict[str, Any]:
    """Losses of a sharded model on its masters and on its average, beside one process on that average."""
    mesh = make_mesh(sizes(1, 2, 1), "global", CPU)
    model, twin = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    shard(model, list(model.transformer_blocks), mesh)
    optimizer = MasterAdamW(model, weight_decay=0.1, betas=(0.9, 0.95))
    ema = EMA(optimizer.masters, 0.5)
    inputs = microbatch(0, 0, 1, torch.float64)
    own_loss(model, inputs, mesh).backward()
    optimizer.step(0.1, 1.0)
    ema.update(0)
    before = {name: full(tensor) for name, tensor in optimizer.masters.items()}
    twin.load_state_dict({name: full(tensor) for name, tensor in ema.average.items()}, strict=False)
    with torch.no_grad():
        outside = float(own_loss(model, inputs, mesh))
        with ema.standing_in():
            inside = float(own_loss(model, inputs, mesh))
        alone = float(own_loss(twin, inputs, mesh))
    restored = all(torch.equal(full(tensor), before[name]) for name, tensor in optimizer.masters.items())
    return {"outside": outside, "inside": inside, "average_alone": alone, "restored": restored}


def bytes_held(num_shards: int) -> dict[str, int]:
    """By part, what lies on this rank after a backward, and what of it is parked before the update; scalars left out."""
    mesh = make_mesh(sizes(1, num_shards, 1), "global", CPU)
    model = make_model()
    shard(model, list(model.transformer_blocks), mesh)
    optimizer = MasterAdamW(model, weight_decay=0.1, betas=(0.9, 0.95))
    ema = EMA(optimizer.masters, 0.5)
    own_loss(model, microbatch(0, 0, 1, torch.float32), mesh).backward()
    moments = {name: tensor for name, tensor in optimizer.state().items() if not name.startswith("step.")}
    gradients = {name: master.grad for name, master in optimizer.masters.items() if master.grad is not None}
    parts = {"masters": optimizer.masters, "optimizer": moments, "average": ema.average, "gradients": gradients}
    found = {part: sum(local_shard(x).nbytes for x in tensors.values()) for part, tensors in parts.items()}
    plan = Plan("", "", "", "float32", 4, (), parked=("optimizer", "average"))
    parked = park(plan, optimizer, ema, torch.device("cpu")).parked_bytes()
    return found | {f"parked {name}": num_bytes for name, num_bytes in parked.items()}


class Encoder(nn.Module):
    """Something like a text encoder: repeated layers, a table, and a method beside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encode(tokens).square()

    def encode(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x).relu()
        return x


def frozen() -> dict[str, Any]:
    """A frozen encoder before and after it is sharded."""
    mesh = make_mesh(sizes(1, 2, 1), "global", CPU)
    encoder, tokens = Encoder(), torch.arange(6)
    with torch.no_grad():
        before = encoder(tokens), encoder.encode(tokens)
        shard_frozen(encoder, mesh, methods=("encode",))
        after = encoder(tokens), encoder.encode(tokens)
    return {
        "same": torch.equal(before[0], after[0]),
        "same_encoded": torch.equal(before[1], after[1]),
        "sharded": all(isinstance(parameter, DTensor) for parameter in encoder.parameters()),
        "trainable": sum(parameter.requires_grad for parameter in encoder.parameters()),
    }


def low_precision() -> str:
    """What MasterAdamW says of a model that was cast before it was sharded."""
    net = nn.Linear(4, 4).bfloat16()
    shard(net, [], make_mesh(sizes(1, 2, 1), "global", CPU))
    try:
        MasterAdamW(net, weight_decay=0.0, betas=(0.0, 0.0))
    except UserError as error:
        return str(error)
    return "nothing was refused"
