"""`vchitect-fast tune kernels`: who wins, what is dropped and said, and the table that it leaves behind.

pytest tests/benchmarks/test_bench_tune.py; the clock is made up, ours is the definition with faults by choice, the GPU is a name.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tuned_tables import GPU, make_row, make_table

from vchitect_fast import cli, tune
from vchitect_fast.benchmarks import tile_search
from vchitect_fast.benchmarks.case import Problem, Provider
from vchitect_fast.benchmarks.tile_search import Dropped, Search, Task, all_tasks, label
from vchitect_fast.benchmarks.timing import Samples, Work
from vchitect_fast.errors import UserError
from vchitect_fast.kernels import reference, tiles, tuned
from vchitect_fast.kernels.tuned import Choice, Table
from vchitect_fast.shapes import VideoShape

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asserts what a machine without a GPU says")
A, B, C = (tiles.PackedTile(16, 8, num_warps) for num_warps in (1, 2, 4))
BY_SIZE = "block 16 pack 1 warps 4"
A_NAME, B_NAME = "block 16 pack 8 warps 1", "block 16 pack 8 warps 2"
Clock = Callable[[Mapping[str, Work], float], tuple[dict[str, Samples], dict[str, str]]]


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU by name, three candidates a kernel, and no table read before or left behind."""
    monkeypatch.setattr(tuned, "gpu_name", lambda: GPU)
    monkeypatch.setattr(tuned, "SHIPPED", Path("/nowhere"))
    monkeypatch.delenv(tuned.ENVIRONMENT, raising=False)
    monkeypatch.setattr(tile_search, "grid", lambda op, kernel, num_frames: [A, B, C])
    monkeypatch.setattr(tile_search, "NO_CANDIDATE", ("auto", "math", "triton"))
    tuned.forget()
    yield
    tuned.forget()


def launched(kernel: str) -> Choice | None:
    return tuned.look_up("temporal", kernel, element_bytes=4, T=2, C=64)


def faulty(problem: Problem) -> Sequence[Tensor]:
    """The definition; with B forward it is off by 1 %, with C it does not launch."""
    choice = launched("forward") or {}
    if choice.get("pack") == 8 and choice["num_warps"] == 4:
        raise RuntimeError("out of resource: shared memory")
    outs = reference.temporal_attention(tuple(problem.leaves[:3]), tuple(problem.leaves[3:]), math=True)
    return tuple(out * (1.01 if choice.get("num_warps") == 2 else 1.0) for out in outs)


def sound(problem: Problem) -> Sequence[Tensor]:
    return reference.temporal_attention(tuple(problem.leaves[:3]), tuple(problem.leaves[3:]), math=True)


def made_up_task(run: Callable[[Problem], Sequence[Tensor]], shape: str = "2x48x16") -> Task:
    [task] = all_tasks([VideoShape.parse(shape)[0]], ["temporal"], tiny=True)
    providers = Provider("triton (ours)", run), *task.case.providers[1:]
    return replace(task, case=replace(task.case, providers=providers))


def clock(**medians_s: float) -> Clock:
    """A_s, B_s, by_size_s: medians of the first rounds; again_A_s: of the rounds of two. p10 is 0.9 of it, unnamed take 9 s."""
    names = {A_NAME: "A", B_NAME: "B", BY_SIZE: "by_size"}

    def measure(works: Mapping[str, Work], budget_s: float) -> tuple[dict[str, Samples], dict[str, str]]:
        found = {}
        for name, work in works.items():
            work.run(work.prepare())
            short = names.get(name, name)
            median_s = medians_s.get(f"{short}_s", 9.0)
            median_s = medians_s.get(f"again_{short}_s", median_s) if len(works) == 2 else median_s
            found[name] = Samples(9, median_s, 0.9 * median_s, 1.1 * median_s)
        return found, {}

    return measure


