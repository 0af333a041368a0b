"""Everything that only a GPU can show, in one command: stages in order of worth, each a process of its own with a limit.

    make gpu        or: python -P -m vchitect_fast.benchmarks.gpu --minutes 12 --out runs/gpu

`make gpu` makes .venv. With a Python of your own (3.11 to 3.13; torch, triton, pybind11, cmake and nvcc there, no network
needed), once before: VCHITECT_FAST_CUDA=1 python -m pip install --no-build-isolation --no-deps -e .
A stage is begun when what it is expected to take still fits into the minutes; one that fails, hangs or falls short stops no
other. Its output stands in OUT/NAME.log and its outcome in OUT/NAME.json. Started again with the same OUT, what has an
outcome is not run again (--only NAME runs it anew), so that an interrupted hour goes on where it stopped. Expected seconds
are estimates for an H100 from measured figures of the plain model (benchmarks/goals.py says which): never measured yet.
--tiny rehearses every stage's code at toy sizes, on a CPU too; its figures mean nothing and nothing counts as held.
Needs a checkout, for its tests. Exit code 0 when all stages held, 1 when one did not, 2 when nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from vchitect_fast.benchmarks.record import Record, append, origin
from vchitect_fast.errors import UserError
from vchitect_fast.files import write_text

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "make gpu"
HELD, SHORT, FAILED, REHEARSED = "held", "falls short", "failed", "rehearsed"
NO_GPU, NOT_REACHED = "not measured: no GPU", "not reached"
STYLES = {HELD: "green", SHORT: "yellow", FAILED: "red"}
PYTHON = (sys.executable, "-P", "-m")
CLI = (*PYTHON, "vchitect_fast.cli")
TRACEBACK = b"Traceback (most recent call last)"
Words = tuple[str, ...]


def ours(module: str, *words: str) -> Words:
    """A script of this folder."""
    return (*PYTHON, f"vchitect_fast.benchmarks.{module}", *words)


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    commands    run in turn, all of them; {out} is the folder, {tests} the files of `tests` with GPU tests in them
    expected_s  estimate for an H100
    limit_s     after which it is ended
    tiny        instead of the commands in a rehearsal; () = the same commands with --tiny
    tests       folder of tests, "" where the stage runs none; of tests/ those that have no stage of their own
    needs       a module without which it cannot run
    """

    name: str
    shows: str
    commands: tuple[Words, ...]
    expected_s: int
    limit_s: int
    tiny: tuple[Words, ...] = ()
    tests: str = ""
    needs: str = ""

    def words(self, out: Path, tiny: bool) -> list[list[str]]:
        """The commands to run now."""
        commands = self.tiny or tuple((*words, "--tiny") for words in self.commands) if tiny else self.commands
        files = gpu_tests(self.tests) if self.tests else []
        return [
            [part.replace("{out}", str(out)) for word in words for part in (files if word == "{tests}" else [word])]
            for words in commands
        ]


def bench(name: str, filter: str, expected_s: int, limit_s: int, shows: str, *words: str, tiny: str) -> Stage:
    """`vchitect-fast bench`, then its Records against the goals."""
    records = f"{{out}}/records-{name}.jsonl"
    measure = (*CLI, "bench", *words, "--filter", filter, "--out", records)
    rehearse = (*CLI, "bench", "--quick", "--filter", tiny, "--out", records)
    judge = ours("goals", records)
    return Stage(name, shows, (measure, judge), expected_s, limit_s, (rehearse, judge))


def pytest(folder: str, name: str, expected_s: int, limit_s: int, shows: str, processes: str = "0") -> Stage:
    """The gpu-marked tests of a folder, side by side where pytest-xdist is here."""
    words = (
        *PYTHON,
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "--continue-on-collection-errors",
        "{tests}",
    )
    many = ("-n", processes) if find_spec("xdist") else ()
    measured = (*many, "--durations=10", f"--junitxml={{out}}/{name}.xml")
    return Stage(name, shows, ((*words, *measured),), expected_s, limit_s, ((*words, "--collect-only"),), folder)


def planner(*words: str) -> tuple[Words, ...]:
    """Predictions from the probe's file, then the points."""
    places = ("--cluster", "{out}/cluster.json", "--ledger", "{out}/planner.ledger.jsonl")
    return (ours("planner", *places, "--out", "{out}/records-planner.jsonl", *words),)


