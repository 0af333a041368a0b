"""`vchitect-fast profile` from end to end on real clips: the spans cover the step, the user's run is not touched, what is refused.

Run: pytest tests/profiling/test_profile_command.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from made_up_trace import op, write
from made_up_trace import span as range_of
from real_video import bikes_clips

from vchitect_fast import cli
from vchitect_fast.benchmarks.record import load
from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.machine import this_device
from vchitect_fast.manifest import write_manifest
from vchitect_fast.model import preset
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction
from vchitect_fast.profiling import nsys
from vchitect_fast.profiling.command import memory_beside
from vchitect_fast.profiling.session import Request, parse_ranks

SHAPE, NUM_STEPS = "8x128x64", 2  # the quickstart's
WARMUP = 2


def plan_for(model: str, shape: str, policy: tuple[Policy, ...], **change: Any) -> Plan:
    """A Plan for this machine; nothing of it was measured."""
    predicted = Prediction(
        1.0, {"forward_s": 0.3, "backward_s": 0.6, "optimizer_s": 0.1}, 1.0, {}, "made up for a test"
    )
    entry = PlanEntry(shape=shape, policy=policy, microbatch=2, accumulation=1, num_chunks=1, predicted=predicted)
    return Plan(
        model=preset(model).fingerprint(), device=this_device().fingerprint(), device_name="this machine",
        compute_dtype="float32", num_text_tokens=16, peak_flops=1e10, entries=(entry,), **change,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml of the quickstart's model and shape on real clips, half of the blocks recomputed."""
    folder = tmp_path_factory.mktemp("profile")
    write_manifest(bikes_clips(), folder / "clips.jsonl")
    num_blocks = preset("vchitect-tiny").num_layers
    policy = tuple(Policy.recompute() if k % 2 else Policy.keep() for k in range(num_blocks))
    plan_for("vchitect-tiny", SHAPE, policy).save(folder / "plan.json")
    run = TrainConfig(
        manifest=str(folder / "clips.jsonl"), plan=str(folder / "plan.json"), out=str(folder / "run"), model="vchitect-tiny",
        steps=1000, cache=str(folder / "cache"), validate_every=1, sample_every=1, save_every=1,
    )  # fmt: skip
    run.save(folder / "run.yaml")
    return folder


@pytest.fixture(scope="module")
def profiled(place: Path) -> Path:
    """The folder of a profile by the command itself."""
    words = ["profile", str(place / "run.yaml"), "seed=3", "--steps", str(NUM_STEPS), "--warmup", str(WARMUP)]
    assert cli.main([*words, "--out", str(place / "p")]) == 0
    return place / "p"


@pytest.fixture(scope="module")
def analysed(profiled: Path) -> dict:
    """What `profile analyse --json` says of it."""
    with redirect_stdout(StringIO()) as printed:
        assert cli.main(["profile", "analyse", str(profiled), "--json"]) == 0
    found: dict = json.loads(printed.getvalue())
    return found


def test_the_spans_cover_the_step(analysed: dict) -> None:
    [rank] = analysed["ranks"]
    assert [step["step"] for step in rank["steps"]] == [WARMUP + 1, WARMUP + 2]
    # The better step: time that another program took from us between two spans is no work without a name.
    assert max(step["coverage"] for step in rank["steps"]) >= 0.98, [step["coverage"] for step in rank["steps"]]
    names = {item["name"] for step in rank["steps"] for item in step["by_span"]}
    assert {
        "data/batch",
        "data/wait",
        "encode/batch",
        "data/noise",
        "forward/model",
        "backward/model",
        "forward/loss",
        "optimizer/step",
        "optimizer/average",
    } <= names


def test_branches_and_groups_are_told_apart_forward_backward_and_recomputed(analysed: dict) -> None:
    names = {
        item["name"] for step in analysed["ranks"][0]["steps"] for item in step["by_span"] if item["device_us"] > 0
    }
    for branch in ("spatial", "temporal", "cross"):
        for kind in ("forward", "recompute", "backward"):
            assert {f"{kind}/{branch}.qkv", f"{kind}/{branch}.branch_out"} <= names, (kind, branch)
    assert {"forward/mlp.mlp_pre", "recompute/mlp.mlp_pre", "backward/mlp", "forward/branch_sum"} <= names
    [memory] = analysed["memory"]
    saved = {part["span"] for part in memory["parts"] if part["owner"] == "activations"}
    assert {"forward/spatial.branch_out", "forward/mlp.mlp_pre"} <= saved


