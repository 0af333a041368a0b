"""Runs a recipe: its stages in order, each into its own folder, each going on where it stopped.

A stage that is finished leaves stage.json: what the recipe asked of it, and what came of it. It is not trained again. A
recipe that asks for something else of a finished stage is refused with the names of what changed, since the stages after
it stand on it. `steps` of the last stage that was begun may grow. What changes in the middle of a stage is said by `train`.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from vchitect_fast import checkpoint
from vchitect_fast.config import TrainConfig
from vchitect_fast.dry_run import outlook, print_outlooks
from vchitect_fast.errors import UserError
from vchitect_fast.files import write_text
from vchitect_fast.manifest import SUFFIXES
from vchitect_fast.metrics import measured, read_log
from vchitect_fast.parallel.mesh import read_launch
from vchitect_fast.plan import Plan
from vchitect_fast.recipe import Recipe, Stage
from vchitect_fast.recipe_report import HEADINGS, rows_of, write_recipe_report
from vchitect_fast.resume import WITHOUT_EFFECT
from vchitect_fast.train import train

STAGE_FILE = "stage.json"
# Fields without effect on a further step, but on what the first one began with.
ASKED = {"manifest", "model", "init_from_sd3", "carry_optimizer"}
NUM_LAST = 20  # steps whose mean training loss is reported


def run_file(path: str, overrides: Sequence[str], *, dry_run: bool, as_json: bool) -> int:
    """`vchitect-fast train` of a recipe's file; returns the exit code."""
    recipe = Recipe.load(path, overrides)
    if dry_run:
        return print_outlooks([outlook(stage) for stage in recipe.stages], as_json=as_json)
    records = run_recipe(recipe)
    if _is_first():
        print(json.dumps({"stages": records})) if as_json else print_records(recipe, records)
    return 0


def run_recipe(recipe: Recipe) -> list[dict[str, Any]]:
    """Train what is left of the recipe; returns the record of every finished stage, in order.

    Ends early, without an error, after a SIGTERM. Raises UserError before the first step for a recipe that does not go
    with what is in its folder, and for a stage whose Plan or manifest is absent or does not fit it.
    """
    console = Console(highlight=False, soft_wrap=True, quiet=not _is_first())
    records = finished_stages(recipe)
    for stage in recipe.stages[len(records) :]:  # a mistake in the last one should not come up after weeks
        stage.check(Plan.load(stage.config.plan))
        manifest = Path(stage.config.manifest)
        if manifest.suffix in SUFFIXES and not manifest.exists():
            raise UserError(f"stage {stage.name}: there is no manifest {manifest}; make it, or correct it.")
    for number, stage in enumerate(recipe.stages):
        title = f"stage {number + 1} of {len(recipe.stages)}: {stage.name}"
        if number < len(records):
            console.print(f"[bold]{title}[/], finished: {records[number]['step']} steps in {stage.folder}")
            continue
        console.print(f"[bold]{title}[/], {stage.config.steps} steps into {stage.folder}")
        summary = train(stage.config)
        if summary["step"] < stage.config.steps:
            console.print(f"stopped in {title} after step {summary['step']}; the same command goes on from there")
            break
        records.append(record_of(stage, summary) if _is_first() else summary)
        if _is_first():
            write_text(stage.folder / STAGE_FILE, json.dumps(records[-1], indent=1))
            write_recipe_report(recipe, records)
        gc.collect()  # what this stage held must not narrow the next
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return records


