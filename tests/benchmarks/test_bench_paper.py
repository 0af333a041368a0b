"""The paper's table and figures as predicted: what is the paper's, how its system is modelled, and which claims come out.

pytest tests/benchmarks/test_bench_paper.py. Claims that do not come out are in docs/paper.md; tests hold what does, so that a
change of the cluster file or of the model that loses it is seen.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.ways import Way
from vchitect_fast.benchmarks import paper
from vchitect_fast.benchmarks.paper_report import figure_eight, figure_nine, lead, said, table_four
from vchitect_fast.benchmarks.paper_scaling import (
    BY_HEADS,
    ENCODED,
    FRAMES,
    LADDER,
    LONGEST,
    OURS,
    SYSTEMS,
    Point,
    System,
    longest,
    point,
    twenty_times_slower,
    workflow,
)
from vchitect_fast.benchmarks.paper_table import (
    BREAKS_DOWN,
    CLUSTER,
    COMBINATION,
    CONFIG,
    OFFLOADED_WITH,
    OUT_OF_MEMORY,
    RECOMPUTATION,
    STRATEGIES,
    TABLE,
    Case,
    Cell,
    choose,
    fractions,
    offload_all,
    part_of_node,
    power_of_two,
    predict,
    saved_sizes,
)
from vchitect_fast.benchmarks.paper_verdict import WITHIN, factor, gains, out_of_order, ratios, summary, variants
from vchitect_fast.benchmarks.record import load
from vchitect_fast.cluster import Cluster
from vchitect_fast.model.blocks import Block, Branches
from vchitect_fast.plan import KEEP, OFFLOAD, RECOMPUTE, Policy
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

SDPA = {"spatial": "sdpa", "temporal": "sdpa", "cross": "sdpa"}


@cache
def cluster() -> Cluster:
    return Cluster.load(CLUSTER)


@cache
def cells() -> list[Cell]:
    return predict(cluster())


def test_fractions_of_the_strategies() -> None:
    assert [fractions(name, 0.5) for name in STRATEGIES] == [(0, 0), (0.5, 0), (0, 0.5), (0.3, 0.2)]
    assert fractions(COMBINATION, 0.2) == (0, 0.2)


@pytest.mark.parametrize(("recomputed", "offloaded"), [(0.2, 0), (0, 0.5), (0.3, 0.2), (0.8, 0.2), (0, 1), (1, 0)])
def test_blocks_are_chosen_by_their_fractions_and_spread(recomputed: float, offloaded: float) -> None:
    actions = choose(24, recomputed, offloaded)
    count = Counter(actions)
    assert abs(count[OFFLOAD] - 24 * offloaded) <= 0.5
    assert abs(count[RECOMPUTE] - min(24 * recomputed, 24 - count[OFFLOAD])) <= 0.5
    halves = [Counter(half) for half in (actions[:12], actions[12:])]
    assert all(abs(halves[0][action] - halves[1][action]) <= 1 for action in (KEEP, RECOMPUTE, OFFLOAD))


@pytest.mark.parametrize(("number", "expected"), [(1, 1), (2, 2), (3, 4), (2**30, 2**30), (2**30 + 1, 2**31)])
def test_powers_of_two(number: int, expected: int) -> None:
    assert power_of_two(number) == expected


@pytest.mark.parametrize("last", [False, True])
def test_sizes_that_are_pinned_are_those_that_a_block_saves(last: bool) -> None:
    """Every storage of at least a row set, by size; what is smaller (norms, softmax, modulation) is below 5 % here."""
    work = Workload(preset("vchitect-tiny"), VideoShape(5, 96, 80), 1, 16)
    config, d = work.config, work.config.hidden_dim
    sizes = ((1, 5, work.visual_rows // 5, d), (1, 5, 16, d), (1, d))
    inputs = tuple(torch.randn(size, requires_grad=True) for size in sizes)
    block = Block(config, last=last, branches=Branches())
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in parameters:
            found.setdefault(address, tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        block(*inputs, SDPA)
    counted = [tensor.untyped_storage().nbytes() for tensor in found.values()]
    expected = list(saved_sizes(work, 4, last=last))
    assert Counter(size for size in counted if size >= min(expected)) == Counter(expected)
    assert sum(counted) - sum(expected) < 0.05 * sum(counted)


def test_an_offloaded_block_keeps_nothing_and_pins_whole_powers_of_two() -> None:
    work = Workload(CONFIG, VideoShape(32, 1024, 768), 1, 333)
    keep = Way(Policy.keep(), 0.0, work.saved_bytes_per_block(2), 0, 0, 0)
    moved = offload_all(work, keep)
    assert (moved.kept_bytes, moved.moved_bytes, moved.again_s) == (0, keep.kept_bytes, 0.0)
    assert 1.5 < moved.host_bytes / moved.moved_bytes < 2  # 302 MB of visual rows take 512 MiB


def test_a_job_on_part_of_a_node_has_its_share() -> None:
    whole = cluster()
    job = part_of_node(whole, 2)
    assert (job.num_nodes, job.num_devices_per_node) == (1, 2)
    assert job.host_memory_bytes == whole.host_memory_bytes // 4
    for name in ("device_to_host", "host_to_device"):
        link = job.link(name)
        assert link.bytes_per_s <= whole.link(name).bytes_per_s and link.both_ways_bytes_per_s is None


def test_cells_fail_where_the_papers_do() -> None:
    assert [cell.run.failure for cell in cells() if isinstance(cell.paper, str)] == [
        OUT_OF_MEMORY, OUT_OF_MEMORY, BREAKS_DOWN, OUT_OF_MEMORY,
    ]  # fmt: skip
    assert all(cell.agrees for cell in cells())


def test_a_fifth_of_the_blocks_is_what_hides() -> None:
    for cell in cells():
        assert 0.12 <= cell.knee <= 0.3, cell.shape


def test_the_combination_beats_recomputation_where_it_recomputes() -> None:
    found = gains(cells())
    assert all(0.02 <= found[row.shape][0] <= 0.07 for row in TABLE if row.ratio > OFFLOADED_WITH)


def test_one_factor_is_fitted() -> None:
    """Least squares of logarithms: any other factor is worse; ratios within a row do not know it."""
    timed = [(cell.step_s, cell.paper) for cell in cells() if cell.step_s and isinstance(cell.paper, float)]

    def squares(times: float) -> float:
        return sum((times * a / b - 1) ** 2 / (times * a / b) for a, b in timed)  # log(x)^2 to second order

    best = factor(cells())
    shifted = [replace(cell, paper=cell.paper * 2 if isinstance(cell.paper, float) else cell.paper) for cell in cells()]
    assert factor(shifted) == pytest.approx(2 * best)
    assert squares(best) < min(squares(0.8 * best), squares(1.25 * best))
    assert [ratio.paper for ratio in ratios(shifted)] == pytest.approx([ratio.paper for ratio in ratios(cells())])


def test_a_turned_order_and_a_missing_cell_are_found() -> None:
    run = cells()[0].run
    a, b = (Cell("1x16x16", name, seconds, run, 0.2) for name, seconds in (("a", 1.0), ("b", 2.0)))
    assert out_of_order([a, b]) == []  # both the same here: not turned
    slower = replace(run, outcome=replace(run.outcome, cost=replace(run.outcome.cost, forward_s=1e6)))
    assert out_of_order([replace(a, run=slower), b]) == [("1x16x16", "a", "b")]
    assert not replace(a, run=replace(run, failure=OUT_OF_MEMORY)).agrees
    assert not replace(a, paper=BREAKS_DOWN).agrees


def test_a_slower_link_never_hides_more() -> None:
    changed = variants(cluster())
    shape = VideoShape(32, 512, 384)
    slow, as_declared, fast = (
        Case.of(changed[name], shape).run(0.0, 0.5).hidden_s
        for name in ("host link 20 % slower", "as declared", "host link 20 % faster")
    )
    assert slow > as_declared > fast
    assert set(changed) >= {"half of the host memory", "compute 20 % slower", "compute 20 % faster"}


def test_the_report_names_what_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=160).print(table_four(cells()))
    shown = capsys.readouterr().out
    for row in TABLE:
        assert row.shape in shown
    for ratio in ratios(cells()):
        assert f"{ratio.error:+.1%}" in shown
    found = summary(cells())
    assert f"{found.num_within} of {found.num_ratios}" in said(found)[1]
    assert found.num_within == sum(abs(ratio.error) <= WITHIN for ratio in ratios(cells()))


def test_sequence_parallelism_inside_a_node_reaches_the_longest_video() -> None:
    reached, across = (point(cluster(), system, VideoShape(144, 1920, 1088)) for system in (SYSTEMS[0], SYSTEMS[2]))
    assert reached.outcome is not None and across.outcome is None
    end = longest(cluster(), SYSTEMS[2], 1920, 1088)
    assert end is not None and 0.55e6 < end.num_visual_tokens() < 0.75e6  # the paper: 0.6 million


def test_sequence_parallelism_inside_a_node_is_faster_on_the_papers_network() -> None:
    slower = twenty_times_slower(cluster())
    assert slower.link("inter_node").bytes_per_s * 20 == pytest.approx(slower.link("intra_node").bytes_per_s)
    for shape in (VideoShape(16, 720, 576), VideoShape(64, 1920, 1088)):
        first, *others = (point(slower, system, shape).tokens_per_s for system in SYSTEMS)
        assert first > max(others)


def test_parameters_are_sharded_inside_a_node_whatever_sp_is() -> None:
    states = {}
    for sp in (6, 24):
        outcome = point(cluster(), System("made up", sp, LADDER[:1], BY_HEADS), VideoShape(8, 720, 576)).outcome
        assert outcome is not None
        states[sp] = outcome.memory.states_bytes
    assert states[6] == states[24]


def test_every_stage_of_the_workflow_gains() -> None:
    for shape in ENCODED[:1]:
        baseline, separate, frame_wise = workflow(cluster(), shape)
        assert baseline.step_s > separate.step_s > frame_wise.step_s
        assert baseline.encode_s == pytest.approx(8 * frame_wise.encode_s)  # 32 frames over 8 ranks
        assert len(figure_eight({str(shape): [baseline, separate, frame_wise]}).rows) == 3


def made(system: System, shape: VideoShape, seconds: float | None) -> Point:
    outcome = SimpleNamespace(cost=SimpleNamespace(step_s=seconds))
    return Point(system, shape, cast(Any, outcome) if seconds else None)


def test_lead_counts_what_is_slower_and_what_does_not_fit() -> None:
    first, *others = SYSTEMS
    one, two, three = (VideoShape(frames, 16, 16) for frames in (1, 2, 3))
    points = [made(first, shape, 1.0) for shape in (one, two, three)]
    points += [
        made(other, shape, seconds) for other in others for shape, seconds in ((one, 2.0), (two, 0.5), (three, None))
    ]
    assert "0.50 to 2.00 times" in lead(points)
    assert "slower at 1 of 2" in lead(points) and "at 1 more" in lead(points)


def test_figure_nine_shows_every_system_and_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    size = (720, 576)
    points = [
        made(s, VideoShape(n, *size), None if n > 64 and s is SYSTEMS[2] else 24.0) for s in SYSTEMS for n in FRAMES
    ]
    ends = {(size, s.name): VideoShape(64 if s is SYSTEMS[2] else LONGEST, *size) for s in SYSTEMS}
    Console(width=160).print(figure_nine(points, points, ends))
    shown = capsys.readouterr().out
    rows = {s: next(line for line in shown.splitlines() if f"720x576   {s.name}" in line) for s in SYSTEMS}
    assert " - " in rows[SYSTEMS[2]] and "64 fr." in rows[SYSTEMS[2]] and "0.10 M" in rows[SYSTEMS[2]]
    assert " - " not in rows[SYSTEMS[0]] and f"{LONGEST}+ fr." in rows[SYSTEMS[0]]
    assert "at a twentieth" in shown


def test_the_command_says_prediction_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few points, so that it is quick; the rest is what the tests above call."""
    shapes = [VideoShape(8, width, height) for width, height in ((720, 576), (1024, 768), (1920, 1088))]
    monkeypatch.setattr(paper, "variants", lambda found: {"as declared": found})
    monkeypatch.setattr(paper, "curves", lambda found: (point(found, s, x) for x in shapes for s in (*SYSTEMS, OURS)))
    monkeypatch.setattr(paper, "longest", lambda found, system, width, height: VideoShape(8, width, height))
    assert paper.main(["--json", "--out", str(tmp_path / "r.jsonl"), "--figures", str(tmp_path)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["kind"] == "predicted, not measured" and len(content["table_4"]) == 16
    records = load(tmp_path / "r.jsonl")
    assert len(records) == sum(cell.step_s is not None for cell in cells())
    assert all("predicted, not measured" in record.provider and "predicted" in record.device for record in records)
    for name in ("table4", "fig9", "fig8"):
        assert (tmp_path / f"paper-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_cluster_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main(["--cluster", "8xa100"]) == 2
    assert RECOMPUTATION not in capsys.readouterr().out