def search(measure: Clock, **fields: float) -> Search:
    return Search(measure, torch.device("cpu"), 227 * 1024, **fields)  # type: ignore[arg-type]


# ---- who wins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("medians_s", "winner"),
    [
        ({"A_s": 0.89, "B_s": 0.95, "by_size_s": 1.0}, A_NAME),
        ({"A_s": 0.89, "B_s": 0.5, "by_size_s": 1.0}, B_NAME),
        ({"A_s": 0.91, "by_size_s": 1.0}, BY_SIZE),  # a lower median, not below p10
        ({"A_s": 0.5, "again_A_s": 0.91, "by_size_s": 1.0}, BY_SIZE),  # luck: not when the two are timed anew
        ({"A_s": 1.1, "by_size_s": 1.0}, BY_SIZE),
    ],
)
def test_a_candidate_wins_below_the_heuristics_p10_timed_anew(medians_s: dict[str, float], winner: str) -> None:
    task = made_up_task(sound)
    forward, backward, backend = search(clock(**medians_s)).tune(task)
    for row in (forward, backward):
        assert label(row.winner.choice) == winner and label(row.heuristic.choice) == BY_SIZE
    assert forward.sizes == {"T": 2, "C": 64} and forward.dtype == "float32"
    again_s = medians_s.get("again_A_s", 0) if winner == A_NAME else 0
    short = {A_NAME: "A_s", B_NAME: "B_s", BY_SIZE: "by_size_s"}[winner]
    assert forward.winner.median_s == (again_s or medians_s[short]) and forward.winner.n == 9
    assert 0 <= forward.winner.error_vs_fp64 < 1e-5
    assert (backend.kernel, backend.winner.choice) == ("backend", {"backend": "sdpa"})


def test_the_choice_is_in_force_while_it_is_checked_and_timed() -> None:
    seen: list[tuple[Choice | None, Choice | None]] = []

    def watched(problem: Problem) -> Sequence[Tensor]:
        seen.append((launched("forward"), launched("backward")))
        return sound(problem)

    search(clock(A_s=0.5, by_size_s=1.0)).tune(made_up_task(watched))
    names = [tuple(choice and label(choice) for choice in pair) for pair in seen]
    others = [label(vars(tile)) for tile in (A, B, C)]
    assert {forward for forward, backward in names if backward is None} == {BY_SIZE, *others}
    assert {backward for forward, backward in names if backward} == {BY_SIZE, *others}
    assert all(forward == A_NAME for forward, backward in names if backward)  # what has won is kept
    assert launched("forward") is None


def test_what_is_wrong_or_raises_is_dropped_and_said() -> None:
    tried = search(clock(A_s=0.5, B_s=0.1, by_size_s=1.0))
    rows = tried.tune(made_up_task(faulty))
    assert label(rows[0].winner.choice) == A_NAME
    wrong, raised = [one for one in tried.dropped if one.place == "temporal forward 2x48x16"]
    assert wrong.choice == B_NAME and wrong.reason.startswith("error 1.0e-02 against fp64, at most ")
    assert raised.choice == label(vars(C)) and raised.reason == "RuntimeError: out of resource: shared memory"


def test_what_raises_under_the_clock_is_dropped_too() -> None:
    def measure(works: Mapping[str, Work], budget_s: float) -> tuple[dict[str, Samples], dict[str, str]]:
        found, _ = clock(A_s=0.5, by_size_s=1.0)(works, budget_s)
        return {name: of for name, of in found.items() if name != A_NAME}, {A_NAME: "the GPU's memory ran out"}

    tried = search(measure)
    row = tried.tune(made_up_task(sound))[0]
    assert row.winner == row.heuristic and label(row.winner.choice) == BY_SIZE
    assert Dropped("temporal forward 2x48x16", A_NAME, "the GPU's memory ran out") in tried.dropped


