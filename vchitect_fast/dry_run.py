"""`vchitect-fast train --dry-run`: what a run, or each stage of a recipe, would take. Trains nothing; writes nothing but the index of tars.

From the stage's Plan: predicted peak against the memory of the device that it was planned for, predicted step time of each
shape, device-hours = ranks x sum over shapes of (steps x step time). From its manifest: how many clips and windows fill each
shape. A shape's share of the steps is its weight in `mixture`, or its windows in batches where there is none. What is not
there is said with what makes it, and nothing is guessed in its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vchitect_fast.architecture import PRESETS, TransformerConfig, preset
from vchitect_fast.buckets import assign
from vchitect_fast.clips import read_clips
from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.model.text import CLIP_TOKENS, HASH_TOKENS, T5_TOKENS
from vchitect_fast.model.weights import read_json
from vchitect_fast.plan import Plan
from vchitect_fast.recipe import Stage, samples_a_step

NOT_PLANNED = "not planned"


@dataclass(frozen=True)
class ShapeOutlook:
    """One shape of a stage; None is what is not known."""

    shape: str
    num_clips: int | None  # that give windows of this shape
    num_windows: int | None
    steps: float | None  # of the stage, expected
    step_s: float | None  # predicted
    peak_gib: float | None  # predicted, of one device
    device_gib: int | None  # of the device that the Plan is for
    fits: bool | None


@dataclass(frozen=True)
class StageOutlook:
    """One stage; `doubts` holds a sentence for everything that stands in its way."""

    name: str
    steps: int
    batch: int
    device: str | None  # that the Plan is for
    num_ranks: int | None
    shapes: tuple[ShapeOutlook, ...]
    step_s: float | None  # mean over the steps of the stage
    imbalance: float | None  # slowest shape's step / mean step - 1
    device_hours: float | None
    doubts: tuple[str, ...]


def outlook(stage: Stage) -> StageOutlook:
    """All that can be said of a stage beforehand; what cannot be read becomes a doubt, never an error."""
    doubts: list[str] = []
    if stage.config.start_from is None:  # what holds for all stages is said once
        _weights(stage.config, doubts)
    plan = _plan(stage, doubts)
    clips, windows = _data(stage, doubts)
    entries = {} if plan is None else {entry.shape: entry for entry in plan.entries}
    shares = _shares(stage, windows)
    shapes = []
    for shape in map(str, stage.shapes):
        entry = entries.get(shape)
        fits = None
        if plan is not None and entry is not None:
            fits = None if plan.device_gib is None else entry.predicted.peak_gib <= plan.device_gib
            if fits is False:
                doubts.append(
                    f"{shape} needs {entry.predicted.peak_gib:.1f} GiB of {plan.device_gib}; plan it again with a smaller "
                    "batch, more ranks or a smaller shape"
                )
        shapes.append(
            ShapeOutlook(
                shape=shape,
                num_clips=clips.get(shape),
                num_windows=windows.get(shape),
                steps=None if shares is None else stage.config.steps * shares[shape],
                step_s=None if entry is None else entry.predicted.step_s,
                peak_gib=None if entry is None else entry.predicted.peak_gib,
                device_gib=None if plan is None else plan.device_gib,
                fits=fits,
            )
        )
    ranks = None if plan is None else math.prod(plan.mesh.values())
    seconds = [row.steps * row.step_s for row in shapes if row.steps is not None and row.step_s is not None]
    mean = math.fsum(seconds) / stage.config.steps if len(seconds) == len(shapes) else None
    slowest = max((row.step_s for row in shapes if row.step_s is not None and row.steps), default=None)
    return StageOutlook(
        name=stage.name,
        steps=stage.config.steps,
        batch=stage.batch,
        device=None if plan is None else plan.device_name,
        num_ranks=ranks,
        shapes=tuple(shapes),
        step_s=mean,
        imbalance=max(0.0, slowest / mean - 1) if mean and slowest is not None else None,
        device_hours=None if ranks is None or mean is None else ranks * mean * stage.config.steps / 3600,
        doubts=tuple(doubts),
    )


def stage_of(config: TrainConfig) -> Stage:
    """A plain run as a stage of its Plan's shapes; UserError as `Plan.load`."""
    plan = Plan.load(config.plan)
    shapes = tuple(entry.video_shape for entry in plan.entries)
    return Stage("run", shapes, samples_a_step(plan, str(shapes[0])), config)


def autotune_command(stage: Stage) -> str:
    """What makes the Plan of a stage on the machine it will run on."""
    shapes = " ".join(map(str, stage.shapes))
    sizes = ",".join(f"{axis}={size}" for axis, size in (stage.mesh or {}).items() if size > 1)
    return (
        f"vchitect-fast autotune --model {stage.config.model} --shapes {shapes} --batch {stage.batch} "
        f"{f'--mesh {sizes} ' if sizes else ''}"
        f"--text-tokens {_num_text_tokens(stage.config)} --cluster {Path(stage.config.plan).parent / 'cluster.json'} "
        f"--out {stage.config.plan}"
    )


