"""report.html of a profile: what to do first, then where the time and the memory of a step went.

    write_report(path, analysis, traces, memories, ...)     traces and memories in the order of analysis.ranks

One file that can be mailed. It shows what the analysis computed and computes nothing but medians over steps; what was not
measured says so. Every text of a trace goes through page.text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from vchitect_fast.files import write_text
from vchitect_fast.page import cards, figure, foreign, lanes, legend, named, page, table, text, track
from vchitect_fast.profiling.facts import CLASSES, IDLE, Analysis, OpTime, RankAnalysis, StepAnalysis
from vchitect_fast.profiling.figures import CLASS_COLOURS, OWNER_COLOURS, memory_over_time, roofline
from vchitect_fast.profiling.kinds import KINDS
from vchitect_fast.profiling.memory import OWNERS, MemoryAnalysis
from vchitect_fast.profiling.timeline import FOREIGN, keys, timeline
from vchitect_fast.profiling.trace import Trace
from vchitect_fast.profiling.work import find_work

NUM_OPS_SHOWN = 20
NUM_SPANS_SHOWN = 40
NUM_PARTS_SHOWN = 12
NUM_STRETCHES_SHOWN = 5


@dataclass(frozen=True)
class SpanRow:
    """One span's name, medians over the steps that have it."""

    name: str
    kind: str
    num_calls: float
    cpu_us: float
    device_us: float
    by_class_us: dict[str, float]


def write_report(
    path: Path, analysis: Analysis, traces: Sequence[Trace], memories: Sequence[MemoryAnalysis | None], *, title: str
) -> Path:
    """Write the page and return its path."""
    first = analysis.ranks[0]
    body = [
        f"<h1>{foreign(title)}</h1>",
        f'<p class="lead">{_lead(first, len(analysis.ranks))}</p>',
        cards(_facts(first, memories[0] if memories else None)),
        "<h2>What to do first</h2>", _findings(analysis),
        *_steps(first, traces[0]),
        "<h2>By span</h2>", *_spans(first),
        *(_classes(first) if first.on_device is not None else ()),
        *_ops(analysis),
        *_memory(memories[0] if memories else None),
        *_ranks(analysis),
        *_notes(analysis),
    ]  # fmt: skip
    write_text(path, page(title, body))
    return path


