"""Validation: the averaged model's loss at fixed noise levels, on fixed clips, with fixed noise.

The levels are quantiles of those that the run trains on, so their mean estimates the training loss without its noise. The
noise of a sample depends on the seed and its number alone, not on the batch it is in. Data-parallel ranks all do the same; the
ranks of an sp group have their frames of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from vchitect_fast.clips import read_clips
from vchitect_fast.config import TrainConfig
from vchitect_fast.data import VideoData
from vchitect_fast.manifest import Clip
from vchitect_fast.metrics import Log
from vchitect_fast.model.flow import flow_loss, sigma_quantile
from vchitect_fast.parallel.mesh import ALONE, Mesh, on_all, over_ranks
from vchitect_fast.plan import Plan
from vchitect_fast.sample import Pipeline

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
NUM_CLIPS = 8


def generator_of(seed: int, *which: int) -> torch.Generator:
    """A CPU generator that is a function of its arguments: (seed, step, microbatch) in training, (seed, -1, sample) here."""
    digest = hashlib.sha256("/".join(map(str, (seed, *which))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Validation:
    """Call it with the step to measure, log and return {"step", "loss", "by_sigma"}."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        pipeline: Pipeline,
        open_data: Callable[[list[Clip]], VideoData],
        log: Log,
        mesh: Mesh = ALONE,
    ) -> None:
        """Reads the clips now, so that a mistake is found before the first step."""
        self._config, self._pipeline, self._log, self._mesh = config, pipeline, log, mesh
        name = config.validation_manifest or config.manifest
        with open_data(on_all(mesh.host_group, lambda: read_clips(name, config.cache))) as data:
            self._batches = data.first_batches(NUM_CLIPS)
        self._rows = {entry.video_shape: entry.microbatch for entry in plan.entries}

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, Any]:
        """The mean over the levels, and the loss at each."""
        config = self._config
        by_sigma = {}
        for quantile in QUANTILES:
            sigma = sigma_quantile(config.timestep_sampling, quantile, config.shift)
            by_sigma[f"{sigma:.4g}"] = self._loss_at(sigma)
        record = {"step": step, "loss": sum(by_sigma.values()) / len(by_sigma), "by_sigma": by_sigma}
        self._log.write("validation", step, loss=record["loss"], by_sigma=by_sigma)
        return record

    def _loss_at(self, sigma: float) -> float:
        losses, number = [], 0
        for batch in self._batches:
            size, T = self._rows[batch.shape], batch.shape.num_frames
            self._pipeline.cut(T)
            for first in range(0, len(batch.latents), size):
                rows = slice(first, first + size)
                latents = batch.latents[rows]
                noise = []
                for sample in latents:
                    generator = generator_of(self._config.seed, -1, number)
                    noise.append(torch.randn(T, *sample.shape[1:], generator=generator)[batch.frames])
                    number += 1
                losses.append(
                    flow_loss(
                        self._pipeline.velocity, latents, batch.text_embeds[rows], batch.pooled[rows],
                        torch.full((len(latents),), sigma), torch.stack(noise).to(latents), num_frames=T,
                    )
                )  # fmt: skip
        [mean], _ = over_ranks(self._mesh, [float(torch.cat(losses).mean())], [])
        return self._mesh.sizes["sp"] * mean  # of an sp group each rank has a part
