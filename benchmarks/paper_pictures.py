"""Draws the paper's table and figures as predicted: three PNGs for docs/paper.md. Nothing is measured; matplotlib only.

    paper-table4.png   ratios within each row of Table IV, predicted and as printed; step time over the fraction offloaded
    paper-fig9.png     visual tokens a second over the frames, a panel a size; a line ends where memory does
    paper-fig8.png     step time of each stage, the codec's part apart
The same predictions give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vchitect_fast.benchmarks.figures import OTHER_COLORS, OURS_COLORS
from vchitect_fast.benchmarks.paper_scaling import OURS, SIZES, SYSTEMS, Point, Stage
from vchitect_fast.benchmarks.paper_table import COMBINATION, CONFIG, OFFLOADED_WITH, RECOMPUTATION, TABLE, Case
from vchitect_fast.benchmarks.paper_verdict import WITHIN, Ratio
from vchitect_fast.cluster import Cluster
from vchitect_fast.shapes import VideoShape

WORDS = "predicted from a cluster file, nothing measured"
ROW_COLORS = (OURS_COLORS[0], OURS_COLORS[1], OTHER_COLORS[3], OTHER_COLORS[0])


def draw(
    folder: Path,
    cluster: Cluster,
    found: Sequence[Ratio],
    points: Sequence[Point],
    stages: Mapping[str, Sequence[Stage]],
) -> list[Path]:
    """All three, into an existing folder or a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "table4": table_four(cluster, found),
        "fig9": figure_nine(cluster, points),
        "fig8": figure_eight(cluster, stages),
    }
    paths = []
    for name, figure in figures.items():
        path = folder / f"paper-{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        paths.append(path)
    return paths


