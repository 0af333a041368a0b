"""`vchitect-fast tune kernels`: measure tiles and backends of attention on this GPU and write the table that launches look up.

    --shapes   VideoShapes, by default those of the goals; one sample, 24 heads x 64, 333 text tokens, bf16
    --minutes  what does not fit is said; started again with the same FILE, what it lacks comes first
Training never searches: it reads a table (kernels/tuned.py). The search itself is benchmarks/tile_search.py. The file is written
whole after each op at each shape, and rows of other sizes that it holds are kept. Never run on a GPU yet.
Exit code 0, 1 where a kernel got no row, 2 without a GPU: then only --tiny runs, a rehearsal that writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vchitect_fast.errors import UserError
from vchitect_fast.plan import BRANCHES
from vchitect_fast.shapes import VideoShape

if TYPE_CHECKING:
    from vchitect_fast.benchmarks.tile_search import Dropped, Search, Task
    from vchitect_fast.kernels.tuned import Row, Table

MINUTES = 20.0
REHEARSAL = "Rehearsed at toy sizes: no figure counts, and no table was written."
EPILOG = """\
Every candidate is checked against fp64 and timed in rounds with the choice made by size, which it replaces only where its
median is below that one's p10, measured anew for the two alone. Ctrl-C keeps what is written.

