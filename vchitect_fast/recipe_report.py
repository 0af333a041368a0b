"""report.html of a recipe: its finished stages in one table, one loss curve over all of them, their last samples.

Self-contained: pictures are embedded, nothing is fetched, no script runs. It shows what the stages wrote (stage.json, log.jsonl,
samples) and computes nothing else; every word of it that comes from a file is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from vchitect_fast.dry_run import amount
from vchitect_fast.files import write_text
from vchitect_fast.metrics import read_log
from vchitect_fast.recipe import Recipe
from vchitect_fast.report import STYLE

HEADINGS = (
    "stage",
    "shape",
    "steps",
    "samples",
    "loss",
    "validation",
    "predicted",
    "measured",
    "error",
    "device-hours",
)
COLOURS = ("#1c7ed6", "#0b7285")  # neighbouring stages
WIDE = "figure, table { overflow-x: auto; } table { display: block; } img { box-sizing: border-box; }"  # on a narrow screen the table scrolls, not the page


def write_recipe_report(recipe: Recipe, records: Sequence[dict[str, Any]]) -> Path:
    """Write `out`/report.html for the finished stages; returns its path."""
    title = f"{recipe.out.name}: {len(records)} of {len(recipe.stages)} stages"
    body = [
        f"<h1>{_text(title)}</h1>",
        '<p class="lead">Each stage starts from the weights and the average of the one before. Predicted was written down '
        "before the stage ran, measured is the median step, both without reading and encoding data.</p>",
        "<h2>Stages</h2>",
        _table(records),
        "<h2>Loss</h2>",
        _loss(recipe, records),
        *_samples(recipe, records),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{_text(title)}</title><style>{STYLE}{WIDE}</style></head>"
    )
    path = recipe.out / "report.html"
    write_text(path, f"{head}<body><main>{''.join(body)}</main></body></html>")
    return path


def rows_of(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """A finished stage's record as the rows of a table, one a shape, under HEADINGS."""
    checked = record["validation_loss"]
    own = (f"{record['loss']:.4f}", "none" if checked is None else f"{checked:.4f}")
    rows: list[tuple[str, ...]] = []
    for shape, values in record["shapes"].items():
        predicted, step_s = values["predicted_step_s"], values["measured_step_s"]
        first = not rows
        rows.append((
            record["name"] if first else "",
            shape,
            f"{values['num_steps']:,}",
            f"{values['num_samples']:,}",
            *(own if first else ("", "")),
            f"{1000 * predicted:,.0f} ms",
            "no step" if step_s is None else f"{1000 * step_s:,.0f} ms",
            "" if step_s is None else f"{100 * (predicted / step_s - 1):+.0f} %",
            amount(record["device_hours"]) if first else "",
        ))  # fmt: skip
    return rows


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _table(records: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in HEADINGS)
    rows = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for record in records for row in rows_of(record)]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _loss(recipe: Recipe, records: Sequence[dict[str, Any]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    starts = list(accumulate((record["step"] for record in records), initial=0))
    for number, (start, record) in enumerate(zip(starts, records, strict=False)):
        folder, colour = recipe.stages[number].folder, COLOURS[number % 2]
        axes.axvline(start, color="#edf0f4", zorder=0)
        axes.annotate(record["name"], (start, 1), xycoords=("data", "axes fraction"), fontsize=8, color=colour)
        if not (folder / "log.jsonl").exists():  # put away after the stage was finished
            continue
        steps, checks = read_log(folder, "step"), read_log(folder, "validation")
        axes.plot([start + e["step"] for e in steps], [e["loss"] for e in steps], color="#b9c3d6", linewidth=0.8)
        axes.plot(
            [start + e["step"] for e in checks], [e["loss"] for e in checks], color=colour, marker="o", markersize=3
        )
    axes.set(xlabel="step, over all stages", ylabel="mean squared error of the velocity", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    caption = "Training loss of each step, grey; loss of the averaged model at fixed noise levels, dots"
    return _figure(caption, "svg+xml", picture.getvalue().encode())


def _samples(recipe: Recipe, records: Sequence[dict[str, Any]]) -> list[str]:
    """The newest filmstrip of every stage that has one."""
    found = []
    for stage, record in zip(recipe.stages, records, strict=False):
        strips = sorted((stage.folder / "samples").glob("step-*.png"))
        found += [_figure(f"{record['name']}, {strips[-1].stem}", "png", strips[-1].read_bytes())] if strips else []
    return ["<h2>Samples</h2>", *found] if found else []


def _figure(caption: str, kind: str, content: bytes) -> str:
    source, words = base64.b64encode(content).decode(), _text(caption)
    return (
        f'<figure><figcaption>{words}</figcaption><img alt="{words}" src="data:image/{kind};base64,{source}"></figure>'
    )
