"""Seconds of collectives: bytes counted by hand, the formulas' properties over many clusters, and what is refused.

pytest tests/autotune/test_collectives.py; arithmetic only.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from vchitect_fast.autotune.collectives import Group, collective_seconds, traffic
from vchitect_fast.cluster import COLLECTIVES, Cluster, Device, Link
from vchitect_fast.errors import UserError

DEVICE = Device(name="made up", kind="cuda", memory_bytes=2**36)
INSIDE = Link("intra_node", 200e9, 10e-6, "made up")
OUTSIDE = Link("inter_node", 20e9, 30e-6, "made up")
SIZES = (1, 2**10, 2**20, 2**30)
GROUPS = [Group(n, m) for n in (2, 3, 8, 12, 16, 64) for m in (1, 2, 3, 4, 8) if m <= n]


def cluster(*links: Link) -> Cluster:
    return Cluster("made up", DEVICE, num_nodes=64, num_devices_per_node=8, links=links or (INSIDE, OUTSIDE))


def nodes_of(num_ranks: int, num_nodes: int) -> list[int]:
    return [rank * num_nodes // num_ranks for rank in range(num_ranks)]


SPREADS = [(2, 1), (8, 1), (2, 2), (8, 2), (16, 4), (6, 6)]


@pytest.mark.parametrize(("num_ranks", "num_nodes"), SPREADS)
def test_pairs_counted(num_ranks: int, num_nodes: int) -> None:
    nodes = nodes_of(num_ranks, num_nodes)
    for rank in range(num_ranks):
        peers = [nodes[peer] == nodes[rank] for peer in range(num_ranks) if peer != rank]
        found = traffic("all_to_all", 960, Group(num_ranks, num_nodes))
        assert found.inside_bytes == pytest.approx(960 / num_ranks * sum(peers))
        assert found.outside_bytes == pytest.approx(960 / num_ranks * (len(peers) - sum(peers)))


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
@pytest.mark.parametrize(("num_ranks", "num_nodes"), SPREADS)
def test_rings_counted(kind: str, num_ranks: int, num_nodes: int) -> None:
    """A ring for each device of a node, each with its part of the tensor; ring k leaves every node through its device k."""
    per_node = num_ranks // num_nodes
    inside, outside = [0.0] * num_ranks, [0.0] * num_ranks
    for ring in range(per_node):
        order = [
            node * per_node + (ring + 1 + place) % per_node for node in range(num_nodes) for place in range(per_node)
        ]
        for sender, receiver in zip(order, order[1:] + order[:1], strict=True):
            sent = (num_ranks - 1) * 960 / per_node / num_ranks  # a chunk a round
            if sender // per_node == receiver // per_node:
                inside[sender] += sent
            else:
                outside[sender] += sent
    found = traffic(kind, 960, Group(num_ranks, num_nodes))
    assert outside == pytest.approx([found.outside_bytes] * num_ranks)
    if num_nodes == 1:
        assert inside == pytest.approx([found.inside_bytes] * num_ranks)
    else:  # counted as if no ring left the node: a second node makes nothing inside quicker
        assert inside == pytest.approx([found.inside_bytes * (per_node - 1) / per_node] * num_ranks)


def test_figures_by_hand() -> None:
    # 8 ranks of one node: 7/8 of 800 MB at 200 GB/s.
    assert collective_seconds(cluster(), "all_to_all", 800e6, Group(8, 1)) == pytest.approx(10e-6 + 700e6 / 200e9)
    # 16 on 2 nodes: half of it leaves each device over 20 GB/s, far slower than the rest inside; one further node.
    assert collective_seconds(cluster(), "all_to_all", 800e6, Group(16, 2)) == pytest.approx(40e-6 + 400e6 / 20e9)
    # 4 nodes of one rank: nothing inside, three further nodes.
    assert collective_seconds(cluster(), "all_gather", 800e6, Group(4, 4)) == pytest.approx(90e-6 + 600e6 / 20e9)
    # 16 on 2 nodes: 15/16 of it crosses in 8 rings, each through its device's share.
    assert collective_seconds(cluster(), "reduce_scatter", 800e6, Group(16, 2)) == pytest.approx(
        40e-6 + max(750e6 / 200e9, 750e6 / 8 / 20e9)
    )


def test_all_reduce_is_two_halves() -> None:
    for size, group in itertools.product(SIZES, GROUPS):
        halves = [collective_seconds(cluster(), kind, size, group) for kind in ("reduce_scatter", "all_gather")]
        assert collective_seconds(cluster(), "all_reduce", size, group) == pytest.approx(sum(halves))


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_more_bytes_are_never_faster(kind: str) -> None:
    measured = replace(INSIDE, points=((2**10, 1e9), (2**16, 30e9), (2**24, 200e9)))
    for links, group in itertools.product([(INSIDE, OUTSIDE), (measured, OUTSIDE)], GROUPS):
        seconds = [collective_seconds(cluster(*links), kind, 2.0**k, group) for k in range(34)]
        assert seconds == sorted(seconds)


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_slower_links_are_never_faster(kind: str) -> None:
    slower = [
        lambda link: replace(link, bytes_per_s=link.bytes_per_s / 3),
        lambda link: replace(link, latency_s=link.latency_s * 3),
        lambda link: replace(link, together_bytes_per_s=link.bytes_per_s / 3),
    ]
    changed = set()
    for size, group, change in itertools.product(SIZES, GROUPS, slower):
        before = collective_seconds(cluster(), kind, size, group)
        for place, links in enumerate([(change(INSIDE), OUTSIDE), (INSIDE, change(OUTSIDE))]):
            after = collective_seconds(cluster(*links), kind, size, group)
            assert after >= before
            if after > before * 1.01:
                changed.add((place, change))
    assert len(changed) == 6  # each of them mattered somewhere


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_more_nodes_are_never_faster(kind: str) -> None:
    """The same ranks on more nodes, and more full nodes, where the network has at most half the rate of a node's link."""
    halved = replace(OUTSIDE, bytes_per_s=INSIDE.bytes_per_s / 2, latency_s=INSIDE.latency_s)
    for size, links in itertools.product(SIZES, [(INSIDE, OUTSIDE), (INSIDE, halved)]):
        for groups in ([Group(16, m) for m in (1, 2, 4, 8, 16)], [Group(8 * m, m) for m in (1, 2, 4, 8, 64)]):
            seconds = [collective_seconds(cluster(*links), kind, size, group) for group in groups]
            assert all(after >= before * (1 - 1e-12) for before, after in itertools.pairwise(seconds))


