"""vchitect-fast profile: one run, any trace, or two of either, and what to do about them.

    profile run.yaml --steps 5       the real loop for a few steps, into one folder: traces, memory, records, report.html
    profile analyse TRACE...         any program's PyTorch traces or Nsight Systems exports, one a rank
    profile compare A B              what got faster or slower; exit code 1 when something got slower

No daemon and nothing else to install. It refuses what `train` refuses, and traces that are broken or foreign.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.profiling.compare import run_compare
from vchitect_fast.profiling.facts import Analysis, Roof
from vchitect_fast.profiling.memory import MemoryAnalysis, analyse_memory, read_owned
from vchitect_fast.profiling.reading import read_traces, trace_files

WAIT_S = 300.0  # for the files of other ranks
EPILOG = """\
verbs: profile analyse TRACE...   profile compare A B   (each with --help)

example: vchitect-fast profile run.yaml --steps 5 --out runs/profile
example: torchrun --nproc-per-node 8 -m vchitect_fast.cli profile run.yaml --ranks 0,3
example: vchitect-fast profile analyse trace-rank0.json.gz trace-rank1.json.gz --report report.html
example: vchitect-fast profile compare runs/before runs/after"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast profile run.yaml`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("run_file", help="the run's YAML, as `vchitect-fast train` takes it")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="fields that replace those of the file")
    parser.add_argument("--steps", type=int, default=5, help="steps that are recorded (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that are not (default: %(default)s)")
    parser.add_argument("--ranks", default="0", help="ranks that record: 0,3 or all (default: %(default)s)")
    parser.add_argument("--out", default="runs/profile", help="folder for everything (default: %(default)s)")
    parser.add_argument("--nsys", action="store_true", help="record with Nsight Systems instead of torch.profiler")
    parser.add_argument("--inside-nsys", action="store_true", help=argparse.SUPPRESS)
    _shared(parser)


def run(args: argparse.Namespace) -> int:
    """`vchitect-fast profile run.yaml`: exit code 0; UserError for what the user can mend."""
    from vchitect_fast.profiling import session

    config, out = TrainConfig.load(args.run_file, args.overrides), Path(args.out)
    rank, num_ranks = session.this_rank()
    ranks = session.parse_ranks(args.ranks, num_ranks)
    _check_place(out, config)
    roof = _roof(args)  # before the run: a typo should not cost it
    tool = "nsys" if args.nsys or args.inside_nsys else "torch"
    request = session.Request(out, args.steps, args.warmup, ranks, tool)
    if args.nsys and rank in ranks:
        _under_nsys(args, out, rank)
    else:
        session.profile_run(config, request)
    if rank != ranks[0] or args.inside_nsys:
        return 0
    paths = [_trace_of(out, each, args.nsys) for each in ranks]
    _await(paths)
    found = _show(paths, roof, args, out / "report.html", f"Profile of {Path(args.run_file).name}")
    from vchitect_fast.profiling.records import write_records

    write_records(out / "records.jsonl", found, config, _words(args))
    if not args.json:
        print(
            f"traces   {', '.join(map(str, paths))}  (open in ui.perfetto.dev)"
            if not args.nsys
            else f"traces   {paths[0]}"
        )
        print(f"records  {out / 'records.jsonl'}\nreport   {out / 'report.html'}")
    return 0


