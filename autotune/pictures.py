"""Pictures of a predicted step, as HTML and SVG: its streams, its memory, where its peak lies, and the choices around it.

    streams      a row a stream, bars coloured by what they do          memory_over_time   bytes on the device, with the limit
    peak         one bar, its parts as shares of the limit              front              time against memory, a point a choice

Numbers in, markup out; the only texts are names of ours and labels given, which are escaped. Streams and memory share one
axis, so that a moment stands under itself. Small bars of one kind become one, so a picture stays small; read figures from
the tables. Nothing is predicted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vchitect_fast.autotune.report import gib, seconds
from vchitect_fast.autotune.streams import STREAMS, Done, Timeline
from vchitect_fast.page import Bar, lane, legend, text

GIB = 2**30
MIN_SHARE = 1 / 900  # of the width: a smaller bar joins its neighbour
HIGH = 1.08  # of the memory picture, in units of the larger of limit and peak
NEAR_FLOOR = 80.0  # of the memory picture's height, counted from above: words below a line would leave it
TICKS = 5

COLOURS = {
    "forward": 0x1971C2, "backward": 0x7048E8, "recompute": 0xE8590C, "ends": 0x0B7285, "optimizer": 0x868E96,
    "encode": 0x5C940D, "copy": 0x2F9E44, "exchange": 0xD6336C, "gather": 0xA61E4D, "reduce": 0xAE3EC9,
}  # fmt: skip
OTHER, OVER = 0x868E96, 0xC92A2A
PART_COLOURS = {
    "process": 0x868E96, "states": 0x1864AB, "gradients": 0xD6336C, "saved": 0x1971C2, "working": 0xE8590C,
    "exchange": 0xAE3EC9, "in_flight": 0x2F9E44,
}  # fmt: skip
STREAM_NAMES = {
    "compute": "compute", "out": "copies to host memory", "in": "copies back from host memory",
    "exchange": "exchanges of sequence parallelism", "gather": "parameters gathered, gradients reduced",
}  # fmt: skip

WIDTH, HEIGHT = 440, 250  # units of the front: letters legible in a narrow column, not huge in a wide one
LEFT, RIGHT, TOP, FLOOR = 58.0, 14.0, 22.0, HEIGHT - 36.0
NEAR_TIME, NEAR_MEMORY = 1.6, 1.6  # times the chosen step, and the memory that may be used


@dataclass(frozen=True)
class Point:
    """One choice in the picture of all."""

    label: str
    step_s: float
    peak_bytes: int
    fits: bool


def kind_of(name: str) -> str:
    """What a task does, by the first word of its name; `reduce the rest` is a reduce, `exchange, forward` an exchange."""
    word = name.replace(",", " ").split()[0] if name.strip(" ,") else ""
    return word if word in COLOURS else "other"


def streams(timeline: Timeline, filling: Sequence[tuple[float, int]], limit_bytes: int) -> str:
    """The rows of every stream that does anything, the memory under them on the same axis, ticks and the key.

    filling  (second, bytes on the device) from its begin until timeline.memory
    """
    total = timeline.total_s
    if not total:
        return "<p>This step has no tasks.</p>"
    parts = []
    for name in STREAMS:
        tasks = [task for task in timeline.tasks if task.stream == name and task.end_s > task.start_s]
        if tasks:
            busy = f"busy {timeline.busy_s(name) / total:.0%}"
            waits = timeline.exposed_s(name)
            note = busy if name == "compute" else f"{busy}, compute waits for it {seconds(waits) if waits else 'never'}"
            parts.append(f"<h4>{STREAM_NAMES[name]} &middot; {text(note)}</h4>{lane(_bars(tasks, total))}")
    if timeline.memory:
        parts.append(f"<h4>memory on the device</h4>{memory_over_time(timeline, filling, limit_bytes)}")
    ticks = "".join(f"<span>{text(_tick(total * k / (TICKS - 1)))}</span>" for k in range(TICKS))
    used = {kind_of(task.name) for task in timeline.tasks if task.end_s > task.start_s}
    keys = {name: colour for name, colour in {**COLOURS, "other": OTHER}.items() if name in used}
    return f'<div class="lanes">{"".join(parts)}<div class="ticks">{ticks}</div>{legend(keys)}</div>'


def memory_over_time(timeline: Timeline, filling: Sequence[tuple[float, int]], limit_bytes: int) -> str:
    """An area through the moments that are known, a line at the limit, both with their figures; as wide as a lane."""
    total = timeline.total_s
    moments = [*filling, *timeline.memory, (total, timeline.memory[-1][1])]
    fullest = max(moments, key=lambda item: item[1])
    over = fullest[1] > limit_bytes
    high = HIGH * max(limit_bytes, fullest[1])
    corners = " ".join(f"{1000 * at_s / total:.1f},{100 * (1 - value / high):.1f}" for at_s, value in moments)
    limit_y, peak_y, peak_x = 100 * (1 - limit_bytes / high), 100 * (1 - fullest[1] / high), 100 * fullest[0] / total
    # The higher of the two has its words above its line, the other below, near the floor above too: they never meet.
    lower = max(limit_y, peak_y)
    above = f"bottom:{100 - min(limit_y, peak_y):.1f}%"
    below = f"top:{lower:.1f}%" if lower < NEAR_FLOOR else f"bottom:{100 - lower:.1f}%"
    limit_place, peak_place = (below, above) if over else (above, below)
    side = f"right:{100 - peak_x:.1f}%" if peak_x > 50 else f"left:{peak_x:.1f}%"
    said = f"memory over the step, at most {gib(fullest[1] / GIB)}, {gib(limit_bytes / GIB)} may be used"
    fill = OVER if over else COLOURS["forward"]
    return (
        '<div style="position:relative;height:9rem;margin-top:1.2rem">'
        f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" style="height:100%" role="img" aria-label="{text(said)}">'
        f'<polygon points="0,100 {corners} 1000,100" fill="#{fill:06x}" fill-opacity=".4"></polygon>'
        f'<line class="roof" vector-effect="non-scaling-stroke" x1="0" y1="{limit_y:.1f}" x2="1000" y2="{limit_y:.1f}"></line>'
        f'</svg><small style="position:absolute;line-height:1.3;left:.3rem;{limit_place}">may be used: {text(gib(limit_bytes / GIB))}'
        f'</small><small style="position:absolute;line-height:1.3;{side};{peak_place}">peak {text(gib(fullest[1] / GIB))}</small></div>'
    )


def peak(parts_gib: dict[str, float], limit_bytes: int) -> str:
    """One bar as wide as the larger of limit and peak; each part's figure is in the key, what is left is white."""
    total, limit = sum(parts_gib.values()), limit_bytes / GIB
    whole = max(total, limit)
    bars, at, keys = [], 0.0, {}
    for name, value in parts_gib.items():
        if value > 0:
            label = f"{name.replace('_', ' ')} {gib(value)}"
            bars.append(Bar(at / whole, (at + value) / whole, PART_COLOURS.get(name, OTHER), label))
            keys[label], at = PART_COLOURS.get(name, OTHER), at + value
    left = f"free {gib(limit - total)}" if limit >= total else f"over the limit by {gib(total - limit)}"
    return f'<div class="lanes">{lane(bars)}{legend(keys)}<div class="keys">{text(left)}</div></div>'


