"""Engines: who runs tasks. An engine takes tasks, returns an Outcome for each in any order, and keeps nothing.

    run(tasks)   yields an Outcome a task as they end; a worker that dies or an unexpected error costs a task one attempt

Both engines run the same tasks (tasks.py) and so give the same values.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

WORKER = "VCHITECT_FAST_WORKER"  # in a worker's environment: its number
ATTEMPTS = 3  # of a task that fails for no reason of its input


class Task(Protocol):
    """Work that runs anywhere; see tasks.py."""

    def run(self) -> Any:
        """The work."""

    def split(self) -> list[Task]:
        """Smaller tasks that together are this one, or [] if it is the smallest."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended: with a value, or with the reason why there is none."""

    task: Any
    value: Any
    reason: str | None
    attempts: int
    cpu_s: float = 0.0  # processor seconds of the attempt that gave the value


class Engine(Protocol):
    """What pipeline.py asks of an engine."""

    name: str

    def run(self, tasks: Iterable[Task], num_workers: int | None = None, *, gpu: bool = False) -> Iterator[Outcome]:
        """Outcomes as they come; `num_workers` limits how many tasks run at once, `gpu` to as many as the GPUs bear."""

    def close(self) -> None:
        """Let the workers go."""


def attempt(task: Task) -> tuple[str, Any, float]:
    """Run a task where it is: ("value", v), ("bad", reason) that no retry mends, or ("error", reason), and processor seconds."""
    from vchitect_fast.curation.frames import BadVideo

    began = time.process_time()
    try:
        value = task.run()
        return "value", value, time.process_time() - began
    except BadVideo as error:
        return "bad", str(error), 0.0
    except Exception as error:
        return "error", f"{type(error).__name__}: {' '.join(str(error).split())}"[:500], 0.0
