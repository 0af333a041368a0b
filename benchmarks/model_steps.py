"""Whole training steps of the 24-block model on hand-written blocks, within the memory of one 80 GB GPU -> Records.

    python -m vchitect_fast.benchmarks.model_steps --out records.jsonl      then: ... benchmarks.goals records.jsonl

The steps are train's own (autotune/verify.py): flow loss, backward, clipping, AdamW with fp32 masters and states, batch 1,
noise for latents; without the average (EMA), which the table of the goals did not have. For each shape Policies are tried from the one that recomputes least; the first that fits is timed. On
a larger GPU torch is held to what an 80 GB one leaves it. --tiny: the same code at toy sizes on whatever is here, no Record.
NEVER RUN on a GPU so far. Exit code 1 when a shape failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.verify import build_step, measure_entry
from vchitect_fast.benchmarks.goals import STEP
from vchitect_fast.benchmarks.offload_goals import hold_to_80gb
from vchitect_fast.benchmarks.planner import POLICIES, give_up
from vchitect_fast.benchmarks.record import BOTH, Record, append, origin
from vchitect_fast.ema import EMA
from vchitect_fast.machine import this_device
from vchitect_fast.offload.policy import from_selective_ratio
from vchitect_fast.parallel.mesh import ALONE
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction
from vchitect_fast.shapes import VideoShape
from vchitect_fast.step import Step
from vchitect_fast.workload import Workload

COMMAND = "python -m vchitect_fast.benchmarks.model_steps"
LADDER: dict[str, Callable[[int], Sequence[Policy]]] = {
    **{name: POLICIES[name] for name in ("keep", "recompute mlp_pre")},
    **{f"recompute {share:.0%}": partial(from_selective_ratio, share, reading="recomputed") for share in (0.25, 0.5, 0.75)},
    "recompute": POLICIES["recompute"],
}  # fmt: skip
LAST = "recompute"
NOT_PREDICTED = Prediction(0.0, {}, 0.0, {}, "not predicted: this bench measures")


@dataclass(frozen=True)
class Cases:
    """What is measured, by whom."""

    model: str
    dtype: str
    num_text_tokens: int
    shapes: tuple[str, ...]
    kernels: str
    num_steps: int


GPU_CASES = Cases(
    "vchitect-2b",
    "bfloat16",
    333,
    ("32x256x256", "32x512x384", "40x768x432", "128x256x256", "32x1024x768"),
    "triton",
    4,
)
TINY_CASES = Cases("vchitect-tiny", "float32", 16, ("4x32x32", "2x64x32"), "reference", 2)


def plan_of(cases: Cases, text: str, policy: str) -> Plan:
    """One entry, one process."""
    config, device = preset(cases.model), this_device()
    policies = tuple(LADDER[policy](config.num_layers))
    entry = PlanEntry(str(VideoShape.parse(text)[0]), policies, 1, 1, NOT_PREDICTED)
    return Plan(config.fingerprint(), device.fingerprint(), device.name, cases.dtype, cases.num_text_tokens, (entry,))


def first_that_fits(step_once: Step, cases: Cases, text: str) -> tuple[str, dict[str, float], float]:
    """The Policy's name, its figures (measure_entry) and the spread of its step; OutOfMemoryError where none fits."""
    for name in LADDER:
        step_once.plan = plan_of(cases, text, name)
        try:
            found = measure_entry(step_once, step_once.plan.entries[0], cases.num_steps, num_warm_up=2)
            return name, found.measured, found.spread["step_s"]
        except torch.OutOfMemoryError:
            if name == LAST:
                raise
        give_up(step_once)
    raise AssertionError("the ladder has steps")


def measure(cases: Cases) -> tuple[list[Record], list[str]]:
    """Records, and a sentence for each shape that failed; prints a line a shape."""
    config, device = preset(cases.model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        hold_to_80gb()
    step_once = build_step(plan_of(cases, cases.shapes[0], LAST), config, replace(ALONE, device=device))
    step_once.ema = EMA({"none": torch.zeros(1, device=device)}, 0.0)  # one number instead of the model
    step_once.model.set_kernels(cases.kernels)
    shared, records, failed = origin(COMMAND), [], []
    for text in cases.shapes:
        try:
            policy, found, spread = first_that_fits(step_once, cases, text)
        except Exception as error:  # one shape must not hide the others; the exit code tells
            failed.append(f"{text} failed with {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            print(failed[-1], flush=True)
            torch.cuda.empty_cache()
            continue
        step_s, half = found["step_s"], found["step_s"] * spread / 2
        flops = Workload(config, VideoShape.parse(text)[0], 1, cases.num_text_tokens).train_flops()
        records.append(
            Record(
                STEP, f"hand-written, {cases.kernels}, {policy} (ours)", text, cases.dtype, BOTH, cases.num_steps, step_s,
                max(0.0, step_s - half), step_s + half, flops / step_s / 1e12, "TFLOP/s", None, None, None, **asdict(shared),
            )
        )  # fmt: skip
        parts = ", ".join(f"{name[:-2]} {1000 * found[name]:.0f}" for name in found if name.endswith("_s"))
        print(f"{text}: {policy}; ms: {parts}; peak {found['peak_gib']:.1f} GiB", flush=True)
    return records, failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and append the Records; exit code as the top of this file says."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Whole steps of the 24-block model.")
    parser.add_argument("--out", metavar="FILE", default="records.jsonl", help="Records (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="rehearse at toy sizes on whatever is here; no Record")
    args = parser.parse_args(arguments)
    if not args.tiny and not torch.cuda.is_available():
        print("not measured: torch sees no GPU; --tiny rehearses.")
        return 2
    records, failed = measure(TINY_CASES if args.tiny else GPU_CASES)
    for record in [] if args.tiny else records:
        append(args.out, record)
    print(f"{len(records)} shapes {'rehearsed, no figure counts' if args.tiny else 'measured'}, {len(failed)} failed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
