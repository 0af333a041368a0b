"""The planner against the Vchitect-2.0 paper: Table IV, Fig. 8 and Fig. 9 predicted from a cluster file, beside what it printed.

    python -m vchitect_fast.benchmarks.paper [--json] [--figures docs/images] [--out FILE]

Everything here is a PREDICTION: no GPU is needed and none is used. Constants come from the cluster file and its sources; one
number, a factor for the batch that the table does not state, is fitted to the table. What does not come out is shown:
docs/paper.md explains it. Records, which say that they are predictions, go to benchmarks/results/predicted/, which the
figures of measurements do not read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from vchitect_fast.benchmarks.paper_report import figure_eight, figure_nine, sensitivity, table_four
from vchitect_fast.benchmarks.paper_scaling import (
    ENCODED,
    FRAMES,
    OURS,
    SIZES,
    SYSTEMS,
    Point,
    Stage,
    curves,
    longest,
    twenty_times_slower,
    workflow,
)
from vchitect_fast.benchmarks.paper_table import CLUSTER, DTYPE, SOURCE, Cell, predict
from vchitect_fast.benchmarks.paper_verdict import Summary, ratios, summary, variants
from vchitect_fast.benchmarks.record import BOTH, RESULTS, Record, append, origin
from vchitect_fast.cluster import Cluster
from vchitect_fast.errors import UserError
from vchitect_fast.shapes import VideoShape

T = TypeVar("T")
PREDICTED = RESULTS / "predicted"
WORD = "predicted, not measured"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 and one sentence for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m vchitect_fast.benchmarks.paper",
        description=__doc__.split("\n")[0],
        epilog="example: python -m vchitect_fast.benchmarks.paper --figures docs/images",
    )
    parser.add_argument("--cluster", default=CLUSTER, help=f"name or file of a cluster ({CLUSTER})")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--figures", type=Path, help="draw the PNGs into this folder; none are drawn without it")
    parser.add_argument("--out", type=Path, help=f"Records go here instead of {PREDICTED}/CLUSTER.jsonl")
    args = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        cluster = Cluster.load(args.cluster)
        found = Found.of(cluster)
        if args.json:
            print(json.dumps(found.to_json(), indent=1))
        else:
            found.show()
        found.write(args.out, args.figures, given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Found:
    """Everything that is predicted from one cluster file."""

    cluster: Cluster
    cells: Sequence[Cell]
    changed: dict[str, Summary]  # by what was changed in the cluster
    points: Sequence[Point]
    slower: Sequence[Point]  # the same with the paper's word on its network
    ends: dict[tuple[tuple[int, int], str], VideoShape | None]  # longest video, by size and system
    stages: dict[str, list[Stage]]  # by shape

    @classmethod
    def of(cls, cluster: Cluster) -> Found:
        """Half a minute on one core, with a bar."""
        with Progress(console=Console(stderr=True), transient=True) as progress:

            def each(items: Iterable[T], total: int, what: str) -> Iterable[T]:
                return progress.track(items, total=total, description=what)

            number = len(SIZES) * (len(SYSTEMS) + 1)
            others, kinds = variants(cluster), [(size, s) for size in SIZES for s in (*SYSTEMS, OURS)]
            return cls(
                cluster=cluster,
                cells=predict(cluster),
                changed={name: summary(predict(x)) for name, x in each(others.items(), len(others), "Table IV")},
                points=list(each(curves(cluster), number * len(FRAMES), "Fig. 9")),
                slower=list(each(curves(twenty_times_slower(cluster)), number * len(FRAMES), "Fig. 9, slower network")),
                ends={(size, s.name): longest(cluster, s, *size) for size, s in each(kinds, number, "longest videos")},
                stages={str(shape): workflow(cluster, shape) for shape in each(ENCODED, len(ENCODED), "Fig. 8")},
            )

    def show(self) -> None:
        """Tables on the terminal."""
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(f"{SOURCE}\nall of it {WORD}, from {self.cluster.name}\n")
        console.print(table_four(self.cells))
        console.print(sensitivity(self.changed))
        console.print(figure_nine(self.points, self.slower, self.ends))
        console.print(figure_eight(self.stages))

    def write(self, out: Path | None, figures: Path | None, given: Sequence[str]) -> None:
        """Records always, PNGs where a folder is named; says where."""
        if figures:
            from vchitect_fast.benchmarks.paper_pictures import draw

            for path in draw(figures, self.cluster, ratios(self.cells), self.points, self.stages):
                print(path, file=sys.stderr)
        out = out or PREDICTED / f"{self.cluster.name}.jsonl"
        made = records(self.cluster, self.cells, " ".join(["python -m vchitect_fast.benchmarks.paper", *given]))
        for record in made:
            append(out, record)
        print(f"{len(made)} Records, {WORD}, in {out}", file=sys.stderr)

    def to_json(self) -> dict[str, Any]:
        """What the tables show; seconds, bytes, tokens a second."""
        return {
            "kind": WORD,
            "source": SOURCE,
            "cluster": self.cluster.name,
            "table_4": _table_four(self.cells),
            "sensitivity": {name: asdict(found) for name, found in self.changed.items()},
            "figure_9": [_point(point) for point in self.points],
            "figure_9_slower_network": [_point(point) for point in self.slower],
            "longest": [
                {"size": f"{width}x{height}", "system": name, "shape": shape and str(shape)}
                for ((width, height), name), shape in self.ends.items()
            ],
            "figure_8": {shape: [asdict(stage) for stage in found] for shape, found in self.stages.items()},
        }


def _table_four(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    by_cell = {(ratio.cell.shape, ratio.cell.strategy): ratio for ratio in ratios(cells)}
    found = []
    for cell in cells:
        ratio = by_cell.get((cell.shape, cell.strategy))
        found.append(
            {
                "shape": cell.shape,
                "strategy": cell.strategy,
                "paper": cell.paper,
                "predicted_s": cell.step_s,
                "failure": cell.run.failure,
                "simulated_s": cell.simulated_s,
                "ratio": ratio and ratio.predicted,
                "paper_ratio": ratio and ratio.paper,
                "parts_s": cell.run.outcome.cost.parts(),
                "peak_bytes": cell.run.least.memory.peak_bytes,
                "host_bytes": cell.run.outcome.host_bytes,
                "left_out": cell.run.outcome.left_out,
            }
        )
    return found


def _point(point: Point) -> dict[str, Any]:
    fits = point.outcome is not None
    return {"system": point.system.name, "shape": str(point.shape), "tokens_per_s": point.tokens_per_s, "fits": fits}


def records(cluster: Cluster, cells: Sequence[Cell], command: str) -> list[Record]:
    """One for each cell that runs; provider and device say that nothing was measured."""
    here = asdict(origin(command)) | {"device": f"{cluster.device.name} ({WORD})"}
    return [
        Record(
            bench="Table IV of the paper", provider=f"planner, {cell.strategy} ({WORD})", shape=cell.shape, dtype=DTYPE,
            direction=BOTH, n=1, median_s=cell.step_s, p10_s=cell.step_s, p90_s=cell.step_s, rate=None, unit=None,
            error_vs_fp64=None, ceiling=None, saved_bytes=None, **here,
        )
        for cell in cells
        if cell.step_s is not None
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
