"""Pictures of a profile as hand-made SVG: the roofline, and memory over time. Numbers in, SVG out.

A figure has 440 units of width, so that its letters are legible in a narrow column and not huge in a wide one. Nothing is
read and no text appears but given names, escaped, and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from vchitect_fast.page import text
from vchitect_fast.profiling.facts import ATTENTION, COLLECTIVE, COPY, ELEMENTWISE, GEMM, IDLE, OTHER, OpTime, Roof
from vchitect_fast.profiling.memory import OWNERS, MemoryAnalysis

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 58.0, 10.0, 12.0, 34.0
CLASS_COLOURS = {
    GEMM: 0x1971C2, ATTENTION: 0x7048E8, ELEMENTWISE: 0x0B7285, OTHER: 0x868E96, COPY: 0x66A80F, COLLECTIVE: 0xE64980, IDLE: 0xCED4DA,
}  # fmt: skip
OWNER_COLOURS = dict(
    zip(OWNERS, (0x1864AB, 0x2F9E44, 0x94D82D, 0xE64980, 0xF08C00, 0x339AF0, 0x9775FA, 0xADB5BD), strict=True)
)
NUM_COLUMNS = 220  # of the memory picture: two units each


def roofline(ops: Sequence[OpTime], roof: Roof | None) -> str:
    """FLOP/s over FLOPs a byte, both logarithmic; a point an op, its area the op's share of the time, its colour the class."""
    points = [
        (op.flops / op.num_bytes, op.flops_per_s, op)
        for op in ops
        if op.flops and op.num_bytes and op.flops_per_s and op.device_us > 0
    ]
    if not points:
        return ""
    peaks = sorted((roof.matmul_flops if roof else {}).items(), key=lambda item: -item[1])
    bandwidth = roof.memory_bytes_per_s if roof else None
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points] + [peak for _, peak in peaks]
    if bandwidth and peaks:
        xs.append(2 * peaks[0][1] / bandwidth)  # past the ridge
    x_low, x_high = _decades(xs)
    y_low, y_high = _decades(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        up = (math.log10(y) - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_frame()]
    for exponent in range(x_low, x_high + 1):
        x, _ = place(10.0**exponent, 10.0**y_low)
        anchor = "end" if exponent == x_high else "middle"
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="{anchor}">{_power(exponent)}</text>')
    for exponent in range(y_low, y_high + 1):
        _, y = place(10.0**x_low, 10.0**exponent)
        parts.append(f'<line class="axis" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{_rate(exponent)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">FLOPs a byte</text>')
    parts += _roofs(peaks, bandwidth, place, 10.0**x_low, 10.0**x_high, 10.0**y_low)
    total = sum(op.device_us for _, _, op in points)
    for x, y, op in sorted(points, key=lambda point: -point[2].device_us):
        across, down = place(x, y)
        radius = 2.5 + 11 * math.sqrt(op.device_us / total)
        name = text(f"{op.name} {op.shapes}: {1e-3 * op.device_us:.2f} ms, {y / 1e9:,.1f} GFLOP/s")
        colour = CLASS_COLOURS.get(op.kernel_class, CLASS_COLOURS[OTHER])
        parts.append(
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="{radius:.1f}" fill="#{colour:06x}"><title>{name}</title></circle>'
        )
    return _svg("roofline", parts)


def memory_over_time(found: MemoryAnalysis) -> str:
    """A stack of owners over the recorded steps; each column shows the moment of its largest total."""
    end = float(found.at_us[-1])
    edges = np.linspace(0.0, end, NUM_COLUMNS + 1)
    owners = [owner for owner in OWNERS if owner in found.by_owner]
    total = sum(found.by_owner.values(), np.zeros(len(found.at_us), dtype=np.int64))
    firsts = np.searchsorted(found.at_us, edges[:-1], side="right")
    stacks = np.zeros((NUM_COLUMNS, len(owners)))
    for column in range(NUM_COLUMNS):
        stop = int(firsts[column + 1]) if column + 1 < NUM_COLUMNS else len(total)
        first = max(0, int(firsts[column]) - 1)  # what held when the column began counts too
        top = first + int(np.argmax(total[first : max(stop, first + 1)]))
        stacks[column] = [found.by_owner[owner][top] for owner in owners]
    sums = np.cumsum(stacks, axis=1)
    high = max(1.0, float(found.peak_bytes)) * 1.05
    floor, span = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM
    x = LEFT + (WIDTH - LEFT - RIGHT) * np.linspace(0, 1, NUM_COLUMNS)
    parts = [_frame()]
    for k, owner in enumerate(owners):
        below = sums[:, k - 1] if k else np.zeros(NUM_COLUMNS)
        line = [f"{a:.1f},{floor - span * b / high:.1f}" for a, b in zip(x, sums[:, k], strict=True)]
        back = [f"{a:.1f},{floor - span * b / high:.1f}" for a, b in zip(x[::-1], below[::-1], strict=True)]
        parts.append(
            f'<polygon points="{" ".join(line + back)}" fill="#{OWNER_COLOURS[owner]:06x}"><title>{owner}</title></polygon>'
        )
    for share in (0.0, 0.5, 1.0):
        y = floor - span * share / 1.05
        parts.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{_size(share * found.peak_bytes)}</text>')
        at = LEFT + share * (WIDTH - LEFT - RIGHT)
        anchor = ("start", "middle", "end")[round(2 * share)]
        parts.append(f'<text x="{at:.1f}" y="{floor + 14}" text-anchor="{anchor}">{share * end / 1000:,.0f} ms</text>')
    at = LEFT + (WIDTH - LEFT - RIGHT) * found.peak_us / max(1e-9, end)
    parts.append(f'<line class="mark" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{floor}"/>')
    return _svg("memory over time by owner", parts)


def _roofs(
    peaks: Sequence[tuple[str, float]], bandwidth: float | None, place: Callable[[float, float], tuple[float, float]],
    x_low: float, x_high: float, y_low: float,
) -> list[str]:  # fmt: skip
    """The measured ceilings: the slope of memory and a flat line a dtype."""
    parts = []
    for k, (dtype, peak) in enumerate(peaks):
        ridge = max(x_low, peak / bandwidth) if bandwidth else x_low
        (x1, y1), (x2, _) = place(ridge, peak), place(x_high, peak)
        parts.append(f'<line class="roof" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y1:.1f}"/>')
        parts.append(f'<text class="roof" x="{x2 - 2:.1f}" y="{y1 - 4:.1f}" text-anchor="end">{text(dtype)}</text>')
        if bandwidth and k == 0:
            low = max(x_low, y_low / bandwidth)
            (x3, y3) = place(low, low * bandwidth)
            parts.append(f'<line class="roof" x1="{x3:.1f}" y1="{y3:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>')
    return parts


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -3 <= exponent <= 4 else f"1e{exponent}"


def _rate(exponent: int) -> str:
    for unit, least in (("P", 15), ("T", 12), ("G", 9), ("M", 6), ("k", 3)):
        if exponent >= least:
            return f"{10 ** (exponent - least)} {unit}"
    return f"{10.0**exponent:g}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _frame() -> str:
    return f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>'


def _svg(label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(label)}">{"".join(parts)}</svg>'
