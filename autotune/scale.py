"""`vchitect-fast autotune scale`: step time, MFU, device-hours and cost against the number of nodes, nothing run.

    --cluster C --model M --shapes ... --batch B    one run of --samples samples, equal steps of each shape
    --cluster C --recipe recipe.yaml                all stages of a recipe: their shapes, weights, batches and steps
    --nodes 1 2 4 ...   --weak   --price P   --figure FILE.svg   --jobs N

Options, table and files; scaling.py adds up, scale_figure.py draws. Prices have no default, and no currency.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from vchitect_fast.autotune.report import gib, seconds
from vchitect_fast.autotune.scaling import (
    EXPOSED,
    Asked,
    Curve,
    Planner,
    Point,
    Stage,
    asked,
    attempt,
    curves,
    stages_of,
)
from vchitect_fast.autotune.search import plan_run
from vchitect_fast.cluster import Cluster
from vchitect_fast.errors import UserError
from vchitect_fast.plan import Plan
from vchitect_fast.shapes import VideoShape

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vchitect_fast.architecture import TransformerConfig

NODES = tuple(2**power for power in range(10))  # 1 to 512
SAMPLES = 1_000_000
HEADINGS = (
    "nodes", "devices", "mesh", "step", "tokens/s", "MFU", "efficiency", "not hidden", "peak", "device-hours",
)  # fmt: skip
SUFFIXES = (".svg", ".png")
EXPOSED_NAMES = {"exchange_s": "exchange", "gather_s": "gather", "copy_s": "copy"}


def add_arguments(group: Any) -> None:
    """Options of the verb; --cluster, --model, --shapes, --batch, --text-tokens, --dtype and --json are the command's."""
    group.add_argument(
        "--nodes",
        type=int,
        nargs="+",
        default=list(NODES),
        metavar="N",
        help="scale: numbers of nodes (default: 1 2 4 ... 512)",
    )
    group.add_argument(
        "--recipe", metavar="YAML", help="scale: all stages of a recipe, instead of --model, --shapes and --batch"
    )
    group.add_argument(
        "--weak", action="store_true",
        help="scale: the batch grows with the nodes, from --batch at the fewest (default: strong, the same batch everywhere)",
    )  # fmt: skip
    group.add_argument(
        "--samples", type=float, default=SAMPLES,
        help="scale: samples that device-hours are for; a recipe has its own (default: 1 million)",
    )  # fmt: skip
    group.add_argument(
        "--price", type=float, metavar="P", help="scale: of a device-hour; adds the cost (default: no cost)"
    )
    group.add_argument(
        "--jobs", type=int, metavar="N", help="scale: Plans sought at the same time (default: one a core)"
    )
    group.add_argument("--figure", metavar="FILE", help="scale: draw it, .svg or .png (default: no figure)")


def run(args: argparse.Namespace) -> int:
    """Plan, print, draw. Exit code 0; UserError for what the user can mend."""
    from vchitect_fast.autotune.command import load_config

    _check(args)
    cluster = Cluster.load(args.cluster)
    model, stages = stages_of(args.recipe) if args.recipe else (args.model, [_stage(args)])
    config = load_config(model)
    items = asked(cluster, stages, args.nodes, weak=args.weak)
    plans = plans_of(Search(config, args.text_tokens, args.dtype), items, args.jobs or _num_cores(), quiet=args.json)
    found = curves(config, items, plans, args.text_tokens)
    if args.json:
        print(json.dumps(as_json(found, args.weak, args.price)))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        console = console if console.is_terminal else Console(highlight=False, width=200)
        console.print(render(found, title_of(cluster, stages, args.weak), args.price))
    if args.figure:
        from vchitect_fast.autotune.scale_figure import draw

        draw(found, args.figure, title_of(cluster, stages, args.weak), args.price)
        if not args.json:
            print(f"wrote {args.figure}")
    return 0


def title_of(cluster: Cluster, stages: Sequence[Stage], weak: bool) -> str:
    """Which question is answered, for whom."""
    batches = sorted({stage.batch for stage in stages})
    samples = " or ".join(map(str, batches)) if len(batches) < 4 else f"{batches[0]} to {batches[-1]}"
    question = (
        f"weak scaling: {samples} samples a step at the fewest nodes, growing with them"
        if weak
        else f"strong scaling: the same {samples} samples a step on more devices"
    )
    return f"{question}; {cluster.device.name}, {cluster.num_devices_per_node} a node, predicted"


def as_json(found: Sequence[Curve], weak: bool, price: float | None) -> dict[str, Any]:
    """Everything, with what is derived."""

    def of(point: Point) -> dict[str, Any]:
        derived = {name: getattr(point, name) for name in ("step_s", "tokens_per_s", "mfu", "device_hours")}
        cost = {} if price is None else {"cost": price * point.device_hours}
        return {**asdict(point), **derived, **cost}

    rows = [
        {"name": curve.name, "points": [of(point) for point in curve.points], "refused": curve.refused}
        for curve in found
    ]
    return {"scaling": "weak" if weak else "strong", "curves": rows}