def finished_stages(recipe: Recipe) -> list[dict[str, Any]]:
    """The records of the stages that are done, checked against the recipe; UserError names what does not go together."""
    folders = {stage.folder.name for stage in recipe.stages}
    there = [path.name for path in recipe.out.glob("[0-9][0-9]-*") if path.is_dir()] if recipe.out.is_dir() else []
    strange = sorted(name for name in there if name not in folders)
    if strange:
        raise UserError(
            f"{recipe.out} holds {', '.join(strange)}, which the recipe does not have; put the stage back at its place, "
            "remove the folder, or choose another out=."
        )
    begun = [stage for stage in recipe.stages if checkpoint.latest(stage.folder) is not None]
    records: list[dict[str, Any]] = []
    for stage in recipe.stages:
        record = _read(stage)
        last = not begun or stage is begun[-1]
        changed = _changed(record["asked"], asked_of(stage)) if record else {}
        grows = record is not None and last and changed.keys() == {"steps"} and stage.config.steps > record["step"]
        if changed and not grows:
            raise UserError(
                f"stage {stage.name} is finished and the recipe changed it ({'; '.join(changed.values())}); put that back, or "
                f"remove {stage.folder} and the stages after it to train them again."
            )
        if record is None or grows:
            if begun and recipe.stages.index(stage) < recipe.stages.index(begun[-1]):
                raise UserError(
                    f"stage {begun[-1].name} has begun and {stage.name} before it is not finished; put {stage.folder} back, or "
                    f"remove {begun[-1].folder} to train it again."
                )
            break
        records.append(record)
    return records


def asked_of(stage: Stage) -> dict[str, Any]:
    """What the recipe asks of a stage, as JSON: what decides its steps, and nothing of where things are written."""
    values = {n: v for n, v in asdict(stage.config).items() if n not in WITHOUT_EFFECT - ASKED}
    return {"shapes": [str(shape) for shape in stage.shapes], "batch": stage.batch, **values}


def record_of(stage: Stage, summary: dict[str, Any]) -> dict[str, Any]:
    """What came of a stage, from its log: steps, samples, losses, step times beside the predicted ones, device-hours."""
    plan, steps = Plan.load(stage.config.plan), read_log(stage.folder, "step")
    checks, times = read_log(stage.folder, "validation"), measured(stage.folder)
    shapes = {}
    for entry in plan.entries:
        num_steps = sum(event["shape"] == entry.shape for event in steps)
        shapes[entry.shape] = {
            "num_steps": num_steps,
            "num_samples": num_steps * stage.batch,
            "predicted_step_s": entry.predicted.step_s,
            "measured_step_s": times[entry.shape]["step_s"] if num_steps else None,
        }
    num_ranks = math.prod(plan.mesh.values())
    return {
        "name": stage.name,
        "asked": asked_of(stage),
        "step": summary["step"],
        "num_ranks": num_ranks,
        "loss": fmean(event["loss"] for event in steps[-NUM_LAST:]),
        "validation_loss": checks[-1]["loss"] if checks else None,
        "device_hours": num_ranks * math.fsum(event["step_s"] for event in steps) / 3600,
        "shapes": shapes,
        "skipped": summary["skipped"],
    }


def table_of(records: list[dict[str, Any]]) -> Table:
    """Stage by stage, a line a shape: what was trained, and whether the predictions held."""
    table = Table(title="stages", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("stage", "shape") else "right")
    for record in records:
        for row in rows_of(record):
            table.add_row(*row)
    return table


def print_records(recipe: Recipe, records: list[dict[str, Any]]) -> None:
    """The table, and where the page and the last finished stage's model are."""
    if not records:
        return
    console = Console(highlight=False)
    if not console.is_terminal:  # a file is as wide as the table
        console = Console(highlight=False, width=160)
    console.print(table_of(records))
    console.print(f"report   {recipe.out / 'report.html'}")
    console.print(f"model    {recipe.stages[len(records) - 1].folder / 'model'}")


def _is_first() -> bool:
    launch = read_launch(os.environ)
    return launch is None or launch.rank == 0


def _read(stage: Stage) -> dict[str, Any] | None:
    path = stage.folder / STAGE_FILE
    try:
        record = json.loads(path.read_bytes())
        return record if record["asked"] and record["step"] else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not what a finished stage leaves ({error}); remove it to finish the stage again."
        ) from None


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    old = {field.name: field.default for field in fields(TrainConfig) if field.name in new} | old  # fields are added
    names = sorted(name for name in old | new if old.get(name) != new.get(name))
    return {name: f"{name}: {old.get(name)} -> {new.get(name)}" for name in names}
