"""`vchitect-fast autotune` from end to end with the smallest preset, its JSON, and a table of mistakes.

pytest tests/autotune/test_command.py; runs the command line in this process.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from made_up_device import cluster, device

from vchitect_fast import step
from vchitect_fast.architecture import preset
from vchitect_fast.autotune import probe, verify
from vchitect_fast.cli import main
from vchitect_fast.cluster import Cluster
from vchitect_fast.errors import UserError
from vchitect_fast.machine import this_device
from vchitect_fast.plan import Comparison, Plan, Prediction

PLAN = ["--model", "vchitect-nano", "--shapes", "2x32x32", "--text-tokens", "4"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a measurement that passes for one of this machine."""
    monkeypatch.chdir(tmp_path)
    found = this_device()
    made_up = cluster()
    facts = {
        "name": found.name,
        "kind": found.kind,
        "memory_bytes": found.memory_bytes,
        "num_threads": found.num_threads,
    }
    replace(made_up, device=replace(made_up.device, **facts)).save("cluster.json")
    return tmp_path


def test_bare_measures_plans_and_writes_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "probe", lambda progress, manifest: cluster())
    out = tmp_path / "deep" / "plan.json"
    assert main(["autotune", *PLAN, "--out", str(out)]) == 0
    assert Cluster.load(out.with_name("cluster.json")) == cluster()
    plan = Plan.load(out)
    assert plan.model == preset("vchitect-nano").fingerprint()
    printed = capsys.readouterr().out
    for words in ("measured made-up CPU", "2x32x32", "0 of 2", "forward", "wrote"):
        assert words in printed


def test_a_probe_of_a_busy_machine_is_called_rough(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (0.2, 4.94):
        found = replace(cluster(), device=device(fit_error=error))
        monkeypatch.setattr(probe, "probe", lambda progress, manifest, found=found: found)
        assert main(["autotune", "probe", "--cluster", str(here / "busy.json")]) == 0
        assert ("off by 494%: the machine was busy" in capsys.readouterr().out) == (error > 1)


def test_bare_reuses_a_measurement_of_this_machine(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", None)  # measuring would fail
    assert main(["autotune", *PLAN, "--cluster", "cluster.json"]) == 0
    assert Plan.load("plan.json").device == this_device().fingerprint()


def test_plan_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autotune", "plan", *PLAN[:3], "2x30x36", *PLAN[4:], "--batch", "2", "--json"]) == 0
    streams = capsys.readouterr()
    printed = json.loads(streams.out)
    assert printed == json.loads(
        json.dumps({"hash": Plan.load("plan.json").digest(), **asdict(Plan.load("plan.json"))})
    )
    assert printed["entries"][0]["microbatch"] * printed["entries"][0]["accumulation"] == 2
    assert "2x30x36 rounded to 2x32x32" in streams.err


def test_explain_prints_a_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autotune", "plan", *PLAN]) == 0
    capsys.readouterr()
    assert main(["autotune", "explain"]) == 0
    assert "where the time goes" in capsys.readouterr().out


def test_verify_measures_what_was_predicted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autotune", *PLAN, "--cluster", "cluster.json", "--batch", "2"]) == 0
    capsys.readouterr()
    assert main(["autotune", "verify", "--model", "vchitect-nano", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["2x32x32"]}
    assert list(rows) == ["step_s", "forward_s", "backward_s", "optimizer_s", "peak_gib"]
    assert all(row["measured"] > 0 for row in rows.values())
    parts = sum(rows[name]["measured"] for name in ("forward_s", "backward_s", "optimizer_s"))
    assert parts < 3 * rows["step_s"]["measured"]  # medians of parts and of sums differ, but not by much
    assert main(["autotune", "verify", "--model", "vchitect-nano"]) == 0
    assert "predicted against measured" in capsys.readouterr().out


def test_verify_counts_the_peak_of_each_shape_anew(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the training log does: a small shape after a large one does not repeat the large one's."""
    calls: list[str] = []
    monkeypatch.setattr(verify, "reset_peak", lambda kind: calls.append("reset"))
    monkeypatch.setattr(step, "peak_bytes", lambda kind: calls.append("read") or len(calls) * 2**30)
    assert main(["autotune", "plan", *PLAN[:3], "2x32x32", "1x32x32", *PLAN[4:]]) == 0
    found = verify.verify(Plan.load("plan.json"), preset("vchitect-nano"), num_steps=1)
    assert calls == ["reset", "read", "read"] * 2
    assert [parts["peak_gib"] for parts in found.values()] == [3, 6]


def test_a_measurement_is_not_spent_on_a_plan_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "probe", None)  # measuring would fail
    (tmp_path / "README.md").write_text("mine")
    assert main(["autotune", *PLAN, "--out", str(tmp_path / "README.md")]) == 2
    assert "is not a Plan" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"


def test_reads_the_sizes_of_a_folder(here: Path) -> None:
    config = preset("vchitect-nano")
    (here / "model" / "transformer").mkdir(parents=True)
    (here / "model" / "transformer" / "config.json").write_text(json.dumps(config.to_dict()))
    assert main(["autotune", "plan", "--model", "model", *PLAN[2:]]) == 0
    assert Plan.load("plan.json").model == config.fingerprint()


def test_comparison_puts_recomputation_into_backward() -> None:
    predicted = Prediction(
        10.0, {"forward_s": 2.0, "backward_s": 4.0, "recompute_s": 1.0, "optimizer_s": 3.0}, 1.5, {}, ""
    )
    rows = predicted.against({"step_s": 8.0, "backward_s": 4.0, "peak_gib": 0.0, "mfu": 0.1, "optimizer_s": None})
    assert rows == [
        Comparison("step_s", 10.0, 8.0),
        Comparison("backward_s", 5.0, 4.0),
        Comparison("peak_gib", 1.5, 0.0),
    ]
    assert [row.error for row in rows] == [0.25, 0.25, None]
    assert predicted.step_parts_s["recompute_s"] == 1.0  # left as it was


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--model", "vchitect-nano"], "which shapes to plan for is missing"),
        ([*PLAN[:3], "2x32"], "a shape is frames x width x height"),
        ([*PLAN[:3], "0x32x32"], "positive frames x width x height"),
        (["plan", "--model", "vchitect-nanoo", *PLAN[2:]], "did you mean 'vchitect-nano'"),
        (["plan", *PLAN, "--batch", "0"], "at least one shape, sample and text token"),
        (["plan", *PLAN, "--mesh", "spp=2"], "did you mean 'sp'"),
        (["plan", *PLAN, "--mesh", "sp=0"], "--mesh sp must be a whole number from 1 up, got '0'"),
        (["plan", *PLAN, "--mesh", "dp_shard=2"], "a step of 1 samples does not divide over 2"),
        (["plan", *PLAN, "--cluster", "none.json"], "cannot read the cluster file none.json"),
        (["plan", *PLAN, "--cluster", "torn.json"], "torn.json is not JSON"),
        (["plan", *PLAN, "--cluster", "list.json"], "expected a cluster file of schema 1"),
        (["plan", *PLAN, "--cluster", "empty.json"], "this is not a cluster file"),
        ([*PLAN, "--cluster", "other.json"], "other.json was measured on made-up CPU"),
        (["plan", *PLAN, "--cluster", "small.json"], "not even one frame fits"),
        (["plan", "--model", "folder", *PLAN[2:]], "expected config.json in folder"),
        (["explain", "--plan", "none.json"], "cannot read the Plan none.json"),
        (["verify", "--model", "vchitect-tiny", "--plan", "good.json"], "this Plan is for model"),
        (["verify", "--model", "vchitect-nano", "--plan", "away.json"], "this Plan is for device"),
    ],
)
def test_mistakes_cost_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "torn.json").write_text('{"schema_version": 1, "dev')
    (here / "list.json").write_text("[1]")
    (here / "empty.json").write_text('{"schema_version": 1}')
    (here / "folder").mkdir()
    cluster().save("other.json")
    cluster(0.25).save("small.json")
    assert main(["autotune", "plan", *PLAN, "--out", "good.json"]) == 0
    assert main(["autotune", "plan", *PLAN, "--out", "away.json", "--cluster", "other.json"]) == 0
    (here / "plan.json").write_text("untouched")
    capsys.readouterr()
    assert main(["autotune", *arguments]) == 2
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.err.count("\n") == 1
    assert (here / "plan.json").read_text() == "untouched"


