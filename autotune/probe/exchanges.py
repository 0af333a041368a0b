"""Times collectives of real ranks, over sizes, and writes them as Links: inside a node and between nodes.

Inside: all ranks of each node. Between: the ranks at one place of every node; the groups of all places run at once, so the
rate is each device's share of the network. gloo on a CPU, NCCL on a GPU. A link a kind, and the plain one, which is that of
all_to_all; what a rank sends and how latencies add up is collectives.py's, so predictions at the timed sizes come out as
timed. One rank has no collective to time. Refused: nodes with different numbers of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from vchitect_fast.autotune.collectives import Group, halves, traffic
from vchitect_fast.autotune.probe.clock import Repeats, summary, synchronize
from vchitect_fast.autotune.probe.fit import fit
from vchitect_fast.cluster import COLLECTIVES, Link
from vchitect_fast.errors import UserError
from vchitect_fast.parallel.mesh import Mesh, over_ranks

REPEATS = 9
SAMPLE_S = 2e-3  # a sample is as many collectives as take so long
# torch renamed both on the way from 2.11 to 2.14
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Place:
    """Where a group lies: its ranks, its spread, and this rank's process group."""

    name: str  # "intra_node" | "inter_node"
    spread: Group
    group: dist.ProcessGroup


def places(mesh: Mesh) -> list[Place]:
    """The groups that this mesh has; every rank calls it. UserError: ranks do not fill the nodes evenly."""
    world, local = mesh.world_size, mesh.local_world_size
    if world % local:
        raise UserError(
            f"expected as many ranks on every node, got {world} in all and {local} on this one; start as many."
        )
    nodes = world // local
    inside = [list(range(node * local, (node + 1) * local)) for node in range(nodes)]
    across = [list(range(place, world, local)) for place in range(local)]
    found = []
    for name, groups, num_nodes in (("intra_node", inside, 1), ("inter_node", across, nodes)):
        if len(groups[0]) > 1:
            made = [dist.new_group(ranks) for ranks in groups]  # by every rank, also those of others
            mine = next(group for group, ranks in zip(made, groups, strict=True) if mesh.rank in ranks)
            found.append(Place(name, Group(len(groups[0]), num_nodes), cast(dist.ProcessGroup, mine)))
    return found


def measure_exchanges(
    mesh: Mesh, place: Place, sizes: tuple[int, ...], source: str, advance: Callable[[], None]
) -> tuple[Link, ...]:
    """Links of one place. `sizes` are bytes of the whole tensor on one rank, rounded up to equal shares."""
    links = []
    for kind in COLLECTIVES:
        timed: list[tuple[float, Repeats]] = []
        for size in sizes:
            timed.append(_time(mesh, place, kind, size))
            advance()
        found = fit([(sent, repeats.median_s) for sent, repeats in timed])
        spread = max(repeats.spread for _, repeats in timed)
        hops = max(1, place.spread.num_nodes - 1)
        text = (
            f"{source}; {kind} of {place.spread.num_ranks} ranks on {place.spread.num_nodes} nodes, all groups at once; median of "
            f"{timed[0][1].number}, spread {spread:.0%}, a latency and a rate alone are off by {found.residual:.0%}"
        )
        links.append(Link(f"{place.name}/{kind}", found.bytes_per_s, found.latency_s / hops, text, points=found.points))
    return replace(links[0], name=place.name), *links


def _time(mesh: Mesh, place: Place, kind: str, num_bytes: int) -> tuple[float, Repeats]:
    """(bytes that a rank sends, seconds): of one half of an all_reduce, which is two collectives."""
    num_ranks = place.spread.num_ranks
    whole = torch.ones(math.ceil(num_bytes / 4 / num_ranks) * num_ranks, device=mesh.device)
    part = torch.ones(len(whole) // num_ranks, device=mesh.device)
    once = _collective(kind, whole, part, torch.empty_like(whole), place.group)

    def sample(calls: int) -> float:
        """Of one collective, on the slowest rank."""
        dist.barrier(mesh.host_group)
        start = time.perf_counter()
        for _ in range(calls):
            once()
        synchronize(mesh.device)
        return over_ranks(mesh, [], [(time.perf_counter() - start) / calls])[1][0]

    sample(1)  # connects
    calls = max(1, min(200, math.ceil(SAMPLE_S / sample(1))))  # the same on every rank
    samples = [sample(calls) / halves(kind) for _ in range(REPEATS)]
    sent = traffic(kind, 4 * len(whole), place.spread)
    return max(sent.inside_bytes, sent.outside_bytes) / halves(kind), summary(samples)


def _collective(
    kind: str, whole: Tensor, part: Tensor, other: Tensor, group: dist.ProcessGroup
) -> Callable[[], object]:
    return {
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "all_gather": lambda: ALL_GATHER(whole, part, group=group),
        "reduce_scatter": lambda: REDUCE_SCATTER(part, whole, group=group),
        "all_reduce": lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group),  # sums would overflow
    }[kind]
