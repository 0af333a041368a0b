"""Memory over the recorded steps by owner, and the peak explained, from a trace and what the run said of its tensors.

    analyse_memory(trace, read_owned(path))  -> MemoryAnalysis, or None where the trace was recorded without memory

Owners: weights, optimizer and average are known by address, gradients by address in each step; an allocation of a forward
span that outlives it is an activation (it was saved for backward), of a data or encode span the batch; the rest is
workspace. Each has the innermost span in which it was made, so that activations split by branch and group. Without owners
(another program's trace) only the spans speak. What a CPU process held before the recording besides these tensors is not
known, which is said; nor is the thread that allocated: the time alone names the span. No torch.
Letters: M memory events, E span events.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vchitect_fast.errors import UserError
from vchitect_fast.profiling.kinds import kind_of
from vchitect_fast.profiling.trace import Kind, Trace

# In the order in which they are stacked.
OWNERS = ("weights", "optimizer", "average", "gradients", "batch", "activations", "workspace", "held before")
OUTLIVES = {"forward": "activations", "data": "batch", "encode": "batch", "optimizer": "optimizer"}
FOREVER = float("inf")
Row = tuple[int, int, str, str]  # address, bytes, owner, name


@dataclass(frozen=True)
class Owned:
    """What a run said of its tensors (owners.py): there before the recording, and the gradients of each step."""

    held: tuple[Row, ...] = ()
    gradients: tuple[tuple[Row, ...], ...] = ()


@dataclass(frozen=True)
class Allocation:
    """One block of memory from its allocation to its free."""

    address: int
    num_bytes: int
    start_us: float  # below 0 where it was there before
    end_us: float  # FOREVER where it was not freed
    owner: str
    name: str  # of the tensor where it is known, else ""
    span: str  # innermost at its allocation, "" outside of all


@dataclass(frozen=True)
class Part:
    """A share of the peak: one owner's allocations of one span."""

    owner: str
    span: str  # "" for what was there before
    num_allocations: int
    num_bytes: int
    largest: str  # name of the largest tensor, or "" where it has none


@dataclass(frozen=True, eq=False)
class MemoryAnalysis:
    """Bytes over time. `at_us` float64 [M]; `by_owner` int64 [M] each, after the event at that time."""

    device: int  # -1 main memory
    at_us: np.ndarray
    by_owner: dict[str, np.ndarray]
    peak_bytes: int
    peak_us: float
    peak_step: str  # name of the step's span, "" outside of steps
    peak_span: str  # outermost span below the step
    parts: tuple[Part, ...]  # of the peak, largest first
    num_unknown_frees: int  # of blocks that were there before and that nobody named
    notes: tuple[str, ...] = field(default=())

    def peak_of(self, owner: str) -> int:
        """Bytes of an owner at the peak."""
        return sum(part.num_bytes for part in self.parts if part.owner == owner)

    def explained(self) -> str:
        """The peak in one sentence."""
        shares = [f"{name} {_mib(size)}" for name in OWNERS if (size := self.peak_of(name))]
        where = " of ".join(name for name in (self.peak_span, self.peak_step) if name) or "no span"
        return f"The peak of {_mib(self.peak_bytes)} is in {where}: {', '.join(shares)}."