def test_help_has_defaults_and_an_example() -> None:
    from vchitect_fast.autotune import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    text = parser.format_help()
    assert "example: vchitect-fast autotune --model vchitect-tiny" in text
    assert "333 = SD3's encoders, 16 = the embedded hash encoder" in " ".join(text.split())
    for option in ("--batch", "--text-tokens", "--dtype", "--out", "--plan", "--cluster"):
        assert "default" in text.split(f"\n  {option} ", 1)[1].split("\n  --")[0]


def test_a_cluster_by_name_is_planned_explained_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is measured: two nodes of a shipped file, 16 devices, the mesh searched."""
    monkeypatch.chdir(tmp_path)
    shapes = ["--shapes", "32x256x256", "--batch", "16", "--dtype", "bfloat16"]
    assert main(["autotune", "plan", "--cluster", "8xh100", "--num-nodes", "2", *shapes]) == 0
    plan = Plan.load("plan.json")
    assert math.prod(plan.mesh.values()) == 16
    assert plan.device_name == Cluster.load("8xh100").device.name
    assert main(["autotune", "report", "--cluster", "8xh100"]) == 0
    assert Path("plan.html").read_text().startswith("<!doctype html>")
    assert main(["autotune", "export", "--format", "litegen"]) == 0
    assert "sp_size" in Path("litegen.yaml").read_text()
    printed = capsys.readouterr()
    assert "32x256x256" in printed.out


def test_what_verify_measured_calibrates_the_next_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autotune", "plan", *PLAN, "--dtype", "float32"]) == 0
    assert main(["autotune", "verify", "--model", "vchitect-nano"]) == 0
    assert main(["autotune", "plan", *PLAN, "--dtype", "float32", "--calibrate", "plan.ledger.jsonl"]) == 0
    assert "calibrated by" in Plan.load("plan.json").entries[0].predicted.confidence
    assert main(["autotune", "verify", "--model", "vchitect-nano", "--json"]) == 0
    assert len(Path("plan.ledger.jsonl").read_text().splitlines()) == 4


def test_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    from vchitect_fast.autotune.command import load_config

    for text, message in (("{", "is not JSON"), ("[]", "must hold a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(str(tmp_path))


def test_a_mesh_is_planned_and_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mesh = ["--mesh", "dp_shard=2,sp=2", "--batch", "2"]
    assert main(["autotune", "plan", *PLAN, *mesh]) == 0
    assert Plan.load("plan.json").mesh == {"dp_replicate": 1, "dp_shard": 2, "sp": 2}
    printed = capsys.readouterr().out
    assert "x 4 (dp_shard 2, sp 2)" in printed
    assert "frames" in printed
    assert main(["autotune", "verify", "--model", "vchitect-nano"]) == 2
    assert "is for 4 ranks, here is 1" in capsys.readouterr().err
