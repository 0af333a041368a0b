"""The bench of sequence parallelism: every way is the same block, its bytes are exact, and the simulated link is arithmetic.

pytest tests/benchmarks/test_bench_parallel.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from exchange_cases import EVEN
from ranks import ranks

from vchitect_fast.benchmarks import parallel
from vchitect_fast.benchmarks.exchanges import WAYS
from vchitect_fast.benchmarks.link import Event, exposed_s
from vchitect_fast.benchmarks.parallel import LINKS, Traffic, parse_sizes, rows, scaled, table, to_record
from vchitect_fast.benchmarks.record import load
from vchitect_fast.cluster import Link
from vchitect_fast.errors import UserError

LINK = Link("made up", bytes_per_s=10.0, latency_s=1.0, source="made up")  # 20 bytes take 3 s
EXCHANGES = dict(zip((way.name for way in WAYS), (4, 4, 4, 18, 2), strict=True))  # forward and backward


def test_every_way_is_the_same_block() -> None:
    """Sizes that do not divide; outputs, and gradients of leaves and parameters, in fp64."""
    for found in ranks(3).run("exchange_cases:errors"):
        assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_way_sends_its_volumes_and_the_first_frames_text(num_ranks: int) -> None:
    by_rank = ranks(num_ranks).run("exchange_cases:counts")
    volume = EVEN.rows * EVEN.D * (num_ranks - 1) // num_ranks
    first_text = EVEN.B * EVEN.N * EVEN.D * (num_ranks - 1)
    for way in WAYS:
        sent = sum(rank[way.name][0] for rank in by_rank)
        assert sent == 4 * 2 * (way.volumes(num_ranks) * volume + first_text), way.name
        for rank in by_rank:
            _, exchanges, messages = rank[way.name]
            assert exchanges == EXCHANGES[way.name]
            assert messages == exchanges * (num_ranks - 1)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], 0.0),
        ([Event(0, 1.0, 20), Event(0, 1.0)], 3.0),  # nothing beside it
        ([Event(0, 1.0, 20), Event(0, 3.0)], 1.0),  # two seconds of compute beside it
        ([Event(0, 1.0, 20), Event(0, 9.0)], 0.0),  # hidden
        ([Event(0, 1.0, 0), Event(0, 1.0)], 1.0),  # an empty one takes its latency
        ([Event(0, 0.0, 20), Event(1, 0.0, 20), Event(0, 0.0), Event(1, 0.0)], 6.0),  # one after the other
        ([Event(0, 0.0, 20), Event(1, 1.0, 20), Event(1, 1.0), Event(0, 1.0)], 5.0),  # the first was over by then
        ([Event(0, 0.0, 20), Event(0, 0.0), Event(1, 1.0, 20), Event(1, 5.0)], 3.0),  # waiting moves what follows
    ],
)
def test_what_a_link_leaves_exposed(events: list[Event], expected: float) -> None:
    assert exposed_s(events, LINK) == expected


def test_every_start_has_its_wait_on_a_clock_that_never_goes_back() -> None:
    for found in ranks(2).run("exchange_cases:traffic"):
        for way in WAYS:
            one = found[way.name]
            assert len(one.compute_s) == len(one.events) == 2 and not one.layer_s
            for events in one.events:
                starts = {event.transfer: event.at_s for event in events if event.num_bytes is not None}
                waits = {event.transfer: event.at_s for event in events if event.num_bytes is None}
                assert starts.keys() == waits.keys() and len(starts) == one.num_collectives
                assert sorted(event.at_s for event in events) == [event.at_s for event in events]
                between = [a.transfer == b.transfer for a, b in zip(events[::2], events[1::2], strict=True)]
                assert all(between)  # a wait follows its start: no two are on their way at once


def test_the_slowest_rank_counts_and_ratios_are_to_ours_by_frames() -> None:
    """Compute 1 s and 2 s; the slower rank's exchange is hidden, the faster one waits less than the slower computes."""
    slow, fast = (
        Traffic(80, 2, 1, (compute_s,), ((Event(0, 0.0, 20), Event(0, wait_s)),))
        for compute_s, wait_s in ((2.0, 1.0), (1.0, 0.0))
    )
    found = rows([dict.fromkeys((way.name for way in WAYS), one) for one in (slow, fast)], EVEN)
    assert len(found) == len(LINKS) * len(WAYS)
    near = scaled(LINKS[0], 2, EVEN, compute_s=2.0)
    waits = [exposed_s(one.events[0], near) for one in (slow, fast)]
    assert found[0].layer.median_s == max(2.0 + waits[0], 1.0 + waits[1])
    assert found[0].sent_bytes == 160 and found[0].num_messages == 2
    assert found[0].volumes == 160 / (EVEN.rows * EVEN.D * 4 / 2)
    assert "1.00x" in table(found)


def test_a_simulated_link_keeps_the_part_of_a_layer_that_a_volume_takes() -> None:
    """Twice the compute time, half the bandwidth and twice the latency; more ranks leave each less compute."""
    once, twice = (scaled(LINKS[0], 4, EVEN, compute_s=seconds) for seconds in (1.0, 2.0))
    assert once.bytes_per_s == 2 * twice.bytes_per_s and 2 * once.latency_s == twice.latency_s
    ours = 4 * EVEN.rows * EVEN.D / once.bytes_per_s  # of a layer that computes for 1 s
    # 40 frames of 1296 + 333 tokens of 1536 columns in bf16, of 18 and 14 D x D products and three attentions
    D, T, S, N, J = 1536, 40, 1296, 333, 1629
    flops = 3 * (2 * D * D * T * (18 * S + 14 * N) + 4 * D * (T * J * J + J * T * T + T * J * N)) / 4
    assert ours == pytest.approx(2 * T * J * D / LINKS[0].bytes_per_s / (flops / parallel.PEAK_FLOPS), rel=1e-12)


def test_on_a_gpu_exposed_is_what_the_exchanges_add() -> None:
    one = Traffic(0, 4, 0, (3.0, 5.0, 4.0), ((), (), ()), (5.0, 6.0, 6.0))
    found = rows([dict.fromkeys((way.name for way in WAYS), one)], EVEN)
    assert [row.way for row in found] == [way.name for way in WAYS]
    assert found[0].link == "NCCL" and found[0].layer.median_s == 6.0 and found[0].exposed_s == 2.0
    assert found[0].volumes is None  # one rank sends nothing
    assert "sequence parallelism" in to_record(found[0], EVEN, "bfloat16", "command").to_line()


@pytest.mark.soak
def test_the_command_starts_ranks_and_appends_records(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records.jsonl"
    assert parallel.main(["--ranks", "2", "--rounds", "1", "--sizes", "2,4,2,2", "--out", str(out)]) == 0
    records = load(out)
    assert [record.provider for record in records] == 2 * [way.name for way in WAYS]
    for record in records:
        assert record.exposed_s is not None and 0 <= record.exposed_s < record.median_s
        assert record.sent_bytes and record.num_messages and "simulated" in record.shape
    assert "plain Ulysses" in capfd.readouterr().out


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,x", "1,2,3,0"])
def test_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected --sizes frames,visual,text,heads"):
        parse_sizes(text)


@pytest.mark.gpu
def test_one_rank_on_nccl(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"]
    subprocess.run(
        [*command, "vchitect_fast.benchmarks.parallel", "--rounds", "2", "--sizes", "4,32,8,4", "--out", str(out)],
        check=True,
    )
    assert {record.provider for record in load(out)} == {way.name for way in WAYS}