def print_outlooks(outlooks: Sequence[StageOutlook], *, as_json: bool) -> int:
    """The table, or one JSON object; returns the exit code: 0 when every stage is planned, fits and has data, else 1."""
    hours = [item.device_hours for item in outlooks]
    total = math.fsum(value for value in hours if value is not None) if None not in hours else None
    good = not any(item.doubts for item in outlooks)
    if as_json:
        print(json.dumps({"good": good, "device_hours": total, "stages": [asdict(item) for item in outlooks]}))
        return 0 if good else 1
    console = Console(highlight=False)
    if not console.is_terminal:  # a file is as wide as the table
        console = Console(highlight=False, width=160)
    console.print(_table(outlooks))
    for device in dict.fromkeys(item.device for item in outlooks if item.device):
        console.print(f"planned for {device}")
    unknown = sum(value is None for value in hours)
    known = math.fsum(value for value in hours if value is not None)
    rest = f"; {unknown} of {len(hours)} stages not known" if unknown else " in all"
    console.print(f"{amount(known)} device-hours predicted{rest}" if unknown < len(hours) else "device-hours not known")
    for item in outlooks:
        for doubt in item.doubts:
            console.print(f"{item.name}: {doubt}", soft_wrap=True)
    return 0 if good else 1


def _weights(config: TrainConfig, doubts: list[str]) -> None:
    for name in ("init_from_sd3", "codec", "text_encoder"):
        place = getattr(config, name)
        if place not in (None, "dct", "hash") and not Path(place).expanduser().is_dir():
            doubts.append(f"{name} names {place}, which is not a folder here; put the weights there, or correct it")


def _plan(stage: Stage, doubts: list[str]) -> Plan | None:
    path = Path(stage.config.plan)
    if not path.exists():
        doubts.append(f"{NOT_PLANNED}, there is no {path}; make it with `{autotune_command(stage)}`")
        return None
    try:
        plan = Plan.load(path)
    except UserError as error:
        doubts.append(str(error))
        return None
    for check in (Stage.check, _check_model):
        try:
            check(stage, plan)
        except UserError as error:
            doubts.append(str(error))
    return plan


def _check_model(stage: Stage, plan: Plan) -> None:
    config = stage.config
    sizes = _sizes(config.model)
    if plan.model != sizes.fingerprint():
        raise UserError(
            f"the Plan {config.plan} is for model {plan.model}, {config.model} is {sizes.fingerprint()}; plan it again."
        )
    if plan.num_text_tokens != _num_text_tokens(config):
        raise UserError(
            f"the Plan {config.plan} is for {plan.num_text_tokens} text tokens, the text encoder {config.text_encoder!r} "
            f"gives {_num_text_tokens(config)}; plan it again."
        )


def _sizes(model: str) -> TransformerConfig:
    folder = Path(model)
    if model in PRESETS or not folder.is_dir():
        return preset(model)
    inner = folder / "transformer"
    return TransformerConfig.from_dict(read_json((inner if inner.is_dir() else folder) / "config.json"))


def _num_text_tokens(config: TrainConfig) -> int:
    return HASH_TOKENS if config.text_encoder == "hash" else CLIP_TOKENS + T5_TOKENS


def _data(stage: Stage, doubts: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Clips and windows by shape, both empty where the manifest cannot be used."""
    weights = stage.config.weights
    used = [shape for shape in stage.shapes if weights is None or weights[shape]]  # a weight of 0 takes no clips
    try:
        assigned = assign(read_clips(stage.config.manifest, stage.config.cache), used, stage.config.fps).windows
    except UserError as error:
        doubts.append(str(error))
        return {}, {}
    if empty := ", ".join(str(shape) for shape in used if not assigned[shape]):
        doubts.append(
            f"no clip fits {empty}; add clips that do, leave the shape out, or give it the weight 0 in mixture"
        )
    clips = {str(shape): len({window.clip for window in found}) for shape, found in assigned.items()}
    return clips, {str(shape): len(found) for shape, found in assigned.items()}


def _shares(stage: Stage, windows: dict[str, int]) -> dict[str, float] | None:
    """Each shape's share of the stage's steps; None where neither a mixture nor the data says it."""
    weights = stage.config.mixture or {shape: -(-number // stage.batch) for shape, number in windows.items()}
    if len(stage.shapes) == 1:
        weights = {str(stage.shapes[0]): 1}
    total = math.fsum(weights.values())
    return {shape: weight / total for shape, weight in weights.items()} if total else None


def _table(outlooks: Sequence[StageOutlook]) -> Table:
    table = Table(title="dry run: predicted, nothing was trained", title_justify="left", box=box.SIMPLE, pad_edge=False)
    headings = (
        "stage",
        "shape",
        "clips",
        "windows",
        "steps",
        "step",
        "peak GiB",
        "of",
        "fits",
        "ranks",
        "imbalance",
        "device-h",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("stage", "shape", "fits") else "right")
    for item in outlooks:
        for number, row in enumerate(item.shapes):
            first = number == 0
            table.add_row(
                item.name if first else "",
                row.shape,
                _or(row.num_clips, "{}", "unknown"),
                _or(row.num_windows, "{}", "unknown"),
                _or(row.steps, "{:,.0f}", "unknown"),
                NOT_PLANNED if row.step_s is None else f"{amount(row.step_s)} s",
                _or(row.peak_gib, "{:.2f}", NOT_PLANNED),
                _or(row.device_gib, "{}", ""),
                {True: "yes", False: "NO", None: ""}[row.fits],
                _or(item.num_ranks, "{}", "") if first else "",
                _or(item.imbalance, "{:.0%}", "") if first else "",
                ("unknown" if item.device_hours is None else amount(item.device_hours)) if first else "",
            )
    return table


def amount(number: float) -> str:
    """Three digits of a small number, every digit of a large one."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _or(value: Any, form: str, otherwise: str) -> str:
    return otherwise if value is None else form.format(value)
