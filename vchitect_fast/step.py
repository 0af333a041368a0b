"""One optimizer step: microbatches forward and backward, clip, update, average; and what the log says of it.

Every draw (noise level, noise, caption dropout) is a function of (seed, step, microbatch), the microbatches of a step counted
over all data-parallel ranks. So n of them compute what one process with n times the accumulation does, and the ranks of an
sp group draw the same and keep the frames that are theirs. A step whose loss or gradient is not finite is not taken.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vchitect_fast.config import TrainConfig
from vchitect_fast.data import Batch
from vchitect_fast.ema import EMA
from vchitect_fast.errors import UserError
from vchitect_fast.metrics import peak_bytes
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.model.flow import draw_sigma, drop_captions, flow_loss
from vchitect_fast.offload.states import States
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.parallel.apply import obey
from vchitect_fast.parallel.mesh import ALONE, Mesh, over_ranks
from vchitect_fast.parallel.shard import reduce_gradients
from vchitect_fast.plan import Plan, PlanEntry
from vchitect_fast.profiling.span import span
from vchitect_fast.validate import generator_of
from vchitect_fast.workload import Workload


@dataclass
class Step:
    """One optimizer step on this rank's part of a batch; every rank of the mesh calls it."""

    config: TrainConfig
    plan: Plan
    model: VchitectTransformer
    optimizer: MasterAdamW
    ema: EMA
    empty: tuple[Tensor, Tensor]  # text and pooled embeddings of the empty caption
    mesh: Mesh = ALONE
    states: States = field(default_factory=lambda: States({}))  # "optimizer" and "average", where they are parked

    def __call__(self, step: int, batch: Batch) -> dict[str, Any]:
        """Returns the step's log record, of all ranks together; UserError when the loss is not finite."""
        entry, mesh = self.plan.entry(batch.shape), self.mesh
        obey(self.model, entry, mesh)
        clock = Clock(batch.latents.device)
        losses = [self._microbatch(step, micro, batch, entry, clock) for micro in range(entry.accumulation)]
        with span("forward/loss"):  # ranks wait for each other here
            # Ranks of an sp group have parts of one loss.
            part = mesh.sizes["sp"] * float(torch.stack(losses).sum())
            busy_s = batch.data_s + batch.encode_s + sum(clock.seconds.values())
            [total, mean_busy_s], [longest_s] = over_ranks(mesh, [part, busy_s], [busy_s])
        rate = learning_rate(self.config, step)
        with span("optimizer/step"):
            moments = self.states.in_turn("optimizer")
            norm = (
                float(self.optimizer.step(rate, self.config.clip_norm, moments)) if math.isfinite(total) else math.nan
            )
        if not math.isfinite(norm):
            clips = ", ".join(str(clip.path) for clip in batch.clips)
            raise UserError(
                f"step {step + 1} has loss {total} and gradient norm {norm} (clips: {clips}), and was not taken; "
                "lower learning_rate or look at these clips."
            )
        with span("optimizer/average"):
            self.ema.update(step, self.states.in_turn("average"))
            clock.lap("optimizer_s")
        seconds = {"data_s": batch.data_s, "encode_s": batch.encode_s, **clock.seconds}
        step_s = sum(seconds.values())
        work = Workload(self.model.config, batch.shape, entry.microbatch, self.plan.num_text_tokens)
        num_microbatches = entry.accumulation * mesh.num_dp
        flops = work.train_flops() * num_microbatches
        _, [most_bytes] = over_ranks(mesh, [], [float(peak_bytes(batch.latents.device.type))])
        return {
            "loss": total, "grad_norm": norm, "learning_rate": rate, "shape": str(batch.shape), "step_s": step_s, **seconds,
            "tokens_per_s": work.visual_rows * num_microbatches / step_s, "model_flops": flops,
            "mfu": flops / step_s / self.plan.peak_flops / mesh.world_size if self.plan.peak_flops else None,
            "peak_gib": most_bytes / 2**30,
            "imbalance": longest_s / mean_busy_s - 1 if mesh.world_size > 1 else None,
        }  # fmt: skip

    def _microbatch(self, step: int, micro: int, batch: Batch, entry: PlanEntry, clock: Clock) -> Tensor:
        """Forward and backward; this rank's part of the loss, a share of `accumulation`."""
        config, T = self.config, batch.shape.num_frames
        with span("data/noise"):
            rows = slice(micro * entry.microbatch, (micro + 1) * entry.microbatch)
            latents = batch.latents[rows]
            generator = generator_of(config.seed, step, self.mesh.dp_rank * entry.accumulation + micro)
            sigma = draw_sigma(config.timestep_sampling, len(latents), config.shift, generator)
            noise = torch.randn(len(latents), T, *latents.shape[2:], generator=generator)[:, batch.frames].to(latents)
            text, pooled = drop_captions(
                batch.text_embeds[rows], batch.pooled[rows], self.empty, config.caption_dropout, generator
            )
        reduce_gradients(self.model, now=micro == entry.accumulation - 1)
        with self.model.saving.step():
            with span("forward/model"):
                found = flow_loss(self.model, latents, text, pooled, sigma, noise, num_frames=T)
                loss = found.mean() / entry.accumulation
                clock.lap("forward_s")
            with span("backward/model"):
                loss.backward()
                clock.lap("backward_s")
        return loss.detach()


class Clock:
    """Adds up the seconds between laps by name; waits for the GPU so that a lap holds the work it is named after."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant or half a cosine down to 0 at `config.steps`."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant" or step < config.warmup_steps:
        return config.learning_rate * warm
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