example: vchitect-fast tune kernels --out h100.json
example: vchitect-fast tune kernels --ops temporal --shapes 40x768x432 128x256x256 --minutes 5
example: VCHITECT_FAST_TUNED=h100.json vchitect-fast train run.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast tune`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "what", choices=("kernels",), help="what is tuned: tiles of the attention kernels, and backends"
    )
    parser.add_argument(
        "--shapes", nargs="+", metavar="FxWxH", help="frames x width x height in pixels (default: the goals' seven)"
    )
    parser.add_argument("--ops", nargs="+", choices=BRANCHES, default=BRANCHES, help="which branches (default: all)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for the whole search (default: %(default)s)")
    parser.add_argument(
        "--out", metavar="FILE", help="the table, made or added to (default: GPU.json here, by its name)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables; times in seconds")
    parser.add_argument(
        "--tiny", action="store_true", help="rehearse at toy sizes, interpreted without a GPU; no table"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code as the top of this file says; UserError for what the user can mend."""
    if args.minutes <= 0:
        raise UserError(f"expected --minutes above 0, got {args.minutes:g}; the default is {MINUTES:g}.")
    if args.tiny and args.out:
        raise UserError("expected --tiny without --out, got both; a rehearsal measures nothing that may be kept.")
    parsed = [VideoShape.parse(text) for text in args.shapes or ()]
    for _, note in parsed:
        print(note, end="\n" if note else "", file=sys.stderr)
    import torch

    from vchitect_fast.benchmarks.case import prepare_process

    on_gpu = torch.cuda.is_available()
    if not (on_gpu or args.tiny):
        raise UserError("expected a CUDA GPU to tune for, torch sees none; rehearse with --tiny, or tune where one is.")
    prepare_process()
    from vchitect_fast.benchmarks.cases import ATTENTION_SHAPES, TINY_SHAPE
    from vchitect_fast.benchmarks.tile_search import Search, all_tasks
    from vchitect_fast.benchmarks.timing import Clock, interleaved
    from vchitect_fast.kernels.aot import SHARED_LIMIT_BYTES

    device, limit = torch.device("cuda" if on_gpu else "cpu"), SHARED_LIMIT_BYTES[90]
    if on_gpu:
        limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    measure = partial(interleaved, Clock(device), rounds=1 if args.tiny else None)
    deadline_s = time.monotonic() + 60 * args.minutes
    search = Search(measure, device, limit, deadline_s, at_most=2 if args.tiny else None)
    names = [TINY_SHAPE] if args.tiny else ATTENTION_SHAPES
    shapes = [shape for shape, _ in parsed or map(VideoShape.parse, names)]
    tasks = all_tasks(shapes, args.ops, tiny=args.tiny)
    return _tune(args, search, tasks)


def _tune(args: argparse.Namespace, search: Search, tasks: Sequence[Task]) -> int:
    """The search, its table written as it grows, and what is printed."""
    from vchitect_fast.benchmarks.tile_search import key
    from vchitect_fast.kernels import tuned

    made: list[tuple[str, Row]] = []
    rows: dict[object, Row] = {}
    place = ""  # of a rehearsal
    gpu = tuned.gpu_name() or ""
    if not args.tiny:
        table = _begin(place := args.out or tuned.file_name(gpu), gpu, _command(args))
        rows = {key(row): row for row in table.rows}
        tasks = sorted(tasks, key=lambda task: set(task.keys()) <= rows.keys())  # what it lacks comes first
    try:
        for task, found in _walk(search, tasks, shown=not args.json):
            made += [(task.shape, row) for row in found]
            rows |= {key(row): row for row in found}
            if place and found:
                replace(table, rows=tuple(rows.values())).save(place)
    finally:  # also of Ctrl-C
        if place:
            print(f"{place} holds {len(rows)} rows, {len(made)} of them of this run.", file=sys.stderr)
    if args.json:
        content: dict[str, object] = {
            "out": place or None,
            "rows": [{"shape": shape, **asdict(row)} for shape, row in made],
        }
        content |= {"dropped": [asdict(one) for one in search.dropped], "not_reached": search.not_reached}
        print(json.dumps(content | {"rehearsal": args.tiny}))
    else:
        _show(made, search)
        use = f"Runs take it with {tuned.ENVIRONMENT}={place}, or as kernels/tuned/{tuned.file_name(gpu)} of this package."
        print(use if place else REHEARSAL)
    return 1 if search.not_reached or any(not one.choice for one in search.dropped) else 0


def _command(args: argparse.Namespace) -> str:
    """What to type for the same rows; where they were written says nothing."""
    parts = ["vchitect-fast tune kernels"]
    parts += ["--shapes", *args.shapes] if args.shapes else []
    parts += ["--ops", *args.ops] if len(args.ops) < len(BRANCHES) else []
    return " ".join([*parts, f"--minutes {args.minutes:g}"])


def _begin(place: str, gpu: str, command: str) -> Table:
    """The rows that the file holds under the header of this run; written, so that a bad place is refused before the search."""
    from vchitect_fast.benchmarks.record import origin
    from vchitect_fast.kernels.tuned import Table

    here = origin(command)
    table = Table(gpu, here.torch, here.triton or "", here.commit, here.command, here.date, ())
    if Path(place).exists():
        found = Table.load(place)
        if misfit := found.misfit(gpu):
            raise UserError(f"{place} {misfit}; choose another place with --out.")
        table = replace(table, rows=found.rows)
    table.save(place)
    return table


def _walk(search: Search, tasks: Sequence[Task], *, shown: bool) -> Iterator[tuple[Task, list[Row]]]:
    """Each task with its rows, with a bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not shown, transient=True) as bars:
        bar = bars.add_task("", total=len(tasks))
        search.said = lambda text: bars.update(bar, description=text)
        for task in tasks:
            # A compiler's chatter goes to standard error: standard output may hold JSON.
            with contextlib.redirect_stdout(sys.stderr):
                rows = search.tune(task)
            yield task, rows
            bars.advance(bar)


def _show(made: Sequence[tuple[str, Row]], search: Search) -> None:
    """A row a kernel and shape, what was dropped by its reason, and what was not reached."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Shown
    from rich.text import Text

    from vchitect_fast.benchmarks.table import duration
    from vchitect_fast.benchmarks.tile_search import label

    shown = Shown(box=box.SIMPLE, pad_edge=False)
    for name in ("op", "kernel", "shape", "by size", "median", "winner", "median ", "p10 - p90", "ratio", "error"):
        shown.add_column(name, justify="left" if name in ("op", "kernel", "shape", "by size", "winner") else "right")
    for shape, row in made:
        by_size, best = row.heuristic, row.winner
        new = best.choice != by_size.choice
        shown.add_row(
            row.op, row.kernel, shape, label(by_size.choice), duration(by_size.median_s),
            Text(label(best.choice) if new else "as by size", style="green" if new else "dim"), duration(best.median_s),
            f"{duration(best.p10_s)} - {duration(best.p90_s)}", f"{best.median_s / by_size.median_s:.2f}",
            f"{best.error_vs_fp64:.1e}",
        )  # fmt: skip
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=200)
    console.print(shown)
    for line in _reasons(search.dropped):
        console.print(Text(line, style="dim"))
    if search.not_reached:
        console.print(f"not reached within the minutes: {', '.join(search.not_reached)}")


def _reasons(dropped: Sequence[Dropped]) -> list[str]:
    """A line a reason, with how many and the first; --json lists each."""
    by_reason: dict[str, list[Dropped]] = {}
    for one in dropped:
        by_reason.setdefault(one.reason, []).append(one)
    return [
        f"dropped {len(ones)}: {why} ({ones[0].place}{f', {ones[0].choice}' if ones[0].choice else ''})"
        for why, ones in by_reason.items()
    ]
