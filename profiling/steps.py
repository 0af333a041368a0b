"""Where the time of each step went: StepAnalysis out of a Trace and its Work.

Steps are the ranges step/N or ProfilerStep#N; a trace without them is one step. Every figure is arithmetic on intervals:
the window of a step is cut into time with compute, time with only copies or collectives (exposed), and idle time, and each
gap of the device gets the reason why nothing was there to run. Reads no files, judges nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vchitect_fast.profiling.facts import (
    CAUSES,
    CLASSES,
    DATA,
    ELSEWHERE,
    IDLE,
    LAUNCHING,
    STREAMS,
    SYNCHRONIZING,
    SpanTime,
    StepAnalysis,
    Stretch,
)
from vchitect_fast.profiling.kinds import kind_of
from vchitect_fast.profiling.overlap import Intervals, clip, complement, covered, intersect, merge, subtract, union
from vchitect_fast.profiling.trace import Kind, Trace
from vchitect_fast.profiling.work import Work, step_number

JOIN_US = 100.0  # gaps with less between them are one stretch; also the pause between ops that is still Python's own
MIN_STRETCH_US = 20.0  # idle time of a stretch that is worth a line
MAX_STRETCHES = 20  # a step
ALLOCATE = ("cudaMalloc", "cuMemCreate", "hipMalloc")
GIVE_BACK = ("cudaFree", "cuMemUnmap", "cuMemRelease", "hipFree")


@dataclass(frozen=True)
class _Window:
    step: int
    cpu_start: float
    cpu_end: float
    start: float  # on the device
    end: float


class _Sets:
    """What is needed of the whole trace, once: disjoint intervals by what they mean, and ranges of the main thread."""

    def __init__(self, trace: Trace, work: Work) -> None:
        self.streams = [merge(work.start[on], work.end[on]) for on in (work.stream == k for k in range(len(STREAMS)))]
        on = work.stream == -1
        self.compute = merge(work.start[on], work.end[on])
        self.busy = union(self.compute, *self.streams)
        self.reach = np.maximum.accumulate(work.end)  # so that the pieces of a window are a slice
        spans = work.spans[[step_number(trace.names[name]) is None for name in trace.name[work.spans]]]
        self.spans = spans
        kinds = np.array([kind_of(trace.names[name]) for name in trace.name[spans]], dtype=object)
        on_main = trace.lane[spans] == work.main_lane
        self.covered = _merged(trace, spans[on_main])
        self.data = _merged(trace, spans[on_main & (kinds == "data")])
        calls = trace.where(Kind.RUNTIME)
        waits = np.array(
            ["Synchronize" in name or name in ("cudaMemcpy", "hipMemcpy") for name in trace.names], dtype=bool
        )
        waits_here = waits[trace.name[calls]]
        self.waiting = _merged(trace, calls[waits_here])
        # The CPU is at work where it issues ops, with the pauses of the interpreter in between, or is in a span that does.
        busy = _merged(trace, np.concatenate([trace.where(Kind.OP), calls[~waits_here]]))
        spans_at_work = spans[np.isin(kinds, ("encode", "forward", "recompute", "backward", "optimizer"))]
        self.issuing = union(merge(busy.start, busy.end + JOIN_US), _merged(trace, spans_at_work))


def _merged(trace: Trace, events: np.ndarray) -> Intervals:
    return merge(trace.start_us[events], trace.start_us[events] + trace.dur_us[events])


def analyse_steps(trace: Trace, work: Work) -> tuple[StepAnalysis, ...]:
    """Every step of a trace in the order of time; none where it has no work."""
    if not len(work):
        return ()
    sets = _Sets(trace, work)
    return tuple(_analyse(trace, work, sets, window) for window in _windows(trace, work))


def _windows(trace: Trace, work: Work) -> list[_Window]:
    """The windows: from where the CPU begins a step, or the device has done the one before, to where both are done."""
    named = [
        (float(trace.start_us[event]), float(trace.end_us[event]), number, trace.names[trace.name[event]])
        for event in work.spans[trace.lane[work.spans] == work.main_lane].tolist()
        if (number := step_number(trace.names[trace.name[event]])) is not None
    ]
    ours = [one for one in named if one[3].startswith("step/")]  # torch's own ranges beside ours would count twice
    if not named:
        start = min(float(work.start[0]), float(trace.start_us[work.spans].min(initial=np.inf)))
        end = max(float(work.end.max()), float(trace.end_us[work.spans].max(initial=-np.inf)))
        return [_Window(0, start, end, start, end)]
    windows, device_done = [], -np.inf
    launched = np.where(work.launch >= 0, trace.start_us[work.launch], work.start)
    kernels = trace.has_device & (work.stream < 1)  # a copy may well end in the next step
    for cpu_start, cpu_end, number, _ in sorted(ours or named):
        own = kernels & (launched >= cpu_start) & (launched < cpu_end)
        start = max(cpu_start, device_done)
        end = max(start, cpu_end, float(work.end[own].max(initial=-np.inf)))
        windows.append(_Window(number, cpu_start, cpu_end, start, end))
        device_done = end
    return windows


def _analyse(trace: Trace, work: Work, sets: _Sets, window: _Window) -> StepAnalysis:
    low, high = window.start, window.end
    compute, busy = clip(sets.compute, low, high), clip(sets.busy, low, high)
    idle = complement(busy, low, high)
    streams = {name: clip(one, low, high) for name, one in zip(STREAMS, sets.streams, strict=True)}
    hidden = {name: intersect(one, compute).total for name, one in streams.items()}
    by_span, by_class, attributed = _by_span(trace, work, sets, window)
    causes, stretches = _causes(trace, work, sets, idle)
    cpu_us = window.cpu_end - window.cpu_start
    allocations, retries, allocator_us = _allocations(trace, window)
    return StepAnalysis(
        step=window.step,
        start_us=low,
        wall_us=high - low,
        compute_us=compute.total,
        exposed_any_us=busy.total - compute.total,
        idle_us=idle.total,
        by_span=by_span,
        by_class_us={**by_class, IDLE: idle.total},
        stream_us={name: one.total for name, one in streams.items()},
        exposed_us={name: one.total - hidden[name] for name, one in streams.items()},
        overlap={name: hidden[name] / one.total if one.total else None for name, one in streams.items()},
        idle_by_cause_us=causes,
        launch_bound=stretches,
        coverage=clip(sets.covered, window.cpu_start, window.cpu_end).total / cpu_us if cpu_us else 0.0,
        attributed=attributed,
        num_device_allocations=allocations,
        num_allocator_retries=retries,
        allocator_us=allocator_us,
    )


def _by_span(
    trace: Trace, work: Work, sets: _Sets, window: _Window
) -> tuple[tuple[SpanTime, ...], dict[str, float], float | None]:
    """Spans, classes, and the share of the work whose span is known; pieces are cut at the window."""
    first = int(np.searchsorted(sets.reach, window.start, side="right"))
    last = int(np.searchsorted(work.start, window.end, side="left"))
    part = slice(first, max(first, last))
    inside = np.minimum(work.end[part], window.end) - np.maximum(work.start[part], window.start)
    cell = work.span[part].astype(np.int64) * len(CLASSES) + work.kernel_class[part]
    table = np.bincount(cell, np.maximum(inside, 0.0), len(work.span_names) * len(CLASSES)).reshape(-1, len(CLASSES))
    device_us = {name: row for name, row in zip(work.span_names, table, strict=True) if row.any()}
    here = sets.spans[
        (trace.start_us[sets.spans] >= window.cpu_start) & (trace.start_us[sets.spans] < window.cpu_end)
    ]  # fmt: skip
    num_calls = np.bincount(trace.name[here], minlength=len(trace.names))
    cpu_us = np.bincount(trace.name[here], trace.dur_us[here], minlength=len(trace.names))
    numbers = {trace.names[name]: name for name in np.flatnonzero(num_calls).tolist()}
    nothing = np.zeros(len(CLASSES))
    found = []
    for name in {**device_us, **numbers}:
        row, number = device_us.get(name, nothing), numbers.get(name)
        calls, cpu = (0, 0.0) if number is None else (int(num_calls[number]), float(cpu_us[number]))
        classes = {kernel: float(us) for kernel, us in zip(CLASSES, row, strict=True) if us}
        found.append(SpanTime(name, kind_of(name), calls, cpu, float(row.sum()), classes))
    total = float(table.sum())
    attributed = 1 - float(table[0].sum()) / total if total else None
    by_class = dict(zip(CLASSES, table.sum(axis=0).tolist(), strict=True))
    return tuple(sorted(found, key=lambda one: (-one.device_us, -one.cpu_us, one.name))), by_class, attributed


def _causes(
    trace: Trace, work: Work, sets: _Sets, idle: Intervals
) -> tuple[dict[str, float], tuple[Stretch, ...]]:  # fmt: skip
    """Idle time by cause, and the stretches in which the CPU was too slow."""
    causes = dict.fromkeys(CAUSES, 0.0)
    if not trace.has_device:
        causes[DATA] = intersect(idle, sets.data).total
        causes[ELSEWHERE] = idle.total - causes[DATA]
        return causes, ()
    # What ended each gap, and whether it was launched after the gap began: then the CPU was late.
    ended_by = np.searchsorted(work.start, idle.end, side="left")
    event = work.launch[np.minimum(ended_by, len(work) - 1)]
    is_last = ended_by == len(work)
    late = is_last | ((event >= 0) & (trace.start_us[event] >= idle.start))
    data_us = np.where(late, covered(sets.data, idle.start, idle.end), 0.0)
    issuing_us = np.where(late, covered(subtract(sets.issuing, sets.data), idle.start, idle.end), 0.0)
    waiting = subtract(union(sets.issuing, sets.waiting), sets.data)
    waiting_us = np.where(late, covered(waiting, idle.start, idle.end), 0.0)
    place = np.searchsorted(sets.waiting.start, idle.start, side="right") - 1
    drained = (
        (place >= 0) & (sets.waiting.end[np.maximum(place, 0)] >= idle.start)
        if len(sets.waiting.start)
        else np.zeros(len(place), dtype=bool)
    )  # fmt: skip
    launching = np.where(drained, 0.0, issuing_us)
    causes[DATA], causes[LAUNCHING] = float(data_us.sum()), float(launching.sum())
    causes[SYNCHRONIZING] = float(waiting_us[drained].sum())
    causes[ELSEWHERE] = max(0.0, idle.total - sum(causes.values()))
    return causes, _stretches(work, idle, launching)


def _stretches(work: Work, idle: Intervals, launching: np.ndarray) -> tuple[Stretch, ...]:
    """Gaps in which the CPU launched, joined where little lies between them."""
    some = launching > 0
    start, end, lost = idle.start[some], idle.end[some], launching[some]
    if not len(start):
        return ()
    first = np.flatnonzero(np.concatenate([[True], start[1:] - end[:-1] > JOIN_US]))
    last = np.concatenate([first[1:], [len(start)]]) - 1
    idle_us = np.add.reduceat(lost, first)
    found = []
    for k in np.argsort(-idle_us, kind="stable")[:MAX_STRETCHES].tolist():
        if idle_us[k] < MIN_STRETCH_US:
            break
        low, high = float(start[first[k]]), float(end[last[k]])
        inside = slice(int(np.searchsorted(work.start, low)), int(np.searchsorted(work.start, high, side="right")))
        spans = np.bincount(work.span[inside]) if inside.stop > inside.start else np.array([1])
        name = work.span_names[int(spans.argmax())]
        found.append(Stretch(low, high - low, float(idle_us[k]), inside.stop - inside.start, name))
    return tuple(found)


def _allocations(trace: Trace, window: _Window) -> tuple[int, int, float]:
    """Calls that take memory from the driver, retries among them, and the time of these calls and of giving back.

    A retry asks, gives cached memory back and asks again, with no work sent to the device in between. A cudaFree alone
    is no sign of one: programs begin with it.
    """
    calls = trace.where(Kind.RUNTIME)
    calls = calls[(trace.start_us[calls] >= window.cpu_start) & (trace.start_us[calls] < window.cpu_end)]
    wanted = np.array([name in ALLOCATE or name in GIVE_BACK for name in trace.names], dtype=bool)
    in_allocator = wanted[trace.name[calls]]
    taken, retries = 0, 0
    asked = gave_back = False
    for name in (trace.names[number] for number in trace.name[calls].tolist()) if in_allocator.any() else ():
        if name in ALLOCATE:
            taken, retries = taken + 1, retries + gave_back
            asked, gave_back = True, False
        elif name in GIVE_BACK:
            gave_back = asked
        elif any(sent in name for sent in ("Launch", "Memcpy", "Memset")):
            asked = gave_back = False
    return taken, retries, float(trace.dur_us[calls[in_allocator]].sum())
