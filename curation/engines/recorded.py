"""The engine that records: another engine's tasks, with the spans that were open in them, a Chrome trace a worker process.

    with closing(RecordedEngine(LocalEngine(), Path("traces"))) as engine: ...      -> traces/trace-rank0.json.gz, ...

A worker sends its spans along with the task's value, so nothing but the driver writes, on a cluster too. Under Nsight
Systems the same spans are NVTX ranges of the worker. `profile analyse` and ui.perfetto.dev read the traces; a worker stands
as a rank. What a task did that failed is not recorded. It changes no value and no order of tasks.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vchitect_fast.curation.engines import Engine, Outcome, Task
from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file
from vchitect_fast.profiling.span import NvtxSink, Sink, recording

UNDER_NSYS = "NVTX_INJECTION64_PATH"  # Nsight Systems sets it in what it starts, and every NVTX library looks there
Stretch = tuple[str, str, int, int]  # name, thread, begin and end in ns of the node's clock


class RecordedEngine:
    """`engine` with its spans kept in `folder` (None: only NVTX ranges); earlier traces there are removed."""

    def __init__(self, engine: Engine, folder: Path | None) -> None:
        if UNDER_NSYS in os.environ:
            NvtxSink()  # without its package it is refused here, not in every worker
        self.name, self._engine, self._folder = engine.name, engine, folder
        self._files: dict[tuple[str, int], gzip.GzipFile] = {}
        self._opened = ExitStack()
        self._began_ns = time.time_ns()
        if folder:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for old in folder.glob("trace-rank*.json.gz"):
                    old.unlink()
            except OSError as error:
                raise UserError(f"cannot write traces to {folder} ({error.strerror}); name another folder.") from None

    def run(self, tasks: Iterable[Task], num_workers: int | None = None, *, gpu: bool = False) -> Iterator[Outcome]:
        """The other engine's outcomes."""
        keep = self._folder is not None
        for outcome in self._engine.run((RecordedTask(task, keep) for task in tasks), num_workers, gpu=gpu):
            value = outcome.value
            if outcome.reason is None:
                value, worker, stretches = outcome.value
                self._write(worker, stretches)
            yield replace(outcome, task=outcome.task.task, value=value)

    def close(self) -> None:
        """Let the workers go and end the traces."""
        self._engine.close()
        for file in self._files.values():
            file.write(b"\n]}\n")
        self._opened.close()
        self._files.clear()

    def _write(self, worker: tuple[str, int], stretches: list[Stretch]) -> None:
        if not self._folder or not stretches:
            return
        file, sep = self._files.get(worker), b",\n"
        if file is None:
            number = len(self._files)
            partial = self._opened.enter_context(whole_file(self._folder / f"trace-rank{number}.json.gz"))
            file = self._files[worker] = self._opened.enter_context(gzip.open(partial, "wb", compresslevel=3))
            head = {"displayTimeUnit": "ms", "worker": worker, "distributedInfo": {"rank": number}}
            file.write(json.dumps(head)[:-1].encode() + b', "traceEvents": [\n')
            sep = b""
        events = (
            {
                "ph": "X", "cat": "user_annotation", "name": name, "pid": f"worker {worker[1]}", "tid": thread,
                "ts": (begin - self._began_ns) / 1000, "dur": (end - begin) / 1000,
            }
            for name, thread, begin, end in stretches
        )  # fmt: skip
        file.write(sep + b",\n".join(json.dumps(event).encode() for event in events))


@dataclass(frozen=True)
class RecordedTask:
    """A task that returns (its value, the worker that ran it, what was open in it where that is kept)."""

    task: Task
    keep: bool

    def run(self) -> tuple[Any, tuple[str, int], list[Stretch]]:
        """Raises what the task raises."""
        kept = _Kept()
        sinks: list[Sink] = [kept] if self.keep else []
        if UNDER_NSYS in os.environ:
            sinks.append(NvtxSink())
        with recording(*sinks):
            value = self.task.run()
        return value, (socket.gethostname(), os.getpid()), kept.stretches

    def split(self) -> list[Task]:
        """The task's parts, recorded too."""
        return [RecordedTask(part, self.keep) for part in self.task.split()]


class _Kept:
    """A sink that notes begin and end of every span, by the name of the thread: each task starts threads of its own."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []
        self._local = threading.local()
        self._offset_ns = time.time_ns() - time.perf_counter_ns()  # so that workers share a clock that never steps back

    def enter(self, name: str) -> None:
        if not hasattr(self._local, "begins"):
            self._local.begins, self._local.thread = [], threading.current_thread().name
        self._local.begins.append(time.perf_counter_ns() + self._offset_ns)

    def leave(self, name: str) -> None:
        end = time.perf_counter_ns() + self._offset_ns
        self.stretches.append((name, self._local.thread, self._local.begins.pop(), end))

    def told(self, parts: dict[str, Any]) -> None:
        pass
