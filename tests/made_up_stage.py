"""Made-up stages for tests of faults: they note in a file whom they judged, and die or raise where they are told to."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from vchitect_fast.curation.stage import ClipSpan, Sample, Scores, SignalStage, Stage, Want


def noted(log: str, samples: Sequence[Sample]) -> None:
    """A line a clip; one write, so that workers do not mix theirs."""
    with open(log, "ab", buffering=0) as file:
        file.write("".join(f"{sample.span.id}\n" for sample in samples).encode())


def judged(log: Path) -> list[str]:
    """The clips noted since the last call, sorted."""
    lines = sorted(log.read_text().split()) if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


@dataclass(frozen=True)
class MadeUp(Stage):
    """The mean of the middle frame times `factor`."""

    log: str = field(metadata={"key": False})
    factor: float = 1.0
    dies_at: str = field(default="", metadata={"key": False})  # clip id: the process is killed
    raises_at: str = field(default="", metadata={"key": False})
    name: ClassVar[str] = "made_up"
    backend: ClassVar[str] = "mean"
    version: ClassVar[int] = 1
    cost: ClassVar[float] = 1.0
    columns: ClassVar[Mapping[str, type]] = {"mean": float}
    main: ClassVar[str] = "mean"

    def wants(self, span: ClipSpan) -> list[Want]:
        return [Want(span.spread(1)[0], 32)]

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        noted(self.log, samples)
        for sample in samples:
            if sample.span.id == self.dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if sample.span.id == self.raises_at:
                raise RuntimeError("a made-up mistake\nin two lines")
        return [{"mean": float(sample.frames[0].mean()) * self.factor} for sample in samples]


@dataclass(frozen=True)
class MadeUpReader(MadeUp):
    """Another one, with a rule, that reads the first one's score."""

    name: ClassVar[str] = "made_up_reader"
    cost: ClassVar[float] = 2.0
    rules: ClassVar[Mapping[str, str]] = {"mean": ">= 0"}
    reads: ClassVar[tuple[str, ...]] = ("made_up",)

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        noted(self.log, samples)
        return [{"mean": sample.scores["made_up"]["mean"]} for sample in samples]


@dataclass(frozen=True)
class MadeUpSignal(SignalStage):
    """Mean brightness of the signals times `factor`."""

    log: str = field(metadata={"key": False})
    factor: float = 1.0
    name: ClassVar[str] = "made_up_signal"
    backend: ClassVar[str] = "mean"
    version: ClassVar[int] = 1
    cost: ClassVar[float] = 0.5
    columns: ClassVar[Mapping[str, type]] = {"mean": float}
    main: ClassVar[str] = "mean"

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        noted(self.log, samples)
        found: list[Any] = []
        for sample in samples:
            assert sample.signals is not None
            found.append({"mean": float(sample.signals.brightness.mean()) * self.factor})
        return found
