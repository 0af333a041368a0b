"""Reads the SQLite export of Nsight Systems (`nsys export --type sqlite`, `nsys profile --export sqlite`) into Traces.

One export may hold several processes (torchrun under nsys): each becomes a Trace, since launches are numbered by process.
Tables are made lazily by nsys and absent ones mean that nothing of the kind happened; which columns there are depends on
its version. Ranges of torch's emit_nvtx (`--pytorch=autograd-nvtx`) become ops. CPU samples, OS calls and metrics are passed
over. Source: "SQLite Export Schema Reference", docs.nvidia.com/nsight-systems. Opens read-only.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vchitect_fast.errors import UserError
from vchitect_fast.profiling.trace import Columns, Kind, Lane, Trace

MAGIC = b"SQLite format 3\0"
REMEDY = "name a file that `nsys export --type sqlite REPORT.nsys-rep` wrote."
PUSH_POP, START_END = 59, 60  # ENUM_NSYS_EVENT_TYPE: the two kinds of NVTX ranges
COPY_KINDS = {1: "HtoD", 2: "DtoH", 8: "DtoD", 10: "PtoP"}  # ENUM_CUDA_MEMCPY_OPER
_OP = re.compile(r"(?P<name>.+?), (?:seq = (?P<seq>-?\d+), )?op_id = ")  # what torch's emit_nvtx writes
_VERSION = re.compile(r"_v\d+$")  # cudaLaunchKernel_v7000
_RANK = re.compile(r"rank[-_.]?(\d+)")


def is_sqlite(path: str | Path) -> bool:
    """Whether the file starts as a SQLite database does; False where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_nsight(path: str | Path) -> list[Trace]:
    """A Trace for each process with ranges, launches or kernels; UserError where the file is no such export, or empty."""
    path = Path(path)
    if not is_sqlite(path):
        raise UserError(f"{path} must be a SQLite export of Nsight Systems, it is not; {REMEDY}")
    try:
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            processes = _Export(database, path).read()
        finally:
            database.close()
    except (sqlite3.Error, UnicodeError) as error:
        raise UserError(f"the SQLite export {path} is damaged or of another kind ({error}); {REMEDY}") from None
    if not processes:
        raise UserError(
            f"the SQLite export {path} has no CUDA and no NVTX events; record with `nsys profile --trace=cuda,nvtx`."
        )
    named = _RANK.search(path.name)
    rank = int(named[1]) if named and len(processes) == 1 else None
    return [
        columns.finish(path.name if len(processes) == 1 else f"{path.name} (process {process})", "nsys", rank)
        for process, columns in sorted(processes.items())
    ]


class _Export:
    """One open database; `read` fills columns for each process."""

    def __init__(self, database: sqlite3.Connection, path: Path) -> None:
        self.database = database
        self.tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "StringIds" not in self.tables:
            raise UserError(f"{path} is a database without the table StringIds of Nsight Systems; {REMEDY}")
        self.strings: dict[int, str] = dict(database.execute("SELECT id, value FROM StringIds"))
        self.processes: dict[int, Columns] = {}

    def read(self) -> dict[int, Columns]:
        """Process id -> its events."""
        for start, end, thread, correlation, name in self._rows(
            "CUPTI_ACTIVITY_KIND_RUNTIME", "start", "end", "globalTid", "correlationId", "nameId"
        ):
            name = _VERSION.sub("", self._text(name))
            self._cpu(Kind.RUNTIME, name, start, end, thread, _id(correlation))
        for start, end, way, text, text_id, thread in self._rows(
            "NVTX_EVENTS", "start", "end", "eventType", "text", "textId", "globalTid"
        ):
            if way in (PUSH_POP, START_END):
                self._range(text if text is not None else self._text(text_id), start, end, thread)
        for start, end, device, stream, correlation, name, process in self._rows(
            "CUPTI_ACTIVITY_KIND_KERNEL", "start", "end", "deviceId", "streamId", "correlationId",
            "demangledName", "globalPid",
        ):  # fmt: skip
            self._device(Kind.KERNEL, self._text(name), start, end, device, stream, correlation, process)
        for start, end, device, stream, correlation, graph, process in self._rows(
            "CUPTI_ACTIVITY_KIND_GRAPH_TRACE", "start", "end", "deviceId", "streamId", "correlationId",
            "graphId", "globalPid",
        ):  # fmt: skip
            self._device(Kind.KERNEL, f"CUDA graph {graph}", start, end, device, stream, correlation, process)
        for start, end, device, stream, correlation, way, process, num_bytes in self._rows(
            "CUPTI_ACTIVITY_KIND_MEMCPY", "start", "end", "deviceId", "streamId", "correlationId",
            "copyKind", "globalPid", "bytes",
        ):  # fmt: skip
            name = f"Memcpy {COPY_KINDS.get(way, f'kind {way}')}"
            self._device(Kind.COPY, name, start, end, device, stream, correlation, process, num_bytes)
        for start, end, device, stream, correlation, process, num_bytes in self._rows(
            "CUPTI_ACTIVITY_KIND_MEMSET", "start", "end", "deviceId", "streamId", "correlationId", "globalPid", "bytes"
        ):
            self._device(Kind.FILL, "Memset", start, end, device, stream, correlation, process, num_bytes)
        return self.processes

    def _rows(self, table: str, *wanted: str) -> Iterator[tuple[Any, ...]]:
        """These columns of a table, NULL for one that this version of nsys does not write; nothing without the table."""
        if table not in self.tables:
            return
        there = {row[1] for row in self.database.execute(f"PRAGMA table_info({table})")}
        columns = ", ".join(f'"{name}"' if name in there else "NULL" for name in wanted)
        yield from self.database.execute(f'SELECT {columns} FROM {table} WHERE start IS NOT NULL AND "end" >= start')

    def _text(self, number: Any) -> str:
        return self.strings.get(number, "")

    def _columns(self, process: int) -> Columns:
        return self.processes.setdefault(process, Columns())

    def _device(
        self, kind: Kind, name: str, start: int, end: int, device: int, stream: int,
        correlation: int | None, process: int | None, num_bytes: int | None = None,
    ) -> None:  # fmt: skip
        lane = Lane(str(device), str(stream), True)
        # Some versions do not say whose a kernel is: of one process it can only be that one's.
        owner = next(iter(self.processes)) if process is None and len(self.processes) == 1 else _process(process)
        self._columns(owner).add(
            kind, name, start / 1e3, (end - start) / 1e3, lane, _id(correlation), num_bytes=_id(num_bytes)
        )

    def _cpu(
        self, kind: Kind, name: str, start: int, end: int, thread: int | None,
        correlation: int = -1, sequence: int = -1, backward: bool = False,
    ) -> None:  # fmt: skip
        process = _process(thread)
        lane = Lane(str(process), str((thread or 0) & 0xFFFFFF), False)
        self._columns(process).add(
            kind, name, start / 1e3, (end - start) / 1e3, lane, correlation, sequence=sequence, backward=backward
        )

    def _range(self, text: str, start: int, end: int, thread: int | None) -> None:
        op = _OP.match(text)
        if op is None:
            self._cpu(Kind.SPAN, text, start, end, thread)
        else:
            sequence = int(op["seq"] or -1)
            self._cpu(Kind.OP, op["name"], start, end, thread, sequence=sequence, backward="Backward" in op["name"])


def _process(identity: int | None) -> int:
    """The process in a globalTid or globalPid: bits 24 to 47; 0 where the export has none."""
    return (identity or 0) >> 24 & 0xFFFFFF


def _id(value: int | None) -> int:
    return -1 if value is None else value