def test_uneven_groups_count_their_busiest_device() -> None:
    # 5 ranks on 2 nodes: of 3 each sends to 2 inside, of 2 each sends to 3 outside.
    assert traffic("all_to_all", 500, Group(5, 2)).inside_bytes == 200
    assert traffic("all_to_all", 500, Group(5, 2)).outside_bytes == 300


def test_alone_and_nothing_take_no_time() -> None:
    for kind in COLLECTIVES:
        assert collective_seconds(Cluster("no links", DEVICE), kind, 2**30, Group(1, 1)) == 0.0
        assert collective_seconds(cluster(), kind, 0, Group(8, 2)) == 0.0


def test_a_kind_s_own_link_goes_first() -> None:
    own = Link("intra_node/all_gather", 50e9, 0.0, "made up")
    there = cluster(INSIDE, OUTSIDE, own)
    assert collective_seconds(there, "all_gather", 8e9, Group(8, 1)) == pytest.approx(7e9 / 50e9)
    for kind in ("all_to_all", "reduce_scatter"):
        assert collective_seconds(there, kind, 8e9, Group(8, 1)) == collective_seconds(
            cluster(), kind, 8e9, Group(8, 1)
        )


def test_together_is_what_counts_and_never_speeds_up() -> None:
    shared = cluster(INSIDE, replace(OUTSIDE, together_bytes_per_s=5e9))
    assert collective_seconds(shared, "all_to_all", 8e9, Group(2, 2)) == pytest.approx(30e-6 + 4e9 / 5e9)
    faster = cluster(INSIDE, replace(OUTSIDE, together_bytes_per_s=40e9))
    assert collective_seconds(faster, "all_to_all", 8e9, Group(2, 2)) == pytest.approx(30e-6 + 4e9 / 20e9)


def test_refused() -> None:
    with pytest.raises(UserError, match="unknown collective 'all_to_al'; did you mean 'all_to_all'"):
        collective_seconds(cluster(), "all_to_al", 1, Group(2, 1))
    with pytest.raises(UserError, match="no link 'inter_node'"):
        collective_seconds(cluster(INSIDE), "all_gather", 1, Group(16, 2))
    with pytest.raises(UserError, match="no link 'intra_node'"):
        collective_seconds(cluster(OUTSIDE), "all_gather", 1, Group(16, 2))
    assert math.isfinite(collective_seconds(cluster(OUTSIDE), "all_gather", 1, Group(2, 2)))  # needs only what it uses
    for ranks, nodes in ((0, 0), (2, 3), (2, 0)):
        with pytest.raises(UserError, match="1 <= nodes <= ranks"):
            Group(ranks, nodes)