def test_the_spans_are_at_most_one_percent_of_a_step(profiled: Path, analysed: dict) -> None:
    """Their number times what one costs, which is measured here, so that a slow machine slows both."""
    from time import perf_counter

    from vchitect_fast.profiling.reading import read_traces
    from vchitect_fast.profiling.span import TorchSink, recording, span
    from vchitect_fast.profiling.trace import Kind

    [trace] = read_traces(profiled / "trace-rank0.json.gz")
    num_spans = len(trace.where(Kind.SPAN)) / NUM_STEPS
    samples = []
    with recording(TorchSink()):
        for _ in range(50):
            began = perf_counter()
            for _ in range(20):
                with span("forward/spatial"):
                    pass
            samples.append((perf_counter() - began) / 20)
    walls = [step["wall_us"] for step in analysed["ranks"][0]["steps"]]
    assert num_spans * median(samples) <= 0.01 * median(walls) / 1e6


def test_the_peak_of_the_memory_is_explained(analysed: dict) -> None:
    [memory] = analysed["memory"]
    sizes: dict[str, int] = {}
    for part in memory["parts"]:
        sizes[part["owner"]] = sizes.get(part["owner"], 0) + part["num_bytes"]
    assert sum(sizes.values()) == memory["peak_bytes"]
    weights = 4 * preset("vchitect-tiny").num_parameters()
    for owner in ("weights", "average"):
        assert weights <= sizes[owner] <= 1.05 * weights, owner  # and buffers
    assert 2 * weights <= sizes["optimizer"] <= 2.05 * weights
    assert 0 < sizes["gradients"] <= weights  # the peak is early in backward
    assert memory["peak_span"] in ("forward/model", "backward/model") and sizes["activations"] > 2**20


def test_the_folder_holds_everything_and_the_run_is_not_touched(place: Path, profiled: Path) -> None:
    assert {path.name for path in profiled.iterdir()} == {
        "trace-rank0.json.gz", "memory-rank0.json", "records.jsonl", "report.html", "train",
    }  # fmt: skip
    assert not (place / "run").exists()
    assert not list((profiled / "train").glob("checkpoint*")) and not (profiled / "train" / "samples").exists()
    assert TrainConfig.load(profiled / "train" / "run.yaml").seed == 3
    page = (profiled / "report.html").read_text()
    assert "forward/model" in page and "<svg" in page and "The peak of" in page


def test_records_are_those_of_the_steps(profiled: Path) -> None:
    records = {(record.bench, record.provider): record for record in load(profiled / "records.jsonl")}
    step = records["profile/step", "wall"]
    assert step.n == NUM_STEPS and step.shape == SHAPE and step.dtype == "float32"
    forward = records["profile/span, begin to end", "forward/model"]
    assert 0 < forward.median_s < step.median_s
    assert records["profile/class", "gemm"].median_s > 0
    assert str(profiled) not in (profiled / "records.jsonl").read_text()


