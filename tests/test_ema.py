"""EMA: the formula in fp64, the warm-up of its decay, and no touch on the weights.

pytest tests/test_ema.py
"""

from __future__ import annotations

import pytest
import torch
from close import assert_close_to_exact

from vchitect_fast.ema import EMA


def test_the_formula_with_its_warm_up() -> None:
    """Against fp64 over 40 updates; decay 0.5 binds from update 8 on, where (1 + 8) / (10 + 8) = 0.5."""
    weight = torch.randn(50)
    ema = EMA({"weight": weight}, decay=0.5)
    exact, plain = weight.double(), weight.clone()
    for step in range(40):
        weight += torch.randn(50)
        decay = (1 + step) / (10 + step) if step < 8 else 0.5
        exact = decay * exact + (1 - decay) * weight.double()
        plain = decay * plain + (1 - decay) * weight
        ema.update(step)
        assert_close_to_exact(ema.average["weight"], exact, plain, reduced=2)


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (8, 0.5), (89, 90 / 99), (8991, 0.999), (10**6, 0.999)])
def test_the_decay_of_one_update(step: int, decay: float) -> None:
    weight = torch.zeros(1)
    ema = EMA({"weight": weight}, decay=0.999)
    weight.fill_(1.0)
    ema.update(step)
    assert ema.average["weight"].item() == torch.tensor(1 - decay, dtype=torch.float32).item()


def test_averages_are_fp32_copies_of_their_own() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    ema = EMA({"a.weight": parameter}, decay=0.9)
    assert ema.average.keys() == {"a.weight"}
    average = ema.average["a.weight"]
    assert average.dtype == torch.float32 and not average.requires_grad
    with torch.no_grad():
        parameter.fill_(2.0)
    assert average.tolist() == [1.0] * 3
    ema.update(0)
    assert parameter.tolist() == [2.0] * 3
    assert ema.average["a.weight"] is average  # in place: a checkpoint loads into this storage


def test_a_carried_average_does_not_warm_up_again() -> None:
    weight = torch.zeros(1)
    ema = EMA({"weight": weight}, decay=0.75, warm_up=False)
    weight.fill_(1.0)
    ema.update(0)
    assert ema.average["weight"].item() == 0.25
