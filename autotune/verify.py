"""Runs a few real steps of a Plan and measures what was predicted: seconds by part, peak memory, what stands between steps.

    vchitect-fast autotune verify --plan plan.json
    torchrun --nproc-per-node=8 -m vchitect_fast.cli autotune verify --plan plan.json      a Plan with a mesh

The steps are train's own: flow loss, backward, clipping, AdamW, EMA, on the Plan's mesh, with its clock and its peak. The
model has random weights and the latents are noise, neither changes the time; nothing is read, encoded or saved. Each
prediction stands in the ledger, on the disk, before its first step runs. Needs torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.autotune.ledger import Expectation, Ledger, Measurement, Pair, expect
from vchitect_fast.benchmarks.record import origin
from vchitect_fast.config import TrainConfig
from vchitect_fast.data import Batch
from vchitect_fast.ema import EMA
from vchitect_fast.machine import resident_bytes, this_device
from vchitect_fast.metrics import COMPUTE_TIMINGS, measured, read_log, reset_peak
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.parallel.apply import parallelize
from vchitect_fast.parallel.mesh import Mesh, launched, on_first, over_ranks, read_launch
from vchitect_fast.parallel.vae import own_frames
from vchitect_fast.plan import Plan, PlanEntry
from vchitect_fast.resume import check_supported
from vchitect_fast.shapes import VideoShape
from vchitect_fast.step import Step
from vchitect_fast.train import build_saving, park

GIB = 2**30
COMMAND = "vchitect-fast autotune verify"
MEASURED = (*COMPUTE_TIMINGS, "step_s", "peak_gib")


def verify(
    plan: Plan, config: TransformerConfig, *, num_steps: int = 5, ledger: Ledger | None = None,
    stated_error: float | None = None, tell: Callable[[str], object] | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Measure every entry of `plan`, on all ranks of its mesh; every rank calls it.

    num_steps     timed steps a shape, after one that warms up; the median is reported
    ledger        takes each prediction before it is measured, and the measurement; rank 0 writes
    stated_error  relative error of the step time that the predictions state, for the ledger
    tell          called with a line a shape, for a person who waits

    Returns by shape, on every rank, the keys of vchitect_fast.metrics.measured that were predicted, and standing_gib, what is
    held between two steps, where that can be told. The peak is that of metrics.peak_bytes, counted anew for each shape.
    Raises UserError for another model's, device's or mesh's Plan.
    """
    plan.check(model=config.fingerprint(), device=this_device())
    with launched(plan.mesh, plan.fsdp_group) as mesh:
        return verify_on(mesh, plan, config, num_steps=num_steps, ledger=ledger, stated_error=stated_error, tell=tell)


