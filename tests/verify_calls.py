"""verify's part of one rank, for ranks that are up already (ranks.py)."""

from __future__ import annotations

from dataclasses import replace

import torch

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.ledger import Ledger
from vchitect_fast.autotune.verify import verify_on
from vchitect_fast.machine import this_device
from vchitect_fast.parallel.mesh import make_mesh
from vchitect_fast.plan import Plan


def verified(plan: Plan, ledger: str) -> dict[str, dict[str, float]]:
    """Measure the Plan, as one for this device: the ranks have fewer threads than the tests."""
    plan = replace(plan, device=this_device().fingerprint())
    mesh = make_mesh(plan.mesh, plan.fsdp_group, torch.device("cpu"))
    return verify_on(mesh, plan, preset("vchitect-nano"), num_steps=1, ledger=Ledger(ledger))
