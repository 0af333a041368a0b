"""Cluster, Device, Link: shipped files with a source a number, YAML and JSON read and refused, seconds of a link.

pytest tests/test_cluster.py; arithmetic and small files.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up_device import cluster, device

from vchitect_fast.cluster import LINKS, SHIPPED, AttentionPoint, Cluster, Device, Link, MatmulPoint, known
from vchitect_fast.cluster_yaml import from_yaml
from vchitect_fast.errors import UserError

TAGS = ("[data sheet]", "[public measurement]", "[measured by us 2026-11-2", "[paper]", "[assumed]")
MINE = """
name: mine
num_nodes: 2
num_devices_per_node: 4
slowdown: {copy: {value: 1.1, source: measured}}
device:
  name: a GPU
  kind: cuda
  memory_bytes: {value: 80e9, source: sheet}
  matmul_flops: {bfloat16: {value: 1e14, source: sheet}}
  attention_points: {bfloat16: {value: [[512, 5e13, 4e13]], source: a paper}}
  matmul_points: {bfloat16: {value: [[64, 128, 9e13]], source: measured}}
links:
  intra_node: {bytes_per_s: {value: 2e11, source: nccl-tests}, latency_s: {value: 0, source: assumed}}
  inter_node/all_to_all:
    bytes_per_s: {value: 2e10, source: nccl-tests}
    latency_s: {value: 1e-5, source: nccl-tests}
    points: {value: [[1000, 1e9], [1000000, 1e10]], source: nccl-tests}
"""


@pytest.mark.parametrize("name", known())
def test_a_shipped_cluster_names_the_source_of_every_number(name: str) -> None:
    found = Cluster.load(name)
    assert found.name == name
    numbers = _facts(yaml.safe_load((SHIPPED / f"{name}.yaml").read_text()))
    assert set(found.sources) == numbers and len(numbers) >= 8
    for place, source in found.sources.items():
        assert any(tag in source for tag in TAGS), f"{place}: {source}"
        assert "able IV" not in source
        if "[public measurement]" in source and "ditto" not in source:
            assert any(end in source for end in (".com/", ".co/", ".org/", "_results.md")), f"{place}: {source}"


def _facts(content: Any, place: str = "") -> set[str]:
    """Places of all {value, source}; numbers outside of one are counts."""
    if isinstance(content, dict) and "value" in content:
        return {place}
    if isinstance(content, dict):
        return {one for name, value in content.items() for one in _facts(value, f"{place}.{name}".lstrip("."))}
    assert isinstance(content, str) or place.split(".")[-1].startswith("num_"), f"{place} has no source"
    return set()


@pytest.mark.parametrize("name", known())
def test_a_shipped_cluster_survives_json(name: str, tmp_path: Path) -> None:
    found = Cluster.load(name)
    found.save(tmp_path / "cluster.json")
    assert Cluster.load(tmp_path / "cluster.json") == found


def test_the_clusters_that_people_ask_for_are_there() -> None:
    expected = {"8xa100-80g-infiniband", "8xh100", "8xh200", "8xb200", "gh200", "h100", "rtx4090", "cpu"}
    assert set(known()) == expected
    node = Cluster.load("8xa100-80g-infiniband")
    assert node.num_devices == 32 and node.device.memory_gib == 79
    inside, outside = node.link("intra_node").bytes_per_s, node.link("inter_node").bytes_per_s
    assert 600e9 / 25e9 > 20 and inside > 10 * outside  # the paper's "more than 20 times" is between data sheets


def test_yaml_is_read_to_the_last_field() -> None:
    found = from_yaml(MINE, "mine.yaml")
    assert (found.num_nodes, found.num_devices, found.slowdown) == (2, 8, {"copy": 1.1})
    assert found.device.matmul_flops == {"bfloat16": 1e14} and found.device.memory_bytes == 80_000_000_000
    assert found.device.attention_points == (AttentionPoint(512, 5e13, 4e13, "bfloat16"),)
    assert found.device.matmul_points == (MatmulPoint(64, 128, 9e13, "bfloat16"),)
    inside, outside = found.links
    assert (inside.bytes_per_s, inside.latency_s, inside.source, inside.points) == (2e11, 0.0, "nccl-tests", ())
    assert outside.points == ((1000, 1e9), (1_000_000, 1e10))
    assert found.sources["device.memory_bytes"] == "sheet" and found.codec_flops is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: mine", "name: [mine", "mine.yaml is not YAML"),
        (MINE, "just text", "a cluster must hold `name: value` lines, got 'just text'"),
        ("num_nodes", "num_node", "unknown field of a cluster 'num_node'; did you mean 'num_nodes'"),
        ("matmul_flops", "matmul_flop", "unknown field of device 'matmul_flop'; did you mean 'matmul_flops'"),
        ("intra_node:", "intranode:", "unknown field of links 'intranode'; did you mean 'intra_node'"),
        ("slowdown: {copy", "slowdown: {copies", "unknown slowdown 'copies'; did you mean 'copy'"),
        ("kind: cuda", "kind: cude", "unknown kind of device 'cude'; did you mean 'cuda'"),
        ("{value: 80e9, source: sheet}", "80e9", "say where the number is from"),
        ("{value: 80e9, source: sheet}", "{value: 80e9}", "say where the number is from"),
        ("{value: 80e9, source: sheet}", "{value: 80e9, source: ''}", "say where the number is from"),
        ("80e9", "many", "device.memory_bytes must be a number, got 'many'"),
        ("80e9", ".nan", "device.memory_bytes must be a number, got nan"),
        ("80e9", "true", "device.memory_bytes must be a number, got True"),
        ("80e9", "-80e9", "memory_bytes of device 'a GPU' must be a number above 0"),
        ("80e9", "80.5", "device.memory_bytes must be a whole number, got 80.5"),
        ("num_nodes: 2", "num_nodes: 0", "num_nodes of cluster 'mine' must be a number above 0, got 0"),
        ("value: 2e11", "value: 0", "bytes_per_s of link 'intra_node' must be a number above 0"),
        ("value: 1e-5", "value: -1e-5", "latency_s of link 'inter_node/all_to_all' must be a number 0 or more"),
        ("5e13, 4e13", "5e13", "must be a list of rows of 3 numbers"),
        ("1e14", "-1e14", "the FLOP/s of device 'a GPU' in bfloat16 must be a number above 0"),
        ("  kind: cuda\n", "", "device lacks kind; add it"),
        (MINE[MINE.index("links:") :], "links: {intra_node: {}}", "links.intra_node lacks bytes_per_s, latency_s"),
    ],
)
def test_bad_yaml_is_refused_in_one_sentence(old: str, new: str, message: str) -> None:
    assert old in MINE
    with pytest.raises(UserError) as caught:
        from_yaml(MINE.replace(old, new, 1), "mine.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_before_these_fields_is_read() -> None:
    """Today's measured files lack the new fields; what they do not say is not known."""
    values = cluster().to_json()
    for name in ("slowdown", "codec_flops", "sources"):
        del values[name]
    for name in ("attention_points", "matmul_points", "pressure_fraction", "remap_s_per_gib"):
        del values["device"][name]
    assert Cluster.from_json(json.loads(json.dumps(values))) == cluster()


