"""Rectified flow: formulas in fp64, distributions of the noise levels, and a sampler that is exact where the flow is straight.

pytest tests/model/test_flow.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
from close import assert_close_to_exact
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.model.flow import (
    draw_sigma,
    drop_captions,
    flow_loss,
    guidance_weight,
    noised,
    sample_latents,
    shift_sigma,
    sigma_quantile,
    sigma_schedule,
)

B, T, c, h, w, N, W, P = 3, 2, 4, 6, 5, 7, 8, 9
KINDS = ["logit_normal", "uniform"]
QUANTILES = [0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(seed: int, batch: int = B) -> Tensor:
    return torch.randn(batch, T, c, h, w, generator=generator(seed))


def captions(seed: int, batch: int = B) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return torch.randn(batch, N, W, generator=g), torch.randn(batch, P, generator=g)


def share_tolerance(share: float, num_draws: int) -> float:
    """Five standard deviations of a share counted over so many draws: fails once in two million seeds."""
    return 5 * math.sqrt(share * (1 - share) / num_draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noised_is_the_straight_line_sample_by_sample(dtype: torch.dtype) -> None:
    z0, noise = latents(1).to(dtype), latents(2).to(dtype)
    sigma = torch.tensor([0.0, 0.3, 1.0]).to(dtype)
    s = sigma.double()[:, None, None, None, None]
    exact = (1 - s) * z0.double() + s * noise.double()
    actual = noised(z0, noise, sigma)
    assert actual.dtype == dtype
    low = sigma[:, None, None, None, None]
    assert_close_to_exact(actual, exact, z0 - low * z0 + low * noise, reduced=2)
    assert torch.equal(actual[0], z0[0]) and torch.equal(actual[2], noise[2])
    text = captions(1)[0]  # any number of dims
    assert torch.equal(noised(text, torch.zeros_like(text), torch.zeros(B)), text)


def test_the_loss_is_the_squared_distance_to_noise_minus_latents() -> None:
    z0, noise, (text, pooled), sigma = latents(1), latents(2), captions(3), torch.tensor([0.1, 0.5, 0.9])
    seen: dict[str, Tensor] = {}

    def velocity(z: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        seen.update(z=z, text=text, pooled=pooled, timestep=timestep)
        return 0.5 * z

    loss = flow_loss(velocity, z0, text, pooled, sigma, noise)
    s = sigma.double()[:, None, None, None, None]
    z = (1 - s) * z0.double() + s * noise.double()
    exact = (0.5 * z - (noise.double() - z0.double())).square().flatten(1).mean(1)
    low = (0.5 * noised(z0, noise, sigma) - noise + z0).square().flatten(1).mean(1)
    assert_close_to_exact(loss, exact, low, reduced=T * c * h * w)
    assert loss.shape == (B,) and loss.dtype == torch.float32
    assert seen["text"] is text and seen["pooled"] is pooled
    assert torch.equal(seen["z"], noised(z0, noise, sigma))
    assert seen["timestep"].tolist() == (1000 * sigma).tolist()


def test_the_right_velocity_has_no_loss_and_a_gradient_reaches_the_model() -> None:
    z0, noise, (text, pooled), sigma = latents(1), latents(2), captions(3), torch.rand(B)
    scale = torch.ones((), requires_grad=True)
    loss = flow_loss(lambda *_: scale * (noise - z0), z0, text, pooled, sigma, noise)
    assert loss.tolist() == [0.0] * B
    flow_loss(lambda *_: 2 * scale * (noise - z0), z0, text, pooled, sigma, noise).sum().backward()
    assert scale.grad is not None and scale.grad > 0


def test_the_loss_of_a_bf16_model_is_fp32() -> None:
    z0, noise, (text, pooled) = latents(1), latents(2), captions(3)
    loss = flow_loss(lambda z, *_: z.bfloat16(), z0, text, pooled, torch.full((B,), 0.5), noise)
    z = noised(z0, noise, torch.full((B,), 0.5)).bfloat16().double()
    exact = (z - (noise.double() - z0.double())).square().flatten(1).mean(1)
    low = (z.float() - (noise - z0)).square().flatten(1).mean(1)
    assert loss.dtype == torch.float32
    assert_close_to_exact(loss, exact, low, reduced=T * c * h * w)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_follow_their_distribution(kind: str, shift: float) -> None:
    """The share of 100 000 draws below each quantile, the quantile from the definition and from `sigma_quantile`."""
    num = 100_000
    sigma = draw_sigma(kind, num, shift, generator())
    assert sigma.shape == (num,) and sigma.dtype == torch.float32
    assert 0 <= sigma.min() and sigma.max() <= 1
    for quantile in QUANTILES:
        plain = 1 / (1 + math.exp(-NormalDist().inv_cdf(quantile))) if kind == "logit_normal" else quantile
        level = shift * plain / (1 + (shift - 1) * plain)
        assert sigma_quantile(kind, quantile, shift) == pytest.approx(level, rel=2**-50)
        share = float((sigma < level).double().mean())
        assert abs(share - quantile) < share_tolerance(quantile, num), quantile


def test_the_same_generator_gives_the_same_levels() -> None:
    for kind in KINDS:
        assert torch.equal(draw_sigma(kind, 5, 3.0, generator(4)), draw_sigma(kind, 5, 3.0, generator(4)))
        assert not torch.equal(draw_sigma(kind, 5, 3.0, generator(4)), draw_sigma(kind, 5, 3.0, generator(5)))


def test_the_shift_keeps_the_ends_and_the_order_and_moves_towards_noise() -> None:
    sigma = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert torch.equal(shift_sigma(sigma, 1.0), sigma)
    shifted = shift_sigma(sigma, 3.0)
    assert (shifted[0], shifted[-1]) == (0.0, 1.0)
    assert shifted[500] == 0.75  # 3/2 over 1 + 2/2
    assert (shifted.diff() > 0).all()
    assert (shifted[1:-1] > sigma[1:-1]).all()
    again = shift_sigma(shift_sigma(sigma, 3.0), 1 / 3)  # the inverse shift
    assert_close_to_exact(again.float(), sigma, sigma.float(), reduced=1)


@pytest.mark.parametrize("call", [lambda kind: draw_sigma(kind, 1, 1.0, generator()), lambda kind: sigma_quantile(kind, 0.5, 1.0)])  # fmt: skip
def test_unknown_sampling_is_refused(call: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match="unknown timestep sampling 'logitnormal'; did you mean 'logit_normal'"):
        call("logitnormal")


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_at_the_rate_and_no_other_row_changes(rate: float) -> None:
    num = 2000
    (text, pooled), empty = captions(1, num), captions(2, 1)
    new_text, new_pooled = drop_captions(text, pooled, empty, rate, generator(3))
    dropped = (new_text == empty[0]).flatten(1).all(1)
    assert torch.equal(new_pooled, torch.where(dropped[:, None], empty[1], pooled))  # both or neither
    assert torch.equal(new_text[~dropped], text[~dropped])
    assert abs(float(dropped.double().mean()) - rate) <= share_tolerance(rate, num)
    again = drop_captions(text, pooled, empty, rate, generator(3))
    assert torch.equal(again[0], new_text) and torch.equal(again[1], new_pooled)


def test_the_schedule_runs_from_one_to_zero() -> None:
    plain = sigma_schedule(4, 1.0)
    assert plain.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0] and plain.dtype == torch.float32
    assert sigma_schedule(2, 3.0).tolist() == [1.0, 0.75, 0.0]
    assert sigma_schedule(1, 5.0).tolist() == [1.0, 0.0]
    assert (sigma_schedule(50, 3.0).diff() < 0).all()
    with pytest.raises(UserError, match="at least 1 step, got 0"):
        sigma_schedule(0, 1.0)


@pytest.mark.parametrize("num_steps", [1, 3, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_exact_on_a_straight_flow(num_steps: int, shift: float) -> None:
    """With the velocity e - z_0 every step ends on the line z_s, up to fp32 rounding."""
    z0, noise = latents(1), latents(2)
    v = noise - z0
    sigmas = sigma_schedule(num_steps, shift)
    states = list(sample_latents(lambda *_: v, noise, captions(1), captions(2, 1), num_steps=num_steps, shift=shift))
    assert len(states) == num_steps
    plain = noise.clone()
    for index, z in enumerate(states):
        plain = plain + (sigmas[index + 1] - sigmas[index]) * v
        s = sigmas[index + 1].double()
        exact = (1 - s) * z0.double() + s * noise.double()
        assert_close_to_exact(z, exact, plain, reduced=num_steps + 1, name=f"step {index + 1}")


class Recorder:
    """A velocity that depends on everything it is given, and remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, ...]] = []

    def __call__(self, z: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        self.calls.append((z, text, pooled, timestep))
        bias = text.mean((1, 2)) + pooled.mean(1) + timestep / 1000
        return z * bias[:, None, None, None, None]


def test_without_guidance_the_model_runs_once_a_step_on_the_prompts_alone() -> None:
    velocity, prompt = Recorder(), captions(1)
    list(sample_latents(velocity, latents(2), prompt, captions(3, 1), num_steps=4, guidance=1.0))
    assert [call[3].tolist() for call in velocity.calls] == [[t] * B for t in (1000.0, 750.0, 500.0, 250.0)]
    assert all(torch.equal(call[1], prompt[0]) and torch.equal(call[2], prompt[1]) for call in velocity.calls)


def test_guidance_is_the_empty_caption_plus_the_weighted_difference() -> None:
    prompt, empty, noise = captions(1), captions(3, 1), latents(2)
    velocity = Recorder()
    [z] = sample_latents(velocity, noise, prompt, empty, num_steps=1, guidance=4.0)
    [(both, _, _, timestep)] = velocity.calls
    assert both.shape[0] == 2 * B and timestep.tolist() == [1000.0] * 2 * B
    with_text = Recorder()(noise.double(), prompt[0].double(), prompt[1].double(), timestep[:B].double())
    expanded = [tensor.double().expand(B, *tensor.shape[1:]) for tensor in empty]
    without = Recorder()(noise.double(), *expanded, timestep[:B].double())
    exact = noise.double() - (without + 4.0 * (with_text - without))
    low_with = Recorder()(noise, *prompt, timestep[:B])
    low_without = Recorder()(noise, *[tensor.float() for tensor in expanded], timestep[:B])
    assert_close_to_exact(z, exact, noise - (4.0 * low_with - 3.0 * low_without), reduced=N * W + P)


def test_sampling_keeps_no_graph_and_returns_fp32() -> None:
    scale = torch.ones((), requires_grad=True)
    [z] = sample_latents(
        lambda z, *_: (scale * z).bfloat16(), latents(1).bfloat16(), captions(1), captions(2, 1), num_steps=1
    )
    assert z.dtype == torch.float32 and not z.requires_grad


@pytest.mark.parametrize(
    ("timestep", "num_steps", "weight"),
    [
        (100.0, 100, 1.0),  # cos 0 = 1
        (0.0, 100, 8.5),  # cos pi = -1: 1 + 7.5
        (0.0, 30, 8.5),
        (200.0, 100, 8.5),  # (-1)^5 = -1
        (1000.0, 100, 8.5),  # (-9)^5 = -59049 is odd
        (50.0, 100, 1 + 3.75 * (1 - math.cos(math.pi / 32))),
        (0.0, 1, 8.5),
        (900.0, 100, 1.0),  # (-8)^5 is even
    ],
)
def test_released_guidance_by_hand(timestep: float, num_steps: int, weight: float) -> None:
    """1 + 7.5 (1 - cos(pi ((n - t)/n)^5)) / 2, to the rounding of the angle, which is large where the power is."""
    rounding = 8 * math.ulp(math.pi * abs((num_steps - timestep) / num_steps) ** 5) + 4 * math.ulp(weight)
    assert abs(guidance_weight("released", 7.5, timestep, num_steps) - weight) <= rounding


def test_released_guidance_is_used_at_each_step() -> None:
    """n = 4 steps: t = 1000, 750, 500, 250, whose weights all differ from the constant one."""
    velocity = Recorder()
    states = list(
        sample_latents(velocity, latents(2), captions(1), captions(3, 1), num_steps=4, guidance=7.5, guidance_kind="released")
    )  # fmt: skip
    z, sigmas = latents(2), sigma_schedule(4, 1.0).tolist()
    for index, (both, text, pooled, timestep) in enumerate(velocity.calls):
        assert torch.equal(both[:B], z)
        v = Recorder()(both, text, pooled, timestep)
        weight = 1 + 7.5 * (1 - math.cos(math.pi * ((4 - 1000 * sigmas[index]) / 4) ** 5)) / 2
        z = z + (sigmas[index + 1] - sigmas[index]) * (v[B:] + weight * (v[:B] - v[B:]))
        assert torch.equal(states[index], z)
    assert len(velocity.calls) == 4


def test_constant_guidance_is_constant_and_others_are_refused() -> None:
    assert guidance_weight("constant", 4.5, 321.0, 7) == 4.5
    with pytest.raises(UserError, match="unknown guidance 'release'; did you mean 'released'"):
        guidance_weight("release", 1.0, 0.0, 1)
