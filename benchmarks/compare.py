"""Two results files side by side: what became slower, what faster, what is only in one.

Slower means both: the median grew by more than the threshold, and it left the range from p10 to p90 of the other run, each
way. A file may hold several Records of one measurement; the last counts. Different devices are compared, and it is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vchitect_fast.benchmarks.record import Key, Record, latest
from vchitect_fast.benchmarks.table import duration
from vchitect_fast.errors import UserError

SLOWER, FASTER, SAME = "slower", "faster", "same"


@dataclass(frozen=True)
class Pair:
    """One measurement in both files."""

    before: Record
    after: Record

    @property
    def ratio(self) -> float:
        """Median time after over before."""
        return self.after.median_s / self.before.median_s

    def verdict(self, threshold: float) -> str:
        """slower, faster or same."""
        a, b = self.before, self.after
        if self.ratio > 1 + threshold and b.median_s > a.p90_s and a.median_s < b.p10_s:
            return SLOWER
        if 1 / self.ratio > 1 + threshold and b.median_s < a.p10_s and a.median_s > b.p90_s:
            return FASTER
        return SAME


def pairs(before: Sequence[Record], after: Sequence[Record]) -> tuple[list[Pair], list[Key], list[Key]]:
    """What is in both, only before, only after. UserError when nothing is in both."""
    old, new = latest(list(before)), latest(list(after))
    both = [Pair(record, new[key]) for key, record in old.items() if key in new]
    if not both:
        raise UserError(
            f"the two files have no measurement in common ({len(old)} and {len(new)}); "
            "run the same `vchitect-fast bench` for both."
        )
    return both, [key for key in old if key not in new], [key for key in new if key not in old]


def render(found: Sequence[Pair], only: Sequence[tuple[str, Sequence[Key]]], threshold: float) -> RenderableType:
    """The pairs, the slowest first, and what is only in one file."""
    num_slower = sum(pair.verdict(threshold) == SLOWER for pair in found)
    title = f"{num_slower} of {len(found)} slower by more than {threshold:.0%} and outside both p10 - p90 ranges"
    table = Table(box=box.SIMPLE, pad_edge=False, title=title, title_justify="left")
    for name in ("bench", "shape", "direction", "dtype", "provider", "before", "after", "after / before", "verdict"):
        table.add_column(name, justify="right" if name in ("before", "after", "after / before") else "left")
    styles = {SLOWER: "red", FASTER: "green", SAME: "dim"}
    for pair in sorted(found, key=lambda pair: -pair.ratio):
        verdict = pair.verdict(threshold)
        times = duration(pair.before.median_s), duration(pair.after.median_s), f"{pair.ratio:.3f}"
        table.add_row(*map(escape, pair.before.key), *times, Text(verdict, style=styles[verdict]))
    notes = [f"only {where}: {', '.join(key)}" for where, keys in only for key in keys]
    devices = {pair.before.device for pair in found} | {pair.after.device for pair in found}
    if len(devices) > 1:
        notes.append(f"measured on different devices: {'; '.join(sorted(devices))}")
    return Group(table, *(Text(note, style="yellow") for note in notes))
