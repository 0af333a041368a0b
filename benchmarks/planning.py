"""How long the planner plans: processor seconds of one core and simulated steps, beside what it may take.

    python -m vchitect_fast.benchmarks.planning                  all three cases, three rounds
    python -m vchitect_fast.benchmarks.planning --rounds 1 --json

    64 devices, 6 shapes      `autotune plan`: vchitect-2b on 8 nodes of 8xh100, a sample a device     at most 5 s
    4096 devices, 6 shapes    the same on 512 nodes                                                    at most 60 s
    recipe, 10 sizes          `autotune scale --recipe examples/vchitect-2b.yaml`, 1 to 512 nodes      at most 60 s

Processor time, not wall time: what else runs on the machine delays a process without adding to it, though it slows its caches.
No alternative answers the same question. How many steps are simulated does not depend on the machine; a test guards it.
Records go to benchmarks/results/ (`--out` elsewhere).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from unittest.mock import patch

from rich import box
from rich.console import Console
from rich.table import Table

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.model import StepModel
from vchitect_fast.autotune.scale import NODES, Search, plans_of
from vchitect_fast.autotune.scaling import asked, stages_of
from vchitect_fast.autotune.search import plan_run
from vchitect_fast.benchmarks.record import Origin, Record, append, origin, results_file
from vchitect_fast.benchmarks.timing import Samples, summary
from vchitect_fast.cluster import Cluster
from vchitect_fast.errors import UserError
from vchitect_fast.shapes import VideoShape

SHAPES = ("32x256x256", "32x512x384", "40x768x432", "128x256x256", "16x1280x720", "48x1280x720")
RECIPE = "examples/vchitect-2b.yaml"
NUM_TEXT_TOKENS, DTYPE = 333, "bfloat16"


@dataclass(frozen=True)
class Case:
    """What is planned, and the processor seconds that it may take."""

    name: str
    goal_s: float
    run: Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """Processor seconds over all rounds, and the steps that one of them simulated."""

    case: Case
    samples: Samples
    num_simulated: int

    @property
    def verdict(self) -> str:
        """Of the median, on this machine."""
        return "pass" if self.samples.median_s <= self.case.goal_s else "fall short"


def on_nodes(num_nodes: int, names: Sequence[str] = SHAPES) -> Callable[[], object]:
    """One Plan for these shapes on so many nodes of eight H100s."""
    shapes = [VideoShape.parse(text)[0] for text in names]
    cluster = replace(Cluster.load("8xh100"), num_nodes=num_nodes)
    return lambda: plan_run(
        preset("vchitect-2b"), shapes, cluster, batch=cluster.num_devices, num_text_tokens=NUM_TEXT_TOKENS, dtype=DTYPE
    )


def of_recipe(path: str, nodes: Sequence[int] = NODES) -> Callable[[], object]:
    """Every stage of a recipe on every number of nodes. UserError for a file that is none."""
    model, stages = stages_of(path)
    items = asked(Cluster.load("8xh100"), stages, nodes, weak=False)
    search = Search(preset(model), NUM_TEXT_TOKENS, DTYPE)
    return lambda: plans_of(search, items, 1, quiet=True)


def cases(recipe: str) -> list[Case]:
    """All three."""
    return [
        Case("64 devices, 6 shapes", 5.0, on_nodes(8)),
        Case("4096 devices, 6 shapes", 60.0, on_nodes(512)),
        Case("recipe, 10 sizes", 60.0, of_recipe(recipe)),
    ]


def simulated(run: Callable[[], object]) -> int:
    """How many steps a search simulates."""
    with patch.object(StepModel, "simulate", autospec=True, side_effect=StepModel.simulate) as counted:
        run()
    return counted.call_count


def measure(case: Case, num_rounds: int) -> Measured:
    """The steps are counted in a round of their own, which also warms up."""
    number, samples = simulated(case.run), []
    for _ in range(num_rounds):
        begin = time.process_time()
        case.run()
        samples.append(time.process_time() - begin)
    return Measured(case, summary(samples), number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, also where a goal is missed: another machine may be slow; 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m vchitect_fast.benchmarks.planning",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed rounds of each case (default: 3)")
    parser.add_argument("--recipe", default=RECIPE, metavar="YAML", help=f"of the third case (default: {RECIPE})")
    parser.add_argument("--out", metavar="FILE", help="where Records go (default: benchmarks/results/DEVICE.jsonl)")
    parser.add_argument("--json", action="store_true", help="print the Records instead of a table")
    args = parser.parse_args(arguments)
    try:
        if args.rounds < 1:
            raise UserError(f"--rounds must be a whole number from 1 up, got {args.rounds}; leave it out for 3.")
        several = cases(args.recipe)
        found = [measure(case, args.rounds) for case in track(several, args.json)]
        about = origin("python -m vchitect_fast.benchmarks.planning")
        records = [record_of(item, about) for item in found]
        for record in records:
            append(args.out or results_file(about.device), record)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([asdict(record) for record in records]))
    else:
        console = Console(highlight=False)
        (console if console.is_terminal else Console(highlight=False, width=120)).print(table(found))
    return 0


def track(several: Sequence[Case], quiet: bool) -> Iterable[Case]:
    """A bar on standard error."""
    from rich.progress import track as bar

    return bar(several, "planning", console=Console(stderr=True), transient=True, disable=quiet)


def record_of(item: Measured, about: Origin) -> Record:
    """Of one case."""
    rate = 1 / item.samples.median_s
    return Record(
        "planning", "plan_run (ours)", item.case.name, "-", "-", **asdict(item.samples), rate=rate, unit="1/s",
        error_vs_fp64=None, ceiling=None, saved_bytes=None, **asdict(about),
    )  # fmt: skip


def table(found: Sequence[Measured]) -> Table:
    """A row a case."""
    shown = Table(title="planning, one core", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("case", "processor time", "p10 - p90", "rounds", "steps simulated", "goal", "here"):
        shown.add_column(heading, justify="left" if heading in ("case", "here") else "right")
    for item in found:
        samples = item.samples
        shown.add_row(
            item.case.name, f"{samples.median_s:.2f} s", f"{samples.p10_s:.2f} - {samples.p90_s:.2f} s", str(samples.n),
            f"{item.num_simulated:,}", f"at most {item.case.goal_s:.0f} s", item.verdict,
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    sys.exit(main())
