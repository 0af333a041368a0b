"""`vchitect-fast bench`: measure every op and the block beside their alternatives, append Records, print tables.

    (none)    measure what matches --filter here
    compare   hold two results files against each other; exit code 1 when something became slower

Exit code 1 of a measurement: a provider of ours that should run here did not. Parsing and printing only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vchitect_fast.errors import UserError

if TYPE_CHECKING:
    from vchitect_fast.benchmarks.goals import Verdict
    from vchitect_fast.benchmarks.suite import Outcome

EPILOG = """\
Times are medians with p10 and p90, rates in TFLOP/s or GB/s beside the ceiling measured in the same run, errors against
fp64. On a CPU the kernels are interpreted at a tiny shape: their times say nothing. Exit code 1 when a provider of ours
failed, or, with compare, when something became slower.

example: vchitect-fast bench --quick
example: vchitect-fast bench --filter temporal --out mine.jsonl
example: vchitect-fast bench compare before.jsonl after.jsonl --threshold 0.05
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast bench`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "verb", nargs="?", choices=("compare",), metavar="compare", help="compare two files; default: measure"
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="with compare: Records before and after (JSON lines)")
    parser.add_argument(
        "--filter",
        default="",
        metavar="TEXT",
        help="only benches whose name and shape contain it, e.g. 'cross 40x', or one of several, 'cross|spatial'",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="where Records are appended (default: benchmarks/results/DEVICE.jsonl)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--quick", action="store_true", help="one shape on a GPU, no torch.compile on a CPU, fewer rounds"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which compiles every shape")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.05,
        help="with compare: growth of the median, a ratio (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 as the top of this file says; UserError for what the user can mend."""
    if args.verb == "compare":
        return _compare(args)
    return _measure(args)


def _compare(args: argparse.Namespace) -> int:
    if len(args.files) != 2:
        raise UserError(
            f"compare takes two files, got {len(args.files)}: `vchitect-fast bench compare A.jsonl B.jsonl`."
        )
    if args.threshold < 0:
        raise UserError(f"--threshold must be a ratio from 0 up like 0.05, got {args.threshold}.")
    from vchitect_fast.benchmarks import compare
    from vchitect_fast.benchmarks.record import load

    found, old, new = compare.pairs(*(load(path) for path in args.files))
    slower = [pair for pair in found if pair.verdict(args.threshold) == compare.SLOWER]
    if args.json:
        rows = [{"key": p.before.key, "ratio": p.ratio, "verdict": p.verdict(args.threshold)} for p in found]
        print(json.dumps({"pairs": rows, "only_before": old, "only_after": new}))
    else:
        _print(compare.render(found, [("before", old), ("after", new)], args.threshold))
    return 1 if slower else 0


def _measure(args: argparse.Namespace) -> int:
    if args.files:
        raise UserError(f"expected no file without compare, got {args.files[0]!r}; filter with --filter TEXT.")
    import torch

    from vchitect_fast.benchmarks.case import is_ours, prepare_process

    prepare_process()
    from vchitect_fast.benchmarks.goals import GOALS, judge
    from vchitect_fast.benchmarks.record import Record, append, origin, results_file
    from vchitect_fast.benchmarks.suite import Absent, Run
    from vchitect_fast.benchmarks.timing import Clock, ceilings

    steps = _steps(args.filter, args.quick, args.no_compile)
    clock = Clock(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    shared = origin(_command(args))
    rounds = 5 if args.quick and not torch.cuda.is_available() else None
    run = Run(shared, ceilings(clock, dtype), 0.3 if args.quick else 1.0, rounds)
    path = Path(args.out) if args.out else results_file(shared.device)

    outcomes: list[Outcome] = []
    for outcome in _walk(steps, clock, run, shown=not args.json):
        outcomes.append(outcome)
        if isinstance(outcome, Record):
            append(path, outcome)
    records = [outcome for outcome in outcomes if isinstance(outcome, Record)]
    verdicts = [judge(goal, records) for goal in GOALS]
    failed = [o for o in outcomes if isinstance(o, Absent) and o.attempted and is_ours(o.provider)]
    if args.json:
        _print_json(outcomes, verdicts, run.ceilings)
    else:
        _show(outcomes, verdicts, run.ceilings, on_gpu=clock.device.type == "cuda")
        print(f"appended {len(records)} Records to {path}")
        for name in dict.fromkeys(f"{o.bench}: {o.provider}: {o.reason}" for o in failed):
            print(f"failed: {name}")
    return 1 if failed else 0


def _steps(text: str, quick: bool, no_compile: bool) -> list[Any]:
    """The cases and host benches that match; UserError listing the names when none does."""
    from vchitect_fast.benchmarks.cases import all_cases
    from vchitect_fast.benchmarks.host import host_benches

    cases = all_cases(quick=quick)
    if no_compile:
        cases = [case.without_compile("left out by --no-compile") for case in cases]
    names: dict[str, Any] = {f"{case.bench} {case.shape}": case for case in cases}
    names |= {f"{bench.name} {bench.shape} {bench.direction}": bench for bench in host_benches()}
    chosen = [step for name, step in names.items() if any(part in name for part in text.split("|"))]
    if not chosen:
        raise UserError(f"no bench contains {text!r}; there are: {', '.join(names)}.")
    return chosen


def _walk(steps: list[Any], clock: Any, run: Any, *, shown: bool) -> Iterator[Outcome]:
    """Every outcome of every step, with a bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    from vchitect_fast.benchmarks.case import Case
    from vchitect_fast.benchmarks.suite import run_case, run_host_bench

    with Progress(console=Console(stderr=True), disable=not shown, transient=True) as bars:
        task = bars.add_task("", total=len(steps))
        for step in steps:
            is_case = isinstance(step, Case)
            bars.update(task, description=f"{step.bench if is_case else step.name} {step.shape}")
            # A compiler's chatter goes to standard error: standard output may hold JSON.
            with contextlib.redirect_stdout(sys.stderr):
                found = list(run_case(step, clock, run) if is_case else run_host_bench(step, run))
            yield from found
            bars.advance(task)


def _command(args: argparse.Namespace) -> str:
    """What to type for the same measurement; where it was written says nothing."""
    parts = ["vchitect-fast bench"]
    parts += [f"--filter '{args.filter}'"] if args.filter else []
    parts += ["--quick"] if args.quick else []
    parts += ["--no-compile"] if args.no_compile else []
    return " ".join(parts)


def _show(outcomes: list[Outcome], verdicts: list[Verdict], ceilings: dict[str, float], *, on_gpu: bool) -> None:
    from vchitect_fast.benchmarks import table

    _print(table.render(outcomes, verdicts))
    print("ceilings of this run: " + ", ".join(f"{value:.3g} {unit}" for unit, value in ceilings.items()))
    if on_gpu:
        _print(table.goal_table(verdicts))
    else:
        print(f"goals: {table.goal_counts(verdicts)} (most are for an H100; --json lists each)")


def _print_json(outcomes: list[Outcome], verdicts: list[Verdict], ceilings: dict[str, float]) -> None:
    from vchitect_fast.benchmarks.record import Record

    content = {
        "records": [asdict(outcome) for outcome in outcomes if isinstance(outcome, Record)],
        "not_measured": [asdict(outcome) for outcome in outcomes if not isinstance(outcome, Record)],
        "ceilings": ceilings,
        "goals": [{**asdict(v.goal), "found": v.found, "verdict": v.text} for v in verdicts],
    }
    print(json.dumps(content))


def _print(renderable: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(renderable) if console.is_terminal else Console(highlight=False, width=200).print(renderable)