def test_json_keeps_everything(tmp_path: Path) -> None:
    found = from_yaml(MINE, "mine.yaml")
    found = replace(found, device=replace(found.device, pressure_fraction=0.75, remap_s_per_gib=0.1), codec_flops=1e13)
    found.save(tmp_path / "cluster.json")
    assert Cluster.load(tmp_path / "cluster.json") == found


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("8xa100", None, "unknown cluster '8xa100'; did you mean"),
        ("h100s", None, "unknown cluster 'h100s'; did you mean 'h100'"),
        ("gone.yaml", None, "cannot read the cluster file"),
        ("torn.json", '{"schema_version": 1, "dev', "is not JSON"),
        ("old.json", '{"schema_version": 0}', "expected a cluster file of schema 1, got 0"),
        ("none.json", '{"device": {}}', "expected a cluster file of schema 1, got None"),
        ("list.json", "[1]", "expected a cluster file of schema 1, got None"),
        ("extra.json", '{"schema_version": 1, "name": "x", "device": {"nam": "x"}}', "this is not a cluster file"),
        ("binary.yaml", b"\xff\xfe\x00", "is not text"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path: Path, path: str, content: str | bytes | None, message: str) -> None:
    where: str | Path = path
    if "." in path:
        where = tmp_path / path
    if content is not None:
        Path(where).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        Cluster.load(where)
    assert message in str(caught.value)


def test_a_file_without_an_ending_is_no_name(tmp_path: Path) -> None:
    cluster().save(tmp_path / "cluster")
    with pytest.raises(UserError, match="expected a cluster file that ends in .json, .yaml or .yml, got"):
        Cluster.load(tmp_path / "cluster")


def test_negative_numbers_are_refused_from_json_too() -> None:
    values = cluster().to_json()
    values["device"]["memory_bytes"] = -1
    with pytest.raises(UserError, match="memory_bytes of device 'made-up CPU' must be a number above 0, got -1"):
        Cluster.from_json(values)
    with pytest.raises(UserError, match=r"must be in \(0, 1\], got 1.5"):
        device(pressure_fraction=1.5)
    with pytest.raises(UserError, match="must be a number above 0"):
        Device("a GPU", "cuda", 1, attention_points=(AttentionPoint(0, 1.0, 1.0),))


def test_a_link_takes_its_latency_and_its_bytes() -> None:
    link = Link("disk", 100.0, 2.0, "made up")
    assert link.seconds(0) == 0.0
    assert link.seconds(300) == 5.0


def test_points_bend_a_link_and_more_bytes_never_take_less() -> None:
    link = Link("disk", 100.0, 2.0, "made up", points=((1000, 40.0), (10, 10.0)))  # in any order
    assert link.seconds(10) == pytest.approx(3.0)
    assert link.seconds(1000) == pytest.approx(27.0)
    assert link.seconds(100) == pytest.approx(2 + 100 / 20)  # the rate halfway in log size
    assert link.seconds(1) == pytest.approx(2 + 1 / 10) and link.seconds(4000) == pytest.approx(2 + 4000 / 40)
    times = [link.seconds(1.3**power) for power in range(40)]
    assert times == sorted(times)


def test_a_missing_link_says_what_is_there() -> None:
    found = from_yaml(MINE, "mine.yaml")
    assert found.link("intra_node") is found.links[0]
    with pytest.raises(UserError, match="the cluster 'mine' has no link 'disk', got intra_node, .*; add it to"):
        found.link("disk")
    with pytest.raises(UserError, match="unknown link 'intranode'; did you mean 'intra_node'"):
        found.link("intranode")
    assert "disk" in LINKS
