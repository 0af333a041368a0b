"""Shows a Plan on the terminal: what was chosen for each shape, where its time and memory go, why the others lost.

    render             a Plan          render_explanation   what explain.py found out about one entry
    compare            predicted against measured

Rendering only, with rich; every figure comes out of the Plan, the explanation or the measurement and is computed elsewhere.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from vchitect_fast.autotune.describe import blocks_in_words
from vchitect_fast.autotune.reasons import num_doing
from vchitect_fast.autotune.streams import STREAMS
from vchitect_fast.plan import OFFLOAD, Plan, PlanEntry

if TYPE_CHECKING:
    from vchitect_fast.autotune.explain import Explanation

PART_NAMES = {
    "forward_s": "forward", "backward_s": "backward", "recompute_s": "recompute", "exchange_s": "exchanges not hidden",
    "gather_s": "gathers not hidden", "copy_s": "copies not hidden", "encode_s": "encoding", "pressure_s": "memory pressure",
    "optimizer_s": "optimizer",
}  # fmt: skip
SAID = {
    "time": "where the time goes",
    "memory": "where the memory goes",
    "choice": "why this choice",
    "change": "what would change it",
}


def render(plan: Plan) -> RenderableType:
    """Tables of the chosen entries and of their runners-up, and the confidence in words."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    where = f"{plan.device_name} x {math.prod(plan.mesh.values())} ({mesh})" if mesh else plan.device_name
    title = f"Plan for {where}, {plan.compute_dtype}, {plan.num_text_tokens} text tokens"
    if plan.parked:
        title += f"; in host memory between uses: {', '.join(plan.parked)}"
    chosen = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    rows = [_chosen_row(entry) for entry in plan.entries]
    used = [name for name in rows[0] if any(row[name] for row in rows)]  # what no shape does has no column
    for heading in used:
        chosen.add_column(heading, justify="left" if heading == "shape" else "right")
    for row in rows:
        chosen.add_row(*(row[name] for name in used))
    lines = [line for entry in plan.entries for line in _parts(entry)]
    lost = Table(title="why the others lost", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("shape", "choice", "step", "peak", "why"):
        lost.add_column(heading, justify="right" if heading in ("step", "peak") else "left")
    for entry in plan.entries:
        for other in entry.runners_up:
            figures = seconds(other["step_s"]), gib(other["peak_gib"])
            lost.add_row(entry.shape, other["choice"], *figures, other["why"])
    rests_on = Text(
        "predictions rest on: " + "; ".join(dict.fromkeys(entry.predicted.confidence for entry in plan.entries))
    )
    return Group(chosen, Text("\n".join(lines) + "\n"), *([lost] if lost.row_count else []), rests_on)


def render_explanation(found: Explanation) -> RenderableType:
    """Sentences first, then the streams of a microbatch and what every change does."""
    line = found.outcome.timeline
    parts: list[RenderableType] = [Text(f"\n{found.entry.shape}", style="bold")]
    for name, heading in SAID.items():
        parts.append(Text(heading, style="italic"))
        parts += [Text(f"  {sentence}") for sentence in found.said[name]]
    streams = Table(
        title=f"streams of one microbatch, {seconds(line.total_s)}",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for heading in ("stream", "busy", "of it hidden", "waited for"):
        streams.add_column(heading, justify="left" if heading == "stream" else "right")
    for name in (name for name in STREAMS if line.busy_s(name)):
        waits = ("", "") if name == "compute" else (f"{line.hidden(name):.0%}", seconds(line.exposed_s(name)))
        streams.add_row(name, f"{line.busy_s(name) / line.total_s:.0%}", *waits)
    changes = Table(title="what would change it", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("change", "this plan's step", "", "fits", "then best"):
        changes.add_column(heading, justify="left" if heading in ("change", "then best") else "right")
    for item in found.effects:
        best = "this plan" if item.winner is None else item.winner
        if item.winner_step_s is not None:
            best = f"{seconds(item.winner_step_s)}: {best}"
        changes.add_row(item.change, seconds(item.step_s), f"{item.ratio - 1:+.1%}", "yes" if item.fits else "no", best)
    return Group(*parts, Text(), streams, changes)


def show(renderable: RenderableType) -> None:
    """Print it, wide enough for tables where the output is no terminal."""
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=200)).print(renderable)


def compare(plan: Plan, measured: dict[str, dict[str, float]]) -> Table:
    """Predicted against measured, by shape; `measured` as vchitect_fast.metrics.measured gives it."""
    table = Table(title="predicted against measured", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("shape", "", "predicted", "measured", "prediction off by"):
        table.add_column(heading, justify="left" if heading in ("shape", "") else "right")
    for entry in plan.entries:
        for item in entry.predicted.against(measured.get(entry.shape, {})):
            show = gib if item.name.endswith("_gib") else seconds
            name, _, _ = item.name.rpartition("_")
            error = "" if item.error is None else f"{item.error:+.0%}"
            table.add_row(entry.shape, name, show(item.predicted), show(item.measured), error)
    return table


def seconds(value: float) -> str:
    """1.23 s, or 12.3 ms below a second."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def gib(value: float) -> str:
    """1.23 GiB, or 12.3 MiB below a tenth."""
    return f"{value:.2f} GiB" if value >= 0.1 else f"{1024 * value:.3g} MiB"


def _chosen_row(entry: PlanEntry) -> dict[str, str]:
    """By heading; "" where the entry does nothing of the kind."""
    blocks, offloaded = len(entry.policy), num_doing(OFFLOAD, entry.policy)
    return {
        "shape": entry.shape,
        "visual tokens": f"{entry.video_shape.num_visual_tokens():,}",
        "batch": f"{entry.microbatch} x {entry.accumulation}",
        "sharded by": entry.shard.axis if entry.shard.axis != "batch" else "",
        "recompute": f"{entry.num_recomputed} of {blocks}",
        "offload": f"{offloaded} of {blocks}" if offloaded else "",
        "chunks": f"{entry.num_chunks}" if entry.num_chunks > 1 else "",
        "step": seconds(entry.predicted.step_s),
        "peak": gib(entry.predicted.peak_gib),
    }


def _parts(entry: PlanEntry) -> list[str]:
    predicted = entry.predicted
    step = " + ".join(
        f"{PART_NAMES.get(name, name)} {seconds(value)}" for name, value in predicted.step_parts_s.items() if value
    )
    peak = " + ".join(
        f"{name.replace('_', ' ')} {gib(value)}" for name, value in predicted.peak_parts_gib.items() if value
    )
    blocks = blocks_in_words(entry.policy)
    return [f"{entry.shape}  {blocks}", f"    step = {step}", f"    peak = {peak}"]
