"""Reads the Chrome trace (.json, .json.gz) that torch.profiler writes into a Trace, piece by piece.

A piece of the file is cut where one event ends and the next begins, parsed, put into columns and forgotten: memory holds
the columns and one piece. A cut in a wrong place (inside an event, inside a string) leaves brackets open, so a piece that
parses was cut rightly. Any program's trace will do, with or without a GPU, also in Chrome's bare array form. Python
function events, flow arrows and the copies of CPU ranges on GPU rows are not needed; events of any other category are
passed over, and the Trace says which. Broken, truncated, empty and foreign files are refused.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import IO, Any

from vchitect_fast.errors import UserError
from vchitect_fast.profiling.trace import Columns, Kind, Lane, Trace

PIECE_BYTES = 8 * 2**20
MAX_EVENT_BYTES = 64 * 2**20  # where no event ends within this, it is no trace
REMEDY = "name a trace that torch.profiler's export_chrome_trace or `vchitect-fast profile` wrote."
_CUT = re.compile(rb"\}\s*,\s*(?=\{)")
_START = re.compile(rb'"traceEvents"\s*:\s*\[')
_RANK = re.compile(r"rank[-_.]?(\d+)")

# Category -> kind; capitalised ones are of PyTorch 1.8.
_KINDS = {
    "cpu_op": Kind.OP, "Operator": Kind.OP, "user_annotation": Kind.SPAN,
    "kernel": Kind.KERNEL, "Kernel": Kind.KERNEL, "gpu_memcpy": Kind.COPY, "Memcpy": Kind.COPY,
    "gpu_memset": Kind.FILL, "Memset": Kind.FILL,
    **{f"{maker}_{what}": Kind.RUNTIME for maker in ("cuda", "xpu", "mtia", "privateuse1") for what in ("runtime", "driver")},
    "Runtime": Kind.RUNTIME,
}  # fmt: skip

_NOT_NEEDED = {
    "python_function", "gpu_user_annotation", "ac2g", "fwdbwd", "async_cpu_to_gpu", "async_gpu", "cpu_instant_event", "Trace",
    "overhead", "cuda_sync", "cuda_profiler_range",
}  # fmt: skip


def read_chrome(path: str | Path) -> Trace:
    """The trace in one file; UserError where it is absent, broken, cut off, empty, or has no events of PyTorch's."""
    path = Path(path)
    columns = Columns()
    reader = _Reader(columns)
    header: dict[str, Any] = {}
    try:
        with _open(path) as stream:
            for events in _pieces(stream, path, header, columns):
                reader.read(events)
    except (OSError, zlib.error) as error:
        raise UserError(f"cannot read the trace {path} ({getattr(error, 'strerror', '') or error}); {REMEDY}") from None
    except EOFError:
        raise _cut_off(path, columns) from None
    if not len(columns):
        seen = ", ".join(sorted(reader.other)) or "none"
        raise UserError(
            f"{path} must have events of PyTorch's profiler (cpu_op, kernel), its categories are: {seen}; {REMEDY}"
        )
    passed_over = tuple(sorted(reader.other - _NOT_NEEDED))
    return columns.finish(path.name, "torch", _rank(header, path), passed_over)


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        magic = file.read(2)
    if not magic:
        raise UserError(f"the trace {path} is empty; record it again, the program ended before it was written.")
    return gzip.open(path, "rb") if magic == b"\x1f\x8b" else path.open("rb")  # type: ignore[return-value]


def _cut_off(path: Path, columns: Columns) -> UserError:
    return UserError(
        f"the trace {path} ends in the middle, after {len(columns)} events; record it again, "
        "the program ended or the disk was full while it was written."
    )


def _pieces(stream: IO[bytes], path: Path, header: dict[str, Any], columns: Columns) -> Iterator[list[Any]]:
    """Lists of events; fills `header` with what stands beside traceEvents."""
    buffer, is_array = _head(stream, path, header)
    while True:
        read = stream.read(PIECE_BYTES)
        buffer += read
        events, buffer = _take(buffer)
        if events is not None:
            yield events
            continue
        # No event ends in what was read: the list of events does, or one event is long.
        text = buffer.decode("utf-8", "replace")
        try:
            events, end = _DECODER.raw_decode("[" + text)
        except ValueError as error:
            if read and len(buffer) < MAX_EVENT_BYTES and _is_prefix(error, text):
                continue
            if is_array and not read:  # Chrome's array form may leave out its end
                try:
                    events, end = _DECODER.raw_decode("[" + text.rstrip().rstrip(",") + "]")
                    yield events
                    return
                except ValueError:
                    pass
            if not read and _is_prefix(error, text):
                raise _cut_off(path, columns) from None
            raise UserError(
                f"the trace {path} is not JSON after its first {len(columns)} events ({error}); {REMEDY}"
            ) from None
        yield events
        if not is_array:
            _tail(text[end - 1 :], stream, path, header, columns)
        return


_DECODER = json.JSONDecoder(strict=False)  # names of kernels may hold control characters


