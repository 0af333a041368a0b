"""What a Policy makes again, as the planner prices it, against the matrix products that one step here runs. Counts, no clock.

pytest tests/autotune/test_ranking_work.py; attention is left out, torch does not count its FLOPs on a CPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from planner_cases import TINY, gpus, problem
from torch.utils.flop_counter import FlopCounterMode

from vchitect_fast.autotune.block import NONE, block_parts
from vchitect_fast.autotune.layout import Layout
from vchitect_fast.autotune.rates import Seconds
from vchitect_fast.autotune.verify import build_step, measure_entry
from vchitect_fast.autotune.ways import way
from vchitect_fast.benchmarks.planner import CPU_CASES, POLICIES, plan_of
from vchitect_fast.machine import this_device
from vchitect_fast.parallel.mesh import ALONE
from vchitect_fast.plan import PlanEntry, Policy, Prediction, ShardSpec
from vchitect_fast.shapes import VideoShape

SHAPE = VideoShape(8, 96, 64)
PRODUCTS = SimpleNamespace(  # rates by which a product takes its FLOPs in seconds, and all else nothing
    device=SimpleNamespace(kind="cpu", op_overhead_s=0.0, timings=()),
    linear=lambda dtype, rows, d_in, d_out: Seconds(2.0 * rows * d_in * d_out, 0.0),
    attention=lambda *_: NONE,
    elementwise=lambda *_: NONE,
)


@cache
def counted(policies: tuple[Policy, ...]) -> int:
    """FLOPs of the products of one step, forward and backward."""
    entry = PlanEntry(str(SHAPE), policies, 1, 1, Prediction(1.0, {"forward_s": 1.0}, 1.0, {}, "made up for a test"))
    plan = plan_of(SimpleNamespace(device=this_device()), replace(CPU_CASES, config=TINY), [entry])
    step_once = build_step(plan, TINY, replace(ALONE, device=torch.device("cpu")))
    with FlopCounterMode(display=False) as counter:
        measure_entry(step_once, entry, 1, num_warm_up=0)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in CPU_CASES.policies if name != "keep"])
def test_products_made_again_are_those_that_are_priced(name: str) -> None:
    num_blocks = TINY.num_layers
    policies = tuple(POLICIES[name](num_blocks))
    work = problem(gpus(), num_layers=num_blocks, batch=1, shape=SHAPE).workload(Layout())
    priced = 0.0
    for block, policy in enumerate(policies):
        parts = block_parts(work, PRODUCTS, "float32", last=block == num_blocks - 1)
        priced += way(work, parts, policy, block, "float32", "cpu", ShardSpec()).again_s
    assert counted(policies) - counted((Policy.keep(),) * num_blocks) == priced