def middle_step(steps: Sequence[StepAnalysis]) -> StepAnalysis:
    """The step whose wall time is the median: the one to look at."""
    return sorted(steps, key=lambda step: step.wall_us)[(len(steps) - 1) // 2]


def span_rows(rank: RankAnalysis) -> list[SpanRow]:
    """Every span of a rank, longest device time first; a step that has not the span counts as none."""
    found: dict[str, list[SpanRow]] = defaultdict(list)
    for step in rank.steps:
        for item in step.by_span:
            row = SpanRow(item.name, item.kind, item.num_calls, item.cpu_us, item.device_us, item.by_class_us)
            found[item.name].append(row)
    rows = []
    for name, items in found.items():
        names = {key for item in items for key in item.by_class_us}
        by_class = {key: median(item.by_class_us.get(key, 0.0) for item in items) for key in names}
        num_calls, cpu_us, device_us = (
            median(getattr(item, field) for item in items) for field in ("num_calls", "cpu_us", "device_us")
        )
        rows.append(SpanRow(name, items[0].kind, num_calls, cpu_us, device_us, by_class))
    return sorted(rows, key=lambda row: -row.device_us)


def _lead(rank: RankAnalysis, num_ranks: int) -> str:
    many = f"{num_ranks} ranks; shown is the first. " if num_ranks > 1 else ""
    if rank.on_device is None:
        return f"{many}{text(rank.source)}: spans alone were recorded, no ops, so they stand for the work that was done in them."
    device = "" if rank.on_device else " It ran without a GPU: the CPU is the device, and its ops are the kernels."
    tool = {"torch": "torch.profiler", "nsys": "Nsight Systems"}.get(rank.tool, rank.tool)
    steps = f"{len(rank.steps)} step{'' if len(rank.steps) == 1 else 's'}"
    return f"{many}{steps} recorded with {text(tool)}, which makes a step slower than it is alone.{device} Times are medians over the steps."


def _facts(rank: RankAnalysis, memory: MemoryAnalysis | None) -> dict[str, str]:
    facts = {}
    if steps := rank.steps:
        wall = median(step.wall_us for step in steps)
        share = {
            name: median(getattr(s, name) / s.wall_us for s in steps if s.wall_us)
            for name in ("compute_us", "idle_us", "exposed_any_us")
        }
        facts["one step"] = _ms(wall)
        facts["of it compute"] = _percent(share["compute_us"])
        facts["copies and collectives not hidden"] = _percent(share["exposed_any_us"])
        facts["device idle"] = _percent(share["idle_us"])
        if rank.on_device is not None:  # else the part beside compute
            facts["of the step lies in spans"] = _percent(median(step.coverage for step in steps), 1)
    if memory:
        facts["peak memory that torch holds"] = _bytes(memory.peak_bytes)
    return facts


def _findings(analysis: Analysis) -> str:
    if not analysis.findings:
        return "<p>Nothing stands out: no finding reached its threshold.</p>"
    items = "".join(
        f"<li><p>{text(item.text)}</p><b>{_ms(item.cost_us)} a step</b>"
        f'<p class="remedy">{text(item.remedy)}{f" <small>Setting: {text(item.setting)}</small>" if item.setting else ""}</p></li>'
        for item in analysis.findings
    )
    return f'<ol class="findings">{items}</ol>'


def _steps(rank: RankAnalysis, trace: Trace) -> Iterable[str]:
    yield "<h2>A step</h2>"
    if not rank.steps:
        yield "<p>The trace has no steps: neither spans step/N nor ranges ProfilerStep#N.</p>"
        return
    step = middle_step(rank.steps)
    yield f"<p>Step {step.step}, the median one of {len(rank.steps)}. Hover over a bar for its name and time.</p>"
    ticks = [_ms(share * step.wall_us) for share in (0, 0.25, 0.5, 0.75, 1)]
    yield lanes(timeline(trace, find_work(trace), step.start_us, step.wall_us), ticks, keys(trace))
    heads = ["step", "wall", "compute", "not hidden", "idle", "in spans", "attributed", "device allocations", "retries"]
    yield table(
        heads,
        [
            [
                str(s.step), _ms(s.wall_us), _ms(s.compute_us), _ms(s.exposed_any_us), _ms(s.idle_us), _percent(s.coverage, 1),
                "-" if s.attributed is None else _percent(s.attributed, 1), str(s.num_device_allocations), str(s.num_allocator_retries),
            ]
            for s in rank.steps
        ],
    )  # fmt: skip
    causes = {
        name: median(s.idle_by_cause_us.get(name, 0.0) for s in rank.steps) for name in rank.steps[0].idle_by_cause_us
    }
    if any(causes.values()):
        told = ", ".join(f"{name} {_ms(us)}" for name, us in sorted(causes.items(), key=lambda item: -item[1]) if us)
        yield f"<p>Idle, by what the CPU did meanwhile: {text(told)}.</p>"
    if step.launch_bound:
        yield "<h3>Stretches in which the device waited for launches</h3>"
        rows = [
            [
                foreign(item.span),
                _ms(item.start_us - step.start_us),
                _ms(item.dur_us),
                _ms(item.idle_us),
                f"{item.num_kernels:,}",
            ]
            for item in step.launch_bound[:NUM_STRETCHES_SHOWN]
        ]
        yield table(["in span", "begins at", "lasts", "of it idle", "kernels"], rows)


def _spans(rank: RankAnalysis) -> Iterable[str]:
    rows = span_rows(rank)
    whole = sum(row.device_us for row in rows) or 1.0
    body = []
    for row in rows[:NUM_SPANS_SHOWN]:
        colour = KINDS.get(row.kind, FOREIGN)
        classes = sorted(row.by_class_us.items(), key=lambda item: -item[1])
        mostly = (
            ", ".join(f"{name} {_percent(us / row.device_us)}" for name, us in classes[:2] if us > 0)
            if row.device_us
            else ""
        )
        share = row.device_us / whole
        body.append(
            [
                named(colour, foreign(row.name)), _ms(row.device_us), _percent(share), track(share, colour),
                _ms(row.cpu_us) if row.num_calls else "-", f"{row.num_calls:,.0f}" if row.num_calls else "-", text(mostly),
            ]
        )  # fmt: skip
    yield (
        "<p>From begin to end: on the CPU, spans inside it included. On the device: work launched in it and in no span inside "
        "it; work of a node of autograd is named backward/x after the span forward/x that made the node.</p>"
    )
    yield table(["span", "on the device", "share", "", "begin to end", "calls", "mostly"], body, words=(0, 3, 6))
    if len(rows) > NUM_SPANS_SHOWN:
        yield f'<p class="soft">{len(rows) - NUM_SPANS_SHOWN} smaller spans are not shown.</p>'


def _classes(rank: RankAnalysis) -> Iterable[str]:
    yield "<h2>By class of kernel</h2>"
    if not rank.steps:
        return
    wall = median(step.wall_us for step in rank.steps) or 1.0
    rows = []
    for name in (*CLASSES, IDLE):
        us = median(step.by_class_us.get(name, 0.0) for step in rank.steps)
        colour = CLASS_COLOURS[name]
        rows.append([named(colour, name), _ms(us), _percent(us / wall), track(us / wall, colour)])
    yield table(["class", "a step", "of the step", ""], rows, words=(0, 3))
    streams = []
    for name, total in rank.steps[0].stream_us.items():
        if any(step.stream_us.get(name) for step in rank.steps):
            exposed = median(step.exposed_us.get(name, 0.0) for step in rank.steps)
            shares = [step.overlap[name] for step in rank.steps if step.overlap.get(name) is not None]
            total = median(step.stream_us.get(name, 0.0) for step in rank.steps)
            hidden = _percent(median(share for share in shares if share is not None)) if shares else "-"
            streams.append([text(name.replace("_", " ")), _ms(total), _ms(exposed), hidden])
    if streams:
        yield table(["beside compute", "runs", "not hidden", "hidden"], streams)


def _ops(analysis: Analysis) -> Iterable[str]:
    rank, roof = analysis.ranks[0], analysis.roof
    if not rank.ops:
        return
    yield "<h2>By op</h2>"
    if picture := roofline(rank.ops, roof):
        measured = (
            f"the roof of {text(roof.device_name)}, {text(roof.source)}"
            if roof
            else "the roof is not measured: give --cluster"
        )
        caption = f'<b>Roofline</b><br><span class="soft">A point is an op with one set of shapes, its area its time; {measured}.</span>'
        used = {op.kernel_class for op in rank.ops if op.flops and op.num_bytes}
        yield f'<div class="figures">{figure(caption, picture + legend({n: CLASS_COLOURS[n] for n in CLASSES if n in used}))}</div>'
    shown = rank.ops[:NUM_OPS_SHOWN]
    yield table(
        ["op", "all steps", "calls", "TFLOP/s", "GB/s", "of the roof", "shapes", "dtype"],
        [
            [
                named(CLASS_COLOURS.get(op.kernel_class, FOREIGN), foreign(op.name)), _ms(op.device_us), f"{op.num_calls:,}",
                _rate(op.flops_per_s, 1e12), _rate(op.bytes_per_s, 1e9), _roof(op), foreign(op.shapes), text(op.dtype),
            ]
            for op in shown
        ],
        words=(0, 6, 7),
    )  # fmt: skip
    if len(rank.ops) > len(shown):
        yield f'<p class="soft">{len(rank.ops) - len(shown)} ops with less time are not shown.</p>'


def _memory(memory: MemoryAnalysis | None) -> Iterable[str]:
    yield "<h2>Memory</h2>"
    if memory is None:
        yield "<p>The trace was recorded without memory.</p>"
        return
    place = "main memory" if memory.device < 0 else f"GPU {memory.device}"
    used = {owner: OWNER_COLOURS[owner] for owner in OWNERS if owner in memory.by_owner}
    caption = f'<b>{place} over the recorded steps</b><br><span class="soft">Dashed: the peak of {_bytes(memory.peak_bytes)}.</span>'
    yield f"<p>{text(memory.explained())}</p>"
    yield f'<div class="figures">{figure(caption, memory_over_time(memory) + legend(used))}</div>'
    yield table(
        ["at the peak", "size", "share", "", "made in", "blocks", "largest"],
        [
            [
                named(OWNER_COLOURS[part.owner], part.owner), _bytes(part.num_bytes), _percent(part.num_bytes / memory.peak_bytes),
                track(part.num_bytes / memory.peak_bytes, OWNER_COLOURS[part.owner]),
                foreign(part.span) if part.span else "before the recording", f"{part.num_allocations:,}",
                foreign(part.largest) if part.largest else "-",
            ]
            for part in memory.parts[:NUM_PARTS_SHOWN]
        ],
        words=(0, 3, 4, 6),
    )  # fmt: skip
    yield "".join(f'<p class="soft">{text(note)}</p>' for note in memory.notes)


def _ranks(analysis: Analysis) -> Iterable[str]:
    if len(analysis.ranks) < 2:
        return
    yield "<h2>Ranks side by side</h2>"
    uneven = analysis.imbalance
    if uneven:
        why = f"; most of it lies in {foreign(uneven.explained)}" if uneven.explained else ""
        yield (
            f"<p>Rank {foreign(uneven.straggler)} needs {_percent(uneven.ratio, 1)} more than the mean over {uneven.num_steps} "
            f"common steps, the time in which it waits for others left out{why}.</p>"
        )
    rows = []
    for rank in analysis.ranks:
        name = foreign(rank.source if rank.rank is None else rank.rank)
        if not rank.steps:
            rows.append([name, "no steps", "-", "-", "-"])
            continue
        values = [
            median(getattr(s, field) for s in rank.steps)
            for field in ("wall_us", "compute_us", "exposed_any_us", "idle_us")
        ]
        rows.append([name, *map(_ms, values)])
    yield table(["rank", "a step", "compute", "not hidden", "idle"], rows)


def _notes(analysis: Analysis) -> Iterable[str]:
    notes = dict.fromkeys(note for rank in analysis.ranks for note in rank.notes)
    if notes:
        yield "<h2>What this page cannot say</h2>"
        yield "".join(f"<p>{text(note)}</p>" for note in notes)


def _ms(us: float) -> str:
    ms = us / 1000
    return f"{ms / 1000:,.2f} s" if ms >= 10_000 else f"{ms:,.1f} ms" if ms >= 10 else f"{ms:.2f} ms"


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _bytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _rate(rate: float | None, unit: float) -> str:
    return "-" if rate is None else f"{rate / unit:,.3g}"


def _roof(op: OpTime) -> str:
    return "not measured" if op.roof_share is None else _percent(op.roof_share)
