"""Running a recipe on real clips: order, what is carried over, kill -9 in the middle of a stage, what is refused.

Run: pytest tests/test_recipe_run.py
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import edited, plan_of, write_recipe
from test_train import assert_same, final

from vchitect_fast import checkpoint, recipe_run
from vchitect_fast.cli import main
from vchitect_fast.errors import UserError
from vchitect_fast.metrics import read_log
from vchitect_fast.recipe import Recipe
from vchitect_fast.recipe_run import run_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe that was run to its end; to be read only."""
    folder = tmp_path_factory.mktemp("trained")
    run_recipe(Recipe.load(write_recipe(folder)))
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A recipe of its own folder with the trained stages in it."""
    path = write_recipe(tmp_path)
    shutil.copytree(trained / "out", tmp_path / "out")
    edited(path, None, manifest=str(trained / "clips.jsonl"))
    return path


def test_each_stage_starts_from_the_one_before(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained / "out"
    assert [final(out / name)["optimizer.step.proj_out.bias"].item() for name in ("01-image", "02-short", "03-long")] == [
        12, 20, 26,
    ]  # fmt: skip
    assert [len(read_log(out / name, "step")) for name in ("01-image", "02-short", "03-long")] == [12, 8, 6]
    assert {event["shape"] for event in read_log(out / "03-long", "step")} == {"12x32x16", "8x32x16"}
    assert (out / "03-long" / "model" / "config.json").exists()

    newest = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(["train", str(trained / "recipe.yaml"), "--json"]) == 0
    printed = capsys.readouterr().out
    assert "stage 2 of 3: short, finished: 8 steps" in printed
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == newest, "finished stages are gone over"
    stages = json.loads(printed.splitlines()[-1])["stages"]
    assert [(s["name"], s["step"], s["num_ranks"]) for s in stages] == [
        ("image", 12, 1),
        ("short", 8, 1),
        ("long", 6, 1),
    ]
    shapes = stages[2]["shapes"]
    assert sum(values["num_steps"] for values in shapes.values()) == 6
    assert sum(values["num_samples"] for values in shapes.values()) == 12
    steps = read_log(out / "03-long", "step")
    assert stages[2]["device_hours"] == pytest.approx(sum(event["step_s"] for event in steps) / 3600)
    assert stages[2]["loss"] == pytest.approx(sum(event["loss"] for event in steps) / 6)

    assert main(["train", str(trained / "recipe.yaml")]) == 0
    table = capsys.readouterr().out
    for fragment in (
        "predicted",
        "measured",
        "samples",
        "device-hours",
        "1,000 ms",
        "03-long/model",
        "out/report.html",
    ):
        assert fragment in table


def test_a_stage_keeps_to_its_mixture(copied: Path) -> None:
    """Of eight steps with weights 1 and 3, the first shape has two; its clips alone would give it two thirds."""
    shutil.rmtree(copied.parent / "out" / "03-long")
    record = run_recipe(Recipe.load(copied, ["long.steps=8", "long.mixture={12x32x16: 1, 8x32x16: 3}"]))[-1]
    assert [values["num_steps"] for values in record["shapes"].values()] == [2, 6]


def test_without_the_optimizer_its_moments_begin_at_zero(copied: Path) -> None:
    shutil.rmtree(copied.parent / "out" / "03-long")
    run_recipe(Recipe.load(copied, ["long.carry_optimizer=false"]))
    assert final(copied.parent / "out" / "03-long")["optimizer.step.proj_out.bias"].item() == 6


@pytest.mark.soak
def test_killed_in_the_middle_of_a_stage_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """kill -9 in the second of three stages, then the same command: the last stage has the same bits as an undisturbed run's."""
    path = write_recipe(tmp_path)
    command = [sys.executable, "-P", "-m", "vchitect_fast.cli", "train", str(path), "short.steps=2000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "02-short" / "checkpoint-00000010").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no checkpoint after two minutes"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    stopped_at = checkpoint.read_state(checkpoint.latest(tmp_path / "out" / "02-short"))["step"]
    assert 5 <= stopped_at < 2000
    assert not (tmp_path / "out" / "03-long").exists()

    first = (tmp_path / "out" / "01-image" / "stage.json").stat().st_mtime_ns
    overrides = [f"short.steps={stopped_at + 7}"]
    resumed = run_recipe(Recipe.load(path, overrides))
    assert (tmp_path / "out" / "01-image" / "stage.json").stat().st_mtime_ns == first
    straight = run_recipe(Recipe.load(path, [*overrides, f"out={tmp_path / 'straight'}"]))
    assert [record["loss"] for record in resumed] == [record["loss"] for record in straight]
    assert_same(final(tmp_path / "out" / "03-long"), final(tmp_path / "straight" / "03-long"))


@pytest.mark.soak
def test_ten_kills_in_three_stages_leave_no_trace(tmp_path: Path) -> None:
    """kill -9 up to a second and a half after a start has gone on, wherever that is; then the same bits as undisturbed."""
    path, draw = write_recipe(tmp_path, save_every=7), random.Random(0)
    overrides = [f"{name}.steps=300" for name in ("image", "short", "long")]
    command = [sys.executable, "-P", "-m", "vchitect_fast.cli", "train", str(path), *overrides]
    for _ in range(10):
        before = _written(tmp_path / "out")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while _written(tmp_path / "out") == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.5))
        process.kill()
        process.wait()
    assert not (tmp_path / "out" / "03-long" / "stage.json").exists(), "some kills came after the end"
    run_recipe(Recipe.load(path, overrides))
    run_recipe(Recipe.load(path, [*overrides, f"out={tmp_path / 'straight'}"]))
    for name in ("01-image", "02-short", "03-long"):
        assert_same(final(tmp_path / "out" / name), final(tmp_path / "straight" / name))


