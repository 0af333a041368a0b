"""Rectified flow: noise levels, targets, loss, and the Euler sampler with classifier-free guidance.

    z_s = (1 - s) z_0 + s e,   target = e - z_0,   timestep = 1000 s,   s in (0, 1)

s is logit-normal or uniform, then shifted towards noise for larger videos: s' = a s / (1 + (a - 1) s).
Sources: Liu et al. 2022 (rectified flow); Esser et al. 2024, sections 3.1 and 5.3.2 (logit-normal, shift); model_spec,
"Diffusion". The paper's preliminaries write DDPM's noise prediction; the released model is a rectified flow, as here.

Letters: B batch, T frames, c latent channels, h w latent rows and columns, N text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import torch
from torch import Tensor

from vchitect_fast.errors import UserError, unknown_name

TIMESTEP_SCALE = 1000.0
GUIDANCE_KINDS = ("constant", "released")

# (latents [B,T,c,h,w], text [B,N,W], pooled [B,P], timestep [B]) -> velocity [B,T,c,h,w]
Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Resolution shift; 1 leaves s as it is, larger values spend more on noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigma(kind: str, batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """[B] noise levels in [0, 1), fp32 on the CPU. kind: "logit_normal" (mean 0, deviation 1) or "uniform"."""
    if kind == "logit_normal":
        sigma = torch.sigmoid(torch.randn(batch, generator=generator))
    elif kind == "uniform":
        sigma = torch.rand(batch, generator=generator)
    else:
        raise unknown_name("timestep sampling", kind, ("logit_normal", "uniform"))
    return shift_sigma(sigma, shift)


def sigma_quantile(kind: str, quantile: float, shift: float) -> float:
    """The noise level below which a share `quantile` of `draw_sigma`'s draws lie."""
    if kind == "logit_normal":
        sigma = 1 / (1 + math.exp(-NormalDist().inv_cdf(quantile)))
    elif kind == "uniform":
        sigma = quantile
    else:
        raise unknown_name("timestep sampling", kind, ("logit_normal", "uniform"))
    return shift * sigma / (1 + (shift - 1) * sigma)


def noised(latents: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """z_s of clean latents [B, ...] and noise of the same shape."""
    s = sigma_B.to(latents).view(-1, *[1] * (latents.ndim - 1))
    return (1 - s) * latents + s * noise


def flow_loss(
    velocity: Velocity,
    latents: Tensor,
    text: Tensor,
    pooled: Tensor,
    sigma_B: Tensor,
    noise: Tensor,
    *,
    num_frames: int | None = None,
) -> Tensor:
    """Mean squared error of the velocity, one value a sample: [B], fp32 (fp64 where the velocity is).

    num_frames  of the whole video where latents and noise are only the frames of this rank: then its part of the mean, so
                that the losses of the ranks, and their gradients, add up
    """
    z = noised(latents, noise, sigma_B)
    predicted = velocity(z, text, pooled, TIMESTEP_SCALE * sigma_B.to(latents.device))
    precise = torch.promote_types(predicted.dtype, torch.float32)
    squares = (predicted.to(precise) - (noise - latents).to(precise)).square().flatten(1)
    if num_frames is None or num_frames == latents.shape[1]:
        return squares.mean(dim=1)
    return squares.sum(dim=1) / (num_frames * math.prod(latents.shape[2:]))


def drop_captions(
    text: Tensor, pooled: Tensor, empty: tuple[Tensor, Tensor], rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Replace a share `rate` of the captions by the empty one, so that guidance has an unconditional model."""
    dropped = torch.rand(text.shape[0], generator=generator).to(text.device) < rate
    return (
        torch.where(dropped[:, None, None], empty[0].to(text), text),
        torch.where(dropped[:, None], empty[1].to(pooled), pooled),
    )


def sigma_schedule(num_steps: int, shift: float) -> Tensor:
    """[num_steps + 1] shifted levels from 1 down to 0."""
    if num_steps < 1:
        raise UserError(f"sampling needs at least 1 step, got {num_steps}; 30 to 50 are usual.")
    return shift_sigma(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def guidance_weight(kind: str, strength: float, timestep: float, num_steps: int) -> float:
    """Guidance at one step: `strength`, or the release's 1 + G (1 - cos(pi ((n - t) / n)^5)) / 2.

    The released formula is for parity only: t runs to 1000 while n is the number of steps, so it jumps between steps.
    """
    if kind == "constant":
        return strength
    if kind == "released":
        return 1 + strength * (1 - math.cos(math.pi * ((num_steps - timestep) / num_steps) ** 5)) / 2
    raise unknown_name("guidance", kind, GUIDANCE_KINDS)


@torch.no_grad()
def sample_latents(
    velocity: Velocity,
    noise: Tensor,
    prompt: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
    *,
    num_steps: int,
    shift: float = 1.0,
    guidance: float = 1.0,
    guidance_kind: str = "constant",
) -> Iterator[Tensor]:
    """Euler from noise to latents; yields z [B, T, c, h, w] in fp32 after each of `num_steps` steps, the last one clean.

    noise   [B, T, c, h, w] at s = 1
    prompt  text [B, N, W] and pooled [B, P]
    empty   the empty caption's, [1, N, W] and [1, P]; used only where the guidance weight is not 1
    """
    sigmas = sigma_schedule(num_steps, shift)
    z = noise.float()
    B = z.shape[0]
    text = torch.cat((prompt[0], empty[0].expand(B, -1, -1).to(prompt[0])))
    pooled = torch.cat((prompt[1], empty[1].expand(B, -1).to(prompt[1])))
    for s, s_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        t = TIMESTEP_SCALE * s
        weight = guidance_weight(guidance_kind, guidance, t, num_steps)
        if weight == 1.0:
            v = velocity(z, text[:B], pooled[:B], z.new_full((B,), t)).float()
        else:
            both = velocity(torch.cat((z, z)), text, pooled, z.new_full((2 * B,), t)).float()
            v = both[B:] + weight * (both[:B] - both[B:])
        z = z + (s_next - s) * v
        yield z
