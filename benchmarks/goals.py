"""The goals a run is held against, and the verdict: pass, fall short, or not measured and why.

    python -m vchitect_fast.benchmarks.goals RECORDS.jsonl...     exit code 1 when a goal fell short

Figures and goals were set on one H100 80GB SXM (torch 2.11+cu130, triton 3.6, 2026-11-22, batch 1, bf16, 24 heads x 64, 333
text tokens), where the plain model was measured. An H200 is the same chip with faster memory: what falls short there does so
on an H100, what passes is said to pass there. On any other device they are not judged. `source` names the table they stand
in. A ratio is our median time over the best alternative's in the same run. Fastest provider of ours counts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vchitect_fast.benchmarks.case import is_ours
from vchitect_fast.benchmarks.record import BACKWARD, BOTH, FORWARD, Record, latest, load
from vchitect_fast.errors import UserError

DEVICE = "H100"  # part of the device's name
SAME_CHIP = "H200"
PASS, SHORT = "pass", "fall short"
PASS_THERE = f"pass on an {SAME_CHIP}"


@dataclass(frozen=True)
class Goal:
    """`measure` is median_s, rate, ratio or saved_bytes of a Record; all but rate are upper limits."""

    bench: str
    shape: str
    direction: str
    measure: str
    limit: float
    source: str
    any_device: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.measure == 'rate' else '<='} {shown(self.measure, self.limit)}"


@dataclass(frozen=True)
class Verdict:
    """Of one goal: pass, fall short, or "not measured: why"."""

    goal: Goal
    found: float | None
    text: str


def shown(measure: str, value: float) -> str:
    """A value with its unit."""
    forms = {
        "median_s": lambda: f"{1000 * value:.3g} ms",
        "rate": lambda: f"{value:.0f} TFLOP/s",
        "ratio": lambda: f"{value:.2f} x the best alternative",
        "saved_bytes": lambda: f"{value / 1e6:.0f} MB",
    }
    return forms[measure]()


BLOCK, BRANCHES, MODEL = "goals, whole block", "goals, attention branches", "goals, whole model"
STEP = "step, 24 blocks"  # measured by model_steps.py


def _block() -> list[Goal]:
    rows = {  # shape: ms in bf16, ms in fp8
        "32x256x256": (8.8, 6.5), "32x512x384": (18, 13), "40x768x432": (34, 25), "128x256x256": (34, 25),
        "32x1024x768": (64, 50),
    }  # fmt: skip
    goals = [Goal("block", shape, BOTH, "median_s", ms / 1e3, BLOCK) for shape, (ms, _) in rows.items()]
    goals.append(Goal("block", "40x768x432", FORWARD, "saved_bytes", 3000e6, BLOCK))
    return goals + [Goal("block fp8", shape, BOTH, "median_s", ms / 1e3, BLOCK) for shape, (_, ms) in rows.items()]


def _branches() -> list[Goal]:
    temporal = {  # shape: forward, backward ms
        "32x256x256": (0.09, 0.17), "32x512x384": (0.17, 0.32), "40x768x432": (0.32, 0.60),
        "32x1024x768": (0.53, 1.0), "128x256x256": (0.40, 0.85), "16x1280x720": (0.30, 0.60),
    }  # fmt: skip
    goals = []
    for shape, (forward, backward) in temporal.items():
        goals.append(Goal("temporal", shape, FORWARD, "median_s", forward / 1e3, BRANCHES))
        goals.append(Goal("temporal", shape, BACKWARD, "median_s", backward / 1e3, BRANCHES))
    for shape in [*temporal, "8x1920x1088"]:
        goals += [Goal("spatial", shape, way, "ratio", 1.0, BRANCHES) for way in (FORWARD, BACKWARD)]
        goals.append(Goal("cross", shape, FORWARD, "ratio", 0.75, BRANCHES))
        goals.append(Goal("cross", shape, BACKWARD, "ratio", 0.70, BRANCHES))
    goals.append(Goal("spatial", "32x256x256", FORWARD, "rate", 400, BRANCHES))
    goals.append(Goal("spatial", "32x256x256", BACKWARD, "rate", 330, BRANCHES))
    return goals


def _model() -> list[Goal]:
    steps = {
        "32x256x256": 260, "32x512x384": 520, "40x768x432": 950, "128x256x256": 950, "32x1024x768": 1900,
    }  # fmt: skip
    return [Goal(STEP, shape, BOTH, "median_s", ms / 1e3, MODEL) for shape, ms in steps.items()]


GOALS: tuple[Goal, ...] = (
    *_block(), *_branches(), *_model(),
    Goal("dispatch", "empty kernel", FORWARD, "ratio", 3.0, "goals, dispatch", any_device=True),
    Goal("dispatch", "empty kernel", BOTH, "ratio", 3.0, "goals, dispatch", any_device=True),
)  # fmt: skip


def best(records: Sequence[Record], *, ours: bool) -> Record | None:
    """The fastest of ours, or of the alternatives."""
    return min((r for r in records if is_ours(r.provider) is ours), key=lambda r: r.median_s, default=None)


def judge(goal: Goal, records: Sequence[Record]) -> Verdict:
    """Hold one goal against the Records of one run."""

    def not_measured(why: str) -> Verdict:
        return Verdict(goal, None, f"not measured: {why}")

    at = [r for r in records if (r.bench, r.shape, r.direction) == (goal.bench, goal.shape, goal.direction)]
    if not at:
        return not_measured("this run did not have it")
    on_same_chip = SAME_CHIP in at[0].device
    if not goal.any_device and DEVICE not in at[0].device and not on_same_chip:
        return not_measured(f"the goal is for an {DEVICE}, this is {at[0].device}")
    ours, other = best(at, ours=True), best(at, ours=False)
    if ours is None:
        return not_measured("ours did not run")
    if goal.measure == "ratio":
        if other is None:
            return not_measured("no alternative ran")
        found: float | None = ours.median_s / other.median_s
    elif goal.measure == "saved_bytes":
        found = min((r.saved_bytes for r in at if is_ours(r.provider) and r.saved_bytes is not None), default=None)
    else:
        found = getattr(ours, goal.measure)
    if found is None:
        return not_measured(f"no {goal.measure} in the Record")
    reached = found >= goal.limit if goal.measure == "rate" else found <= goal.limit
    passed = PASS_THERE if on_same_chip and not goal.any_device else PASS
    return Verdict(goal, found, passed if reached else SHORT)


def main(arguments: list[str] | None = None) -> int:
    """Print the goals against the newest Records of the files; exit code 1 when one fell short."""
    from rich.console import Console

    from vchitect_fast.benchmarks.table import goal_counts, goal_table

    paths = sys.argv[1:] if arguments is None else arguments
    try:
        if not paths:
            raise UserError("expected files of Records, got none; name what `vchitect-fast bench --out` wrote.")
        records = [record for path in paths for record in load(path)]
    except UserError as error:
        print(f"goals: {error}", file=sys.stderr)
        return 2
    verdicts = [judge(goal, list(latest(records).values())) for goal in GOALS]
    Console(highlight=False, width=160).print(goal_table(verdicts))
    print(f"goals: {goal_counts(verdicts)}")
    return 1 if any(verdict.text == SHORT for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
