"""Draws the Curves of `autotune scale`: tokens/s, MFU and device-hours (or cost) over devices, an SVG or a PNG.

Axes of devices and tokens/s are logarithmic, that of hours where they differ ten times. A line a stage, all stages in black;
dotted is what the fewest nodes would give if nothing were lost. The same Curves give the same bytes of SVG. Computes nothing;
matplotlib is imported when it draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vchitect_fast.autotune.scaling import TOTAL, Curve, Point
from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file

COLORS = ("#0b6e4f", "#4c6a92", "#c98f4a", "#8a7090", "#5bb98c", "#88a2c4", "#e3bd8c", "#bba8c0")
INK = "black"
Value = Callable[[Point], float | None]


def draw(curves: Sequence[Curve], path: str | Path, title: str, price: float | None = None) -> None:
    """Write the figure, whole or not at all; the suffix decides the format. UserError where the system refuses."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: a tenth of the size
    matplotlib.rcParams["svg.hashsalt"] = "vchitect-fast"  # the same Curves, the same bytes
    from matplotlib import pyplot

    figure, (speed, use, cost) = pyplot.subplots(1, 3, figsize=(11, 4), layout="constrained")
    drawn = [curve for curve in curves if curve.points]
    _lines(speed, drawn, lambda point: point.tokens_per_s)
    _ideal(speed, drawn, lambda point: point.tokens_per_s, grows=True)
    speed.set_title("visual tokens a second", fontsize=9)
    _lines(use, drawn, lambda point: None if point.mfu is None else 100 * point.mfu)
    use.set_title("MFU [%]", fontsize=9)
    value: Value = (lambda point: point.device_hours) if price is None else (lambda point: price * point.device_hours)
    _lines(cost, drawn, value)
    _ideal(cost, drawn, value, grows=False)
    cost.set_title("device-hours" if price is None else f"cost, at {price:g} a device-hour", fontsize=9)
    counts = sorted({point.num_devices for curve in drawn for point in curve.points})
    values = [at for curve in drawn for point in curve.points if (at := value(point))]
    _finish(speed, counts, logarithmic=True)
    _finish(use, counts, logarithmic=False)
    _finish(cost, counts, logarithmic=bool(values) and max(values) > 10 * min(values))
    figure.suptitle(title, fontsize=9)
    handles = [
        speed.plot([], [], "o-", color=_color(drawn, curve), label=curve.name or "best Plan")[0] for curve in drawn
    ]
    handles += speed.plot([], [], ":", color="#777777", label="if nothing were lost")
    figure.legend(
        handles=handles,
        fontsize=8,
        loc="outside lower center",
        ncols=len(handles) if len(handles) <= 6 else 4,
        frameon=False,
    )
    try:
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=150, metadata={"Date": None} if Path(path).suffix == ".svg" else None)
    except OSError as error:
        raise UserError(f"could not write {path} ({error}); free some space or choose another place.") from None
    finally:
        pyplot.close(figure)


def _lines(axes: Any, curves: Sequence[Curve], value: Value) -> None:
    for curve in curves:
        found = [(point.num_devices, value(point)) for point in curve.points]
        known = [(x, y) for x, y in found if y is not None]
        if known:
            wide = 2.0 if curve.name in ("", TOTAL) else 1.2
            axes.plot(*zip(*known, strict=True), "o-", color=_color(curves, curve), markersize=3.5, linewidth=wide)


def _ideal(axes: Any, curves: Sequence[Curve], value: Value, *, grows: bool) -> None:
    for curve in curves:
        first, last = curve.points[0], curve.points[-1]
        at = value(first)
        if at is not None:
            end = at * last.num_devices / first.num_devices if grows else at
            axes.plot([first.num_devices, last.num_devices], [at, end], ":", color="#777777", linewidth=1, zorder=0)


def _finish(axes: Any, counts: Sequence[int], *, logarithmic: bool) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=7, rotation=45 if len(counts) > 6 else 0)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: EngFormatter(sep="")(value) if value >= 1000 else f"{value:g}")
    axes.set_xlabel("devices", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _color(curves: Sequence[Curve], curve: Curve) -> str:
    if curve.name in ("", TOTAL):
        return INK
    return COLORS[[other.name for other in curves].index(curve.name) % len(COLORS)]