def analyse(words: list[str]) -> int:
    """`vchitect-fast profile analyse TRACE...`: exit code 0; UserError for a trace that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="vchitect-fast profile analyse", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Say where the time of a recorded program went.",
        epilog="example: vchitect-fast profile analyse trace.json.gz --report report.html",
    )  # fmt: skip
    parser.add_argument(
        "traces",
        nargs="+",
        metavar="TRACE",
        help=".json or .json.gz of torch.profiler, .sqlite of nsys export, or a profile's folder",
    )
    parser.add_argument("--report", metavar="FILE", help="also write a page (default: none)")
    _shared(parser)
    args = parser.parse_args(words)
    paths = [path for name in args.traces for path in trace_files(name)]
    report = Path(args.report) if args.report else None
    _show(paths, _roof(args), args, report, ", ".join(path.name for path in paths))
    if report and not args.json:
        print(f"report   {report}")
    return 0


SUBCOMMANDS = {"analyse": analyse, "compare": run_compare}


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", metavar="FILE", help="measurements of `autotune probe`, for the roof (default: none)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _roof(args: argparse.Namespace) -> Roof | None:
    from vchitect_fast.profiling.roofline import read_roof

    return read_roof(args.cluster) if args.cluster else None


def _show(
    paths: Sequence[Path], roof: Roof | None, args: argparse.Namespace, report: Path | None, title: str
) -> Analysis:
    """Read, analyse, print; write the page when there is a place for it."""
    from vchitect_fast.profiling import report as pages
    from vchitect_fast.profiling.analysis import analyse as analyse_traces
    from vchitect_fast.profiling.console import print_analysis

    read = [(trace, path) for path in paths for trace in read_traces(path)]
    read.sort(key=lambda pair: (pair[0].rank is None, pair[0].rank or 0))  # as the analysis orders its ranks
    traces = [trace for trace, _ in read]
    found = analyse_traces(traces, roof)
    memories = [analyse_memory(trace, read_owned(memory_beside(path))) for trace, path in read]
    if report:
        pages.write_report(report, found, traces, memories, title=title)
    if args.json:
        print(json.dumps({**asdict(found), "memory": [memory and memory_json(memory) for memory in memories]}))
    else:
        print_analysis(found, memories)
    return found


def memory_json(memory: MemoryAnalysis) -> dict[str, object]:
    """The peak and its parts; the curves stay in the page."""
    return {
        "device": memory.device, "peak_bytes": memory.peak_bytes, "peak_step": memory.peak_step, "peak_span": memory.peak_span,
        "parts": [asdict(part) for part in memory.parts], "notes": list(memory.notes),
    }  # fmt: skip


def memory_beside(trace: Path) -> Path:
    """Where `vchitect-fast profile` wrote whose memory is whose; need not exist."""
    rank = trace.name.removeprefix("trace-rank").removesuffix(".json.gz")
    return trace.with_name(f"memory-rank{rank}.json")


def _check_place(out: Path, config: TrainConfig) -> None:
    """The profile's folder must not be the run's own."""
    if out.resolve() == Path(config.out).resolve() or (out / "train").resolve() == Path(config.out).resolve():
        raise UserError(f"--out must not be the run's own folder {config.out}, got {out}; name another.")


def _trace_of(out: Path, rank: int, by_nsys: bool) -> Path:
    from vchitect_fast.profiling.session import trace_path

    return out / f"nsys-rank{rank}.sqlite" if by_nsys else trace_path(out, rank)


def _under_nsys(args: argparse.Namespace, out: Path, rank: int) -> None:
    """This same command again, under Nsight Systems; the child trains, we only wait."""
    import torch

    from vchitect_fast.profiling import nsys

    command = [sys.executable, "-P", "-m", "vchitect_fast.cli", "profile", args.run_file, *args.overrides]
    command += ["--steps", str(args.steps), "--warmup", str(args.warmup), "--ranks", args.ranks, "--out", args.out]
    nsys.record([*command, "--inside-nsys"], out / f"nsys-rank{rank}", has_gpu=torch.cuda.is_available())


def _await(paths: Sequence[Path]) -> None:
    """Other ranks write at about the same time, each when its own trace is whole."""
    deadline = time.monotonic() + WAIT_S
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > deadline:
            raise UserError(
                f"expected {missing[0]} from its rank, it did not come in {WAIT_S:.0f} s; give --out on a disk that all ranks "
                "share, or copy the traces together and run `vchitect-fast profile analyse`."
            )
        time.sleep(0.2)


def _words(args: argparse.Namespace) -> str:
    """The command as a person would type it, without paths."""
    return f"vchitect-fast profile RUN.yaml --steps {args.steps} --warmup {args.warmup}{' --nsys' if args.nsys else ''}"