def _head(stream: IO[bytes], path: Path, header: dict[str, Any]) -> tuple[bytes, bool]:
    """What follows the opening bracket of the list of events, and whether the file is that list alone."""
    buffer = b""
    while True:
        read = stream.read(PIECE_BYTES)
        buffer += read
        text = buffer.removeprefix(b"\xef\xbb\xbf").lstrip()
        if text.startswith(b"["):
            return text[1:], True
        found = _START.search(text)
        if text.startswith(b"{") and found:
            try:
                header.update(_DECODER.decode(text[: found.start()].decode("utf-8", "replace") + '"traceEvents":[]}'))
            except ValueError as error:
                raise UserError(f"the trace {path} is not JSON before its events ({error}); {REMEDY}") from None
            return text[found.end() :], False
        if not read or len(buffer) > MAX_EVENT_BYTES or not text.startswith(b"{"):
            raise UserError(f'{path} must be a Chrome trace (JSON with "traceEvents"), it is not; {REMEDY}')


def _take(buffer: bytes) -> tuple[list[Any] | None, bytes]:
    """Whole events from the start of `buffer` and what is left, or None when no cut near its end is one."""
    cuts = [match.start() + 1 for match in _CUT.finditer(buffer, max(0, len(buffer) - 2**18))]
    for cut in reversed(cuts[-8:]):
        try:
            events = _DECODER.decode("[" + buffer[:cut].decode("utf-8", "replace") + "]")
        except ValueError:
            continue
        return events, buffer[cut:].lstrip().removeprefix(b",")
    return None, buffer


def _is_prefix(error: ValueError, text: str) -> bool:
    """Whether the text fails only at its end: it was cut off, not garbled."""
    at = getattr(error, "pos", 0)
    return "Unterminated" in str(error) or at >= len(text.rstrip()) - 8


def _tail(text: str, stream: IO[bytes], path: Path, header: dict[str, Any], columns: Columns) -> None:
    """The keys after the events; an end that is missing means a file that was cut off."""
    rest = text + stream.read(MAX_EVENT_BYTES).decode("utf-8", "replace")
    try:
        header.update(_DECODER.decode("{" + rest.lstrip().removeprefix(",")))
    except ValueError:
        raise _cut_off(path, columns) from None


def _rank(header: dict[str, Any], path: Path) -> int | None:
    told = header.get("distributedInfo")
    if isinstance(told, dict) and isinstance(told.get("rank"), int):
        return int(told["rank"])
    named = _RANK.search(path.name)
    return int(named[1]) if named else None


class _Reader:
    """Puts events into columns, and remembers the categories of the others."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.other: set[str] = set()
        self._lanes: dict[tuple[Any, Any, bool], Lane] = {}

    def read(self, events: list[Any]) -> None:
        """All of a piece; an event that lacks its time is passed over."""
        for event in events:
            if not isinstance(event, dict):
                continue
            category, args = event.get("cat"), event.get("args")
            args = args if isinstance(args, dict) else {}
            kind = _KINDS.get(category) if isinstance(category, str) else None
            if event.get("ph") == "X" and kind is not None:
                self._event(kind, event, args)
            elif event.get("name") == "[memory]":
                self._memory(event, args)
            elif category is not None:
                self.other.add(str(category)[:40])

    def _event(self, kind: Kind, event: dict[str, Any], args: dict[str, Any]) -> None:
        try:
            start_us, dur_us = float(event["ts"]), max(0.0, float(event.get("dur", 0)))
        except (KeyError, TypeError, ValueError):
            return
        if not isfinite(start_us + dur_us):
            return
        on_device = kind >= Kind.KERNEL
        place = (event.get("pid"), event.get("tid"), on_device)
        if on_device:
            place = (args.get("device", place[0]), args.get("stream", place[1]), True)
        lane = self._lanes.get(place)
        if lane is None:
            lane = self._lanes[place] = Lane(str(place[0]), str(place[1]), on_device)
        shapes = None
        if kind == Kind.OP and "Input Dims" in args:
            shapes = f"({args['Input Dims']}, {args.get('Input type', [])})"
        self.columns.add(
            kind, str(event.get("name", "")), start_us, dur_us, lane,
            _whole(args.get("correlation")), _whole(args.get("External id")), _whole(args.get("bytes")), shapes,
            _whole(args.get("Sequence number")), bool(args.get("Fwd thread id")),
        )  # fmt: skip

    def _memory(self, event: dict[str, Any], args: dict[str, Any]) -> None:
        try:
            at_us, num_bytes = float(event["ts"]), int(args["Bytes"])
        except (KeyError, TypeError, ValueError):
            return
        device = -1 if args.get("Device Type", 0) == 0 else _whole(args.get("Device Id"))
        totals = _whole(args.get("Total Allocated")), _whole(args.get("Total Reserved"))
        self.columns.add_memory(at_us, num_bytes, _whole(args.get("Addr")), *totals, device)


def _whole(value: Any) -> int:
    """A whole number of 63 bits, -1 for anything else."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return -1
    return number if -(2**63) <= number < 2**63 else -1
