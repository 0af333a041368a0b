"""Made-up tasks for tests of engines: they end well, raise, die, hang, or come apart."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vchitect_fast.curation.frames import BadVideo


@dataclass(frozen=True)
class MadeUpTask:
    """Does what `how` says, at each attempt or only at the first ones.

    well    returns its number
    raise   an error that another try may mend
    bad     an error of the input
    die     kills its process
    hang    sleeps for a minute
    """

    number: int
    how: str = "well"
    log: str = ""  # a file that gets a line an attempt
    times: int = 1_000_000  # attempts that go wrong

    def run(self) -> int:
        tried = 0
        if self.log:
            with open(self.log, "ab", buffering=0) as file:
                file.write(f"{self.number}\n".encode())
            tried = Path(self.log).read_text().split().count(str(self.number))
        if tried <= self.times:
            if self.how == "raise":
                raise RuntimeError(f"mistake {self.number}")
            if self.how == "bad":
                raise BadVideo(f"bad {self.number}")
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "hang":
                time.sleep(60)
        return self.number

    def split(self) -> list[Any]:
        return []


@dataclass(frozen=True)
class MadeUpBatch:
    """Several tasks as one."""

    tasks: tuple[MadeUpTask, ...]

    def run(self) -> list[int]:
        return [task.run() for task in self.tasks]

    def split(self) -> list[Any]:
        return list(self.tasks)