def verify_on(
    mesh: Mesh, plan: Plan, config: TransformerConfig, *, num_steps: int, ledger: Ledger | None = None,
    stated_error: float | None = None, tell: Callable[[str], object] | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """`verify` where the ranks are up already."""
    check_supported(plan, mesh)
    commit = origin(COMMAND).commit if mesh.is_first else None
    step_once = build_step(plan, config, mesh)
    result = {}
    for number, entry in enumerate(plan.entries, 1):
        if tell is not None and mesh.is_first:
            tell(f"{entry.shape} ({number} of {len(plan.entries)}): {num_steps + 1} steps")
        expected = expect(plan, entry, config, stated_error=stated_error, commit=commit)
        name = _predict(mesh, ledger, expected)
        found = measure_entry(step_once, entry, num_steps)
        if ledger is not None and mesh.is_first:
            ledger.measure(name, Measurement(found.num_steps, found.measured, found.spread, commit))
        result[entry.shape] = found.measured
    return result


def is_first_rank() -> bool:
    """Whether this process is the one that prints: rank 0, or one that no launcher started."""
    launch = read_launch(os.environ)
    return launch is None or launch.rank == 0


def run_pairs(plan: Plan, config: TransformerConfig, run: Path) -> list[Pair]:
    """What a training run's log measured beside what its Plan predicted, a pair a shape: ground for a calibration.

    Not for the ledger: nobody wrote the prediction down before. Without standing_gib, which a log does not have.
    UserError where the log cannot be read or has a shape that the Plan has not.
    """
    events = read_log(run, "step")
    found = []
    for shape, values in measured(run).items():
        expected = expect(plan, plan.entry(VideoShape.parse(shape)[0]), config)
        number = sum(event["shape"] == shape for event in events)
        found.append(Pair(expected, Measurement(number, {name: values[name] for name in MEASURED})))
    return found


def build_step(plan: Plan, config: TransformerConfig, mesh: Mesh) -> Step:
    """A model with random weights and all that train puts around it, on this rank of the mesh."""
    with mesh.device:  # drawn there: on a CPU 2.4 billion numbers take half a minute
        model = VchitectTransformer(config)
    model.saving = build_saving(plan, config, mesh.device)
    parallelize(model, plan, mesh)
    run = TrainConfig(manifest="", plan="")
    betas, dtype = (run.beta1, run.beta2), getattr(torch, plan.compute_dtype)
    optimizer = MasterAdamW(model, weight_decay=run.weight_decay, betas=betas, dtype=dtype)
    ema = EMA(optimizer.masters, run.ema_decay)
    states = park(plan, optimizer, ema, mesh.device)
    optimizer.copy_masters()
    return Step(run, plan, model, optimizer, ema, _text(plan, config, 1, mesh.device), mesh, states)


def measure_entry(step_once: Step, entry: PlanEntry, num_steps: int, num_warm_up: int = 1) -> Measurement:
    """Medians of `num_steps` after those that warm up; the peak of all of them, counted from what stood before."""
    mesh = step_once.mesh
    batch = noise(step_once, entry)
    give_back(mesh.device.type)  # else a larger shape before this one is its peak
    reset_peak(mesh.device.type)
    records = [step_once(step, batch) for step in range(num_warm_up + num_steps)][num_warm_up:]
    found = {name: median(record[name] for record in records) for name in (*COMPUTE_TIMINGS, "step_s")}
    spread = {name: _spread([record[name] for record in records]) for name in found}
    found["peak_gib"] = records[-1]["peak_gib"]
    del batch
    if (standing := standing_bytes(mesh.device.type)) is not None:
        _, [most] = over_ranks(mesh, [], [float(standing)])
        found["standing_gib"] = most / GIB
    return Measurement(num_steps, found, spread)


def standing_bytes(device_kind: str) -> int | None:
    """Bytes held now, in the terms of metrics.peak_bytes: between two steps what does not grow with the work.

    None on a CPU whose C library cannot give freed memory back: resident bytes are then mostly holes.
    """
    if device_kind == "cuda":
        return torch.cuda.memory_allocated()
    return resident_bytes() if give_back(device_kind) else None


def give_back(device_kind: str) -> bool:
    """On a CPU, return freed memory to the system; False where the C library has no way to (glibc has)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device_kind == "cpu" else None
    if trim is None:
        return False
    trim(ctypes.c_size_t(0))
    return True


def _predict(mesh: Mesh, ledger: Ledger | None, expected: Expectation) -> str:
    """On rank 0, before any rank begins; where the disk refuses, all ranks stop."""
    if ledger is None:
        return ""
    return on_first(mesh.host_group, lambda: ledger.predict(expected))


def _spread(seconds: list[float]) -> float:
    """(p90 - p10) / median."""
    if len(seconds) < 2:
        return 0.0
    tenths = quantiles(seconds, n=10, method="inclusive")
    return (tenths[-1] - tenths[0]) / median(seconds)


def noise(step_once: Step, entry: PlanEntry) -> Batch:
    """The samples that one data-parallel rank has in a step, and of their frames this rank's."""
    shape, samples, mesh = entry.video_shape, entry.microbatch * entry.accumulation, step_once.mesh
    config, frames = step_once.model.config, own_frames(shape.num_frames, mesh.sp_group)
    T = len(range(shape.num_frames)[frames])
    size = (samples, T, config.in_channels, shape.latent_height, shape.latent_width)
    latents = torch.randn(size, device=mesh.device)
    text = _text(step_once.plan, config, samples, mesh.device)
    return Batch(shape, latents, *text, windows=[], data_s=0.0, encode_s=0.0, frames=frames)


def _text(
    plan: Plan, config: TransformerConfig, samples: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = torch.randn(samples, plan.num_text_tokens, config.joint_attention_dim, device=device)
    return embeds, torch.randn(samples, config.pooled_projection_dim, device=device)
