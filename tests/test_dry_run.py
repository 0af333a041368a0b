"""A dry run's figures by hand, what it doubts, its exit code; that it writes nothing.

pytest tests/test_dry_run.py
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from recipes import edited, plan_of, write_recipe

from vchitect_fast import cli
from vchitect_fast.config import TrainConfig
from vchitect_fast.dry_run import outlook
from vchitect_fast.manifest import Clip, write_manifest
from vchitect_fast.recipe import Recipe

EIGHT = {"dp_replicate": 2, "dp_shard": 1, "sp": 4}


def dry(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a dry run."""
    code = cli.main(["train", str(path), *words, "--dry-run", "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_hours_are_ranks_times_steps_times_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1000 steps, three quarters of 2 s and one quarter of 4 s, on 8 ranks: a mean of 2.5 s, 2500 s, 5.56 device-hours."""
    path = edited(write_recipe(tmp_path), 2, mixture={"12x32x16": 3, "8x32x16": 1}, batch=4, steps=1000)
    plan_of(tmp_path / "long.json", "12x32x16", "8x32x16", step_s=(2.0, 4.0), mesh=EIGHT, device_gib=80, peak_gib=50.0)
    code, said = dry(path, capsys)
    long = said["stages"][2]
    assert [shape["steps"] for shape in long["shapes"]] == [750, 250]
    assert [shape["step_s"] for shape in long["shapes"]] == [2.0, 4.0]
    assert [(shape["peak_gib"], shape["device_gib"], shape["fits"]) for shape in long["shapes"]] == [
        (50.0, 80, True)
    ] * 2
    assert (long["num_ranks"], long["batch"], long["step_s"]) == (8, 4, 2.5)
    assert long["imbalance"] == pytest.approx(4 / 2.5 - 1)
    assert long["device_hours"] == pytest.approx(8 * 2500 / 3600)
    others = (12 + 8) * 1.0 / 3600
    assert said["device_hours"] == pytest.approx(8 * 2500 / 3600 + others)
    assert (code, said["good"]) == (0, True)


def test_without_a_mixture_the_clips_say_how_often_a_shape_comes(tmp_path: Path) -> None:
    """Four images and ten seconds of video: 4 windows of one frame, 80 / 8 of eight, so 2 and 5 steps an epoch of batch 2."""
    path = edited(write_recipe(tmp_path), 2, shapes=["1x32x16", "8x32x16"], steps=70)
    plan_of(tmp_path / "long.json", "1x32x16", "8x32x16")
    video = Clip(Path("v.mp4"), 0.0, 10.0, 250, 640, 272, 25.0, "")
    images = [Clip(Path(f"{k}.png"), 0.0, 0.0, 1, 640, 272, 1.0, "") for k in range(4)]
    write_manifest([video, *images], tmp_path / "clips.jsonl")
    image, eight = outlook(Recipe.load(path).stages[2]).shapes
    assert (image.num_clips, image.num_windows, image.steps) == (4, 4, pytest.approx(20))
    assert (eight.num_clips, eight.num_windows, eight.steps) == (1, 10, pytest.approx(50))


def test_a_shape_of_weight_0_takes_no_clips(tmp_path: Path) -> None:
    path = edited(write_recipe(tmp_path), 2, mixture={"12x32x16": 0, "8x32x16": 1})
    twelve, eight = outlook(Recipe.load(path).stages[2]).shapes
    assert (twelve.num_windows, twelve.steps) == (None, 0)
    assert (eight.num_clips, eight.steps) == (5, 6), "clips of 12 frames give windows of 8 then"


def test_a_recipe_that_is_ready_says_so_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["train", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "device-hours predicted in all" in printed
    for name, shape in (("image", "1x32x16"), ("short", "4x32x16"), ("long", "12x32x16")):
        assert re.search(rf"{name} +{shape} .* yes ", printed)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            lambda f: (f / "long.json").unlink(),
            "not planned, there is no .*long.json; make it with `vchitect-fast autotune ",
        ),
        (
            lambda f: plan_of(f / "long.json", "12x32x16", "8x32x16", peak_gib=90.0, device_gib=80),
            r"8x32x16 needs 90.0 GiB of 80; plan it again",
        ),
        (lambda f: plan_of(f / "long.json", "12x32x16"), "stage long has the shapes 12x32x16, 8x32x16, its Plan"),
        (
            lambda f: plan_of(f / "long.json", "12x32x16", "8x32x16", mesh=EIGHT),
            "has batch 2, its Plan .* takes 4 samples",
        ),
        (
            lambda f: plan_of(f / "long.json", "12x32x16", "8x32x16", model="0" * 12),
            "is for model 000000000000, vchitect-nano",
        ),
        (
            lambda f: plan_of(f / "long.json", "12x32x16", "8x32x16", num_text_tokens=333),
            "for 333 text tokens, the text encoder 'hash' gives 16",
        ),
        (lambda f: (f / "long.json").write_text("{}"), "expected a Plan of schema 1, got None"),
        (lambda f: edited(f / "recipe.yaml", 2, manifest="no.jsonl"), "cannot read the manifest no.jsonl"),
        (lambda f: edited(f / "recipe.yaml", 2, fps=4.0), "no clip fits 12x32x16; add clips that do"),
    ],
)
def test_a_doubt_about_the_last_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Any, said: str) -> None:
    path = write_recipe(tmp_path)
    harm(tmp_path)
    code, found = dry(path, capsys)
    assert (code, found["good"]) == (1, False)
    *others, long = found["stages"]
    assert [stage["doubts"] for stage in others] == [[], []]
    assert any(re.search(said, doubt) for doubt in long["doubts"]), long["doubts"]