def render(found: Sequence[Curve], title: str, price: float | None) -> RenderableType:
    """A table a stage and one of all; what does not fit below, with its reason."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(title)]
    for curve in found:
        table = Table(title=curve.name or None, title_justify="left", box=box.SIMPLE, pad_edge=False)
        for heading in [*HEADINGS, *([] if price is None else ["cost"])]:
            table.add_column(heading, justify="left" if heading in ("mesh", "not hidden") else "right")
        for point in curve.points:
            table.add_row(*_row(point), *([] if price is None else [in_short(price * point.device_hours)]))
        parts.append(table)
        for reason in dict.fromkeys(curve.refused.values()):
            counts = ", ".join(str(count) for count, why in curve.refused.items() if why == reason)
            parts.append(Text(f"not on {counts} {'node' if counts == '1' else 'nodes'}: {reason}\n"))
    peak = next(point.peak_flops for curve in found for point in curve.points)
    about = (
        "mesh: dp_replicate x dp_shard x sp. not hidden: share of the step in exchanges, in gathers of parameters and "
        "gradients, and in copies, that compute does not hide."
    )
    known = f" MFU: of {peak / 1e12:,.1f} TFLOP/s, the device's matmul rate in the cluster file." if peak else ""
    parts.append(Text(f"{about}{known} Reading data, validation, saving, failures and slow devices not included."))
    return Group(*parts)


def _row(point: Point) -> tuple[str, ...]:
    exposed = [f"{EXPOSED_NAMES[name]} {point.exposed(name):.1%}" for name in EXPOSED if point.exposed(name) >= 0.0005]
    return (
        f"{point.num_nodes}",
        f"{point.num_devices:,}",
        mesh_in_short(point),
        seconds(point.step_s),
        in_short(point.tokens_per_s),
        "-" if point.mfu is None else f"{point.mfu:.1%}",
        f"{point.efficiency:.0%}",
        ", ".join(exposed) or "-",
        gib(point.peak_gib),
        in_short(point.device_hours),
    )


def mesh_in_short(point: Point) -> str:
    """ "2x4x8": dp_replicate x dp_shard x sp; of several stages with different ones, how many."""
    found = list(dict.fromkeys("x".join(str(size) for size in mesh.values()) for mesh in point.meshes))
    return found[0] if len(found) == 1 else f"{len(found)} meshes"


def in_short(value: float) -> str:
    """Four digits at the most: 12.34, 1,234, 12.3k, 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


@dataclass(frozen=True)
class Search:
    """The search, as scaling.py asks for it; a worker process gets a copy."""

    config: TransformerConfig
    num_text_tokens: int
    dtype: str

    def __call__(self, cluster: Cluster, stage: Stage) -> Plan:
        """The best Plan of a stage."""
        return plan_run(
            self.config, list(stage.shapes), cluster, batch=stage.batch, num_text_tokens=self.num_text_tokens,
            dtype=self.dtype, weights=stage.weights, encode=stage.encode,
        )  # fmt: skip


def plans_of(planner: Planner, items: Sequence[Asked], num_jobs: int, *, quiet: bool = False) -> list[Plan | UserError]:
    """`attempt` of each, in order, with a bar on standard error; several at a time in processes of their own.

    Of one job nothing is started; more need a planner that can be sent to a process.
    """
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task("planning", total=len(items))
        if num_jobs == 1:
            plans = []
            for item in items:
                plans.append(attempt(planner, item))
                progress.advance(task)
            return plans
        # Spawned: the bar has a thread, and a fork beside threads may hang.
        with ProcessPoolExecutor(min(num_jobs, len(items)), mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(attempt, planner, item) for item in items]
            try:
                for _ in as_completed(futures):
                    progress.advance(task)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in futures]


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stage(args: argparse.Namespace) -> Stage:
    parsed = [VideoShape.parse(text) for text in args.shapes]
    for note in filter(None, (note for _, note in parsed)):
        print(note, file=sys.stderr)
    shapes = tuple(dict.fromkeys(shape for shape, _ in parsed))
    return Stage("", shapes, (1.0,) * len(shapes), args.batch, args.samples)


def _check(args: argparse.Namespace) -> None:
    """UserError for options that are missing, contradict each other or mean nothing."""
    if not args.cluster:
        raise UserError("which cluster to scale on is missing; give --cluster, for example 8xa100-80g-infiniband.")
    if args.recipe and args.shapes:
        raise UserError(f"--recipe {args.recipe} has shapes of its own; leave out --shapes, or leave out --recipe.")
    if not args.recipe and not args.shapes:
        raise UserError("what to train is missing; give --shapes 32x512x384 or several, or --recipe recipe.yaml.")
    if args.batch < 1:
        raise UserError(f"--batch must be a whole number from 1 up, got {args.batch}; give the samples of a step.")
    if not (math.isfinite(args.samples) and args.samples > 0):
        raise UserError(f"--samples must be above 0, got {args.samples:g}; give the samples of the training.")
    if args.price is not None and not (math.isfinite(args.price) and args.price >= 0):
        raise UserError(f"--price must be 0 or more, got {args.price:g}; give what one device costs for one hour.")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be a whole number from 1 up, got {args.jobs}; leave it out for one a core.")
    if args.figure and not args.figure.endswith(SUFFIXES):
        raise UserError(f"--figure must end in {' or '.join(SUFFIXES)}, got {args.figure}; choose another name.")
