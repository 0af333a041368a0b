"""Seconds of a collective between ranks, from the links of a Cluster: a latency and bytes over a rate (alpha-beta).

Refused: another kind, a group that cannot be; a missing link is refused by `Cluster.link`. Not modelled: trees, reductions
inside the network (NCCL takes both for small messages), and what runs at the same time, which is streams.py's. No torch.

    n ranks on m nodes, B bytes (of the whole tensor on one rank)      one device sends
    all_to_all                              inside its node            B (n / m - 1) / n
                                            to other nodes             B (n - n / m) / n
    all_gather, reduce_scatter              inside its node            B (n - 1) / n
    (rings, one a device of a node)         to other nodes             B (n - 1) / n x m / n
    all_reduce                              reduce_scatter and all_gather after each other

The bytes are those of pairwise exchange and of rings (Thakur, Rabenseifner and Gropp 2005), a ring through each device's
share of the network, as NCCL lays them. What a ring sends inside is counted as if it never left, so that a second node
makes nothing quicker. Inside and outside run at once and the slower decides. Latency: that of intra_node once, since all
peers of a node are reached at once, and that of inter_node for each further node, as public measurements of all-to-all on
2 to 32 nodes grow (meta-pytorch/autoparallel, nccl_cost_model.py). All devices of a node run their collectives at once, so
`together_bytes_per_s` counts. A link named after a place and a kind, "intra_node/all_gather", goes before the plain one.
"""

from __future__ import annotations

from dataclasses import dataclass

from vchitect_fast.cluster import COLLECTIVES, Cluster, Link
from vchitect_fast.errors import UserError, unknown_name


@dataclass(frozen=True)
class Group:
    """Ranks of one collective, spread evenly over nodes."""

    num_ranks: int
    num_nodes: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_nodes <= self.num_ranks:
            raise UserError(
                f"expected 1 <= nodes <= ranks of a group, got {self.num_nodes} nodes and {self.num_ranks} ranks; "
                "a node without a rank takes no part."
            )


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest device of a group sends."""

    inside_bytes: float  # to devices of its node
    outside_bytes: float  # over its share of the network


def halves(kind: str) -> int:
    """Collectives after each other that one of this kind is made of."""
    return 2 if kind == "all_reduce" else 1


def traffic(kind: str, num_bytes: float, group: Group) -> Traffic:
    """What one device sends in one collective; an all_reduce counts both its halves. UserError for another kind."""
    if kind not in COLLECTIVES:
        raise unknown_name("collective", kind, COLLECTIVES)
    n, m = group.num_ranks, group.num_nodes
    fullest, emptiest = -(-n // m), n // m
    part = num_bytes / n
    if kind == "all_to_all":
        return Traffic(part * (fullest - 1), part * (n - emptiest) if m > 1 else 0.0)
    ring = halves(kind) * part * (n - 1)
    return Traffic(ring if fullest > 1 else 0.0, ring / emptiest if m > 1 else 0.0)


def collective_seconds(cluster: Cluster, kind: str, num_bytes: float, group: Group) -> float:
    """Seconds of one collective when nothing else runs.

    kind       "all_to_all" | "all_gather" | "reduce_scatter" | "all_reduce"
    num_bytes  of the whole tensor on one rank: all_to_all what a rank holds before, and after; all_gather the gathered
               result; reduce_scatter the input; all_reduce the tensor

    0.0 for a group of one rank, and for nothing to send. UserError: another kind, a link that the cluster does not state.
    """
    sent = traffic(kind, num_bytes, group)
    if group.num_ranks == 1 or num_bytes <= 0:
        return 0.0
    rounds = halves(kind)
    inside_s = outside_s = latency_s = 0.0
    if sent.inside_bytes:
        link = _link(cluster, "intra_node", kind)
        inside_s = rounds * _bytes_s(link, sent.inside_bytes / rounds)
        latency_s += rounds * link.latency_s
    if sent.outside_bytes:
        link = _link(cluster, "inter_node", kind)
        outside_s = rounds * _bytes_s(link, sent.outside_bytes / rounds)
        latency_s += rounds * (group.num_nodes - 1) * link.latency_s
    return latency_s + max(inside_s, outside_s)


def _bytes_s(link: Link, num_bytes: float) -> float:
    """Without the latency, while all devices of the node use the link."""
    crowd = max(1.0, link.bytes_per_s / link.together_bytes_per_s) if link.together_bytes_per_s else 1.0
    return crowd * (link.seconds(num_bytes) - link.latency_s)


def _link(cluster: Cluster, place: str, kind: str) -> Link:
    measured = [link for link in cluster.links if link.name == f"{place}/{kind}"]
    return measured[0] if measured else cluster.link(place)
