"""Shows the predictions of the paper's table and figures to a person, beside what the paper printed. Rendering only, with rich.

What is off by more than WITHIN is red and says so; what does not run says why. Every figure is computed elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vchitect_fast.benchmarks.paper_scaling import FRAMES, LONGEST, PAPER_STAGES, SYSTEMS, Point, Stage
from vchitect_fast.benchmarks.paper_table import RECOMPUTATION, Cell
from vchitect_fast.benchmarks.paper_verdict import WITHIN, Summary, own_factor, ratios, summary, times_flops
from vchitect_fast.shapes import VideoShape

SHOWN = (8, 16, 32, 64, 80, 144)  # of FRAMES
GIB, GB = 2**30, 10**9


def table_four(cells: Sequence[Cell]) -> RenderableType:
    """Every cell of Table IV, and what the rows say together."""
    found = summary(cells)
    by_cell = {(ratio.cell.shape, ratio.cell.strategy): ratio for ratio in ratios(cells)}
    table = _table(
        f"Table IV: 2 A100s, ZeRO-3; predicted seconds x {found.factor:.2f}, the one fitted number",
        ("shape", "strategy"),
        ("paper", "predicted", "paper's ratio", "predicted", "off by", "this runtime", "peak", "pinned a rank"),
    )
    for cell in cells:
        ratio = by_cell.get((cell.shape, cell.strategy))
        shown = cell.run.failure or f"{found.factor * cell.run.hidden_s:.1f}"
        wrong = not cell.agrees or (ratio is not None and abs(ratio.error) > WITHIN)
        table.add_row(
            cell.shape,
            cell.strategy,
            str(cell.paper),
            Text(shown, style="" if cell.agrees else "red"),
            *_ratio(cell, ratio.paper if ratio else None, ratio.predicted if ratio else None),
            Text(f"{ratio.error:+.1%}" if ratio else "", style="red" if wrong else "green"),
            f"{cell.run.simulated_s / cell.run.hidden_s:.2f}" if not cell.run.failure else "",
            f"{cell.run.least.memory.peak_bytes / GIB:.0f} GiB",
            f"{cell.run.outcome.host_bytes / GB:.0f} GB" if cell.run.outcome.host_bytes else "",
        )
        if cell is [other for other in cells if other.shape == cell.shape][-1]:
            table.add_section()
    notes = (
        f"ratios are to {RECOMPUTATION}; 'this runtime': its simulated time over the time where copies hide perfectly, which "
        "is what stands to its left; peak: with what leaves gone at once",
    )
    return Group(table, *(Text(line, style="dim") for line in notes), _rows(cells), *map(Text, said(found)))


def said(found: Summary) -> list[str]:
    """The claims about the table in sentences."""
    gains = ", ".join(f"{ours:.1%} ({paper:.1%})" for ours, paper in found.gains.values())
    knees = ", ".join(f"{shape} {knee:.0%}" for shape, knee in found.knees.items())
    order = "; ".join(f"{shape}: {a} is faster than {b} there, slower here" for shape, a, b in found.out_of_order)
    return [
        f"cells that run, or fail in the same way: {found.num_agreeing} of {found.num_cells}",
        f"ratios within {WITHIN:.0%}: {found.num_within} of {found.num_ratios}, worst {found.worst:+.1%}",
        f"order of the strategies: {order or 'the same in every row'}",
        f"combination against recomputation, less time, predicted (paper's): {gains}",
        f"offload alone is hidden up to, of the blocks: {knees}",
    ]


def sensitivity(found: Mapping[str, Summary]) -> RenderableType:
    """The table again with one sourced number changed."""
    numbers = ("cells agree", "ratios within", "worst", "order", "hidden up to", "combination gains")
    table = _table("what it hangs on", ("the cluster",), numbers)
    for name, item in found.items():
        gains = [ours for ours, _ in item.gains.values()]
        table.add_row(
            name,
            f"{item.num_agreeing} of {item.num_cells}",
            f"{item.num_within} of {item.num_ratios}",
            f"{item.worst:+.0%}",
            "the same" if not item.out_of_order else f"{len(item.out_of_order)} turned",
            _range(list(item.knees.values())),
            _range(gains, digits=1),
        )
    return table


def figure_nine(
    points: Sequence[Point], slower: Sequence[Point], ends: Mapping[tuple[tuple[int, int], str], VideoShape | None]
) -> RenderableType:
    """Throughput of a system at some numbers of frames, and the longest video that fits; then the claims, on both networks."""
    frames = [frames for frames in FRAMES if frames in SHOWN]
    table = _table(
        "Fig. 9: 4 nodes x 6 A100s, 24 samples a step, thousands of visual tokens a second", ("size", "system"),
        (*(f"{number} fr." for number in frames), "longest", "tokens"),
    )  # fmt: skip
    rates = {(point.shape, point.system.name): point.tokens_per_s for point in points}
    for ((width, height), name), end in ends.items():
        here = [rates[VideoShape(number, width, height), name] for number in frames]
        shown = ["-" if not rate else f"{rate / 1e3:.0f}" for rate in here]
        tokens = "-" if end is None else f"{end.num_visual_tokens() / 1e6:.2f} M"
        longest = "-" if end is None else f"{end.num_frames}{'+' if end.num_frames == LONGEST else ''} fr."
        table.add_row(f"{width}x{height}", name, *shown, longest, tokens)
    return Group(table, Text(f"as declared: {lead(points)}\nat a twentieth of the rate inside: {lead(slower)}\n"))


def lead(points: Sequence[Point]) -> str:
    """How far the first system is ahead of the better of the other two, over all sizes and frames."""
    first, *others = (system.name for system in SYSTEMS)
    rates = {(point.shape, point.system.name): point.tokens_per_s for point in points}
    best = {shape: max(rates[shape, other] for other in others) for shape, name in rates if name == first}
    times = [rates[shape, first] / rate for shape, rate in best.items() if rate]
    lost = sum(time <= 1 for time in times)
    return (
        f"{first}: {min(times):.2f} to {max(times):.2f} times the better of the other two, slower at {lost} of {len(times)} "
        f"shapes; at {len(best) - len(times)} more the others do not fit"
    )


def figure_eight(stages: Mapping[str, Sequence[Stage]]) -> Table:
    """Less time than the stage before, and the paper's word."""
    table = _table(
        "Fig. 8: one node of 8 A100s, SP 8", ("shape", "stage"), ("step", "of it encoding", "less time", "paper's")
    )
    for shape, found in stages.items():
        for stage, before in zip(found, [None, *found], strict=False):
            gain = "" if before is None else f"{1 - stage.step_s / before.step_s:.1%}"
            table.add_row(
                shape, stage.name, f"{stage.step_s:.2f} s", f"{stage.encode_s:.2f} s", gain, PAPER_STAGES[stage.name]
            )
    return table


def _rows(cells: Sequence[Cell]) -> Table:
    numbers = ("FLOPs", "paper's time", "factor of its own")
    table = _table("between rows, in units of the first", ("shape",), numbers)
    first = cells[0].shape
    for shape in dict.fromkeys(cell.shape for cell in cells):
        flops, seconds = times_flops(shape, first), _seconds(cells, shape) / _seconds(cells, first)
        table.add_row(shape, f"{flops:.2f}", f"{seconds:.2f}", f"{own_factor(cells, shape):.2f}")
    return table


def _seconds(cells: Sequence[Cell], shape: str) -> float:
    [seconds] = [cell.paper for cell in cells if (cell.shape, cell.strategy) == (shape, RECOMPUTATION)]
    assert isinstance(seconds, float)
    return seconds


def _ratio(cell: Cell, paper: float | None, predicted: float | None) -> tuple[str, str]:
    if cell.strategy == RECOMPUTATION:
        return "1", "1"
    return tuple("" if value is None else f"{value:.3f}" for value in (paper, predicted))  # type: ignore[return-value]


def _range(values: Sequence[float], digits: int = 0) -> str:
    return f"{min(values):.{digits}%} to {max(values):.{digits}%}"


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right")
    return table
