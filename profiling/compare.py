"""`profile compare A B`: what got faster or slower between two profiles, as a whole, by class and by span; for CI too.

    compare(analysis_a, analysis_b)     a Comparison
The samples are the steps. A difference counts when both hold: the Mann-Whitney test finds it in steps that scatter as these
do (two-sided, exact for small numbers, p at most 1 %), and the median moved by more than the threshold and by more than
0.5 % of the step. The step alone decides the exit code; classes and spans explain it, and of thirty rows one may err.
Steps of one recording share the state of the machine, which no test sees: record both on a machine that does nothing else.
It refuses profiles with too few steps for any difference to count, and a GPU against a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb, erfc, sqrt
from pathlib import Path
from statistics import mean, median

import numpy as np

from vchitect_fast.errors import UserError
from vchitect_fast.profiling.analysis import analyse
from vchitect_fast.profiling.facts import CLASSES, IDLE, STREAMS, Analysis
from vchitect_fast.profiling.reading import read_traces, trace_files

ALPHA = 0.01
THRESHOLD = 0.03  # of a row's own median
LEAST_SHARE = 0.005  # of the step: a smaller difference is nobody's concern
MAX_EXACT = 60  # samples together; above, the normal approximation
FASTER, SLOWER, SAME = "faster", "slower", "same"
EPILOG = """\
exit code: 0 the step is the same or faster, 1 it is slower by more than --threshold, 2 the profiles do not compare
example: vchitect-fast profile compare runs/before runs/after --threshold 0.05"""


@dataclass(frozen=True)
class Row:
    """One time in both profiles, microseconds a step."""

    group: str  # "step" | "class" | "exposed" | "span" | "span, begin to end"
    name: str
    before_us: float  # median over steps
    after_us: float
    p: float  # of the Mann-Whitney test: how likely steps that do not differ look like this
    verdict: str  # FASTER | SLOWER | SAME

    @property
    def ratio(self) -> float | None:
        """After over before; None where there was nothing before."""
        return self.after_us / self.before_us if self.before_us else None


@dataclass(frozen=True)
class Comparison:
    """Two profiles side by side. rows: the step first, then the largest differences."""

    num_steps_before: int
    num_steps_after: int
    threshold: float
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def step(self) -> Row:
        """The whole step, which decides."""
        return self.rows[0]

    @property
    def exit_code(self) -> int:
        """1 when the step is slower, else 0."""
        return int(self.step.verdict == SLOWER)


def compare(before: Analysis, after: Analysis, threshold: float = THRESHOLD) -> Comparison:
    """Compare two analyses; of several ranks the slowest counts for the step, the mean for what is in it.

    Raises UserError where no difference could count: too few steps, or a GPU in one of them only.
    """
    if not threshold > 0:
        raise UserError(f"--threshold must be above 0, got {threshold}; 0.03 is 3 %.")
    a, b = _samples(before), _samples(after)
    _check(before, after, len(a["step", "wall"]), len(b["step", "wall"]))
    least = LEAST_SHARE * median(a["step", "wall"])
    rows = []
    for key in dict.fromkeys((*a, *b)):
        nothing = [0.0] * len((a if key in a else b)[key])
        row = _row(*key, a.get(key, nothing), b.get(key, nothing), threshold, least)
        if key[0] == "step" or max(row.before_us, row.after_us) >= least:
            rows.append(row)
    rows[1:] = sorted(rows[1:], key=lambda row: (row.verdict == SAME, -abs(row.after_us - row.before_us)))
    return Comparison(
        len(a["step", "wall"]), len(b["step", "wall"]), threshold, tuple(rows), tuple(_notes(before, after))
    )


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney test: exact up to MAX_EXACT values, equal ones included; else by the normal law."""
    ranks = _double_ranks(np.concatenate([a, b]))
    total, num, taken = int(ranks[: len(a)].sum()), len(ranks), len(a)
    if num > MAX_EXACT:
        middle = taken * (num + 1)
        spread = sqrt(taken * (num - taken) / (num - 1) * (((ranks / 2) ** 2).mean() - ((num + 1) / 2) ** 2))
        return 1.0 if not spread else erfc(max(0.0, abs(total - middle) / 2 - 0.5) / spread / sqrt(2))
    # ways[k, s]: how many choices of k of the values have doubled ranks that sum to s.
    ways = np.zeros((taken + 1, int(ranks.sum()) + 1))
    ways[0, 0] = 1
    for rank in ranks.tolist():
        ways[1:, rank:] = ways[1:, rank:] + ways[:-1, : ways.shape[1] - rank]
    chance = ways[taken]
    return min(1.0, 2 * float(min(chance[: total + 1].sum(), chance[total:].sum())) / comb(num, taken))


