"""The probe over two real gloo ranks, on one node and as two nodes; and what links come out of a machine with known figures.

pytest tests/autotune/test_probe_ranks.py; no time is compared with an expectation.
"""

from __future__ import annotations

import pytest
from probe_cases import SMALL
from ranks import ranks

from vchitect_fast.autotune.collectives import Group, collective_seconds, halves, traffic
from vchitect_fast.autotune.probe import exchanges
from vchitect_fast.autotune.probe.clock import Repeats
from vchitect_fast.cluster import COLLECTIVES, Cluster, Device, Link
from vchitect_fast.parallel.mesh import ALONE

HOST = {"device_to_host", "host_to_device"}


@pytest.mark.parametrize(("local", "place"), [(2, "intra_node"), (1, "inter_node")])
def test_two_ranks_measure_what_lies_between_them(local: int, place: str) -> None:
    (first, said), (second, nothing) = ranks(2).run("probe_cases:probed", local)
    assert first == second
    assert nothing == [] and any("no clips" in line for line in said)
    cluster = Cluster.from_json(first)
    assert (cluster.num_nodes, cluster.num_devices_per_node) == (2 // local, local)
    assert {link.name for link in cluster.links} == HOST | {place} | {f"{place}/{kind}" for kind in COLLECTIVES}
    for link in cluster.links:
        assert len(link.points) == (2 if link.name in HOST else 3) and "gloo, 2 ranks" in link.source
        assert all(rate > 0 for _, rate in link.points)
    assert (cluster.link("device_to_host").together_bytes_per_s is None) == (local == 1)
    group = Group(2, 2 // local)
    for kind in COLLECTIVES:
        times = [collective_seconds(cluster, kind, size, group) for size in SMALL.collectives]
        assert 0 < times[0] <= times[1] <= times[2] < 60
    assert all(factor >= 1 for factor in cluster.slowdown.values()) and cluster.slowdown.keys() <= {
        "copy",
        "collective",
    }


@pytest.mark.parametrize("group", [Group(8, 1), Group(4, 4)], ids=str)
def test_links_predict_what_was_timed(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 20 us a node and 5 GB/s: its links say so, whatever the kind, and give its times back."""
    name, hops = ("intra_node", 1) if group.num_nodes == 1 else ("inter_node", 3)

    def seconds(kind: str, size: int) -> float:
        sent = traffic(kind, size, group)
        return halves(kind) * 20e-6 * hops + (sent.inside_bytes or sent.outside_bytes) / 5e9

    def timed(mesh: object, place: object, kind: str, size: int) -> tuple[float, Repeats]:
        sent = traffic(kind, size, group)
        return (sent.inside_bytes or sent.outside_bytes) / halves(kind), Repeats(
            seconds(kind, size) / halves(kind), 0.0, 9
        )

    monkeypatch.setattr(exchanges, "_time", timed)
    sizes, advanced = (2**10, 2**16, 2**24), []
    place = exchanges.Place(name, group, None)  # type: ignore[arg-type]
    links = exchanges.measure_exchanges(ALONE, place, sizes, "made up", lambda: advanced.append(1))
    assert len(advanced) == len(COLLECTIVES) * len(sizes)
    for link in links:
        assert link.latency_s == pytest.approx(20e-6)
        assert link.bytes_per_s == pytest.approx(5e9)
    cluster = Cluster("made up", Device("made up", "cpu", 2**30), links=(*links, Link("disk", 1.0, 0.0, "not asked")))
    for kind in COLLECTIVES:
        for size in (2**10, 2**13, 2**24, 2**30):
            assert collective_seconds(cluster, kind, size, group) == pytest.approx(seconds(kind, size), rel=1e-6)