def test_a_heuristic_that_is_wrong_leaves_no_row_and_stops_no_other() -> None:
    def broken(problem: Problem) -> Sequence[Tensor]:
        return [1.01 * out for out in sound(problem)]

    tried = search(clock())
    assert [row.kernel for row in tried.tune(made_up_task(broken))] == ["backend"]
    lost = [one.place for one in tried.dropped if not one.choice]
    assert lost == ["temporal forward 2x48x16", "temporal backward 2x48x16"]


def test_what_the_minutes_do_not_reach_has_no_row() -> None:
    tried = search(clock(), deadline_s=time.monotonic() - 1)
    assert tried.tune(made_up_task(sound)) == []
    assert tried.not_reached == [f"temporal {kernel} 2x48x16" for kernel in ("forward", "backward", "backend")]


# ---- which candidates ---------------------------------------------------------------------------------------------------


def test_tiles_that_cannot_fit_are_left_out_by_hand_counted_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    fits = tiles.FlashTile(128, 64, num_warps=4, num_stages=3)
    num_bytes = 2 * 64 * (128 + 2 * 3 * 64)
    assert tile_search.why_not(fits, "forward", 64, 2, num_bytes) == ""  # 128 (64 + 64) / 128 = 128 values
    assert "shared memory" in tile_search.why_not(fits, "forward", 64, 2, num_bytes - 1)
    full = tiles.FlashTile(128, 128, num_warps=4, num_stages=2)
    assert "spill" in tile_search.why_not(full, "forward", 64, 2, 2**18)  # 128 (64 + 128) / 128 = 192
    turned = tiles.FlashTile(64, 128, num_warps=8, num_stages=2)  # of dkv, which owns keys
    assert tile_search.why_not(turned, "dkv", 64, 2, 2 * 64 * (2 * 128 + 2 * 2 * 64)) == ""
    for name, tile in tiles.FLASH_TILES.items():
        assert tile_search.why_not(tile, *name, 2, 227 * 1024) == ""
        assert name[1] == 128 or tile in tile_search.grid("spatial", name[0], 32)
    for T in (8, 16, 24, 32, 40, 64, 80, 128, 144, 512):
        for tile in tile_search.grid("temporal", "backward", T):
            assert isinstance(tile, tiles.TiledTile) or tile.pack * T <= tile.block
            tiles.check_choice("temporal", "backward", vars(tile))


def test_shapes_that_an_op_cannot_tell_apart_are_measured_once_at_the_largest() -> None:
    shapes = [VideoShape.parse(name)[0] for name in ("32x256x256", "32x1024x768", "32x512x384")]
    found = [(task.op, task.shape) for task in all_tasks(shapes, ["temporal", "cross"], tiny=False)]
    assert found == [
        ("temporal", "32x1024x768"), ("cross", "32x256x256"), ("cross", "32x1024x768"), ("cross", "32x512x384"),
    ]  # fmt: skip


# ---- the table ----------------------------------------------------------------------------------------------------------


def arguments(path: Path, **fields: object) -> argparse.Namespace:
    parser, _ = cli.parser_of("tune")
    args = parser.parse_args(["kernels", "--out", str(path), "--ops", "temporal"])
    return argparse.Namespace(**{**vars(args), **fields})


def test_the_table_is_what_launches_look_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.json"
    other = make_row("temporal", "forward", vars(tiles.PackedTile(64, 1, 4)), T=40, C=64)
    make_table(other).save(path)
    tried = search(clock(A_s=0.5, by_size_s=1.0))
    assert tune._tune(arguments(path), tried, [made_up_task(faulty)]) == 0
    out, err = capsys.readouterr()
    assert f"Runs take it with VCHITECT_FAST_TUNED={path}, or as kernels/tuned/made-up-gpu-80gb.json" in out
    assert "out of resource: shared memory (temporal forward 2x48x16" in out and "4 rows, 3 of them of this run" in err
    monkeypatch.setenv(tuned.ENVIRONMENT, str(path))
    tuned.forget()
    assert launched("forward") == vars(A) and launched("backward") == vars(A)
    assert tuned.look_up("temporal", "forward", element_bytes=2, T=40, C=64) == other.winner.choice  # kept
    table = Table.load(path)
    assert table.command == "vchitect-fast tune kernels --ops temporal --minutes 20" and table.gpu == GPU


