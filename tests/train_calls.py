"""A training run's part of one rank, for ranks that are up already (ranks.py): no start, no import, no launcher."""

from __future__ import annotations

import torch

from vchitect_fast.config import TrainConfig
from vchitect_fast.parallel.mesh import make_mesh
from vchitect_fast.plan import Plan
from vchitect_fast.train import train_on


def trained(file: str) -> int:
    """Train what is left of a run file on the Plan's mesh; the last step."""
    config = TrainConfig.load(file)
    plan = Plan.load(config.plan)
    mesh = make_mesh(plan.mesh, plan.fsdp_group, torch.device("cpu"))
    return train_on(mesh, config, plan)["step"]
