"""gated_weight against its formula in fp64: odd sizes, in place, several samples, the same bits twice.

pytest tests/kernels/test_gated_weight.py; interpreted where there is no GPU.
"""

from __future__ import annotations

import pytest
import torch
from close import assert_close_to_exact
from torch import Tensor

from vchitect_fast.kernels.gated_weight import launch
from vchitect_fast.model import steps

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (5, 33), (3, 1024), (2, 1030), pytest.param((1536, 6144), marks=pytest.mark.gpu)]


def draw(size: tuple[int, int], dtype: torch.dtype, device: torch.device, num_samples: int = 1) -> list[list[Tensor]]:
    """product, weight and gate of each sample; the weight is one."""
    D, K = size
    weight = torch.randn(D, K, device=device).to(dtype)
    return [
        [torch.randn(D, K, device=device).to(dtype), weight, torch.randn(D, device=device).to(dtype)]
        for _ in range(num_samples)
    ]


def run(step, samples: list[list[Tensor]], *, in_place: bool = False) -> list[Tensor]:
    """gated and dgate of the last sample, and dweight over all."""
    wide = torch.promote_types(samples[0][0].dtype, torch.float32)
    sum_dtype = wide if len(samples) > 1 else samples[0][0].dtype
    dweight = torch.full_like(samples[0][0], torch.nan, dtype=sum_dtype)
    for i, (product, weight, gate) in enumerate(samples):
        target = product if in_place else dweight
        gated, dgate = torch.full_like(weight, torch.nan), torch.full_like(gate, torch.nan, dtype=wide)
        step(product, weight, gate, gated, target, dgate, i > 0)
    return [gated, dgate, target]


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_its_formula(size: tuple[int, int], dtype: torch.dtype, num_samples: int, device: torch.device) -> None:
    samples = draw(size, dtype, device, num_samples)
    found, low = run(launch, samples), run(steps.gate_weights, samples)
    exact = run(steps.gate_weights, [[t.double() for t in sample] for sample in samples])
    for name, *values in zip(("gated", "dgate", "dweight"), found, exact, low, strict=True):
        assert_close_to_exact(*values, reduced=size[1], name=name)


def test_the_formula_is_the_derivative() -> None:
    """gate (x W^T + b) by autograd in fp64."""
    x, weight = torch.randn(7, 4).double(), torch.randn(3, 4).double().requires_grad_()
    gate, d = torch.randn(3).double().requires_grad_(), torch.randn(7, 3).double()
    dweight, dgate = torch.autograd.grad((gate * (x @ weight.T)).flatten(), (weight, gate), d.flatten())
    gated, found_dgate, found_dweight = run(steps.gate_weights, [[d.T @ x, weight.detach(), gate.detach()]])
    exact = (gate[:, None] * weight, dgate, dweight)
    for found, value in zip((gated, found_dgate, found_dweight), exact, strict=True):
        assert (found - value).norm() < 1e-10 * value.norm()


def test_in_place_and_twice_the_same_bits(device: torch.device) -> None:
    [sample] = draw((4, 70), torch.float32, device)
    first, second = run(launch, [sample]), run(launch, [sample])
    in_place = run(launch, [[sample[0].clone(), *sample[1:]]], in_place=True)
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, in_place))


def test_strides_and_nothing_beside_the_slot(device: torch.device) -> None:
    [(product, weight, gate)] = draw((4, 20), torch.float32, device)
    plain = run(launch, [[product, weight, gate]])
    wide = torch.full((4, 60), 7.0, device=device)
    wide[:, 20:40] = product
    slot = wide[:, 20:40]
    strided = run(launch, [[slot, weight, gate]], in_place=True)
    assert all(map(torch.equal, plain, strided))
    assert (wide[:, :20] == 7).all() and (wide[:, 40:] == 7).all()