def table_four(cluster: Cluster, found: Sequence[Ratio]) -> Any:
    """Ratios on the left, the knee on the right."""
    figure, (left, right) = _panels(2, 10.5, 4.2)
    for y, ratio in enumerate(found):
        color = ROW_COLORS[[row.shape for row in TABLE].index(ratio.cell.shape)]
        left.plot([ratio.paper * (1 - WITHIN), ratio.paper * (1 + WITHIN)], [y, y], color="#cccccc", linewidth=7)
        left.plot(ratio.paper, y, "|", color="black", markersize=12)
        left.plot(ratio.predicted, y, "o", color=color, markersize=6)
        left.annotate(f"{ratio.error:+.0%}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    left.set_yticks(range(len(found)), [f"{r.cell.shape}, {r.cell.strategy}" for r in found], fontsize=8)
    left.set_ylim(len(found) - 0.5, -0.5)
    left.set_xscale("log")
    ticks = (0.9, 1, 1.5, 2, 3, 4)
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    left.set_xlabel(f"time / that of {RECOMPUTATION} in the row (log)", fontsize=8)
    left.plot([], [], "o", color="black", label="predicted")
    left.plot([], [], "|", color="black", markersize=12, label=f"paper; grey: within {WITHIN:.0%}")
    left.legend(fontsize=8, frameon=False, loc="upper right")
    for row, color in zip(TABLE, ROW_COLORS, strict=True):
        case = Case.of(cluster, VideoShape.parse(row.shape)[0])
        fractions = [number / CONFIG.num_layers for number in range(CONFIG.num_layers + 1)]
        runs = [case.run(0.0, fraction) for fraction in fractions]
        paid = [run.least.cost.pressure_s for run in runs]
        hidden = [run.hidden_s - cost for run, cost in zip(runs, paid, strict=True)]
        ours = [run.simulated_s - cost for run, cost in zip(runs, paid, strict=True)]
        right.plot(fractions, [value / hidden[0] for value in hidden], color=color, label=row.shape)
        right.plot(fractions, [value / hidden[0] for value in ours], color=color, linestyle=":", linewidth=1.2)
    right.axvline(OFFLOADED_WITH, ymax=0.55, color="black", linewidth=0.8)
    right.annotate(f"{COMBINATION}: {OFFLOADED_WITH}", (OFFLOADED_WITH, 0.53), xycoords=("data", "axes fraction"),
                   xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    right.set_xlabel("fraction of the blocks offloaded, nothing recomputed, memory aside", fontsize=8)
    right.set_ylabel("step time / that without offload", fontsize=8)
    right.set_ylim(bottom=0.8)
    right.plot([], [], color="black", linestyle=":", label="under this project's runtime")
    right.legend(fontsize=8, frameon=False, loc="upper left")
    figure.suptitle(f"Table IV: two A100s, ZeRO-3; {WORDS}", fontsize=10)
    return figure


def figure_nine(cluster: Cluster, points: Sequence[Point]) -> Any:
    """A panel a size."""
    figure, panels = _panels(len(SIZES), 11, 3.9, sharey=True)
    styles = {SYSTEMS[0]: (OURS_COLORS[0], "o-"), OURS: (OURS_COLORS[1], ".:")}
    styles |= {SYSTEMS[1]: (OTHER_COLORS[3], "s-"), SYSTEMS[2]: (OTHER_COLORS[0], "^-")}
    for axes, (width, height) in zip(panels, SIZES, strict=True):
        for system, (color, style) in styles.items():
            here = [p for p in points if p.system == system and (p.shape.width, p.shape.height) == (width, height)]
            fitting = [p for p in here if p.outcome is not None]
            frames, rates = [p.shape.num_frames for p in fitting], [p.tokens_per_s / 1e3 for p in fitting]
            axes.plot(frames, rates, style, color=color, markersize=4, label=system.name)
            if len(fitting) < len(here):
                end = fitting[-1]
                axes.plot(end.shape.num_frames, rates[-1], "x", color=color, markersize=10)
                axes.annotate(f"{end.shape.num_visual_tokens() / 1e6:.2f} M", (frames[-1], rates[-1]), xytext=(0, -20), ha="center",
                              textcoords="offset points", fontsize=8, color=color)  # fmt: skip
        axes.set_title(f"{width}x{height}", fontsize=9)
        axes.set_xlabel("frames", fontsize=8)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("visual tokens a second, thousands", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(
        f"Fig. 9: 4 nodes x 6 A100s, 24 samples a step; x: no longer video fits (its tokens); {WORDS}", fontsize=10
    )
    return figure


def figure_eight(cluster: Cluster, stages: Mapping[str, Sequence[Stage]]) -> Any:
    """A panel a shape."""
    figure, panels = _panels(len(stages), 9, 2.9)
    for axes, (shape, found) in zip(panels, stages.items(), strict=True):
        for y, stage in enumerate(found):
            rest = stage.step_s - stage.encode_s
            axes.barh(y, rest, color=OURS_COLORS[0], height=0.6)
            axes.barh(y, stage.encode_s, left=rest, color=OTHER_COLORS[3], height=0.6)
            less = "" if y == 0 else f" ({stage.step_s / found[y - 1].step_s - 1:+.0%})"
            axes.text(stage.step_s, y, f" {stage.step_s:.2f} s{less}", va="center", fontsize=8)
        axes.set_yticks(range(len(found)), [stage.name for stage in found], fontsize=8)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlim(0, 1.35 * max(stage.step_s for stage in found))
        axes.set_xlabel("seconds of a step of one sample", fontsize=8)
        axes.set_title(shape, fontsize=9)
    handles = [panels[0].barh(0, 0, color=OURS_COLORS[0]), panels[0].barh(0, 0, color=OTHER_COLORS[3])]
    figure.legend(
        handles, ["transformer", "encoding video"], fontsize=8, frameon=False, loc="outside lower center", ncols=2
    )
    figure.suptitle(f"Fig. 8: one node of 8 A100s, SP 8; {WORDS}", fontsize=10)
    return figure


def _panels(number: int, width: float, height: float, *, sharey: bool = False) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, number, figsize=(width, height), layout="constrained", sharey=sharey)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, panels
