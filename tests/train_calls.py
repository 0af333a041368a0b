"""A rank's part of a training run, or of `memory explain`, for ranks that are up already (ranks.py): no start, no import, no launcher."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.memory import explain, to_json
from vchitect_fast.parallel.mesh import make_mesh
from vchitect_fast.parallel.shard import local_shard
from vchitect_fast.plan import Plan
from vchitect_fast.step import Step
from vchitect_fast.train import train_on


def trained(file: str) -> int:
    """Train what is left of a run file on the Plan's mesh; the last step."""
    config = TrainConfig.load(file)
    plan = Plan.load(config.plan)
    mesh = make_mesh(plan.mesh, plan.fsdp_group, torch.device("cpu"))
    return train_on(mesh, config, plan)["step"]


def parked(file: str) -> set[tuple[int, int]]:
    """Train as `trained`; after each forward and backward: bytes of moments and averages in host memory, and on the device."""
    seen, microbatch = set(), Step._microbatch

    def watched(self: Step, *args):
        loss = microbatch(self, *args)
        states = [*self.ema.average.values(), *(t for n, t in self.optimizer.state().items() if n[:5] != "step.")]
        on_device = sum(local_shard(tensor).untyped_storage().nbytes() for tensor in states)
        seen.add((sum(self.states.parked_bytes().values()), on_device))
        return loss

    with patch.object(Step, "_microbatch", watched):
        trained(file)
    return seen


def explained(plans: list[Plan], model: TransformerConfig) -> list[dict[str, Any]]:
    """What `memory explain` finds on this rank, for the first entry of each Plan."""
    found = []
    for plan in plans:
        mesh = make_mesh(plan.mesh, plan.fsdp_group, torch.device("cpu"))
        found.append(to_json(explain(plan, plan.entries[0], model, mesh)))
    return found


def failing(file: str, names: dict[str, int]) -> list[str]:
    """Train once for each name, "module:function", that fails on the given rank; what this rank says of it."""
    said = []
    for name, rank in names.items():
        module, _, path = name.partition(":")
        error = UserError(f"{path} failed on rank {rank} on purpose")
        place = patch(f"vchitect_fast.{module}.{path}", side_effect=error) if dist.get_rank() == rank else nullcontext()
        with place, pytest.raises(UserError) as caught:
            trained(file)
        said.append(str(caught.value))
    return said
