"""The probe on this machine, one process, with tiny sizes: complete, positive, readable again, and usable by the planner.

pytest tests/autotune/test_probe.py; no figure is compared with an expectation, machines differ.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from probe_cases import SMALL

from vchitect_fast.architecture import preset
from vchitect_fast.autotune import probe as probing
from vchitect_fast.autotune.probe import ops, probe
from vchitect_fast.autotune.rates import Rates
from vchitect_fast.autotune.search import plan_run
from vchitect_fast.cli import main
from vchitect_fast.cluster import Cluster, Timing
from vchitect_fast.errors import UserError
from vchitect_fast.machine import available_memory_bytes, host_memory_bytes, resident_bytes, this_device
from vchitect_fast.parallel.mesh import CPU
from vchitect_fast.shapes import VideoShape

SAID: list[str] = []


@pytest.fixture(scope="module")
def measured() -> Cluster:
    return probe(progress=False, sizes=SMALL, say=SAID.append)


def test_facts_have_units_and_a_source(measured: Cluster) -> None:
    device = measured.device
    assert device.fingerprint() == this_device().fingerprint()
    assert set(device.matmul_flops) == set(device.attention_flops) == {"float32", "bfloat16"}
    assert all(
        rate > 0
        for rate in (*device.matmul_flops.values(), *device.attention_flops.values(), device.memory_bytes_per_s)
    )
    assert 0 < device.op_overhead_s < 1
    assert 2**24 < device.process_bytes < device.memory_bytes
    assert device.source.startswith("measured 20") and "torch" in device.source
    assert device.fit_error > 0


def test_every_op_has_a_whole_grid(measured: Cluster) -> None:
    device = measured.device
    for dtype in ("float32", "bfloat16"):
        points = {
            op: [t for t in device.timings if (t.op, t.dtype) == (op, dtype)]
            for op in ("linear", "attention", "multiply", "gelu", "layer_norm", "rotate")
        }
        assert {op: len(found) for op, found in points.items()} == dict(
            linear=4, attention=4, multiply=2, gelu=2, layer_norm=2, rotate=2
        )
        assert all(t.forward_s > 0 and t.num_repeats >= 3 for found in points.values() for t in found)
        assert all(t.backward_s > 0 for op, found in points.items() for t in found if op != "multiply")
    Rates(device)  # refuses an incomplete grid


def test_every_held_out_size_is_timed_and_none_is_in_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block's own linear layers are held out too: their width is the geometric mean of fan in and fan out."""
    held_out: list[Timing] = []
    monkeypatch.setattr(ops, "_fit_error", lambda device, timings: held_out.extend(timings))
    device = ops.measure_ops(this_device(), CPU, SMALL.ops, lambda what, total: nullcontext(lambda: None))
    sizes = {(t.op, t.rows, t.width) for t in held_out if t.dtype == "float32"}
    assert {("linear", 32, 32), ("attention", 96, 64), ("gelu", 8, 256)} <= sizes
    assert len([t for t in held_out if t.op == "linear"]) == 2 * (1 + 1)  # dtypes x (square, fan in 16 to fan out 64)
    assert not {(t.op, t.dtype, t.rows, t.width, t.length) for t in held_out} & {
        (t.op, t.dtype, t.rows, t.width, t.length) for t in device.timings
    }


def test_links_of_one_process(measured: Cluster) -> None:
    """Host memory each way; what needs ranks or clips is left out, and said."""
    assert [link.name for link in measured.links] == ["device_to_host", "host_to_device"]
    for link in measured.links:
        assert len(link.points) == len(SMALL.copies) and link.both_ways_bytes_per_s > 0
        assert link.together_bytes_per_s is None
        for words in ("measured 20", "median of", "spread", "the pool is set up in"):
            assert words in link.source
    assert measured.codec_flops is None
    for words in ("one rank; start one a device", "no clips are given; give --manifest"):
        assert any(words in line for line in SAID)
    with pytest.raises(UserError, match="no link 'intra_node'"):
        measured.link("intra_node")


def test_reads_back_and_plans(measured: Cluster, tmp_path: Path) -> None:
    measured.save(tmp_path / "cluster.json")
    again = Cluster.load(tmp_path / "cluster.json")
    assert again == measured
    plan = plan_run(
        preset("vchitect-nano"), [VideoShape(2, 32, 32)], again.device, batch=1, num_text_tokens=4, dtype="auto"
    )
    assert plan.entries[0].predicted.step_s > 0


def test_what_codec_and_contention_were_is_said() -> None:
    found = probing._sources({"copy": 1.5}, {1: 5e9, 8: 20e9}, SMALL, "measured today")
    assert found["slowdown.copy"] == "measured today; a product of side 64 beside a copy, over the same alone"
    assert found["codec_flops"].endswith("frames of 32x32, GFLOP/s: 1 at once 5.0, 8 at once 20.0")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_writes_and_speaks(
    rank: int, measured: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(probing, "probe", lambda progress, manifest: measured)
    path = tmp_path / "cluster.json"
    assert main(["autotune", "probe", "--cluster", str(path), "--json"]) == 0
    assert path.exists() == bool(capsys.readouterr().out) == (rank == 0)


def test_memory_of_this_process_is_ordered() -> None:
    assert 0 < resident_bytes() < host_memory_bytes()
    assert 0 < available_memory_bytes() <= host_memory_bytes()