def front(points: Sequence[Point], chosen: Point, limit_bytes: int) -> str:
    """Time over memory; the line joins those that no other beats in both, the ring is the chosen one.

    Only what is `near` is drawn. Empty where there is no other choice to draw.
    """
    shown = [point for point in points if near(point, chosen, limit_bytes)]
    if not shown:
        return ""
    everything, limit = [*shown, chosen], limit_bytes / GIB
    xs, ys = [point.peak_bytes / GIB for point in everything], [point.step_s for point in everything]
    shows_limit = limit < NEAR_MEMORY * max(xs)  # a limit far away would press the points into a corner
    x_ticks = _round_ticks(min(xs), max(*xs, limit if shows_limit else 0.0))
    y_ticks = _round_ticks(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), FLOOR - up * (FLOOR - TOP)

    def at(point: Point) -> tuple[float, float]:
        return place(point.peak_bytes / GIB, point.step_s)

    parts = _grid(x_ticks, y_ticks, place)
    if shows_limit:
        x, _ = place(limit, y_ticks[0])
        anchor = "end" if x > (LEFT + WIDTH) / 2 else "start"
        parts.append(f'<line class="roof" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{FLOOR}"></line>')
        said = text(f"may be used: {gib(limit)}")
        parts.append(f'<text class="roof" x="{x:.1f}" y="{TOP - 5}" text-anchor="{anchor}">{said}</text>')
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, pareto(everything)))
    parts.append(f'<polyline points="{joined}" fill="none" stroke="#7048e8" stroke-width="1.4"></polyline>')
    parts += [_dot(point, *at(point)) for point in shown]
    x, y = at(chosen)
    ring = "fill:none;stroke:var(--mark);stroke-width:2.4"
    parts.append(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6.5" style="{ring}"><title>{text(_says(chosen))}</title></circle>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="time against memory">{"".join(parts)}</svg>'


def near(point: Point, chosen: Point, limit_bytes: int) -> bool:
    """Whether a point is drawn: one far away would press the others into a corner."""
    return point.step_s <= NEAR_TIME * chosen.step_s and point.peak_bytes <= NEAR_MEMORY * max(
        limit_bytes, chosen.peak_bytes
    )


def _grid(
    x_ticks: Sequence[float], y_ticks: Sequence[float], place: Callable[[float, float], tuple[float, float]]
) -> list[str]:
    parts = []
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        anchor = {x_ticks[0]: "start", x_ticks[-1]: "end"}.get(tick, "middle")
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{FLOOR}"></line>')
        parts.append(f'<text x="{x:.1f}" y="{FLOOR + 14}" text-anchor="{anchor}">{tick:g}</text>')
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line class="axis" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"></line>')
        said = text(_axis_seconds(tick, y_ticks))
        parts.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{said}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">peak memory, GiB</text>')
    return [*parts, '<text x="4" y="12">one step</text>']


def pareto(points: Iterable[Point]) -> list[Point]:
    """Those that no other beats in time and memory, by memory."""
    found: list[Point] = []
    for point in sorted(points, key=lambda item: (item.peak_bytes, item.step_s)):
        if not found or point.step_s < found[-1].step_s:
            found.append(point)
    return found


def _dot(point: Point, x: float, y: float) -> str:
    colour = COLOURS["forward"] if point.fits else OTHER
    said = text(_says(point))
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#{colour:06x}"><title>{said}</title></circle>'


def _says(point: Point) -> str:
    fits = "" if point.fits else ", does not fit"
    return f"{point.label}: {seconds(point.step_s)}, {gib(point.peak_bytes / GIB)}{fits}"


def _bars(tasks: Sequence[Done], total_s: float) -> list[Bar]:
    bars: list[Bar] = []
    joined = False  # the last bar may take a small neighbour
    for task in tasks:
        left, right = task.start_s / total_s, task.end_s / total_s
        kind, small = kind_of(task.name), (task.end_s - task.start_s) / total_s < MIN_SHARE
        colour = COLOURS.get(kind, OTHER)
        if bars and small and joined and bars[-1].colour == colour and left - bars[-1].end < MIN_SHARE:
            bars[-1] = Bar(bars[-1].start, right, colour, f"{kind}: several")
            continue
        where = "" if task.block is None else f" of block {task.block}"
        bars.append(Bar(left, right, colour, f"{task.name}{where}, {seconds(task.end_s - task.start_s)}"))
        joined = small
    return bars


def _tick(value: float) -> str:
    return seconds(value) if value else "0"


def _round_ticks(low: float, high: float) -> list[float]:
    """At least two round numbers around low and high, evenly spaced."""
    reach = high - low if high > low else max(abs(high), 1e-9) * 0.2
    step = 10 ** math.floor(math.log10(reach / 3))
    step *= next((factor for factor in (1, 2, 5) if reach / (factor * step) <= 5), 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def _axis_seconds(tick: float, ticks: Sequence[float]) -> str:
    """All ticks of an axis in one unit."""
    return f"{tick:g} s" if ticks[-1] >= 1 else f"{1000 * tick:g} ms"
