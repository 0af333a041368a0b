"""The table and the picture of `memory explain`: drawing only, every figure comes from memory.py.

table   blocks that do the same stand in one row, parked states below them; predicted beside measured
draw    a bar a block: its groups by colour, what becomes of them by hatching; a bar a parked state; a line where the measured
        bytes end
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vchitect_fast.files import whole_file
from vchitect_fast.plan import KEEP, OFFLOAD, RECOMPUTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vchitect_fast.memory import Explanation, Row

DONE = {KEEP: "kept", OFFLOAD: "moved", RECOMPUTE: "recomputed"}
COLOURS = {
    "whole": "#7a8699", "block_input": "#2f6f9f", "qkv": "#3f9c78", "branch_out": "#c9952d", "mlp_pre": "#b8574a", "stats": "#7d5ba6",
}  # fmt: skip
MARK_COLOUR, STATE_COLOUR = "#1c2330", "#8a6d5c"
HATCHES = {KEEP: "", OFFLOAD: "////", RECOMPUTE: ""}
PARKED = "parked"  # moved, but not between forward and backward


def amount(num_bytes: int | None) -> str:
    """Bytes exactly below a MiB, else in MiB or GiB as well."""
    if num_bytes is None:
        return "not measured"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"


def table(explanation: Explanation) -> RenderableType:
    """Rows by block and group, the sums by what becomes of them, and what the engine did."""
    title = f"what the blocks save of {_subject(explanation)}"
    rows = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("blocks", "group", "", "predicted, each", "measured, each", "difference"):
        rows.add_column(heading, justify="left" if heading in ("blocks", "group", "") else "right")
    for first, last, row in _merged(explanation):
        blocks = str(first) if first == last else f"{first} to {last}"
        again = row.action == RECOMPUTE
        measured = "not saved" if again and explanation.engine is not None else amount(row.measured_bytes)
        difference = "" if row.measured_bytes is None else f"{row.predicted_bytes - row.measured_bytes:+d} B"
        rows.add_row(blocks, row.group, DONE[row.action], amount(row.predicted_bytes), measured, difference)
    for state in explanation.parked:
        difference = "" if state.measured_bytes is None else f"{state.predicted_bytes - state.measured_bytes:+d} B"
        rows.add_row(
            "state", state.name, PARKED, amount(state.predicted_bytes), amount(state.measured_bytes), difference
        )
    lines = []
    for action, total in explanation.totals().items():
        beside = "" if action == RECOMPUTE else f", measured {amount(total['measured_bytes'])}"
        lines.append(f"{DONE[action]}: predicted {amount(total['predicted_bytes'])}{beside}")
    if explanation.parked:
        predicted = sum(state.predicted_bytes for state in explanation.parked)
        measured_bytes = [state.measured_bytes for state in explanation.parked if state.measured_bytes is not None]
        lines.append(
            f"{PARKED}: predicted {amount(predicted)}, measured {amount(sum(measured_bytes) if measured_bytes else None)}"
        )
    if explanation.engine and "budget_bytes" in explanation.engine:
        engine = explanation.engine
        lines.append(
            f"pool: {amount(int(engine['high_water_bytes']))} used at most of {amount(int(engine['budget_bytes']))}; blocks "
            f"fetched ahead of use {engine['fetched_ahead']}, late {engine['fetched_late']}"
        )
    return Group(rows, Text("\n".join(lines)))


def _subject(explanation: Explanation) -> str:
    entry, ranks = explanation.entry, explanation.num_ranks
    of_ranks = f", the first of {ranks} ranks" if ranks > 1 else ""
    return f"{entry.shape}, {entry.microbatch} samples, {explanation.dtype}{of_ranks}"


def draw(explanation: Explanation, path: str) -> None:
    """Write the picture as .svg or .png."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    blocks = sorted({row.block for row in explanation.rows})
    num_bars = len(blocks) + len(explanation.parked)
    figure = Figure(figsize=(9, 1.6 + 0.34 * num_bars), layout="constrained")
    axes = figure.add_subplot()
    unit = 2**20
    for block in blocks:
        left = 0.0
        mine = [row for row in explanation.rows if row.block == block]
        for row in sorted(mine, key=lambda row: row.action == RECOMPUTE):  # what takes memory first
            width = row.predicted_bytes / unit
            again = row.action == RECOMPUTE
            axes.barh(
                block, width, left=left, height=0.7, color=COLOURS[row.group], alpha=0.22 if again else 1.0,
                hatch=HATCHES[row.action], edgecolor="white", linewidth=0.5,
            )  # fmt: skip
            left += width
        if explanation.engine is not None:
            measured = sum(row.measured_bytes or 0 for row in mine) / unit
            _mark(axes, block, measured)
    below = [max(blocks, default=-1) + 2 + number for number in range(len(explanation.parked))]
    for place, state in zip(below, explanation.parked, strict=True):
        axes.barh(
            place, state.predicted_bytes / unit, height=0.7, color=STATE_COLOUR, hatch=HATCHES[OFFLOAD], edgecolor="white",
            linewidth=0.5,
        )  # fmt: skip
        if state.measured_bytes is not None:
            _mark(axes, place, state.measured_bytes / unit)
    axes.invert_yaxis()
    axes.set_yticks([*blocks, *below], [*map(str, blocks), *(state.name for state in explanation.parked)])
    axes.set_xlabel("MiB of a block or of a parked state, predicted" if below else "MiB of a block, predicted")
    axes.set_ylabel("block")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_subject(explanation), loc="left")
    groups = [
        Patch(color=colour, label=name)
        for name, colour in COLOURS.items()
        if any(r.group == name for r in explanation.rows)
    ]
    kinds = [
        Patch(facecolor="#9aa4b5", label="kept"),
        Patch(facecolor="#9aa4b5", hatch=HATCHES[OFFLOAD], edgecolor="white", label="moved to host memory"),
        Patch(facecolor="#9aa4b5", alpha=0.22, label="recomputed, not saved"),
    ]
    ran = explanation.engine is not None
    line = [axes.plot([], [], color=MARK_COLOUR, linewidth=2, label="measured: kept and moved")[0]] if ran else []
    figure.legend(handles=[*groups, *kinds, *line], loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    with whole_file(path) as partial:
        figure.savefig(partial, format=Path(path).suffix[1:], dpi=150)


def _mark(axes: Axes, place: int, measured: float) -> None:
    axes.plot([measured, measured], [place - 0.45, place + 0.45], color=MARK_COLOUR, linewidth=2)


def _merged(explanation: Explanation) -> list[tuple[int, int, Row]]:
    """(first, last, row) with neighbouring blocks that do the same in one row."""
    by_block = [list(rows) for _, rows in groupby(explanation.rows, key=lambda row: row.block)]

    def same(rows: list[Row]) -> list[tuple[object, ...]]:
        return [(row.group, row.action, row.predicted_bytes, row.measured_bytes) for row in rows]

    found = []
    for _, blocks in groupby(by_block, key=same):
        alike = list(blocks)
        found += [(alike[0][0].block, alike[-1][0].block, row) for row in alike[0]]
    return found