def test_an_interrupted_run_leaves_what_it_had_and_goes_on_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, first, second = tmp_path / "mine.json", made_up_task(sound), made_up_task(sound, "3x48x16")
    real, begun = Search.tune, []

    def stopped(self: Search, task: Task) -> list[tuned.Row]:
        begun.append(task.shape)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(self, task)

    monkeypatch.setattr(Search, "tune", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune._tune(arguments(path), search(clock()), [first, second])
    assert [row.sizes["T"] for row in Table.load(path).rows] == [2, 2, 2]
    assert "holds 3 rows" in capsys.readouterr().err
    begun.append("again")
    tune._tune(arguments(path, json=True), search(clock()), [first, second])
    assert begun == ["2x48x16", "3x48x16", "again", "3x48x16", "2x48x16"]
    content = json.loads(capsys.readouterr().out)
    assert [row["shape"] for row in content["rows"]] == ["3x48x16"] * 3 + ["2x48x16"] * 3
    assert len(Table.load(path).rows) == 6 and content["not_reached"] == [] and content["out"] == str(path)


def test_a_table_of_another_gpu_is_not_added_to(tmp_path: Path) -> None:
    make_table(gpu="NVIDIA A100").save(tmp_path / "a100.json")
    before = (tmp_path / "a100.json").read_bytes()
    with pytest.raises(UserError, match="is for GPU NVIDIA A100.*choose another place with --out"):
        tune._tune(arguments(tmp_path / "a100.json"), search(clock()), [made_up_task(sound)])
    assert (tmp_path / "a100.json").read_bytes() == before


# ---- the command --------------------------------------------------------------------------------------------------------


@on_a_cpu
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected a CUDA GPU to tune for, torch sees none; rehearse with --tiny"),
        (["--tiny", "--out", "mine.json"], "expected --tiny without --out, got both"),
        (["--minutes", "0"], "expected --minutes above 0, got 0"),
        (["--shapes", "32x256"], "a shape is frames x width x height"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", "kernels", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"vchitect-fast tune: {said}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_has_units_defaults_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["tune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("frames x width x height in pixels", "default: 20.0", "example: vchitect-fast tune kernels --out"):
        assert part in text


@on_a_cpu
def test_a_rehearsal_runs_the_kernels_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tile_search, "grid", lambda *_: [A])
    assert cli.main(["tune", "kernels", "--tiny", "--ops", "temporal"]) == 0
    out, _ = capsys.readouterr()
    assert "Rehearsed at toy sizes: no figure counts, and no table was written." in out
    assert [line.split()[:3] for line in out.splitlines() if "2x48x16" in line and "dropped" not in line] == [
        ["temporal", kernel, "2x48x16"] for kernel in ("forward", "backward", "backend")
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_a_gpu_is_tuned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    path = tmp_path / "mine.json"
    words = ["--ops", "temporal", "spatial", "--shapes", "4x96x64", "--minutes", "2", "--out", str(path)]
    assert cli.main(["tune", "kernels", *words]) in (0, 1)  # 1: the minutes
    rows = Table.load(path).rows
    assert {row.kernel for row in rows if row.op == "temporal"} == {"forward", "backward", "backend"}
    assert all(row.winner.n >= 5 and row.winner.median_s <= row.heuristic.median_s for row in rows)
    monkeypatch.setenv(tuned.ENVIRONMENT, str(path))
    tuned.forget()
    [forward] = [row for row in rows if (row.op, row.kernel) == ("temporal", "forward")]
    assert tuned.look_up("temporal", "forward", element_bytes=2, T=4, C=64) == forward.winner.choice