def read_owned(path: Path) -> Owned:
    """What `vchitect-fast profile` wrote beside the trace; nothing where it is absent; UserError where it is broken."""
    if not path.exists():
        return Owned()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        held = tuple(map(_row, found["held"]))
        return Owned(held, tuple(tuple(map(_row, rows)) for rows in found["gradients"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} must say whose memory is whose, it does not ({type(error).__name__}: {error}); profile again, or remove it."
        ) from None


def analyse_memory(trace: Trace, owned: Owned = Owned()) -> MemoryAnalysis | None:
    """The device with the most traffic; main memory where nothing was allocated on a GPU."""
    memory = trace.memory
    if not len(memory):
        return None
    on_gpu = memory.device >= 0
    device = int(np.bincount(memory.device[on_gpu]).argmax()) if on_gpu.any() else -1
    spans = _Spans(trace)
    allocations, num_unknown = _blocks(trace, device, owned)
    allocations = _owned_by(allocations, spans, owned)
    before = _held_before(trace, device, allocations)
    if before:
        allocations.append(Allocation(0, before, -1.0, FOREVER, "held before", "", ""))
    return _over_time(allocations, spans, device, num_unknown)


class _Spans:
    """The spans of a trace by time: ours where it has any, else all."""

    def __init__(self, trace: Trace) -> None:
        events = trace.where(Kind.SPAN)
        ours = [i for i in events if kind_of(trace.names[trace.name[i]])]
        chosen = ours or list(events)
        self.names = [trace.names[trace.name[i]] for i in chosen]
        self.start = [float(trace.start_us[i]) for i in chosen]
        self.end = [float(trace.start_us[i] + trace.dur_us[i]) for i in chosen]

    def open_at(self, times: Sequence[float]) -> Iterator[list[int]]:
        """For each time, in order, the open spans, outermost first."""
        position, active = 0, list[int]()
        for time in times:
            while position < len(self.start) and self.start[position] <= time:
                active.append(position)
                position += 1
            active = [i for i in active if self.end[i] > time]
            yield active

    def starts_of(self, name: str) -> list[float]:
        """When spans of this name begin."""
        return [start for start, known in zip(self.start, self.names, strict=True) if known == name]


def _blocks(trace: Trace, device: int, owned: Owned) -> tuple[list[Allocation], int]:
    """Allocations with their ends, in the order of their starts; and frees of blocks that nobody knows."""
    memory, found, num_unknown = trace.memory, list[Allocation](), 0
    open_blocks: dict[int, Allocation] = {
        row[0]: Allocation(row[0], row[1], -1.0, FOREVER, row[2], row[3], "") for row in owned.held
    }
    for index in np.flatnonzero(memory.device == device):
        address, size, at_us = int(memory.address[index]), int(memory.bytes[index]), float(memory.at_us[index])
        block = open_blocks.pop(address, None)
        if block is not None:  # freed, or its free was not recorded and the address is in use again
            found.append(replace(block, end_us=at_us))
        if size > 0:
            open_blocks[address] = Allocation(address, size, at_us, FOREVER, "", "", "")
        elif block is None:
            num_unknown += 1
    found += open_blocks.values()
    return sorted(found, key=lambda block: block.start_us), num_unknown


def _owned_by(allocations: list[Allocation], spans: _Spans, owned: Owned) -> list[Allocation]:
    gradients = _gradients(allocations, spans, owned)
    result = []
    for number, (block, active) in enumerate(
        zip(allocations, spans.open_at([block.start_us for block in allocations]), strict=True)
    ):
        inside = [i for i in active if not spans.names[i].startswith("step/")]
        span = spans.names[inside[-1]] if inside else ""
        if block.owner:
            result.append(block)
        elif number in gradients:
            result.append(replace(block, owner="gradients", name=gradients[number], span=span))
        else:
            owner = "workspace"
            if inside and block.end_us > spans.end[inside[0]]:
                owner = OUTLIVES.get(kind_of(spans.names[inside[0]]), owner)
            result.append(replace(block, owner=owner, span=span))
    return result


def _gradients(allocations: list[Allocation], spans: _Spans, owned: Owned) -> dict[int, str]:
    """Position -> name of the allocations that hold a gradient when its step's optimizer begins."""
    by_address: dict[int, list[int]] = defaultdict(list)
    for number, block in enumerate(allocations):
        by_address[block.address].append(number)
    found: dict[int, str] = {}
    for at_us, rows in zip(spans.starts_of("optimizer/step"), owned.gradients, strict=False):
        for address, _, _, name in rows:
            numbers = by_address.get(address, [])
            position = bisect_right([allocations[n].start_us for n in numbers], at_us) - 1
            if position >= 0 and allocations[numbers[position]].end_us > at_us:
                found.setdefault(numbers[position], name)
    return found


def _held_before(trace: Trace, device: int, allocations: list[Allocation]) -> int:
    """What a GPU held when the recording began and nobody named. A CPU's total counts from the recording on only."""
    first = np.flatnonzero(trace.memory.device == device)[0]
    total = int(trace.memory.allocated_bytes[first]) - int(trace.memory.bytes[first])
    named = sum(block.num_bytes for block in allocations if block.start_us < 0)
    return max(0, total - named) if device >= 0 and trace.memory.allocated_bytes[first] >= 0 else 0


def _over_time(allocations: list[Allocation], spans: _Spans, device: int, num_unknown: int) -> MemoryAnalysis:
    changes = [(max(0.0, block.start_us), block.num_bytes, block.owner) for block in allocations]
    changes += [(b.end_us, -b.num_bytes, b.owner) for b in allocations if b.end_us < FOREVER]
    changes.sort(key=lambda change: change[0])  # stable: an address in use again is allocated and freed at one time
    at_us = np.array([change[0] for change in changes])
    by_owner = {}
    for owner in OWNERS:
        sizes = np.array([size if name == owner else 0 for _, size, name in changes], dtype=np.int64)
        if sizes.any():
            by_owner[owner] = np.cumsum(sizes)
    total = sum(by_owner.values(), np.zeros(len(changes), dtype=np.int64))
    # Events of one time are one change: between them the total is not a state of the program.
    last = np.flatnonzero(np.append(np.diff(at_us) > 0, True))
    top = last[int(np.argmax(total[last]))]
    peak_us = float(at_us[top])
    [active] = spans.open_at([peak_us])
    steps = [spans.names[i] for i in active if spans.names[i].startswith("step/")]
    inside = [spans.names[i] for i in active if not spans.names[i].startswith("step/")]
    live = [block for block in allocations if block.start_us <= peak_us < block.end_us]
    return MemoryAnalysis(
        device, at_us[last], {owner: values[last] for owner, values in by_owner.items()}, int(total[top]), peak_us,
        steps[0] if steps else "", inside[0] if inside else "", _parts(live), num_unknown, _notes(device, num_unknown),
    )  # fmt: skip


def _parts(live: list[Allocation]) -> tuple[Part, ...]:
    groups: dict[tuple[str, str], list[Allocation]] = defaultdict(list)
    for block in live:
        groups[block.owner, block.span].append(block)
    parts = []
    for (owner, span), blocks in groups.items():
        largest = max(blocks, key=lambda block: block.num_bytes)
        parts.append(Part(owner, span, len(blocks), sum(block.num_bytes for block in blocks), largest.name))
    return tuple(sorted(parts, key=lambda part: -part.num_bytes))


def _notes(device: int, num_unknown: int) -> tuple[str, ...]:
    notes = []
    if device < 0:
        notes.append(
            "Main memory that torch allocated while it was recorded, and the run's named tensors; what the process held "
            "besides is not known, nor is memory that torch did not allocate."
        )
    if num_unknown:
        notes.append(f"{num_unknown} blocks that were there before and that nobody named were freed.")
    return tuple(notes)


def _row(values: Any) -> Row:
    address, num_bytes, owner, name = values
    if owner not in OWNERS:
        raise ValueError(f"owner {owner!r}")
    return int(address), int(num_bytes), str(owner), str(name)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