def test_weights_that_are_not_there_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = dry(write_recipe(tmp_path, codec="weights/sd3"), capsys)
    first, *others = found["stages"]
    assert first["doubts"] == [
        "codec names weights/sd3, which is not a folder here; put the weights there, or correct it"
    ]
    assert [stage["doubts"] for stage in others] == [[], []]
    assert code == 1


def test_what_is_not_known_is_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "long.json").unlink()
    assert cli.main(["train", str(path), "--dry-run"]) == 1
    printed = capsys.readouterr().out
    assert "0.00556 device-hours predicted; 1 of 3 stages not known" in printed  # 20 steps of 1 s
    assert re.search(r"long +12x32x16 .* not planned", printed)
    _, found = dry(path, capsys)
    assert found["device_hours"] is None
    assert found["stages"][2]["step_s"] is None


def test_the_command_that_it_names_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The words after `autotune` parse, and ask for this stage's shapes, batch, text tokens and file."""
    path = edited(write_recipe(tmp_path), 2, mesh={"dp_shard": 2, "sp": 4})
    (tmp_path / "long.json").unlink()
    _, found = dry(path, capsys)
    command = re.search("`(.+)`", found["stages"][2]["doubts"][0]).group(1)
    program, name, *words = shlex.split(command)
    assert (program, name) == ("vchitect-fast", "autotune")
    parsed = cli.parser_of("autotune")[0].parse_args(words)
    assert (parsed.model, parsed.shapes) == ("vchitect-nano", ["12x32x16", "8x32x16"])
    assert (parsed.batch, parsed.text_tokens, parsed.out) == (2, 16, str(tmp_path / "long.json"))
    assert parsed.mesh == "dp_shard=2,sp=4"
    assert parsed.cluster == str(tmp_path / "cluster.json"), "one measurement serves all stages"


def test_a_plain_run_has_one_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path)
    config = TrainConfig(
        manifest=str(tmp_path / "clips.jsonl"), plan=str(tmp_path / "short.json"), model="vchitect-nano", steps=3600
    )
    config.save(tmp_path / "run.yaml")
    code, found = dry(tmp_path / "run.yaml", capsys)
    [run] = found["stages"]
    assert (code, run["device_hours"], run["shapes"][0]["num_windows"]) == (0, pytest.approx(1.0), 17)
    assert cli.main(["train", str(tmp_path / "run.yaml"), "plan=absent.json", "--dry-run"]) == 2
    assert "cannot read the Plan absent.json" in capsys.readouterr().err


def test_the_papers_recipe_is_not_planned_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    code, found = dry(Path("examples/vchitect-2b.yaml"), capsys)
    assert code == 1
    assert found["device_hours"] is None
    for stage in found["stages"]:
        assert any(doubt.startswith("not planned") for doubt in stage["doubts"])
        assert any(doubt.startswith("cannot read the manifest data/") for doubt in stage["doubts"])
