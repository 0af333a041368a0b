"""Trace: what one process did, event by event, in columns, whichever tool recorded it.

`chrome.py` reads PyTorch's JSON and `nsight.py` Nsight Systems' SQLite export into it; everything that computes with times
sees only this. An event is a row over all columns. Holds facts and looks nothing up: no classes, no spans of ours, no torch.
Letters: E events, M memory events.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np


class Kind(IntEnum):
    """What an event is. KERNEL, COPY and FILL ran on a device, the others on the CPU."""

    OP = 0  # an operator of the framework on a CPU thread (aten::mm)
    SPAN = 1  # a named range of the program (record_function, NVTX)
    RUNTIME = 2  # a call into the driver: launch, copy, synchronize, allocate
    KERNEL = 3
    COPY = 4  # bytes moved by a copy engine
    FILL = 5  # memory set


ON_DEVICE = (Kind.KERNEL, Kind.COPY, Kind.FILL)


@dataclass(frozen=True)
class Lane:
    """Where events run one after the other or inside each other: a CPU thread, or a stream of a device."""

    process: str  # id of the process, or number of the device
    thread: str  # id of the thread, or number of the stream
    on_device: bool


@dataclass(frozen=True, eq=False)
class Memory:
    """Allocations and frees in the order of time, from a trace recorded with its memory; all empty otherwise.

    at_us float64 [M]; bytes int64 [M], negative for a free; address int64 [M]; allocated_bytes and reserved_bytes
    int64 [M], totals after the event, -1 where not recorded; device int64 [M], -1 for main memory.
    """

    at_us: np.ndarray
    bytes: np.ndarray
    address: np.ndarray
    allocated_bytes: np.ndarray
    reserved_bytes: np.ndarray
    device: np.ndarray

    def __len__(self) -> int:
        return len(self.at_us)


@dataclass(frozen=True, eq=False)
class Trace:
    """The events of one process, sorted by start (longer first where starts are equal: parents before children)."""

    source: str  # the file
    tool: str  # "torch" | "nsys"
    rank: int | None  # of torch.distributed; None where the file does not say
    origin_us: float  # the tool's clock at start_us = 0; clocks of two nodes need not agree
    names: tuple[str, ...]
    shapes: tuple[str, ...]  # of an op's inputs: the text of a pair of lists (dims, types)
    lanes: tuple[Lane, ...]
    kind: np.ndarray  # int8 [E], Kind
    name: np.ndarray  # int32 [E], index into names
    start_us: np.ndarray  # float64 [E], from the trace's first event
    dur_us: np.ndarray  # float64 [E]
    lane: np.ndarray  # int32 [E], index into lanes
    correlation: np.ndarray  # int64 [E], the same for a launch and what it launched; -1 unknown
    external: np.ndarray  # int64 [E], the same for an op and what it launched; -1 unknown
    bytes: np.ndarray  # int64 [E], moved or set; -1 unknown
    shape: np.ndarray  # int32 [E], index into shapes; -1 unknown
    sequence: np.ndarray  # int64 [E], number of the autograd node that an op makes or runs; -1 none
    backward: np.ndarray  # int8 [E], 1 where the op runs that node
    memory: Memory
    passed_over: tuple[str, ...] = ()  # categories of events that nobody here understands

    def __len__(self) -> int:
        return len(self.start_us)

    @property
    def end_us(self) -> np.ndarray:
        """float64 [E]."""
        return self.start_us + self.dur_us

    @property
    def has_device(self) -> bool:
        """Whether anything ran on a GPU; without, the CPU's threads are the device and its ops the kernels."""
        return bool(np.isin(self.kind, ON_DEVICE).any())

    @property
    def spans_only(self) -> bool:
        """Whether neither kernels nor ops were recorded, as of curation's workers: spans then stand for the work in them."""
        return not (self.has_device or bool((self.kind == Kind.OP).any()))

    def where(self, *kinds: Kind) -> np.ndarray:
        """int64 indices of the events of these kinds, in the order of time."""
        return np.flatnonzero(np.isin(self.kind, kinds))


class Columns:
    """Collects a Trace event by event, in arrays of machine numbers: 62 bytes an event, each text kept once."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._shapes: dict[str, int] = {}
        self._lanes: dict[Lane, int] = {}
        self._columns: dict[str, array[Any]] = {name: array(code) for name, code in _CODES.items()}
        self._memory: dict[str, array[Any]] = {name: array(code) for name, code in _MEMORY_CODES.items()}

    def __len__(self) -> int:
        return len(self._columns["kind"])

    def add(
        self, kind: Kind, name: str, start_us: float, dur_us: float, lane: Lane,
        correlation: int = -1, external: int = -1, num_bytes: int = -1, shapes: str | None = None,
        sequence: int = -1, backward: bool = False,
    ) -> None:  # fmt: skip
        """One event; `start_us` on the tool's own clock."""
        columns = self._columns
        columns["kind"].append(kind)
        columns["name"].append(self._names.setdefault(name, len(self._names)))
        columns["start_us"].append(start_us)
        columns["dur_us"].append(dur_us)
        columns["lane"].append(self._lanes.setdefault(lane, len(self._lanes)))
        columns["correlation"].append(correlation)
        columns["external"].append(external)
        columns["bytes"].append(num_bytes)
        columns["shape"].append(-1 if shapes is None else self._shapes.setdefault(shapes, len(self._shapes)))
        columns["sequence"].append(sequence)
        columns["backward"].append(backward)

    def add_memory(
        self, at_us: float, num_bytes: int, address: int = 0, allocated: int = -1, reserved: int = -1, device: int = -1
    ) -> None:
        """One allocation, or a free with negative bytes."""
        values = (at_us, num_bytes, address, allocated, reserved, device)
        for column, value in zip(self._memory.values(), values, strict=True):
            column.append(value)

    def finish(self, source: str, tool: str, rank: int | None, passed_over: tuple[str, ...] = ()) -> Trace:
        """The Trace, sorted, its clock starting at the first event."""
        columns = {name: np.frombuffer(column, dtype=column.typecode) for name, column in self._columns.items()}
        memory = {name: np.frombuffer(column, dtype=column.typecode) for name, column in self._memory.items()}
        origin_us = float(columns["start_us"].min()) if len(self) else 0.0
        order = np.lexsort((-columns["dur_us"], columns["start_us"]))
        columns = {name: column[order] for name, column in columns.items()}
        columns["start_us"] = columns["start_us"] - origin_us
        in_time = np.argsort(memory["at_us"], kind="stable")
        memory = {name: column[in_time] for name, column in memory.items()}
        memory["at_us"] = memory["at_us"] - origin_us
        return Trace(
            source, tool, rank, origin_us, tuple(self._names), tuple(self._shapes), tuple(self._lanes),
            **columns, memory=Memory(**memory), passed_over=passed_over,
        )  # fmt: skip


_CODES = {
    "kind": "b", "name": "i", "start_us": "d", "dur_us": "d", "lane": "i",
    "correlation": "q", "external": "q", "bytes": "q", "shape": "i",
    "sequence": "q", "backward": "b",
}  # fmt: skip
_MEMORY_CODES = {
    "at_us": "d", "bytes": "q", "address": "q", "allocated_bytes": "q", "reserved_bytes": "q", "device": "q",
}  # fmt: skip
