"""How well the planner predicts here: many shapes and policies, predicted and written down first, then measured.

    python -m vchitect_fast.benchmarks.planner --cluster cluster.json [--quick] [--json]

Every prediction of a run stands in the ledger before its first step. Each point is measured in several rounds, one after
the other, so that a machine that slows down slows all alike. Then one measured step of the first shape calibrates, and the
others are scored again. Points that are not predicted to fit, or of which the cluster file lacks a figure, are left out and
named. The goals are for an H100; elsewhere figures are shown and not judged, but for the ranking of policies.
On a CPU it falls short of the ranking: Policies that keep some groups cost time in Python that StepModel leaves out.
NEVER RUN on a GPU so far. Exit code 1 when a goal fell short.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import torch

from vchitect_fast.architecture import TransformerConfig, preset
from vchitect_fast.autotune.calibrate import calibrate
from vchitect_fast.autotune.layout import Layout, Problem
from vchitect_fast.autotune.ledger import Ledger, Measurement, Pair, expect
from vchitect_fast.autotune.memory import GIB
from vchitect_fast.autotune.model import Outcome, StepModel
from vchitect_fast.autotune.verify import build_step, measure_entry
from vchitect_fast.benchmarks.goals import DEVICE, PASS, SAME_CHIP, SHORT
from vchitect_fast.benchmarks.offload_goals import INPUT, MOVED
from vchitect_fast.benchmarks.planner_accuracy import Row, Score, rows
from vchitect_fast.benchmarks.record import BOTH, Origin, Record, append, origin, results_file
from vchitect_fast.cluster import Cluster
from vchitect_fast.errors import UserError
from vchitect_fast.machine import this_device
from vchitect_fast.offload.policy import from_selective_ratio, offload_budget_bytes
from vchitect_fast.parallel.mesh import ALONE
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction
from vchitect_fast.shapes import VideoShape
from vchitect_fast.step import Step
from vchitect_fast.train import build_saving

COMMAND = "python -m vchitect_fast.benchmarks.planner"
BENCH = "step of a Plan"


@dataclass(frozen=True)
class Cases:
    """What is measured; the first shape is the one that calibrates."""

    config: TransformerConfig
    dtype: str
    num_text_tokens: int
    shapes: tuple[str, ...]
    policies: tuple[str, ...]
    num_rounds: int  # times that every point has its turn
    num_steps: int  # timed in a turn
    num_warm_up: int = 1  # before them


def again(**groups: str) -> Policy:
    """Keep everything but what is named."""
    return replace(Policy.keep(), **groups)


POLICIES: dict[str, Callable[[int], Sequence[Policy]]] = {  # by name: of a model of so many blocks
    "keep": lambda n: (Policy.keep(),) * n,
    "recompute": lambda n: (Policy.recompute(),) * n,
    "recompute half": lambda n: from_selective_ratio(0.5, n, "recomputed"),
    "recompute mlp_pre": lambda n: (again(mlp_pre="recompute"),) * n,
    "recompute qkv": lambda n: (again(qkv="recompute"),) * n,
    "recompute branch_out": lambda n: (again(branch_out="recompute", stats="recompute"),) * n,
    "recompute, offload inputs": lambda n: (INPUT,) * n,
    "offload a sixth": lambda n: tuple(MOVED if i % 6 == 2 else Policy.keep() for i in range(n)),
}
GPU_CASES = Cases(
    preset("vchitect-2b"), "bfloat16", 333, ("32x256x256", "24x384x256", "16x512x384", "32x512x384", "40x768x432", "128x256x256"),
    tuple(POLICIES), num_rounds=2, num_steps=3,
)  # fmt: skip
CPU_CASES = Cases(
    preset("vchitect-tiny"), "float32", 16, ("8x176x96", "8x96x64", "4x256x256", "16x256x128"), tuple(POLICIES)[:6],
    num_rounds=3, num_steps=2,
)  # fmt: skip


def quick(cases: Cases) -> Cases:
    """The first two shapes, one round."""
    return replace(cases, shapes=cases.shapes[:2], num_rounds=1)


def predictions(cases: Cases, cluster: Cluster) -> tuple[dict[str, Plan], list[str]]:
    """By policy a Plan with an entry a shape; and a sentence for each point that is left out."""
    config, num_blocks = cases.config, cases.config.num_layers
    models = {}
    for text in cases.shapes:
        problem = Problem(cluster, config, VideoShape.parse(text)[0], 1, cases.num_text_tokens, cases.dtype)
        models[text] = StepModel(problem)
    plans: dict[str, Plan] = {}
    left_out = []
    for name in cases.policies:
        entries = []
        for text, model in models.items():
            outcome = model.predict(Layout(), POLICIES[name](num_blocks))
            if why := _why_not(model, outcome):
                left_out.append(f"{text}, {name}: {why}")
            else:
                entries.append(entry_of(model, outcome))
        if entries:
            plans[name] = plan_of(cluster, cases, entries)
    return plans, left_out


def _why_not(model: StepModel, outcome: Outcome) -> str:
    limit = model.limits().device_bytes
    if outcome.memory.peak_bytes > limit:
        return f"predicted not to fit, {outcome.memory.peak_bytes / GIB:.1f} of {limit / GIB:.1f} GiB"
    return f"the cluster file has no figure for {', '.join(outcome.left_out)}" if outcome.left_out else ""


def entry_of(model: StepModel, outcome: Outcome) -> PlanEntry:
    """What the Plan says of an outcome."""
    work, policies = model.problem.workload(outcome.layout), outcome.policies
    cost, memory = outcome.cost, outcome.memory
    rests_on = f"rates {model.device.source or 'of unknown source'}"
    predicted = Prediction(cost.step_s, cost.parts(), memory.peak_bytes / GIB, memory.parts_gib(), rests_on)
    return PlanEntry(
        str(model.problem.shape), policies, outcome.layout.microbatch, outcome.layout.accumulation, predicted,
        offload_bytes=offload_budget_bytes(work, policies, model.problem.dtype),
    )  # fmt: skip


def plan_of(cluster: Cluster, cases: Cases, entries: Sequence[PlanEntry]) -> Plan:
    """A Plan of one process on the cluster's device."""
    device = cluster.device
    return Plan(
        cases.config.fingerprint(), device.fingerprint(), device.name, cases.dtype, cases.num_text_tokens, tuple(entries),
        peak_flops=device.matmul_flops.get(cases.dtype), device_threads=device.num_threads, device_gib=device.memory_gib,
    )  # fmt: skip


