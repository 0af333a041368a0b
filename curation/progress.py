"""Progress of a curation: a bar a phase on a terminal, with rate and remaining time; one line a phase elsewhere.

It also adds up what each phase took, so that the throughput is printed and kept. Phases without work stay silent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Phase:
    """What a phase did: amount in `unit`, wall and processor seconds."""

    name: str
    unit: str
    amount: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0


@dataclass
class Progress:
    """Shows phases on stderr; `quiet` shows nothing."""

    quiet: bool = False
    phases: list[Phase] = field(default_factory=list)

    def over(self, name: str, items: Sequence[str]) -> Iterator[str]:
        """The items, with a bar when they take long."""
        with self.phase(name, len(items), "", show=False) as advance:
            for item in items:
                yield item
                advance(1, 0.0)

    @contextmanager
    def phase(
        self, name: str, total: float, unit: str = "", *, show: bool = True
    ) -> Iterator[Callable[[float, float], None]]:
        """A phase of `total`; call what it gives with (amount done, processor seconds)."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        phase, began = Phase(name, unit or "tasks"), time.perf_counter()
        console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(
            *columns, console=console, disable=self.quiet or not console.is_terminal or not total, transient=True
        ) as bars:
            bar = bars.add_task(name, total=round(total), rate="")

            def advance(amount: float, cpu_s: float) -> None:
                phase.amount += amount
                phase.cpu_s += cpu_s
                phase.wall_s = time.perf_counter() - began
                bars.update(bar, completed=round(phase.amount), rate=_rate(phase))

            yield advance
        phase.wall_s = time.perf_counter() - began
        if phase.amount and show:
            self.phases.append(phase)
            if not self.quiet:
                console.print(f"{name:8} {phase.amount:,.0f} {phase.unit} in {phase.wall_s:.1f} s, {_rate(phase)}")


def _rate(phase: Phase) -> str:
    return f"{phase.amount / max(phase.wall_s, 1e-9):,.1f} {phase.unit}/s"
