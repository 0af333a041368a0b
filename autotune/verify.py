"""Runs a few real steps of a Plan on this machine and measures what was predicted: seconds by part, peak memory.

The steps are train's own: flow loss, backward, clipping, AdamW, EMA, with its clock and its peak. The model has random weights
and the latents are noise, neither changes the time; nothing is read, encoded, logged or saved. Needs torch.
"""

from __future__ import annotations

from statistics import median

import torch

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.config import TrainConfig
from vchitect_fast.data import Batch
from vchitect_fast.ema import EMA
from vchitect_fast.machine import this_device
from vchitect_fast.metrics import COMPUTE_TIMINGS, reset_peak
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.plan import Plan, PlanEntry
from vchitect_fast.step import Step
from vchitect_fast.train import build_saving, park


def verify(plan: Plan, config: TransformerConfig, *, num_steps: int = 5) -> dict[str, dict[str, float]]:
    """Measure every entry of `plan`.

    num_steps  timed steps a shape, after one that warms up; the median is reported

    Returns by shape the keys of vchitect_fast.metrics.measured that were predicted. The peak is that of metrics.peak_bytes,
    counted anew for each shape. Raises UserError for another model's or device's Plan.
    """
    plan.check(model=config.fingerprint(), device=this_device())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = VchitectTransformer(config).to(device)
    model.saving = build_saving(plan, config, device)
    run = TrainConfig(manifest="", plan="")
    betas, dtype = (run.beta1, run.beta2), getattr(torch, plan.compute_dtype)
    optimizer = MasterAdamW(model, weight_decay=run.weight_decay, betas=betas, dtype=dtype)
    optimizer.copy_masters()
    ema = EMA(optimizer.masters, run.ema_decay)
    empty = _text(plan, config, 1, device)
    step_once = Step(run, plan, model, optimizer, ema, empty, states=park(plan, optimizer, ema, device))
    result = {}
    for entry in plan.entries:
        batch = _noise(plan, entry, config, device)
        reset_peak(device.type)
        records = [step_once(step, batch) for step in range(num_steps + 1)][1:]
        parts = {name: median(record[name] for record in records) for name in COMPUTE_TIMINGS}
        parts["step_s"] = median(record["step_s"] for record in records)
        parts["peak_gib"] = records[-1]["peak_gib"]
        result[entry.shape] = parts
    return result


def _noise(plan: Plan, entry: PlanEntry, config: TransformerConfig, device: torch.device) -> Batch:
    shape, samples = entry.video_shape, entry.microbatch * entry.accumulation
    size = (samples, shape.num_frames, config.in_channels, shape.latent_height, shape.latent_width)
    latents, text = torch.randn(size, device=device), _text(plan, config, samples, device)
    return Batch(shape, latents, *text, windows=[], data_s=0.0, encode_s=0.0)


def _text(
    plan: Plan, config: TransformerConfig, samples: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = torch.randn(samples, plan.num_text_tokens, config.joint_attention_dim, device=device)
    return embeds, torch.randn(samples, config.pooled_projection_dim, device=device)
