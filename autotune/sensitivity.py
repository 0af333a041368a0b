"""What would change a decision: the same problem on clusters that differ in one fact by a known fraction.

    changes(problem, layout)           none; links, device memory, products, attention: each less and more of it
    effect(problem, chosen, change)    the chosen step with the change, and what would be chosen instead
    slack(problem, chosen, names)      how many times slower links may be before the step is longer

A fact changes for every device or link at once; two facts changed together are not looked at. The mesh stays: another one
is another run for every shape. Layer 0 only.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from vchitect_fast.autotune.bounds import fits
from vchitect_fast.autotune.describe import difference
from vchitect_fast.autotune.layout import Layout, Problem
from vchitect_fast.autotune.model import Outcome, StepModel
from vchitect_fast.autotune.search import ShapeSearch
from vchitect_fast.cluster import Cluster, Device, Link

HOST_LINKS = ("device_to_host", "host_to_device")
LINKS = {"host links": HOST_LINKS, "links inside a node": ("intra_node",), "links between nodes": ("inter_node",)}
RATES = {"products": "linear", "attention": "attention"}
LINK_CHANGE, MEMORY_CHANGE, RATE_CHANGE = 0.2, 0.1, 0.1
SAME = 0.002  # of a step: choices this near are one to a person
LONGER = 0.01  # of a step: what slack calls longer
NOTHING = "nothing fits"
SLOWEST = 32.0  # times: slower links than this are not looked at


@dataclass(frozen=True)
class Change:
    """A cluster that differs in one fact."""

    name: str
    factor: float  # 0.8: a fifth less
    cluster: Cluster

    def __str__(self) -> str:
        return self.name if self.factor == 1 else f"{self.name} {self.factor - 1:+.0%}"


@dataclass(frozen=True)
class Effect:
    """What a change does."""

    change: str
    step_s: float  # of the chosen plan, with the change
    ratio: float  # to its step without
    fits: bool  # the chosen plan still does
    winner: str | None  # in what the best choice now differs; None: it is the chosen one
    winner_step_s: float | None  # None where nothing fits, or the chosen one wins

    @property
    def decides(self) -> bool:
        """Whether the decision would be another one."""
        return self.winner is not None


def changes(problem: Problem, layout: Layout) -> list[Change]:
    """No change, then less and more of every fact that the cluster has; links between devices only where the mesh uses them."""
    cluster, device = problem.cluster, problem.cluster.device
    found = [Change("no change", 1.0, cluster)]
    present, used = {link.place for link in cluster.links}, links_between(problem, layout)
    for name, links in LINKS.items():
        if present & set(links) and (links == HOST_LINKS or used & set(links)):
            for factor in _around(LINK_CHANGE):
                found.append(Change(name, factor, with_links(cluster, links, factor)))
    for factor in _around(MEMORY_CHANGE):
        more = replace(device, memory_bytes=round(device.memory_bytes * factor))
        found.append(Change("device memory", factor, replace(cluster, device=more)))
    for name, op in RATES.items():
        for factor in _around(RATE_CHANGE):
            found.append(Change(name, factor, replace(cluster, device=faster(device, op, factor))))
    return found


def links_between(problem: Problem, layout: Layout) -> set[str]:
    """Names of the links that the ranks of this mesh reach each other by."""
    groups = [of(layout) for of in (problem.sp_group, problem.shard_group, problem.replica_group)]
    inside = {"intra_node"} if any(group.num_ranks > group.num_nodes for group in groups) else set()
    return inside | ({"inter_node"} if any(group.num_nodes > 1 for group in groups) else set())


def effect(
    problem: Problem, chosen: Outcome, change: Change, limit_bytes: int | None = None
) -> tuple[Effect, tuple[Outcome, ...]]:
    """The chosen step predicted again and the best searched anew, both with the change; and all that was looked at.

    limit_bytes  memory that may be used before the change, and as much of more or less memory; None: 0.9 of the device's
    """
    if limit_bytes is not None:
        limit_bytes = limit_bytes * change.cluster.device.memory_bytes // problem.cluster.device.memory_bytes
    model = StepModel(on(problem, change.cluster), limit_bytes)
    now = model.predict(chosen.layout, chosen.policies)
    does = fits(now, model.limits())
    search = ShapeSearch(model)
    best = search.best(chosen.layout.mesh, (1 - SAME) * now.cost.step_s if does else math.inf)
    winner = difference(best.layout, best.policies, chosen.layout, chosen.policies) if best else ""
    if not does and best is None:
        winner = NOTHING
    winner_s = best.cost.step_s if best and winner else None
    ratio = now.cost.step_s / chosen.cost.step_s
    return Effect(str(change), now.cost.step_s, ratio, does, winner or None, winner_s), search.seen()


def on(problem: Problem, cluster: Cluster) -> Problem:
    """The problem on a changed cluster; what was measured on the real one still corrects the formulas."""
    known = problem.calibration
    return replace(
        problem,
        cluster=cluster,
        calibration=replace(known, device=cluster.device.fingerprint()) if known else None,
    )


def slack(problem: Problem, chosen: Outcome, names: Collection[str]) -> float | None:
    """How many times slower the named links may be before the step is LONGER; None: SLOWEST times slower does not matter."""

    def longer(times: float) -> bool:
        cluster = with_links(problem.cluster, names, 1 / times)
        now = StepModel(on(problem, cluster)).predict(chosen.layout, chosen.policies)
        return now.cost.step_s > (1 + LONGER) * chosen.cost.step_s

    low, high = 1.0, SLOWEST
    if not longer(high):
        return None
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if longer(middle) else (middle, high)
    return low


def with_links(cluster: Cluster, names: Collection[str], factor: float) -> Cluster:
    """The cluster with so many times the bytes a second on the named links, of each collective too; latencies stay."""
    changed = (_scaled(link, factor) if link.place in names else link for link in cluster.links)
    return replace(cluster, links=tuple(changed))


def faster(device: Device, op: str, factor: float) -> Device:
    """The device with `op`, linear or attention, so many times as fast, its rates measured or declared."""
    timings = tuple(
        replace(t, forward_s=t.forward_s / factor, backward_s=None if t.backward_s is None else t.backward_s / factor)
        if t.op == op
        else t
        for t in device.timings
    )
    if op == "linear":
        flops = {dtype: rate * factor for dtype, rate in device.matmul_flops.items()}
        products = tuple(replace(point, flops=point.flops * factor) for point in device.matmul_points)
        return replace(device, timings=timings, matmul_flops=flops, matmul_points=products)
    lengths = tuple(
        replace(point, forward_flops=point.forward_flops * factor, backward_flops=point.backward_flops * factor)
        for point in device.attention_points
    )
    flops = {dtype: rate * factor for dtype, rate in device.attention_flops.items()}
    return replace(device, timings=timings, attention_points=lengths, attention_flops=flops)


def _around(fraction: float) -> tuple[float, float]:
    return 1 - fraction, 1 + fraction


def _scaled(link: Link, factor: float) -> Link:
    both, together = (
        None if rate is None else rate * factor for rate in (link.both_ways_bytes_per_s, link.together_bytes_per_s)
    )
    points = tuple((size, rate * factor) for size, rate in link.points)
    return replace(
        link,
        bytes_per_s=link.bytes_per_s * factor,
        both_ways_bytes_per_s=both,
        together_bytes_per_s=together,
        points=points,
    )
