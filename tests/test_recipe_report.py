"""report.html of a recipe: every stage, shape and figure is there, pictures are whole, nothing is fetched, words are escaped.

pytest tests/test_recipe_report.py
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from vchitect_fast.config import TrainConfig
from vchitect_fast.recipe import Recipe, Stage
from vchitect_fast.recipe_report import HEADINGS, rows_of, write_recipe_report
from vchitect_fast.shapes import VideoShape


def record(name: str, **change: object) -> dict[str, object]:
    """What stage.json holds, with figures that can be told apart."""
    shapes = {
        "1x32x16": {"num_steps": 30, "num_samples": 1234, "predicted_step_s": 0.2, "measured_step_s": 0.25},
        "4x32x16": {"num_steps": 0, "num_samples": 0, "predicted_step_s": 2.5, "measured_step_s": None},
    }
    return {
        "name": name,
        "step": 30,
        "loss": 1.5,
        "validation_loss": None,
        "device_hours": 7.25,
        "shapes": shapes,
        **change,
    }


def recipe_in(folder: Path) -> Recipe:
    """Two stages, the first with a log and a filmstrip."""
    stages = []
    for number, name in enumerate(("first", "second"), 1):
        config = TrainConfig(manifest="c.jsonl", plan="p.json", out=str(folder / f"0{number}-{name}"), steps=30)
        stages.append(Stage(name, (VideoShape(1, 32, 16),), 2, config))
    first = stages[0].folder
    (first / "samples").mkdir(parents=True)
    for step in (10, 30):
        (first / "samples" / f"step-000000{step}.png").write_bytes(b"PNG %d" % step)
    events = [{"kind": "step", "step": 1, "loss": 2.0}, {"kind": "validation", "step": 1, "loss": 1.9}]
    (first / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return Recipe(folder, tuple(stages))


def test_a_row_a_shape_with_every_figure() -> None:
    image, video = rows_of(record("first", validation_loss=0.75))
    assert len(HEADINGS) == len(image) == len(video)
    assert image == ("first", "1x32x16", "30", "1,234", "1.5000", "0.7500", "200 ms", "250 ms", "-20 %", "7.25")
    assert video == ("", "4x32x16", "0", "0", "", "", "2,500 ms", "no step", "", "")


def test_the_page_holds_all_of_it_and_fetches_nothing(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    page = write_recipe_report(recipe, [record("first")]).read_text()
    assert "1 of 2 stages" in page
    for cell in rows_of(record("first"))[0]:
        assert f"<td>{cell}</td>" in page
    pictures = re.findall(r'src="data:image/(png|svg\+xml);base64,([^"]+)"', page)
    plot, strip = (base64.b64decode(content) for _, content in pictures)
    assert b"</svg>" in plot
    assert strip == b"PNG 30", "the newest filmstrip"
    assert "http" not in page and "<script" not in page


def test_words_from_files_are_escaped(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "<b>bold</b>")
    page = write_recipe_report(recipe, [record("<i>stage</i>")]).read_text()
    assert "<b>bold" not in page and "<i>stage" not in page
    assert "&lt;i&gt;stage" in page


def test_a_finished_stage_whose_log_was_put_away_is_no_error(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    (recipe.stages[0].folder / "log.jsonl").unlink()

    assert "<td>first</td>" in write_recipe_report(recipe, [record("first"), record("second")]).read_text()
