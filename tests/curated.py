"""Curations for tests: real clips under many names, a run without the command line, and what it left."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from real_video import bikes

from vchitect_fast.curation.engines import Engine, Outcome, attempt
from vchitect_fast.curation.found import Found
from vchitect_fast.curation.outputs import write_outputs
from vchitect_fast.curation.pipeline import Pipeline
from vchitect_fast.curation.progress import Progress
from vchitect_fast.curation.rules import Rule
from vchitect_fast.curation.settings import load
from vchitect_fast.curation.stage import Stage
from vchitect_fast.curation.store import Store, read_table

CHEAP = (
    "text=off",
    "aesthetic_proxy=off",
    "rules.length.seconds=off",
    "rules.static.share=off",
    "rules.motion.dynamic=off",
)


def carphone() -> Path:
    """carphone_pristine.mp4: 176x144, 120 frames, 30000/1001 fps, one shot."""
    return bikes().with_name("carphone_pristine.mp4")


def copy(source: Path, target: Path, number: int) -> Path:
    """The same frames in other bytes: a box of nothing at the end holds a number."""
    target.write_bytes(source.read_bytes() + struct.pack(">I4sI", 12, b"free", number))
    return target


class Here:
    """An engine that runs tasks in this process, once, and counts them by type."""

    name = "here"

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()

    def run(self, tasks: Iterable[Any], num_workers: int | None = None, *, gpu: bool = False) -> Iterator[Outcome]:
        for task in tasks:
            self.ran[type(task).__name__] += 1
            kind, value, cpu_s = attempt(task)
            yield Outcome(task, value, None, 1, cpu_s) if kind == "value" else Outcome(task, None, value, 1)

    def close(self) -> None:
        pass


def curate(
    out: Path, paths: Iterable[str | Path], *stages: Stage, overrides: Sequence[str] = CHEAP, engine: Engine | None = None, retry: bool = False
) -> Found:  # fmt: skip
    """One run with more stages than the settings know; writes the folder's tables."""
    settings = load(None, overrides)
    rules = [
        *settings.rules,
        *(Rule.parse(stage.name, score, text) for stage in stages for score, text in stage.rules.items()),
    ]
    signal = tuple(stage for stage in stages if stage in replace(settings, stages=stages).signal_stages)
    frame = tuple(stage for stage in stages if stage not in signal)
    settings = replace(
        settings, rules=tuple(rules), stages=(*settings.signal_stages, *signal, *settings.frame_stages, *frame)
    )
    progress = Progress(quiet=True)
    with Store(out) as store:
        found = Pipeline(store, settings, engine or Here(), progress, retry=retry).run(sorted(map(str, paths)))
        write_outputs(out, found, settings, progress, caption="", wall_s=1.0)
    return found


def clips(out: Path) -> list[dict[str, Any]]:
    """The rows of clips.parquet, in order."""
    return read_table(out / "clips.parquet")


def quarantine(out: Path) -> list[dict[str, Any]]:
    """The rows of quarantine.parquet."""
    return read_table(out / "quarantine.parquet")
