"""Figures of curation's pages as hand-made SVG: one score's histogram with its rule, and several sets' shares overlaid.

A figure has 340 x 150 units, so that its letters are legible in a narrow column and not huge in a wide one; colours are
the page's. Numbers in, SVG out: nothing is read, and no text but the given names and numbers appears.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vchitect_fast.curation.dataset import counted
from vchitect_fast.curation.report_page import text
from vchitect_fast.curation.rules import Rule

WIDTH, HEIGHT = 340, 150
LEFT, RIGHT, TOP, BOTTOM = 8.0, 8.0, 22.0, 20.0  # margins around the plot
NUM_BINS = 32


def bins(values: Sequence[np.ndarray], cut: float | None = None, whole: bool = False) -> np.ndarray:
    """float64 [N+1]: edges of at most about NUM_BINS equal bins over the middle 99 % of the values of every set.

    `cut` lies on an edge; whole numbers lie between edges. What lies outside belongs to the outermost bins
    (`counts`): one odd clip must not squeeze all others into one bin.
    """
    lows, highs = zip(*(np.percentile(v, (0.5, 99.5)) for v in values if len(v)), strict=True)
    low, high = float(min(lows)), float(max(highs))
    if cut is not None:
        low, high = min(low, cut), max(high, cut)
    if whole:
        step = max(1, math.ceil((high - low + 1) / NUM_BINS))
        begin = math.floor(low) - 0.5
        begin -= 0 if cut is None else (begin - math.floor(cut) - 0.5) % step
        return np.arange(begin, math.ceil(high) + step + 0.5, step)
    high = high if high > low else low + max(abs(low), 1.0)  # one value: a bar, not a wall
    width = (high - low) / NUM_BINS
    first = low if cut is None else cut - math.ceil((cut - low) / width - 1e-9) * width
    return first + width * np.arange(max(1, math.ceil((high - first) / width - 1e-9)) + 1)


def counts(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """int64 [N]: values in each bin, those outside in the outermost."""
    inside = np.clip(values, edges[0], np.nextafter(edges[-1], -np.inf))
    return np.histogram(inside, edges)[0]


def histogram(keeps: np.ndarray, drops: np.ndarray, rule: Rule | None = None, whole: bool = False) -> str:
    """SVG of how many clips have which score: those that `rule` keeps and drops in two colours, its side shaded."""
    cut = float(rule.value) if rule else None
    if cut is not None and whole and rule and rule.sign in ("<", "<=", ">", ">="):
        # Whole numbers have bins of their own: the rule cuts between two of them.
        cut = math.floor(cut) + 0.5 if rule.sign in ("<=", ">") else math.ceil(cut) - 0.5
    edges = bins([np.concatenate([keeps, drops])], cut, whole)
    kept, dropped = counts(keeps, edges), counts(drops, edges)
    top = int((kept + dropped).max())
    x, y = _scales(edges, top)
    parts = []
    if rule and cut is not None and rule.sign in ("<", "<=", ">", ">="):
        side = (x(cut), WIDTH - RIGHT) if rule.sign[0] == "<" else (LEFT, x(cut))
        parts.append(
            f'<rect class="side" x="{side[0]:.1f}" y="{TOP:g}" width="{side[1] - side[0]:.1f}" height="{HEIGHT - TOP - BOTTOM:g}"/>'
        )
    gap = min(1.0, (x(edges[1]) - x(edges[0])) / 6)
    for k in range(len(edges) - 1):
        left, right = x(edges[k]) + gap / 2, x(edges[k + 1]) - gap / 2
        for below, num, kind in ((0, kept[k], "keep"), (kept[k], dropped[k], "drop")):
            if num:
                high = y(below + num)
                parts.append(
                    f'<rect class="{kind}" x="{left:.1f}" y="{high:.1f}" width="{right - left:.1f}" height="{y(below) - high:.1f}"/>'
                )
    parts.append(_axis(edges, x))
    parts.append(f'<text x="{LEFT:g}" y="12">{counted(top, "clip")} in the highest bar</text>')
    if rule and cut is not None:
        parts.append(
            f'<line class="cut" x1="{x(cut):.1f}" x2="{x(cut):.1f}" y1="{TOP - 6:g}" y2="{HEIGHT - BOTTOM:g}"/>'
        )
        parts.append(
            f'<text class="cut-text" x="{WIDTH - RIGHT:g}" y="12" text-anchor="end">keeps {text(rule.sign)} {_number(float(rule.value))}</text>'
        )
    return _svg(f"histogram of {len(keeps) + len(drops)} clips, {len(drops)} dropped", parts)


def shares(sets: Sequence[np.ndarray], middles: Sequence[float | None], whole: bool = False) -> str:
    """SVG of each set's distribution as a line of shares, its middle as a stroke; an empty set has none."""
    edges = bins(sets, whole=whole)
    found = [counts(values, edges) / max(1, len(values)) for values in sets]
    top = max(float(share.max()) for share in found)
    x, y = _scales(edges, top)
    parts = [_axis(edges, x), f'<text x="{LEFT:g}" y="12">{100 * top:.3g} % in the highest bin</text>']
    for k, (value, share) in enumerate(zip(middles, found, strict=True)):
        if value is None:
            continue
        corners = [f"{x(edges[0]):.1f},{y(0):.1f}"]
        for j, height in enumerate(share):
            corners += [f"{x(edges[j]):.1f},{y(height):.1f}", f"{x(edges[j + 1]):.1f},{y(height):.1f}"]
        corners.append(f"{x(edges[-1]):.1f},{y(0):.1f}")
        # Dashes as well as colours: told apart without seeing colour.
        dash = ("", "6 3", "2 2", "8 3 2 3", "1 3", "12 4")[k]
        parts.append(f'<polyline class="step s{k}" stroke-dasharray="{dash}" points="{" ".join(corners)}"/>')
        middle = x(min(max(value, edges[0]), edges[-1]))
        parts.append(
            f'<line class="middle s{k}" x1="{middle:.1f}" x2="{middle:.1f}" y1="{TOP - 6:g}" y2="{TOP + 3:g}"/>'
        )
    return _svg(f"distributions of {len(sets)} sets", parts)


class _Scale:
    """A linear map of [low, high] to [start, stop]."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.start, self.slope = low, start, (stop - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.slope


def _scales(edges: np.ndarray, top: float) -> tuple[_Scale, _Scale]:
    return _Scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT), _Scale(0, top or 1, HEIGHT - BOTTOM, TOP)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], about that many."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _axis(edges: np.ndarray, x: _Scale) -> str:
    floor = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{floor:g}" y2="{floor:g}"/>']
    for value in ticks(float(edges[0]), float(edges[-1])):
        at = x(value)
        anchor = "start" if at < LEFT + 12 else "end" if at > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{floor:g}" y2="{floor + 4:g}"/>')
        parts.append(f'<text x="{at:.1f}" y="{floor + 15:g}" text-anchor="{anchor}">{_number(value)}</text>')
    return "".join(parts)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.4g}"


def _svg(label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(label)}">{"".join(parts)}</svg>'