def _double_ranks(values: np.ndarray) -> np.ndarray:
    """Twice the rank of each value from 1 up, equal values sharing their mean: whole numbers."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    doubled: np.ndarray = (2 * last - counts + 1)[inverse]
    return doubled


def _row(group: str, name: str, a: list[float], b: list[float], threshold: float, least: float) -> Row:
    before, after, p = median(a), median(b), mann_whitney(a, b)
    moved = abs(after - before)
    counts = p <= ALPHA and moved > least and moved > threshold * before
    verdict = (SLOWER if after > before else FASTER) if counts else SAME
    return Row(group, name, before, after, p, verdict)


def _samples(analysis: Analysis) -> dict[tuple[str, str], list[float]]:
    """(group, name) -> microseconds of each step, over the ranks; steps are matched by their order."""
    ranks = [rank.steps for rank in analysis.ranks if rank.steps]
    if not ranks:
        raise UserError("expected profiles with work in their steps, got one without; analyse it to see what it holds.")
    steps = list(zip(*ranks, strict=False))

    found = {("step", "wall"): [max(one.wall_us for one in step) for step in steps]}
    for name in (*CLASSES, IDLE):
        found["class", name] = [mean(one.by_class_us[name] for one in step) for step in steps]
    for name in STREAMS:
        found["exposed", name] = [mean(one.exposed_us[name] for one in step) for step in steps]
    spans = [[{span.name: span for span in one.by_span} for one in step] for step in steps]
    for name in dict.fromkeys(name for step in spans for one in step for name in one):
        calls = [[one[name] for one in step if name in one] for step in spans]
        found["span", name] = [sum(span.device_us for span in step) / len(ranks) for step in calls]
        if not any(found["span", name]):  # data, checkpoints: time that only the CPU spends
            found["span, begin to end", name] = [sum(span.cpu_us for span in step) / len(ranks) for step in calls]
    return found


def _check(before: Analysis, after: Analysis, num_before: int, num_after: int) -> None:
    kinds = ["a GPU" if one.ranks[0].on_device else "a CPU" for one in (before, after)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"expected two profiles of one kind of device, got {kinds[0]} and {kinds[1]}; record both on one."
        )
    if 2 / comb(num_before + num_after, num_before) > ALPHA:
        raise UserError(
            f"expected enough steps to tell a difference from noise, got {num_before} and {num_after}; "
            "record at least 5 in both, `vchitect-fast profile run.yaml --steps 5`."
        )


def _notes(before: Analysis, after: Analysis) -> list[str]:
    notes = []
    for what, pair in (
        ("ranks", (len(before.ranks), len(after.ranks))),
        ("tool", (before.ranks[0].tool, after.ranks[0].tool)),
    ):
        if pair[0] != pair[1]:
            notes.append(f"not recorded alike: {what} {pair[0]} and {pair[1]}.")
    return notes


def run_compare(words: list[str]) -> int:
    """`vchitect-fast profile compare A B`: print what differs; the exit code as EPILOG says."""
    parser = argparse.ArgumentParser(
        prog="vchitect-fast profile compare", allow_abbrev=False, epilog=EPILOG,
        description="Say what got faster or slower between two profiles, by class and by span.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    kinds = "a profile's folder, a trace of torch.profiler (.json, .json.gz) or an export of nsys (.sqlite)"
    parser.add_argument("before", type=Path, metavar="A", help=kinds)
    parser.add_argument("after", type=Path, metavar="B", help="the same of the other")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="share from which on a change counts (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(words)
    before, after = (
        analyse([trace for file in trace_files(place) for trace in read_traces(file)])
        for place in (args.before, args.after)
    )
    found = compare(before, after, args.threshold)
    if args.json:
        rows = [{**asdict(row), "ratio": row.ratio} for row in found.rows]
        print(json.dumps({**asdict(found), "rows": rows, "exit_code": found.exit_code}, indent=1))
    else:
        _print(found)
    return found.exit_code


def _print(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, view = Console(highlight=False), Table(box=None, pad_edge=False)
    for heading in ("", "", "before", "after", "change", "p", ""):
        view.add_column(heading, justify="right" if heading in ("before", "after", "change", "p") else "left")
    colours = {SLOWER: "red", FASTER: "green", SAME: ""}
    for row in found.rows:
        change = "new" if row.ratio is None else f"{100 * (row.ratio - 1):+.1f} %"
        times = (f"{us / 1000:,.2f} ms" for us in (row.before_us, row.after_us))
        name = Text("".join(letter if letter.isprintable() else "\ufffd" for letter in row.name))
        view.add_row(row.group, name, *times, change, f"{row.p:.3f}", Text(row.verdict, colours[row.verdict]))
    console.print(view)
    console.print(
        f"medians over {found.num_steps_before} and {found.num_steps_after} steps; slower or faster: p at most {ALPHA}, "
        f"more than {100 * found.threshold:g} % and more than {100 * LEAST_SHARE:g} % of the step"
    )
    for note in found.notes:
        console.print(note)
