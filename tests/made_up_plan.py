"""A made-up cluster of small devices, a small model, and a Plan for it, searched for: what the tests of explain and report share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from vchitect_fast.architecture import TransformerConfig, preset
from vchitect_fast.autotune.calibrate import Calibration
from vchitect_fast.autotune.explain import Explanation, explain, problem_of
from vchitect_fast.autotune.search import plan_run
from vchitect_fast.cluster import AttentionPoint, Cluster, Device, Link
from vchitect_fast.plan import Plan
from vchitect_fast.shapes import VideoShape

CONFIG = replace(preset("vchitect-tiny"), num_layers=6)  # more than the search looks at one by one
SHAPE = VideoShape(32, 512, 384)
MESH = {"dp_replicate": 1, "dp_shard": 2, "sp": 2}


def made_up_cluster(memory_bytes: int = 700 * 2**20, host_bytes_per_s: float = 50e9, attack: str = "") -> Cluster:
    """Two nodes of four devices, every rate declared."""
    device = Device(
        name=f"Made-up 1{attack}", kind="cuda", memory_bytes=memory_bytes, matmul_flops={"bfloat16": 4e14},
        memory_bytes_per_s=3e12, op_overhead_s=1e-6, process_bytes=0, source=f"data sheet{attack}",
        attention_points=(AttentionPoint(16, 2e13, 2e13), AttentionPoint(1000, 2e14, 2e14)),
    )  # fmt: skip
    host = (
        Link(name, host_bytes_per_s, 1e-5, f"data sheet{attack}", 0.8 * host_bytes_per_s)
        for name in ("device_to_host", "host_to_device")
    )
    links = (*host, Link("intra_node", 2e11, 1e-5, "data sheet"), Link("inter_node", 2e10, 2e-5, "data sheet"))
    return Cluster(f"made up{attack}", device, 2, 4, 2**36, links)


def made_up_plan(
    cluster: Cluster, config: TransformerConfig = CONFIG, *shapes: VideoShape, calibration: Calibration | None = None
) -> Plan:
    """The best Plan for the shapes on MESH."""
    return plan_run(
        config, list(shapes or (SHAPE,)), cluster, batch=4, num_text_tokens=16, dtype="bfloat16", mesh=MESH,
        calibration=calibration,
    )  # fmt: skip


def explained(cluster: Cluster, plan: Plan, config: TransformerConfig = CONFIG) -> list[Explanation]:
    """Of every entry."""
    return [explain(plan, entry, problem_of(plan, entry, cluster, config)) for entry in plan.entries]


@cache
def tight() -> tuple[Cluster, Plan, Explanation]:
    """A Plan that has to recompute or offload, and why it is so."""
    cluster = made_up_cluster()
    plan = made_up_plan(cluster)
    return cluster, plan, explained(cluster, plan)[0]