def _written(out: Path) -> dict[str, int]:
    """The logs that are there, with their sizes."""
    return {path.parent.name: path.stat().st_size for path in out.glob("*/log.jsonl")}


def test_killed_before_it_was_written_down_a_stage_is_not_trained_again(copied: Path) -> None:
    long = copied.parent / "out" / "03-long"
    record, weights = json.loads((long / "stage.json").read_text()), final(long)
    (long / "stage.json").unlink()
    again = run_recipe(Recipe.load(copied))[-1]
    assert {**again, "asked": None} == {**record, "asked": None}
    assert_same(final(long), weights)


def test_the_last_stage_may_grow(copied: Path) -> None:
    assert run_recipe(Recipe.load(copied, ["long.steps=8"]))[-1]["step"] == 8
    steps = read_log(copied.parent / "out" / "03-long", "step")
    assert [event["step"] for event in steps] == list(range(1, 9))


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        (
            0,
            {"learning_rate": 1e-3},
            r"stage image is finished and the recipe changed it \(learning_rate: 0.01 -> 0.001\)",
        ),
        (0, {"steps": 13}, r"stage image is finished and the recipe changed it \(steps: 12 -> 13\)"),
        (2, {"steps": 5}, r"stage long is finished and the recipe changed it \(steps: 6 -> 5\)"),
        (1, {"batch": 4, "weight_decay": 0.5}, r"short .* \(batch: 2 -> 4; weight_decay: 0.01 -> 0.5\)"),
        (1, {"shapes": ["4x16x16"]}, r"short .* \(shapes: \['4x32x16'\] -> \['4x16x16'\]\)"),
        (1, {"manifest": "other.jsonl"}, r"short .* \(manifest: .*clips.jsonl -> other.jsonl\)"),
        (2, {"carry_optimizer": False}, r"long .* \(carry_optimizer: True -> False\)"),
        (None, {"seed": 1}, r"image .* \(seed: 0 -> 1\)"),
        (1, {"name": "shorter"}, "out holds 02-short, which the recipe does not have"),
    ],
)
def test_a_change_of_what_is_finished_is_refused(
    trained: Path, tmp_path: Path, stage: int | None, change: dict[str, Any], said: str
) -> None:
    path = shutil.copy(trained / "recipe.yaml", tmp_path)
    with pytest.raises(UserError, match=said):
        run_recipe(Recipe.load(edited(Path(path), stage, **change)))


def test_a_change_without_effect_is_none(trained: Path, tmp_path: Path) -> None:
    path = edited(Path(shutil.copy(trained / "recipe.yaml", tmp_path)), 0, plan="elsewhere.json", log_every=3)
    assert len(run_recipe(Recipe.load(path))) == 3


def test_a_stage_without_the_one_before_is_refused(copied: Path) -> None:
    shutil.rmtree(copied.parent / "out" / "02-short")
    with pytest.raises(
        UserError, match="stage long has begun and short before it is not finished; put .*02-short back"
    ):
        run_recipe(Recipe.load(copied))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "long.json").unlink(), "cannot read the Plan .*long.json"),
        (lambda f: plan_of(f / "long.json", "8x32x16"), "stage long has the shapes 12x32x16, 8x32x16, its Plan"),
        (lambda f: edited(f / "recipe.yaml", 2, batch=3), "stage long has batch 3, its Plan .* takes 2 samples"),
        (lambda f: edited(f / "recipe.yaml", 2, manifest="no.jsonl"), "stage long: there is no manifest no.jsonl"),
    ],
)
def test_a_mistake_in_the_last_stage_comes_up_before_the_first_step(tmp_path: Path, harm: Any, said: str) -> None:
    path = write_recipe(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=said):
        run_recipe(Recipe.load(path))
    assert not (tmp_path / "out").exists()


def test_a_stop_on_request_ends_the_recipe_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After SIGTERM `train` returns early; the next stage must not start from a half-trained one."""
    monkeypatch.setattr(recipe_run, "train", lambda config: {"step": 3})
    assert main(["train", str(write_recipe(tmp_path))]) == 0
    printed = capsys.readouterr().out
    assert "stopped in stage 1 of 3: image after step 3" in printed
    assert "stage 2 of 3" not in printed


def test_a_torn_record_is_named(copied: Path) -> None:
    (copied.parent / "out" / "01-image" / "stage.json").write_text("{")
    with pytest.raises(UserError, match="01-image/stage.json is not what a finished stage leaves"):
        run_recipe(Recipe.load(copied))


def test_the_average_is_the_one_that_was_carried(copied: Path) -> None:
    """At a rate of next to nothing the last stage's average stays between the second's average and its weights."""
    shutil.rmtree(copied.parent / "out" / "03-long")
    overrides = ["long.learning_rate=1e-30", "long.weight_decay=0", "long.steps=1"]
    run_recipe(Recipe.load(copied, overrides))
    short, long = (final(copied.parent / "out" / name) for name in ("02-short", "03-long"))
    name = "proj_out.weight"
    expected = torch.lerp(short[f"ema.{name}"], short[f"model.{name}"], 0.1)  # ema_decay 0.9, without warm-up
    assert torch.equal(long[f"ema.{name}"], expected)
