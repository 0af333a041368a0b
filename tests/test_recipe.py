"""Recipe: what a file becomes, every mistake named, and the examples that ship.

pytest tests/test_recipe.py
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from recipes import edited, plan_of, write_recipe

from vchitect_fast.architecture import preset
from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.plan import Plan
from vchitect_fast.recipe import Recipe, is_recipe, samples_a_step
from vchitect_fast.shapes import CODEC_FACTOR

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_run_wide_fields_reach_every_stage_and_a_stage_has_the_last_word(tmp_path: Path) -> None:
    path = edited(write_recipe(tmp_path, seed=7), 1, learning_rate=5e-4)
    image, short, long = Recipe.load(path).stages
    assert [stage.config.learning_rate for stage in (image, short, long)] == [1e-2, 5e-4, 1e-2]
    assert [stage.folder.name for stage in (image, short, long)] == ["01-image", "02-short", "03-long"]
    assert [stage.config.start_from for stage in (image, short, long)] == [None, image.config.out, short.config.out]
    assert [stage.config.seed for stage in (image, short, long)] == [7, 8, 9], "no stage repeats the noise of another"
    assert [str(shape) for shape in long.shapes] == ["12x32x16", "8x32x16"]


def test_overrides_are_run_wide_or_of_one_stage(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    overrides = ["out=elsewhere", "carry_optimizer=false", "long.steps=99", "short.mixture={4x32x16: 2}"]
    image, short, long = Recipe.load(path, overrides).stages
    assert image.config.out == "elsewhere/01-image"
    assert not any(stage.config.carry_optimizer for stage in (image, short, long))
    assert (short.config.steps, long.config.steps) == (8, 99)
    assert short.config.mixture == {"4x32x16": 2.0}
    with pytest.raises(UserError, match=r"got 'log.steps=3'; stages are image, short, long"):
        Recipe.load(path, ["log.steps=3"])
    with pytest.raises(UserError, match="name=value or stage.name=value, got 'steps'"):
        Recipe.load(path, ["steps"])


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        (None, {"stages": None}, "stages in .*recipe.yaml must be a list"),
        (None, {"stages": []}, "must be a list of mappings, each with a name of its own"),
        (None, {"stages": [{"steps": 3}]}, "must be a list of mappings, each with a name of its own"),
        (None, {"stages": [{"name": "a"}, {"name": "a"}]}, "each with a name of its own"),
        (None, {"lerning_rate": 1}, "unknown field of a recipe 'lerning_rate'; did you mean 'learning_rate'"),
        (None, {"start_from": "x"}, "unknown field of a recipe 'start_from'"),
        (None, {"resume": False}, "unknown field of a recipe 'resume'"),
        (None, {"learning_rate": -1}, "stage image: learning_rate must be positive"),
        (0, {"name": "Image 1"}, "lower-case letters, digits and dashes, got 'Image 1'"),
        (1, {"stepps": 3}, "unknown field of the stage short 'stepps'; did you mean 'steps'"),
        (1, {"seed": 3}, "stage short sets seed, which holds for all stages"),
        (1, {"model": "vchitect-2b"}, "stage short sets model, which holds for all stages"),
        (1, {"steps": None}, "stage short lacks steps"),
        (1, {"shapes": None}, "stage short lacks shapes"),
        (1, {"batch": 0}, "batch of the stage short must be a whole number from 1 up, got 0"),
        (1, {"plan": None}, "stage short: the run lacks plan"),
        (1, {"shapes": "4x32x16"}, "must be a list of different FxWxH, got '4x32x16'"),
        (1, {"shapes": ["4x32x16", "4x32x16"]}, "must be a list of different FxWxH"),
        (1, {"shapes": ["4x30x16"]}, "stage short has the shape 4x30x16, the nearest is 4x32x16; write that"),
        (1, {"mesh": {"dp": 2}}, "unknown mesh axis of the stage short 'dp'; "),
        (1, {"mesh": {"sp": 0}}, "mesh of the stage short must map axes to whole numbers from 1 up, got"),
        (2, {"mixture": {"8x32x16": 1}}, "has the shapes 12x32x16, 8x32x16, its mixture weighs 8x32x16"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, stage: int | None, change: dict[str, object], said: str) -> None:
    path = edited(write_recipe(tmp_path), stage, **change)
    with pytest.raises(UserError, match=said) as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)


def test_a_run_file_is_no_recipe(tmp_path: Path) -> None:
    TrainConfig(manifest="a.jsonl", plan="b.json").save(tmp_path / "run.yaml")
    assert not is_recipe(tmp_path / "run.yaml")
    assert not is_recipe(tmp_path / "absent.yaml")
    assert is_recipe(write_recipe(tmp_path))
    with pytest.raises(UserError, match="cannot read the recipe .*absent.yaml"):
        Recipe.load(tmp_path / "absent.yaml")


def test_a_stage_knows_the_plan_that_is_not_its(tmp_path: Path) -> None:
    long = Recipe.load(write_recipe(tmp_path)).stages[2]
    long.check(Plan.load(long.config.plan))
    with pytest.raises(UserError, match=r"stage long has the shapes 12x32x16, 8x32x16, its Plan .*long.json 4x32x16"):
        long.check(Plan.load(tmp_path / "short.json"))
    mesh = {"dp_replicate": 2, "dp_shard": 3, "sp": 4}
    sharded = Plan.load(plan_of(tmp_path / "mesh.json", "12x32x16", "8x32x16", mesh=mesh))
    assert samples_a_step(sharded, "8x32x16") == 2 * 2 * 3  # sequence-parallel ranks share a sample
    with pytest.raises(
        UserError, match=r"stage long has the mesh dp_shard 2, its Plan .* dp_replicate 2, dp_shard 3, sp 4"
    ):
        Recipe.load(edited(tmp_path / "recipe.yaml", 2, mesh={"dp_shard": 2})).stages[2].check(sharded)
    with pytest.raises(UserError, match=r"stage long has batch 2, its Plan .* takes 12 samples of 12x32x16 a step"):
        long.check(sharded)


def test_the_papers_recipe_is_the_papers() -> None:
    """Data sets in order, frames and heights of each stage; shapes fit the model; every stage has a Plan of its own."""
    recipe = Recipe.load(EXAMPLES / "vchitect-2b.yaml")
    found = [
        (
            Path(s.config.manifest).parent.name,
            max((t.num_frames, t.height) for t in s.shapes),
            max(t.height for t in s.shapes),
        )
        for s in recipe.stages
    ]
    assert found == [
        ("webvid", (1, 240), 240), ("webvid", (24, 336), 336), ("panda", (40, 336), 336), ("panda", (80, 240), 432),
        ("internvid-vimeo", (40, 432), 720), ("in-house", (40, 720), 720),
    ]  # fmt: skip
    assert {stage.config.fps for stage in recipe.stages} == {8.0}  # so 80 frames are 10 s and 40 are 5 s
    assert {stage.config.model for stage in recipe.stages} == {"vchitect-2b"}
    assert recipe.stages[0].config.init_from_sd3
    assert len({stage.config.plan for stage in recipe.stages}) == len(recipe.stages)
    assert all(later.config.start_from == before.config.out for before, later in pairwise(recipe.stages))
    side = preset("vchitect-2b").pos_embed_max_size * 2 * CODEC_FACTOR
    assert all(max(shape.width, shape.height) <= side for stage in recipe.stages for shape in stage.shapes)


def test_examples_name_no_field_twice() -> None:
    """YAML would take the last one without a word."""
    for path in EXAMPLES.glob("*recipe*.yaml"):
        values = yaml.safe_load(path.read_text())
        for name in values:
            assert path.read_text().count(f"\n{name}:") == 1, name


def test_the_documentation_shows_a_recipe(tmp_path: Path) -> None:
    page = (EXAMPLES.parent / "docs" / "recipe.md").read_text()
    (tmp_path / "recipe.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    image, long = Recipe.load(tmp_path / "recipe.yaml").stages
    assert (image.mesh, long.mesh) == (None, {"dp_replicate": 1, "dp_shard": 4, "sp": 2})
    assert (image.config.learning_rate, long.config.learning_rate) == (1e-4, 5e-5)
