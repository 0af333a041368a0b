"""Runs a few real steps of a Plan on this machine and measures what was predicted: seconds by part, peak memory.

The model has random weights and the latents are noise: neither changes the time. The steps are those of training - flow
loss, backward, clipping, AdamW, EMA - without data, encoding, logging or saving. Needs torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.ema import EMA
from vchitect_fast.machine import this_device
from vchitect_fast.metrics import peak_bytes, reset_peak
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.model.flow import flow_loss
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.plan import Plan, PlanEntry


def verify(plan: Plan, config: TransformerConfig, *, num_steps: int = 5) -> dict[str, dict[str, float]]:
    """Measure every entry of `plan`.

    num_steps  timed steps a shape, after one that warms up; the median is reported

    Returns by shape the keys of vchitect_fast.metrics.measured that were predicted. The peak is that of metrics.peak_bytes,
    counted anew for each shape. Raises UserError for another model's or device's Plan.
    """
    plan.check(model=config.fingerprint(), device=this_device())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = VchitectTransformer(config).to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, plan.compute_dtype))
    optimizer = MasterAdamW(model, weight_decay=0.01, betas=(0.9, 0.99))
    ema = EMA(optimizer.masters, 0.999)
    result = {}
    for entry in plan.entries:
        model.set_policy(entry.policy)
        model.attention_backend = entry.attention
        reset_peak(device.type)
        laps = [_step(model, optimizer, ema, entry, plan.num_text_tokens, device) for _ in range(num_steps + 1)][1:]
        parts = {name: median(lap[name] for lap in laps) for name in laps[0]}
        parts["step_s"] = median(sum(lap.values()) for lap in laps)
        parts["peak_gib"] = peak_bytes(device.type) / 2**30
        result[entry.shape] = parts
    return result


def _step(
    model: VchitectTransformer,
    optimizer: MasterAdamW,
    ema: EMA,
    entry: PlanEntry,
    num_text_tokens: int,
    device: torch.device,
) -> dict[str, float]:
    config, shape, batch = model.config, entry.video_shape, entry.microbatch
    size = (batch, shape.num_frames, config.in_channels, shape.latent_height, shape.latent_width)
    latents, noise = (torch.randn(size, device=device) for _ in range(2))
    text = torch.randn(batch, num_text_tokens, config.joint_attention_dim, device=device)
    pooled = torch.randn(batch, config.pooled_projection_dim, device=device)
    sigma = torch.full((batch,), 0.5)
    seconds = {"forward_s": 0.0, "backward_s": 0.0, "optimizer_s": 0.0}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = _now(device)
        yield
        seconds[name] += _now(device) - start

    for _ in range(entry.accumulation):
        with timed("forward_s"):
            loss = flow_loss(model, latents, text, pooled, sigma, noise).mean() / entry.accumulation
        with timed("backward_s"):
            loss.backward()
    with timed("optimizer_s"):
        optimizer.step(1e-4, 1.0)
        ema.update(0)
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
