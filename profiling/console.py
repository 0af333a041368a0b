"""What a profile prints: the step in one line a part, the findings, the peak of the memory. Plain words, no page.

Texts of a trace are printed as text: no markup of the terminal's library is read in them, control characters are replaced.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vchitect_fast.profiling.facts import Analysis, RankAnalysis
from vchitect_fast.profiling.memory import MemoryAnalysis

NUM_FINDINGS_SHOWN = 5
NUM_SPANS_SHOWN = 8


def print_analysis(analysis: Analysis, memories: Sequence[MemoryAnalysis | None]) -> None:
    """Tables to standard output."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=140)
    console.print(step_table(analysis.ranks[0]))
    console.print(finding_table(analysis) if analysis.findings else "no finding reached its threshold")
    for memory in memories[:1]:
        if memory:
            console.print(Text(f"memory   {memory.explained()}"))
    for note in dict.fromkeys(note for rank in analysis.ranks for note in rank.notes):
        console.print(plain(f"note     {note}"))


def step_table(rank: RankAnalysis) -> Table:
    """The median step: its whole, then the spans with most device time."""
    title = f"one step, median of {len(rank.steps)} recorded" if rank.steps else "the trace has no steps"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("part", "time", "of the step"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    if not rank.steps:
        return table
    steps = rank.steps
    wall = median(step.wall_us for step in steps) or 1.0

    def add(name: str, us: float) -> None:
        table.add_row(plain(name), f"{us / 1000:,.2f} ms", f"{100 * us / wall:.1f} %")

    add("whole step", wall)
    add("compute", median(step.compute_us for step in steps))
    add("copies and collectives, not hidden", median(step.exposed_any_us for step in steps))
    add("idle", median(step.idle_us for step in steps))
    names = dict.fromkeys(item.name for step in steps for item in step.by_span)
    times = {
        name: median(sum(item.device_us for item in step.by_span if item.name == name) for step in steps)
        for name in names
    }
    for name, us in sorted(times.items(), key=lambda item: -item[1])[:NUM_SPANS_SHOWN]:
        add(f"  {name}", us)
    return table


def finding_table(analysis: Analysis) -> Table:
    """The costliest findings with what to change."""
    shown = analysis.findings[:NUM_FINDINGS_SHOWN]
    title = f"what to do first ({len(shown)} of {len(analysis.findings)} findings)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("costs a step", "finding", "change", "setting"):
        table.add_column(heading, justify="right" if heading == "costs a step" else "left", overflow="fold")
    for item in shown:
        table.add_row(f"{item.cost_us / 1000:,.2f} ms", plain(item.text), plain(item.remedy), plain(item.setting))
    return table


def plain(value: str) -> Text:
    """Text without markup and without control characters."""
    return Text("".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in value))
