"""Redraws every figure from results/*.jsonl: bars of ours beside the alternatives, and the roofline. Nothing is measured.

    python -m vchitect_fast.benchmarks.figures [RESULTS] [FIGURES]     default: benchmarks/results, benchmarks/figures

One file a device and bench, NAME.svg, plus DEVICE-roofline.svg. Bars are median time over the best alternative's of the same
place, with p10 and p90: a ratio, so that devices and shapes share an axis. An interpreted kernel is no speed and gets no
bar. The same Records give the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vchitect_fast.benchmarks.case import is_interpreted, is_ours
from vchitect_fast.benchmarks.goals import best
from vchitect_fast.benchmarks.record import BOTH, RESULTS, Record, latest, load
from vchitect_fast.errors import UserError

FIGURES = Path("benchmarks/figures")
OURS_COLORS = ("#0b6e4f", "#5bb98c", "#a8dcc1")
OTHER_COLORS = ("#4c6a92", "#88a2c4", "#b9c8dd", "#c98f4a", "#e3bd8c", "#8a7090", "#bba8c0", "#777777", "#aaaaaa")


def main(arguments: Sequence[str]) -> int:
    """Draw; prints the files. Exit code 2 and one sentence when there is nothing to draw from."""
    places = [*map(Path, arguments), *(RESULTS, FIGURES)[len(arguments) :]]
    results, figures = places[:2]
    try:
        drawn = draw_all(results, figures)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(map(str, drawn)))
    return 0


def draw_all(results: Path, figures: Path) -> list[Path]:
    """Every figure of every results file; UserError when there is none."""
    files = sorted(results.glob("*.jsonl"))
    if not files:
        raise UserError(f"expected *.jsonl in {results}, found none; run `vchitect-fast bench` first.")
    figures.mkdir(parents=True, exist_ok=True)
    drawn = []
    for file in files:
        records = [record for record in latest(load(file)).values() if not is_interpreted(record.provider)]
        for bench in dict.fromkeys(record.bench for record in records):
            chart = bars([record for record in records if record.bench == bench])
            drawn += _save(chart, figures / f"{file.stem}-{_slug(bench)}.svg")
        drawn += _save(roofline(records), figures / f"{file.stem}-roofline.svg")
    return drawn


def bars(records: Sequence[Record]) -> Any | None:
    """A group of bars each shape and direction, time over the best alternative's; None where there is no alternative."""
    places = []
    for place in dict.fromkeys((record.shape, record.direction) for record in records):
        at = [record for record in records if (record.shape, record.direction) == place]
        other = best(at, ours=False)
        if other and best(at, ours=True):
            places.append((place, at, other))
    if not places:
        return None
    colors = _colors([record.provider for _, at, _ in places for record in at])
    num_bars = sum(len(at) + 1 for _, at, _ in places)
    figure, axes = _axes(7.5, 1.7 + 0.2 * num_bars)
    y, ticks = 0.0, []
    longest = max(record.median_s / other.median_s for _, at, other in places for record in at)
    for (shape, direction), at, other in places:
        ticks.append((y + (len(at) - 1) / 2, f"{shape}\n{direction}" if direction != "-" else shape))
        for record in at:
            ratio, low, high = (value / other.median_s for value in (record.median_s, record.p10_s, record.p90_s))
            axes.barh(y, ratio, color=colors[record.provider], height=0.85)
            axes.plot([low, min(high, 1.12 * longest)], [y, y], color="black", linewidth=0.8)
            axes.text(
                min(max(ratio, high), 1.12 * longest) + 0.01 * longest, y, f"{ratio:.2f}", va="center", fontsize=7
            )
            y += 1
        y += 1
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.set_ylim(y - 1, -1)
    axes.set_xlim(0, 1.2 * longest)
    axes.set_xlabel(
        "median time / that of the best alternative (shorter is faster); line: p10 to p90, cut at the frame", fontsize=8
    )
    first = records[0]
    figure.suptitle(f"{first.bench}\n{_where(first)}", fontsize=9)
    handles = [axes.barh(0, 0, color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, fontsize=7, loc="outside lower center", ncols=3, frameon=False)
    return figure


def roofline(records: Sequence[Record]) -> Any | None:
    """Rate over the run's own ceiling, the fastest of ours and of the others, by bench and direction; None if no rates."""
    rated = [r for r in records if r.rate is not None and r.ceiling and r.direction != BOTH]
    rows = list(dict.fromkeys((r.bench, r.direction, r.unit) for r in rated))
    rows = [row for row in rows if any(is_ours(r.provider) for r in rated if (r.bench, r.direction, r.unit) == row)]
    if not rows:
        return None
    figure, axes = _axes(7.5, 1.7 + 0.3 * len(rows))
    for y, row in enumerate(rows):
        at = [r for r in rated if (r.bench, r.direction, r.unit) == row]
        for shape in dict.fromkeys(r.shape for r in at):
            here = [r for r in at if r.shape == shape]
            for mine, color, marker in ((False, OTHER_COLORS[0], "|"), (True, OURS_COLORS[0], "o")):
                fastest = best(here, ours=mine)
                if fastest and fastest.rate and fastest.ceiling:
                    axes.plot(100 * fastest.rate / fastest.ceiling, y, marker, color=color, markersize=7, alpha=0.8)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_yticks(
        range(len(rows)), [f"{bench} {way if way != '-' else ''} [{unit}]" for bench, way, unit in rows], fontsize=8
    )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("% of the ceiling measured in the same run (matmul TFLOP/s, copy GB/s)", fontsize=8)
    figure.suptitle(f"each op against the roof that bounds it\n{_where(rated[0])}", fontsize=9)
    axes.plot([], [], "o", color=OURS_COLORS[0], label="ours, a dot a shape")
    axes.plot([], [], "|", color=OTHER_COLORS[0], label="best alternative")
    figure.legend(fontsize=7, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: a tenth of the size
    matplotlib.rcParams["svg.hashsalt"] = "vchitect-fast"  # the same Records, the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any | None, path: Path) -> list[Path]:
    from matplotlib import pyplot

    if figure is None:
        return []
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return [path]


def _colors(providers: Sequence[str]) -> dict[str, str]:
    names = list(dict.fromkeys(providers))
    palette = {True: iter(OURS_COLORS * 9), False: iter(OTHER_COLORS * 9)}
    return {name: next(palette[is_ours(name)]) for name in names}


def _where(record: Record) -> str:
    return f"{record.device}, torch {record.torch}, {record.date[:10]}"


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