PROBE = ((*CLI, "autotune", "probe", "--cluster", "{out}/cluster.json"),)
HAS_COPIER = """\
import sys
from vchitect_fast import _C
print(_C.build_info())
sys.exit(0 if _C.build_info()["cuda"] else "the C++ module has no CUDA copier")
"""
STAGES = (
    Stage(
        "build", "the C++ module with its CUDA copier compiles and imports",
        ((*PYTHON, "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."),
         (sys.executable, "-P", "-c", HAS_COPIER)),
        60, 180, tiny=((sys.executable, "-P", "-c", HAS_COPIER),),
    ),
    pytest("tests/offload", "tests-offload", 25, 120, "a slow copy stream changes no gradient; copies overlap compute"),
    pytest("tests/kernels", "tests-kernels", 90, 200, "every kernel against fp64 at real sizes, bf16", processes="4"),
    bench(
        "block", "block ", 80, 180, "the whole block in 16 bits and in fp8: goals in ms, bytes saved", "--no-compile",
        tiny="block ",
    ),
    bench(
        "attention", "temporal|spatial|cross", 75, 180, "the three branches beside every library that is here",
        "--no-compile", tiny="temporal",
    ),
    Stage(
        "model", "whole 24-block steps with AdamW, hand-written blocks within 80 GB: goals in ms",
        (ours("model_steps", "--out", "{out}/records-model.jsonl"), ours("goals", "{out}/records-model.jsonl")),
        75, 180, tiny=(ours("model_steps", "--tiny"),),
    ),
    Stage(
        "offload", "copies, slab, block inputs, a fifth of the blocks, bytes freed, best mix",
        (ours("offload_goals", "--only", "copies", "set-up", "spin", "steps"),), 80, 200,
    ),
    Stage("probe", "rates and links of this machine, which the planner predicts from", PROBE, 60, 200, tiny=PROBE),
    Stage(
        "planner", "predictions to the ledger, then 32 points: errors, regret, tau; needs the probe",
        planner("--shapes", "4", "--rounds", "1"), 100, 240, tiny=planner("--shapes", "1", "--rounds", "1"),
    ),
    Stage(
        "profile", "a 2B step: GPU time attributed, copies against the engine's counters, report.html",
        (ours("gpu_profile", "--out", "{out}/profile", "--cluster", "{out}/cluster.json"),), 45, 150,
    ),
    pytest("tests", "tests-others", 40, 150, "NCCL with one rank, the VAE's frames, the probe's link, the allocator's peak"),
    Stage("longest", "24 blocks train at 144x1920x1088 within 80 GB", (ours("offload_goals", "--only", "longest"),), 110, 240),
    Stage(
        "tune", "tiles searched for this GPU, the winners beside the heuristic",
        ((*CLI, "tune", "kernels", "--minutes", "2", "--out", "{out}/tuned.json"),), 140, 240,
        tiny=((*CLI, "tune", "kernels", "--tiny"),),
    ),
    bench("compile", "block ", 70, 150, "the block beside torch.compile at one shape", "--quick", tiny="bias_gelu"),
    bench(
        "rows", "norm|residual|gelu|branch_sum|project", 90, 200, "the other ops beside torch.compile at one shape",
        "--quick", tiny="dispatch",
    ),
    Stage(
        "fp8", "the loss of a training in fp8 beside bf16, on real clips",
        (ours("fp8_parity", "--out", "{out}/records-fp8.jsonl", "--figure", "{out}/fp8.png"),), 180, 400, needs="av",
        tiny=(ours("fp8_parity", "--steps", "2", "--seeds", "1", "--out", "{out}/records-fp8.jsonl", "--figure", "{out}/fp8.png"),),
    ),
    Stage("doctor", "what this machine can do, what is missing", ((*CLI, "doctor"),), 10, 60, tiny=((*CLI, "doctor"),)),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a stage; `says` is the last line that it printed, or why it did not run."""

    name: str
    state: str
    says: str
    took_s: float = 0.0


def gpu_tests(folder: str) -> list[str]:
    """Files below a folder in which something is marked gpu: others may need packages that a GPU machine lacks."""
    others = [stage.tests for stage in STAGES if stage.tests and stage.tests != folder]
    files = [path for path in sorted((ROOT / folder).rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    names = [str(path.relative_to(ROOT)) for path in files]
    return [name for name in names if folder != "tests" or not name.startswith(tuple(others))]


def run_all(stages: Sequence[Stage], out: Path, minutes: float, *, tiny: bool, again: bool) -> list[Outcome]:
    """An outcome for each stage, those of earlier runs included."""
    deadline, found = time.monotonic() + 60 * minutes, []
    for stage in stages:
        place = out / f"{stage.name}.json"
        if place.exists() and not again:
            found.append(Outcome(**json.loads(place.read_text())))
            continue
        left_s = deadline - time.monotonic()
        if stage.needs and find_spec(stage.needs) is None:
            found.append(Outcome(stage.name, NOT_REACHED, f"{stage.needs} is not here"))
        elif (0 if tiny else stage.expected_s) > left_s:
            found.append(
                Outcome(stage.name, NOT_REACHED, f"about {stage.expected_s} s, {max(0.0, left_s):.0f} s are left")
            )
        else:
            print(f"{stage.name}: about {stage.expected_s} s; {stage.shows}", file=sys.stderr)
            found.append(run_stage(stage, out, left_s if tiny else min(stage.limit_s, left_s), tiny=tiny))
            write_text(place, json.dumps(asdict(found[-1])))
            print(f"{stage.name}: {found[-1].state} after {found[-1].took_s:.0f} s", file=sys.stderr)
    return found


def run_stage(stage: Stage, out: Path, limit_s: float, *, tiny: bool) -> Outcome:
    """Run its commands in turn. Exit code 1 of one is what fell short; of tests, or with a traceback, it failed."""
    begin, states, log = time.monotonic(), [HELD], out / f"{stage.name}.log"
    log.unlink(missing_ok=True)
    late = ""
    for words in stage.words(out, tiny):
        left_s = limit_s - (time.monotonic() - begin)
        seen = log.stat().st_size if log.exists() else 0
        code = _run(words, log, left_s, tiny=tiny) if left_s > 0 else None
        if code is None:
            late = f"over its {limit_s:.0f} s; "
        raised = TRACEBACK in log.read_bytes()[seen:] if code else False
        states.append(HELD if code == 0 else SHORT if code == 1 and not raised and not stage.tests else FAILED)
    took_s = time.monotonic() - begin
    state = next(one for one in (FAILED, SHORT, HELD) if one in states)
    return Outcome(stage.name, REHEARSED if tiny and state != FAILED else state, late + _last_line(log), took_s)


def _run(words: Sequence[str], log: Path, limit_s: float, *, tiny: bool) -> int | None:
    """The exit code, or None when the limit ended it; it and what it started are gone when this returns."""
    environ = {**os.environ, "VCHITECT_FAST_CUDA": "1", "PYTHONUNBUFFERED": "1"}
    if not tiny:  # no test may interpret kernels here because it does not find the GPU's files
        environ["TRITON_INTERPRET"] = "0"
    with log.open("a") as output:
        print("$", *words, file=output, flush=True)
        child = subprocess.Popen(
            words, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            return child.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def stage_records(outcomes: Sequence[Outcome]) -> list[Record]:
    """How long each stage took, so that the next estimate is a measurement."""
    shared, found = asdict(origin(COMMAND)), []
    for one in outcomes:
        if one.state in (HELD, SHORT):
            times = (1, one.took_s, one.took_s, one.took_s)
            found.append(Record("gpu stage", one.name, "-", "-", "-", *times, None, None, None, None, None, **shared))
    return found


def table(stages: Sequence[Stage], outcomes: Sequence[Outcome]) -> object:
    """A row a stage."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("stage", "outcome", "took", "expected", "shows", "last line of OUT/STAGE.log"):
        shown.add_column(heading, justify="right" if heading in ("took", "expected") else "left", overflow="fold")
    for stage, one in zip(stages, outcomes, strict=True):
        took = f"{one.took_s:.0f} s" if one.took_s else ""
        state = Text(one.state, style=STYLES.get(one.state, "dim"))
        shown.add_row(stage.name, state, took, f"{stage.expected_s} s", stage.shows, Text(one.says))
    return shown


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for and print the tables; exit code as the top of this file says."""
    parser = argparse.ArgumentParser(
        prog="python -m vchitect_fast.benchmarks.gpu", description="All that needs a GPU, in stages."
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="for all stages together (default: %(default)s)")
    parser.add_argument("--out", default="runs/gpu", help="folder of logs, Records and outcomes (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these, run anew (default: all without an outcome)")
    parser.add_argument("--list", action="store_true", help="print the stages and what they are expected to take")
    parser.add_argument("--tiny", action="store_true", help="rehearse every stage at toy sizes, on a CPU too")
    args = parser.parse_args(arguments)
    try:
        return _main(args)
    except UserError as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2


def _main(args: argparse.Namespace) -> int:
    from rich.console import Console

    names = [stage.name for stage in STAGES]
    if unknown := [name for name in args.only or () if name not in names]:
        raise UserError(f"expected stages among {', '.join(names)}, got {', '.join(unknown)}; correct --only.")
    stages = [stage for stage in STAGES if not args.only or stage.name in args.only]
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=180)
    if args.list:
        console.print(table(stages, [Outcome(stage.name, "", "") for stage in stages]))
        print(f"about {sum(stage.expected_s for stage in stages) / 60:.0f} minutes on an H100, estimated.")
        return 0
    if not (ROOT / "pyproject.toml").exists():
        raise UserError("expected a checkout, which has the tests, got an installed package; clone it and `make gpu`.")
    if not args.tiny and not _has_gpu():
        console.print(table(stages, [Outcome(stage.name, NO_GPU, "") for stage in stages]))
        print("Nothing was measured: torch sees no GPU here. --tiny rehearses the same code at toy sizes.")
        return 2
    return _measure(args, stages, console)


def _measure(args: argparse.Namespace, stages: Sequence[Stage], console: object) -> int:
    from vchitect_fast.benchmarks import goals

    out = Path(args.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run_all(stages, out, args.minutes, tiny=args.tiny, again=bool(args.only))
    if not args.tiny:
        for record in stage_records(outcomes):
            append(out / "stages.jsonl", record)
    if records := sorted(map(str, out.glob("records-*.jsonl"))):
        goals.main(records)
    console.print(table(stages, outcomes))  # type: ignore[attr-defined]
    states = [one.state for one in outcomes]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"{len(states)} stages: {counts}; logs, Records and outcomes in {args.out}.")
    return 0 if set(states) <= {HELD, REHEARSED} else 1


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage does not outlive this
    sys.exit(main())
