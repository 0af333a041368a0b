"""The rows of a step's timeline: the program's spans by depth, compute by class, collectives and copies, as bars.

Bars are few, however long the trace: a row of work is cut into columns, each with the class that fills most of it, and
small spans of one kind that stand side by side become one bar. So a bar is a summary; times are read from the tables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from vchitect_fast.page import Bar
from vchitect_fast.profiling.facts import CLASSES, STREAMS
from vchitect_fast.profiling.figures import CLASS_COLOURS
from vchitect_fast.profiling.kinds import KINDS, kind_of
from vchitect_fast.profiling.overlap import merge
from vchitect_fast.profiling.trace import Trace
from vchitect_fast.profiling.work import Work

NUM_COLUMNS = 360
MAX_DEPTH = 5
MIN_SHARE = 1 / 900  # of the width: a smaller span joins its neighbours
FOREIGN = 0x868E96  # a span of another program
Rows = list[list[Bar]]


def timeline(trace: Trace, work: Work, start_us: float, wall_us: float) -> list[tuple[str, Rows]]:
    """Groups of rows with their headings, for the stretch of one step."""
    groups = [(f"spans, thread {name}", rows) for name, rows in _span_rows(trace, work, start_us, wall_us)]
    place = "GPU" if trace.has_device else "CPU"
    compute = [_work_row(work, start_us, wall_us, np.flatnonzero(work.stream < 0))]
    groups.append((f"{place}: compute by class, white where idle", compute))
    for number, stream in enumerate(STREAMS):
        found = np.flatnonzero((work.stream == number) & (work.end > start_us) & (work.start < start_us + wall_us))
        if len(found):
            groups.append((f"{place}: {stream.replace('_', ' ')}", [_work_row(work, start_us, wall_us, found)]))
    return groups


def keys(trace: Trace) -> dict[str, int]:
    """The colours that the rows use."""
    used = {kind_of(trace.names[trace.name[i]]) for i in np.flatnonzero(trace.kind == 1)}
    spans = {kind: colour for kind, colour in KINDS.items() if kind in used}
    return {**spans, **{name: CLASS_COLOURS[name] for name in CLASSES}}


def _span_rows(trace: Trace, work: Work, start_us: float, wall_us: float) -> list[tuple[str, Rows]]:
    """Of each thread that has spans, the main one first."""
    end_us = start_us + wall_us
    by_lane: dict[int, list[int]] = defaultdict(list)
    for event in work.spans.tolist():
        if trace.start_us[event] < end_us and trace.start_us[event] + trace.dur_us[event] > start_us:
            by_lane[int(trace.lane[event])].append(event)
    found = []
    for lane in sorted(by_lane, key=lambda lane: lane != work.main_lane):
        rows: list[list[tuple[float, float, str]]] = []
        open_until: list[float] = []
        for event in by_lane[lane]:
            begin, end = float(trace.start_us[event]), float(trace.start_us[event] + trace.dur_us[event])
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            depth = len(open_until)
            open_until.append(end)
            if depth < MAX_DEPTH:
                if depth == len(rows):
                    rows.append([])
                rows[depth].append((max(begin, start_us), min(end, end_us), trace.names[trace.name[event]]))
        found.append((trace.lanes[lane].thread, [_bars(row, start_us, wall_us) for row in rows]))
    return found


def _bars(spans: Sequence[tuple[float, float, str]], start_us: float, wall_us: float) -> list[Bar]:
    bars: list[Bar] = []
    joined = False
    for begin, end, name in spans:
        left, right = (begin - start_us) / wall_us, (end - start_us) / wall_us
        colour = KINDS.get(kind_of(name), FOREIGN)
        small = right - left < MIN_SHARE
        if bars and small and joined and bars[-1].colour == colour and left - bars[-1].end < MIN_SHARE:
            bars[-1] = Bar(bars[-1].start, right, colour, f"{kind_of(name) or 'several'}: short spans")
            continue
        bars.append(Bar(left, right, colour, f"{name} {(end - begin) / 1000:.2f} ms"))
        joined = small
    return bars


def _work_row(work: Work, start_us: float, wall_us: float, chosen: np.ndarray) -> list[Bar]:
    """The class that fills most of each column, columns of one class joined; nothing where idle fills most."""
    edges = start_us + wall_us * np.linspace(0, 1, NUM_COLUMNS + 1)
    width = wall_us / NUM_COLUMNS
    covered = np.zeros((len(CLASSES) + 1, NUM_COLUMNS))
    for number in range(len(CLASSES)):
        mine = chosen[work.kernel_class[chosen] == number]
        covered[number] = np.diff(_time_before(work.start[mine], work.end[mine], edges))
    covered[-1] = np.maximum(0.0, width - covered[:-1].sum(axis=0))
    filling = covered.argmax(axis=0)
    bars = []
    changes = [0, *(np.flatnonzero(np.diff(filling)) + 1).tolist(), NUM_COLUMNS]
    for first, stop in pairwise(changes):
        if (number := int(filling[first])) < len(CLASSES):
            name = CLASSES[number]
            bars.append(Bar(first / NUM_COLUMNS, stop / NUM_COLUMNS, CLASS_COLOURS[name], name))
    return bars


def _time_before(start: np.ndarray, end: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """How long at least one interval runs before each moment."""
    runs = merge(start, end)
    if not len(runs.start):
        return np.zeros(len(moments))
    points = np.stack([runs.start, runs.end], axis=1).reshape(-1)
    lengths = runs.end - runs.start
    after = np.cumsum(lengths)
    before = after - lengths
    return np.interp(moments, points, np.stack([before, after], axis=1).reshape(-1))
