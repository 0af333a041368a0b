"""Shows a run: one table an op, what was not measured and why, and the goals. Rendering only, with rich.

Headlines hold ratios. Times stand in the rows, and a reader of a CPU's rows is told that interpreted kernels are no speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vchitect_fast.benchmarks.case import is_interpreted, is_ours
from vchitect_fast.benchmarks.goals import PASS, PASS_THERE, SHORT, Verdict, best, shown
from vchitect_fast.benchmarks.record import Record
from vchitect_fast.benchmarks.suite import Absent, Outcome

COLUMNS = (
    "shape",
    "direction",
    "provider",
    "median",
    "p10 - p90",
    "rate",
    "of ceiling",
    "error",
    "x best other",
    "goal",
)
LEFT = {"shape", "direction", "provider", "goal"}
STYLES = {PASS: "green", PASS_THERE: "green", SHORT: "red"}


def render(outcomes: Sequence[Outcome], verdicts: Sequence[Verdict]) -> RenderableType:
    """A table of every bench, in the order in which they ran."""
    parts: list[RenderableType] = []
    for bench in dict.fromkeys(outcome.bench for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome.bench == bench]
        parts += [_bench(bench, rows, [v for v in verdicts if v.goal.bench == bench]), Text()]
    return Group(*parts)


def _bench(bench: str, outcomes: Sequence[Outcome], verdicts: Sequence[Verdict]) -> RenderableType:
    table = Table(box=box.SIMPLE, pad_edge=False, title=escape(headline(bench, outcomes)), title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=name != "goal")
    places = list(dict.fromkeys((outcome.shape, outcome.direction) for outcome in outcomes))
    for shape, direction in places:
        here = [outcome for outcome in outcomes if (outcome.shape, outcome.direction) == (shape, direction)]
        records = [outcome for outcome in here if isinstance(outcome, Record)]
        reached = [
            v for v in verdicts if (v.goal.shape, v.goal.direction) == (shape, direction) and v.found is not None
        ]
        goal = Text("; ").join(_verdict(verdict) for verdict in reached)
        for i, outcome in enumerate(here):
            place = (shape, direction) if i == 0 else ("", "")
            if isinstance(outcome, Absent):
                table.add_row(*place, escape(outcome.provider), Text("not measured", style="dim"))
            else:
                table.add_row(*place, *_row(outcome, records), goal if i == 0 else "")
        table.add_section()
    absent = [outcome for outcome in outcomes if isinstance(outcome, Absent)]
    lines = saved([outcome for outcome in outcomes if isinstance(outcome, Record)]) + reasons(absent)
    return Group(table, *(Text(line, style="dim") for line in lines))


def headline(bench: str, outcomes: Iterable[Outcome]) -> str:
    """The bench and, for each direction, our time over the best alternative's, lowest to highest over the shapes."""
    every = [outcome for outcome in outcomes if isinstance(outcome, Record)]
    records = [record for record in every if not is_interpreted(record.provider)]
    said = []
    for direction in dict.fromkeys(record.direction for record in records):
        ratios = []
        for shape in dict.fromkeys(record.shape for record in records):
            at = [r for r in records if (r.shape, r.direction) == (shape, direction)]
            ours, other = best(at, ours=True), best(at, ours=False)
            if ours and other:
                ratios.append(ours.median_s / other.median_s)
        if ratios:
            low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
            way = "" if direction == "-" else f"{direction} "
            said.append(way + (low if low == high else f"{low} - {high}"))
    text = f"{bench}: ours takes {', '.join(said)} x the time of the best alternative" if said else bench
    note = "kernels interpreted here: errors count, times do not"
    return f"{text} ({note})" if len(records) < len(every) else text


def saved(records: Iterable[Record]) -> list[str]:
    """A line a shape: what each provider keeps for backward, where that was counted."""
    found: dict[str, list[str]] = {}
    for record in records:
        if record.saved_bytes is not None:
            found.setdefault(record.shape, []).append(f"{record.provider} {record.saved_bytes / 1e6:,.3f} MB")
    return [f"saved for backward at {shape}: {', '.join(providers)}" for shape, providers in found.items()]


def reasons(absent: Iterable[Absent]) -> list[str]:
    """One line for each reason, with the providers and, where it does not hold everywhere, where."""
    absent = list(absent)
    providers: dict[str, dict[str, list[str]]] = {}
    for item in absent:
        providers.setdefault(item.reason, {}).setdefault(item.provider, []).append(f"{item.shape} {item.direction}")
    places = {f"{item.shape} {item.direction}" for item in absent}
    lines = []
    for why, found in providers.items():
        names = [name if set(where) == places else f"{name} at {', '.join(where)}" for name, where in found.items()]
        lines.append(f"not measured: {', '.join(names)}: {why}")
    return lines


def goal_table(verdicts: Sequence[Verdict]) -> RenderableType:
    """Every goal with its verdict."""
    counts = goal_counts(verdicts)
    table = Table(box=box.SIMPLE, pad_edge=False, title=f"goals: {counts}", title_justify="left")
    for name in ("bench", "shape", "direction", "goal", "found", "verdict"):
        table.add_column(name, justify="right" if name == "found" else "left")
    for verdict in verdicts:
        goal = verdict.goal
        found = "" if verdict.found is None else shown(goal.measure, verdict.found)
        style = STYLES.get(verdict.text, "dim")
        table.add_row(goal.bench, goal.shape, goal.direction, str(goal), found, Text(verdict.text, style=style))
    return table


def goal_counts(verdicts: Sequence[Verdict]) -> str:
    """How many passed, fell short and were not measured."""
    passed, short = (sum(verdict.text in texts for verdict in verdicts) for texts in ((PASS, PASS_THERE), (SHORT,)))
    return f"{passed} pass, {short} fall short, {len(verdicts) - passed - short} not measured"


def duration(seconds: float) -> str:
    """Three digits in s, ms or us."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _row(record: Record, records: Sequence[Record]) -> list[RenderableType]:
    other = best(records, ours=False)
    spread = f"{duration(record.p10_s)} - {duration(record.p90_s)}" if record.n > 1 else "one sample"
    ratio = f"{record.median_s / other.median_s:.2f}" if other and not is_interpreted(record.provider) else ""
    return [
        Text(record.provider, style="bold" if is_ours(record.provider) else ""),
        duration(record.median_s),
        spread,
        _rate(record),
        f"{record.rate / record.ceiling:.0%}" if record.rate is not None and record.ceiling else "",
        "" if record.error_vs_fp64 is None else f"{record.error_vs_fp64:.1e}",
        ratio,
    ]


def _rate(record: Record) -> str:
    if record.rate is None:
        return ""
    return f"{record.rate:,.0f} {record.unit}" if record.rate >= 100 else f"{record.rate:.3g} {record.unit}"


def _verdict(verdict: Verdict) -> Text:
    return Text(f"{verdict.goal}: {verdict.text}", style=STYLES[verdict.text])
