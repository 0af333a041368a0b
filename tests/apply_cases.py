"""What the ranks of tests/parallel/test_apply.py do: our model by its Plan, and one that is not ours, brought into shards by the recipe.

Every rank draws its first weights from its own seed: they must start from rank 0's. Letters: B batch, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from offloading import MIB, make_inputs, make_model, work_of
from resume_cases import SHAPE
from shard_cases import full
from torch import Tensor, nn

from vchitect_fast.errors import UserError
from vchitect_fast.model.flow import flow_loss
from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.offload.policy import offloads
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.parallel.apply import check, obey, parallelize, parallelize_blocks
from vchitect_fast.parallel.collectives import share
from vchitect_fast.parallel.mesh import ALONE, CPU, Mesh, make_mesh
from vchitect_fast.parallel.shard import reduce_gradients
from vchitect_fast.plan import Plan

STEPS, T = 3, 3


def batch(step: int, sample: int) -> list[Tensor]:
    """Latents, text, pooled, sigma, noise of one sample, the same wherever it is computed."""
    inputs = [x.double() for x in make_inputs(work_of(SHAPE, batch=1), seed=100 * step + sample)]
    noise = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(7 + 100 * step + sample)).double()
    return [*inputs[:3], inputs[3] / 1000, noise]


def train(plan: Plan, mesh: Mesh) -> dict[str, Any]:
    """As a user's loop would: losses, norms, gradients of the first step, masters at the end; whole."""
    entry = plan.entries[0]
    model = make_model(mesh.rank, dtype=torch.float64)
    if any(offloads(policy) for policy in entry.policy):
        model.saving = Saving(Engine(8 * MIB), keep_last=0)
    parallelize(model, plan, mesh)
    optimizer = MasterAdamW(model, weight_decay=0.1, betas=(0.9, 0.95))
    own = share(T, mesh.sizes["sp"], mesh.sp_rank)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        obey(model, entry, mesh)
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(entry.accumulation):
            reduce_gradients(model, now=micro == entry.accumulation - 1)
            latents, text, pooled, sigma, noise = batch(step, mesh.dp_rank * entry.accumulation + micro)
            inputs = latents[:, own], text, pooled, sigma, noise[:, own]
            with model.saving.step():
                loss = flow_loss(model, *inputs, num_frames=T).mean() / entry.accumulation
                loss.backward()
            total += loss.detach()
        if mesh.axes is not None:
            dist.all_reduce(total)
        found["losses"].append(float(total) / mesh.num_dp)
        if not step:
            found["gradients"] = {n: full(m.grad) for n, m in optimizer.masters.items() if m.grad is not None}
        found["norms"].append(float(optimizer.step(1e-2 / (step + 1), 0.05)))
    found["masters"] = {name: full(tensor) for name, tensor in optimizer.masters.items()}
    return found


def train_on(plan: Plan) -> dict[str, Any] | None:
    """On the ranks; rank 0 answers."""
    found = train(plan, make_mesh(plan.mesh, plan.fsdp_group, CPU))
    return found if dist.get_rank() == 0 else None


class Layer(nn.Module):
    """A residual layer with a keyword and a projection that is not trained, whose 2 MiB are worth moving by their size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.grow, self.shrink = nn.LayerNorm(width), nn.Linear(width, 1024), nn.Linear(1024, width)
        self.grow.requires_grad_(False)

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return x + scale * self.shrink(self.grow(self.norm(x)).tanh())


class Foreign(nn.Module):
    """Somebody's model: it knows nothing of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 256), nn.Linear(256, 3)
        self.layers = nn.ModuleList(Layer(256) for _ in range(3))
        self.register_buffer("shift", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.last(x) + self.shift.to(x)


def train_foreign(actions: Sequence[str] | None, compute_dtype: str | None, mesh: Mesh) -> dict[str, Any]:
    """Two samples a step; what was moved by the engine too."""
    torch.manual_seed(mesh.rank)
    model = Foreign().double() if compute_dtype is None else Foreign()
    saving = Saving(Engine(64 * MIB))
    moved: list[int] = []
    offload = saving.engine.offload
    saving.engine.offload = lambda tensor, label: (
        moved.append(tensor.untyped_storage().nbytes()),
        offload(tensor, label),
    )[1]
    dtype = getattr(torch, compute_dtype) if compute_dtype else None
    parallelize_blocks(model, list(model.layers), mesh, actions=actions, saving=saving, compute_dtype=dtype)
    optimizer = MasterAdamW(model, weight_decay=0.1, betas=(0.9, 0.95))
    found: dict[str, Any] = {"losses": [], "dtypes": set()}
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for sample in range(mesh.dp_rank, 2, mesh.num_dp):
            reduce_gradients(model, now=sample + mesh.num_dp >= 2)
            x = torch.randn(512, 5, generator=torch.Generator().manual_seed(10 * step + sample))
            out = model(x.to(next(model.parameters()).dtype))
            found["dtypes"].add(str(out.dtype))
            loss = out.square().mean() * mesh.num_dp / 2
            with saving.step():
                loss.backward()
            total += loss.detach().double()
        if mesh.axes is not None:
            dist.all_reduce(total)
        found["losses"].append(float(total) / mesh.num_dp)
        optimizer.step(1e-2, 1.0)
    found["masters"] = {name: full(tensor) for name, tensor in optimizer.masters.items()}
    return {**found, "moved": moved}


def train_foreign_on(actions: Sequence[str] | None, compute_dtype: str | None = None) -> dict[str, Any]:
    mesh = make_mesh({"dp_replicate": 1, "dp_shard": 2, "sp": 1}, "global", CPU)
    return train_foreign(actions, compute_dtype, mesh)


def refused(plan: Plan) -> str:
    try:
        check(plan, make_mesh(dict(plan.mesh), "global", CPU))
    except UserError as error:
        return str(error)
    return "nothing was refused"


__all__ = ["ALONE", "train", "train_foreign"]
