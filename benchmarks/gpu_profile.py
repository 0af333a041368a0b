"""A training step of the 2B model, profiled: is all GPU time attributed, do trace and engine agree, and the page.

    python -m vchitect_fast.benchmarks.gpu_profile --out runs/gpu/profile [--cluster cluster.json]

The step is train's own (autotune/verify.py) on noise: hand-written blocks that offload their inputs and recompute the rest,
under the tools of `vchitect-fast profile`. Held: every step's share of GPU time whose span is known, and how long copies ran
each way by the trace beside the copy engine's own counters, which come from CUDA events. The share of copies that compute
hides is printed; it needs the trace. --tiny: the same code at a toy size on whatever is here, judged by nobody; without a
GPU copies are threads that no trace shows. NEVER RUN on a GPU so far. Exit code 1 when a row fell short, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.verify import build_step, noise
from vchitect_fast.benchmarks.offload_goals import Row
from vchitect_fast.benchmarks.planner import POLICIES
from vchitect_fast.machine import this_device
from vchitect_fast.parallel.mesh import ALONE
from vchitect_fast.plan import Plan, PlanEntry, Prediction
from vchitect_fast.profiling.analysis import analyse
from vchitect_fast.profiling.facts import RankAnalysis
from vchitect_fast.profiling.memory import analyse_memory, read_owned
from vchitect_fast.profiling.reading import read_traces
from vchitect_fast.profiling.report import write_report
from vchitect_fast.profiling.roofline import read_roof
from vchitect_fast.profiling.session import Request, memory_path, profile_steps, trace_path
from vchitect_fast.profiling.span import span, tell
from vchitect_fast.shapes import VideoShape

COMMAND = "python -m vchitect_fast.benchmarks.gpu_profile"
POLICY = "recompute, offload inputs"
NUM_WARMUP, NUM_STEPS = 2, 2
WAYS = {"copy_out": "offload_busy_s", "copy_in": "prefetch_busy_s"}  # in the trace, in the engine's stats
ROWS = {
    "attributed": Row("GPU time with a known span, least of the steps", 99, "%", at_least=True),
    "copy_out": Row("time of copies out, trace off the engine's counters by", 2, "%"),
    "copy_in": Row("time of copies back, trace off the engine's counters by", 2, "%"),
}
NOT_PREDICTED = Prediction(0.0, {}, 0.0, {}, "not predicted: this bench measures")


@dataclass(frozen=True)
class Case:
    """What is profiled."""

    model: str
    shape: str
    dtype: str
    num_text_tokens: int
    kernels: str


GPU_CASE = Case("vchitect-2b", "40x768x432", "bfloat16", 333, "triton")
TINY_CASE = Case("vchitect-nano", "2x32x32", "float32", 4, "reference")


def record(case: Case, out: Path) -> dict[str, float]:
    """Profile the steps into the folder; returns the engine's counters over those that were recorded."""
    config, here = preset(case.model), this_device()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policies = tuple(POLICIES[POLICY](config.num_layers))
    entry = PlanEntry(str(VideoShape.parse(case.shape)[0]), policies, 1, 1, NOT_PREDICTED)
    plan = Plan(config.fingerprint(), here.fingerprint(), here.name, case.dtype, case.num_text_tokens, (entry,))
    step_once = build_step(plan, config, replace(ALONE, device=device))
    step_once.model.set_kernels(case.kernels)
    engine, batch, before = step_once.model.saving.engine, noise(step_once, entry), {}
    assert engine is not None

    def run() -> None:
        tell(model=step_once.model, optimizer=step_once.optimizer, ema=step_once.ema)
        for number in range(NUM_WARMUP + NUM_STEPS):
            if number == NUM_WARMUP:
                engine.settle()
                before.update(engine.stats())
            with span("step", number + 1):
                step_once(number, batch)

    profile_steps(run, Request(out, NUM_STEPS, NUM_WARMUP))
    engine.settle()
    return {name: value - before[name] for name, value in engine.stats().items()}


def judge(rank: RankAnalysis, counters: Mapping[str, float]) -> list[Row]:
    """The rows, with figures."""
    known = [step.attributed for step in rank.steps if step.attributed is not None]
    found = {"attributed": replace(ROWS["attributed"], found=100 * min(known, default=0.0))}
    for way, counter in WAYS.items():
        traced_s, counted_s = sum(step.stream_us[way] for step in rank.steps) / 1e6, counters[counter]
        if counted_s:
            found[way] = replace(ROWS[way], found=100 * abs(traced_s / counted_s - 1))
        else:
            found[way] = replace(ROWS[way], not_measured="the engine copied nothing")
    return list(found.values())


def show(rank: RankAnalysis, rows: Sequence[Row]) -> None:
    """What a person reads."""
    for step in rank.steps:
        hidden = ", ".join(f"{way} {share:.1%}" for way in WAYS if (share := step.overlap[way]) is not None)
        print(f"step {step.step}: {step.wall_us / 1000:.1f} ms; idle {step.idle_us / 1000:.1f} ms; hidden: {hidden}")
    for row in rows:
        print(row)


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile, judge, write the page; exit code as the top of this file says."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="A 2B step, profiled and judged.")
    parser.add_argument("--out", default="runs/gpu/profile", help="folder of trace and page (default: %(default)s)")
    parser.add_argument("--cluster", metavar="FILE", help="of `autotune probe`, for the roof; passed over when absent")
    parser.add_argument("--tiny", action="store_true", help="rehearse at a toy size on whatever is here")
    args = parser.parse_args(arguments)
    if not args.tiny and not torch.cuda.is_available():
        print("not measured: torch sees no GPU; --tiny rehearses.")
        return 2
    out, case = Path(args.out), TINY_CASE if args.tiny else GPU_CASE
    counters = record(case, out)
    [trace] = read_traces(trace_path(out, 0))
    roof = read_roof(args.cluster) if args.cluster and Path(args.cluster).exists() else None
    found = analyse([trace], roof)
    rows = judge(found.ranks[0], counters)
    memory = analyse_memory(trace, read_owned(memory_path(out, 0)))
    title = f"{case.model} at {case.shape}, {this_device().name}"
    write_report(out / "report.html", found, [trace], [memory], title=title)
    show(found.ranks[0], rows)
    verdicts = [row.verdict for row in rows]
    words = "rehearsed, no figure counts" if args.tiny else f"{verdicts.count('pass')} pass"
    print(f"{len(rows)} rows: {words}; page in {out / 'report.html'}")
    return 0 if args.tiny or all(verdict == "pass" for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