def measure(
    cases: Cases, plans: Mapping[str, Plan], ledger: Ledger, *, commit: str | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> dict[str, list[Pair]]:  # fmt: skip
    """Every entry of the Plans, by policy: all predictions to the ledger, then the rounds; a point's medians after its last."""
    config, device = cases.config, _device()
    for plan in plans.values():
        plan.check(model=config.fingerprint(), device=this_device())
    points = [(name, entry) for name, plan in plans.items() for entry in plan.entries]
    expected = [expect(plans[name], entry, config, commit=commit) for name, entry in points]
    written = [ledger.predict(item) for item in expected]
    step_once = build_step(next(iter(plans.values())), config, replace(ALONE, device=device))
    rounds: list[list[Measurement]] = [[] for _ in points]
    pairs: dict[str, list[Pair]] = {name: [] for name in plans}
    for number in range(cases.num_rounds):
        for place, (name, entry) in enumerate(points):
            tell(f"round {number + 1} of {cases.num_rounds}: {entry.shape}, {name}")
            step_once.plan = plans[name]
            step_once.model.saving = build_saving(plans[name], config, device)
            try:
                rounds[place].append(measure_entry(step_once, entry, cases.num_steps, cases.num_warm_up))
            except torch.OutOfMemoryError:  # its prediction stands in the ledger alone
                tell(f"{entry.shape}, {name}: predicted to fit, the memory ran out")
            else:
                if (
                    len(rounds[place]) == cases.num_rounds
                ):  # at once, so that a run that is cut off leaves what it measured
                    merged = replace(_merged(rounds[place]), commit=commit)
                    ledger.measure(written[place], merged)
                    pairs[name].append(Pair(expected[place], merged))
                continue
            give_up(step_once)
    return pairs


def give_up(step_once: Step) -> None:
    """After memory ran out in a step: its gradients and cached memory. Call it outside of `except`, which holds the step's frames."""
    for parameter in (*step_once.model.parameters(), *step_once.optimizer.masters.values()):
        parameter.grad = None
    gc.collect()
    torch.cuda.empty_cache()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _merged(rounds: Sequence[Measurement]) -> Measurement:
    """Medians of the rounds' medians; of the spread, how far the rounds lie apart where there are several."""
    measured = {name: median(item.measured[name] for item in rounds) for name in rounds[0].measured}
    spread = dict(rounds[0].spread)
    if len(rounds) > 1:
        for name in spread:
            low, high = _tenths([item.measured[name] for item in rounds])
            spread[name] = (high - low) / measured[name]
    return Measurement(sum(item.num_steps for item in rounds), measured, spread)


def _tenths(values: Sequence[float]) -> tuple[float, float]:
    found = quantiles(values, n=10, method="inclusive")
    return found[0], found[-1]


def scores(pairs: Mapping[str, Sequence[Pair]]) -> tuple[Score, Score | None]:
    """As predicted; and the points that one measured step, the first pair, has not calibrated, after it has."""
    first, *others = [pair for group in pairs.values() for pair in group]
    if not others:
        return Score.of([first]), None
    return Score.of([first, *others]), Score.of(others, calibrate([first], f"one step of {first.expected.shape}"))


def records(pairs: Mapping[str, Sequence[Pair]], shared: Origin) -> Iterator[Record]:
    """One a point, the policy as provider; `rate` is predicted / measured seconds."""
    for name, pair in ((name, pair) for name, group in pairs.items() for pair in group):
        expected, found = pair.expected, pair.found
        step_s = found.measured["step_s"]
        half = found.spread["step_s"] * step_s / 2
        yield Record(
            BENCH, name, expected.shape, expected.dtype, BOTH, found.num_steps, step_s, max(0.0, step_s - half),
            step_s + half, expected.predicted.step_s / step_s, "predicted / measured", None, None, None, **asdict(shared),
        )  # fmt: skip


def table(pairs: Mapping[str, Sequence[Pair]], after: Score | None, found: Sequence[Row]) -> str:
    """What a person reads: the points by shape, the fastest prediction first, then the goals."""
    lines = []
    every = [(name, pair) for name, group in pairs.items() for pair in group]
    for shape in dict.fromkeys(pair.expected.shape for _, pair in every):
        lines.append(
            f"{shape:<28}{'step':>10}{'measured':>10}{'off by':>8}{'peak GiB':>10}{'measured':>10}{'off by':>8}"
        )
        here = [item for item in every if item[1].expected.shape == shape]
        for name, pair in sorted(here, key=lambda item: item[1].expected.predicted.step_s):
            step, peak = (next(c for c in pair.errors() if c.name == figure) for figure in ("step_s", "peak_gib"))
            lines.append(
                f"  {name:<26}{step.predicted:>9.3f}s{step.measured:>9.3f}s{step.error:>+8.1%}"
                f"{peak.predicted:>10.3f}{peak.measured:>10.3f}{peak.error:>+8.1%}"
            )
    lines.append("")
    for row in found:
        sign = ">=" if row.at_least else "<="
        value = "" if row.found is None else f"{row.found:.3g} {row.unit}; "
        lines.append(f"{row.goal:<55} {sign} {row.limit:g} {row.unit:<2} {value}{row.verdict}")
    if after is not None:
        lines.append(
            f"after one calibration step, {after.num_points} points: step off by {after.step_mean:.1%} (largest "
            f"{after.step_max:.1%}), peak by {after.peak_mean:.1%} (largest {after.peak_max:.1%})"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit code 1 when a goal fell short."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Held against measured steps: what the planner predicts."
    )
    parser.add_argument(
        "--cluster", required=True, help="measurements of this machine, of `vchitect-fast autotune probe`"
    )
    parser.add_argument("--ledger", default="planner.ledger.jsonl", help="where both go (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two shapes, one round")
    parser.add_argument("--shapes", type=int, metavar="N", help="the first N shapes (default: all)")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="times that every point is measured (default: 2, 3 on a CPU)"
    )
    parser.add_argument("--out", metavar="FILE", help="where Records go (default: benchmarks/results/DEVICE.jsonl)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args(arguments)
    try:
        return _run(args)
    except UserError as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    cluster = Cluster.load(args.cluster)
    cases = GPU_CASES if cluster.device.kind == "cuda" else CPU_CASES
    cases = quick(cases) if args.quick else cases
    cases = replace(cases, shapes=cases.shapes[: args.shapes], num_rounds=args.rounds or cases.num_rounds)
    given = [f"--{name} {getattr(args, name)}" for name in ("shapes", "rounds") if getattr(args, name)]
    shared = origin(" ".join([COMMAND, *["--quick"] * args.quick, *given]))
    plans, left_out = predictions(cases, cluster)
    if not plans:
        raise UserError(f"no point can be measured here ({'; '.join(left_out)}); choose another machine.")

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    pairs = measure(cases, plans, Ledger(args.ledger), commit=shared.commit, tell=tell)
    if not any(pairs.values()):
        raise UserError(
            "memory ran out at every point that was predicted to fit; the cluster file is of another device."
        )
    score, after = scores(pairs)
    judged = any(name in cluster.device.name for name in (DEVICE, SAME_CHIP))  # errors are relative to this very device
    found = rows(score, after, "" if judged else f"the goal is for an {DEVICE}")
    path = Path(args.out) if args.out else results_file(shared.device)
    for record in records(pairs, shared):
        append(path, record)
    number = sum(map(len, pairs.values()))
    if args.json:
        goals = [{**asdict(row), "verdict": row.verdict} for row in found]
        content = {"score": asdict(score), "after": after and asdict(after), "goals": goals, "left_out": left_out}
        print(json.dumps(content))
    else:
        print(table(pairs, after, found))
        print("\n".join(f"left out: {line}" for line in left_out))
        print(f"appended {number} Records to {path}, predictions and measurements to {args.ledger}")
        verdicts = [row.verdict for row in found]
        print(f"{number} points; {verdicts.count(PASS)} goals pass, {verdicts.count(SHORT)} fall short")
    return 1 if any(row.verdict == SHORT for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