def test_it_prints_what_a_person_needs(profiled: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    capsys.readouterr()
    report = tmp_path / "page.html"
    assert cli.main(["profile", "analyse", str(profiled / "trace-rank0.json.gz"), "--report", str(report)]) == 0
    printed = capsys.readouterr().out
    for said in (
        "one step, median of 2 recorded",
        "backward/model",
        "idle",
        "The peak of",
        "has no GPU in it",
        str(report),
    ):
        assert said in printed
    assert report.exists()


def test_any_programs_trace_is_analysed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [range_of("ProfilerStep#7", 0, 100), range_of("[bold]x[/]\x1b", 10, 80), op("aten::mm", 20, 40)]
    path = write(tmp_path / "trace.json", events)
    assert cli.main(["profile", "analyse", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "[bold]x[/]\ufffd" in printed and "\x1b" not in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--warmup", "0"], "--warmup must be at least 1, got 0"),
        (["--ranks", "1"], "--ranks must be within 0 to 0, got 1"),
        (["--ranks", "x"], "--ranks must be all, or numbers as in 0,3, got 'x'"),
        (["--cluster", "absent.json"], "absent.json"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(
    place: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["profile", str(place / "run.yaml"), "--out", str(tmp_path / "p"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_the_runs_own_folder_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (place / "run", place / "run" / ".." / "run"):
        assert cli.main(["profile", str(place / "run.yaml"), "--out", str(out)]) == 2
        assert "must not be the run's own folder" in capsys.readouterr().err
    assert not (place / "run").exists()


def test_nsys_that_is_not_there_is_said(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["profile", str(place / "run.yaml"), "--out", str(tmp_path / "p"), "--nsys"]) == 2
    assert "--nsys needs Nsight Systems' command nsys on the PATH, found none" in capsys.readouterr().err


def test_the_command_line_of_nsys() -> None:
    with_gpu = nsys.profile_command(["python", "x"], Path("p/nsys-rank3"), has_gpu=True)
    assert with_gpu[:2] == ["nsys", "profile"] and with_gpu[-2:] == ["python", "x"]
    assert {"--trace=cuda,nvtx,cudnn,cublas", "--capture-range=cudaProfilerApi", "--output=p/nsys-rank3"} <= set(
        with_gpu
    )
    without = nsys.profile_command(["python", "x"], Path("p/nsys-rank3"), has_gpu=False)
    assert "--trace=nvtx" in without and not [flag for flag in without if "capture" in flag or "cuda" in flag]


def test_a_run_under_nsys_is_this_command_again_and_its_export_is_read(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a program in place of nsys that writes down its words, and fails when it should export."""
    program = tmp_path / "bin" / "nsys"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/words\n[ "$1" = profile ]\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    words = ["profile", str(place / "run.yaml"), "seed=5", "--steps", "3", "--out", str(tmp_path / "p"), "--nsys"]
    assert cli.main(words) == 2
    profile_line, export_line = (tmp_path / "words").read_text().splitlines()
    again = f"-P -m vchitect_fast.cli profile {place / 'run.yaml'} seed=5 --steps 3 --warmup 2 --ranks 0 --out {tmp_path / 'p'} --inside-nsys"
    assert profile_line.endswith(f"{sys.executable} {again}")
    assert export_line.startswith("export --type=sqlite") and export_line.endswith("nsys-rank0.nsys-rep")
    assert "ended with exit code 1" in capsys.readouterr().err


def test_ranks_and_files() -> None:
    assert parse_ranks("all", 3) == (0, 1, 2) and parse_ranks("2,0,2", 3) == (0, 2)
    with pytest.raises(UserError, match="--ranks must be within 0 to 2, got 0,3"):
        parse_ranks("0,3", 3)
    assert Request(Path("p")).ranks == (0,)
    assert memory_beside(Path("a/trace-rank12.json.gz")) == Path("a/memory-rank12.json")


def test_a_profile_beside_itself_is_the_same(profiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps are too few for a difference to count, and that is said; see test_compare.py for the rest."""
    assert cli.main(["profile", "compare", str(profiled), str(profiled)]) == 2
    assert "steps" in capsys.readouterr().err


@pytest.mark.soak
def test_two_ranks_write_into_one_folder_and_the_first_shows_both(place: Path, tmp_path: Path) -> None:
    nano = preset("vchitect-nano")
    mesh = {"dp_replicate": 1, "dp_shard": 2, "sp": 1}
    plan = plan_for("vchitect-nano", "4x32x16", (Policy.keep(),) * nano.num_layers, mesh=mesh, fsdp_group="global")
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    fingerprint = "from vchitect_fast.machine import this_device; print(this_device().fingerprint())"
    told = subprocess.run(
        [sys.executable, "-c", fingerprint], env=environ, cwd=tmp_path, capture_output=True, text=True
    )
    replace(plan, device=told.stdout.strip()).save(tmp_path / "plan.json")  # of one thread, as the ranks have
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "vchitect_fast.cli",
    ]
    words = ["profile", str(place / "run.yaml"), f"plan={tmp_path / 'plan.json'}", "model=vchitect-nano", "cache=null"]
    command = [*start, *words, "--steps", "2", "--ranks", "all", "--out", "p"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        "trace-rank0.json.gz", "trace-rank1.json.gz", "memory-rank0.json", "memory-rank1.json", "records.jsonl", "report.html", "train",
    }  # fmt: skip
    assert "Ranks side by side" in (tmp_path / "p" / "report.html").read_text()
