"""What the ranks of tests/test_resume.py and tests/parallel/test_apply.py do with a run's folder, and the Plans that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from offloading import NANO, NUM_BLOCKS

from vchitect_fast import checkpoint
from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.parallel.mesh import CPU, make_mesh
from vchitect_fast.parallel.shard import local_shard, shard
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction, ShardSpec
from vchitect_fast.resume import check_supported, only_process_in, resume

NAMES = ("dp_replicate", "dp_shard", "sp")
SHAPE = "3x32x32"


def plan_of_ranks(
    sizes: tuple[int, int, int],
    spec: ShardSpec,
    policy: tuple[Policy, ...] = (Policy.keep(),) * NUM_BLOCKS,
    *,
    fsdp_group: str = "global",
    compute_dtype: str = "float64",
    **entry: Any,
) -> Plan:
    """For the nano model; nothing of it was measured."""
    prediction = Prediction(1.0, {}, 1.0, {}, "made up for a test")
    planned = PlanEntry(SHAPE, policy, microbatch=1, predicted=prediction, shard=spec, **{"accumulation": 1, **entry})
    mesh = dict(zip(NAMES, sizes, strict=True))
    return Plan(
        NANO.fingerprint(), "0" * 12, "no device", compute_dtype, 5, (planned,), mesh=mesh, fsdp_group=fsdp_group
    )


def hold_and_resume(run: str) -> dict[str, Any]:
    """Two steps are saved, the second is torn; what the ranks go on from."""
    mesh, folder = make_mesh({"dp_replicate": 1, "dp_shard": 2, "sp": 1}, "global", CPU), Path(run)
    net = torch.nn.Linear(4, 4, bias=False)
    shard(net, [], mesh)
    tensors = {"model.weight": net.weight.detach()}
    state = {"model": {}, "decides": {"seed": 0}}
    with only_process_in(folder, mesh):
        for step in (1, 2):
            local_shard(tensors["model.weight"]).fill_(step)
            newest = checkpoint.save(folder, step, tensors, state, 2, mesh.host_group)
        if mesh.is_first:
            next(newest.glob("*.distcp")).unlink()
        config = TrainConfig(manifest="clips.jsonl", plan="plan.json", out=run)
        done, changed = resume(config, state, tensors, mesh)
    return {"done": done, "changed": changed, "loaded": local_shard(tensors["model.weight"]).flatten().tolist()}


def refused_to_hold(run: str) -> str:
    mesh = make_mesh({"dp_replicate": 1, "dp_shard": 2, "sp": 1}, "global", CPU)
    try:
        with only_process_in(Path(run), mesh):
            return "held"
    except UserError as error:
        return str(error)


def supported(plan: Plan) -> str:
    """UserError where it is not."""
    check_supported(plan, make_mesh(plan.mesh, plan.fsdp_group, CPU))
    return "supported"
