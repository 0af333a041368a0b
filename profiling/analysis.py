"""The analysis of a run: one trace or more, one a rank -> Analysis, with what the ranks say together and what to do first.

    analyse([read_traces("trace-rank0.json.gz")[0], ...], read_roof("cluster.json"))
The order: work is led back to ops and spans (`work.py`), steps are cut (`steps.py`), ops get rates (`roofline.py`), findings
are written (`findings.py`). Standard library and numpy only: a trace is analysed where no torch is.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median

from vchitect_fast.errors import UserError
from vchitect_fast.profiling.facts import IDLE, Analysis, Imbalance, RankAnalysis, Roof, StepAnalysis
from vchitect_fast.profiling.findings import find, rank_names
from vchitect_fast.profiling.roofline import op_times
from vchitect_fast.profiling.steps import analyse_steps
from vchitect_fast.profiling.trace import Kind, Trace
from vchitect_fast.profiling.work import find_work, step_number

LOW_ATTRIBUTION = 0.9  # below this share of device time with a known span, a note says so


def analyse(traces: Sequence[Trace], roof: Roof | None = None) -> Analysis:
    """Analyse the traces of one run, in the order of their ranks; UserError without a trace or with one rank twice."""
    if not traces:
        raise UserError("expected at least one trace, got none; name the files that the profiler wrote.")
    known = [trace.rank for trace in traces if trace.rank is not None]
    for rank in known:
        if known.count(rank) > 1:
            files = ", ".join(trace.source for trace in traces if trace.rank == rank)
            raise UserError(f"expected one trace a rank, got rank {rank} in {files}; name the traces of one run.")
    in_order = sorted(traces, key=lambda trace: (trace.rank is None, trace.rank or 0))
    ranks = tuple(_analyse_rank(trace, roof) for trace in in_order)
    imbalance = _imbalance(ranks)
    return Analysis(ranks, roof, imbalance, find(ranks, roof, imbalance))


def _analyse_rank(trace: Trace, roof: Roof | None) -> RankAnalysis:
    work = find_work(trace)
    steps = analyse_steps(trace, work)
    return RankAnalysis(
        rank=trace.rank,
        source=trace.source,
        tool=trace.tool,
        on_device=None if trace.spans_only else trace.has_device,
        steps=steps,
        ops=() if trace.spans_only else op_times(trace, work, steps, roof),
        notes=tuple(_notes(trace, steps)),
    )


def _notes(trace: Trace, steps: tuple[StepAnalysis, ...]) -> list[str]:
    """What the trace does not hold, and how to record it."""
    notes = []
    if not steps:
        return [f"{trace.source} has neither kernels nor ops: nothing is known of the device's time."]
    if trace.spans_only:
        return [
            "Spans alone were recorded, no ops: time in a span counts as compute, time outside of all of them as idle."
        ]
    numbered = any(step_number(trace.names[name]) is not None for name in trace.name[trace.where(Kind.SPAN)])
    if not numbered:
        notes.append(
            f"{trace.source} names no steps, so the whole recording counts as one: call the profiler's step(), "
            "or open the span step/N around each."
        )
    if not trace.has_device:
        notes.append(
            f"{trace.source} has no GPU in it: the threads of the CPU count as the device, ops as kernels, and the time of "
            "the interpreter between ops is idle."
        )
    elif not len(trace.where(Kind.RUNTIME)):
        notes.append(
            f"{trace.source} has no launches, so why the device was idle is not known: record CPU activity too."
        )
    if trace.passed_over:
        notes.append(
            f"{trace.source} has events that are not understood, and not counted: {', '.join(trace.passed_over)}."
        )
    shares = [step.attributed for step in steps if step.attributed is not None]
    if shares and median(shares) < LOW_ATTRIBUTION:
        notes.append(
            f"the span is known of {100 * median(shares):.0f} % of the device's time in {trace.source}: open spans around "
            "what launches the rest."
        )
    if not trace.shapes:
        notes.append(f"{trace.source} has no input shapes, so no op has a rate: record with record_shapes=True.")
    return notes


def _imbalance(ranks: tuple[RankAnalysis, ...]) -> Imbalance | None:
    """The straggler among two ranks or more; None where they have no step in common."""
    if len(ranks) < 2:
        return None
    common = set.intersection(*({step.step for step in rank.steps} for rank in ranks))
    if not common:
        return None
    names = rank_names(ranks)
    steps = {name: [s for s in rank.steps if s.step in common] for name, rank in zip(names, ranks, strict=True)}
    own_us = {name: median(step.wall_us - step.exposed_us["collective"] for step in own) for name, own in steps.items()}
    straggler = max(own_us, key=lambda name: own_us[name])
    average = mean(own_us.values())
    parts = {name: _parts(own) for name, own in steps.items()}
    above = {
        part: parts[straggler][part] - mean(other.get(part, 0.0) for other in parts.values())
        for part in parts[straggler]
    }
    explained = max(above, key=lambda part: above[part], default="")
    return Imbalance(
        num_steps=len(common),
        own_us=own_us,
        straggler=straggler,
        ratio=own_us[straggler] / average - 1 if average else 0.0,
        explained=explained if above.get(explained, 0.0) > 0 else "",
    )


def _parts(steps: list[StepAnalysis]) -> dict[str, float]:
    """Median time of a rank's steps by span, without collectives, and idle."""
    found = {IDLE: [step.idle_us for step in steps]}
    for number, step in enumerate(steps):
        for span in step.by_span:
            own = span.device_us - span.by_class_us.get("collective", 0.0)
            found.setdefault(span.name, [0.0] * len(steps))[number] = own
    return {name: median(values) for name, values in found.items()}
