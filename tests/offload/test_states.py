"""Optimizer states and an EMA that lie in host memory between uses: bitwise the same training, nothing readable while away.

pytest tests/offload/test_states.py
"""

from __future__ import annotations

import pytest
import torch
from offloading import MIB, assert_no_leaks, assert_same, loss_of, make_inputs, make_model, work_of
from torch import Tensor

from vchitect_fast.ema import EMA
from vchitect_fast.errors import UserError
from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.states import Parked, park_budget_bytes
from vchitect_fast.optimizer import MasterAdamW

pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")


def train(parks: bool) -> dict[str, Tensor]:
    model, inputs = make_model(), make_inputs(work_of())
    optimizer = MasterAdamW(model, weight_decay=0.1, betas=(0.9, 0.99))
    ema = EMA(optimizer.masters, 0.9)
    states = {name: x for name, x in optimizer.state().items() if not name.startswith("step.")}
    states |= {f"ema.{name}": x for name, x in ema.average.items()}
    if parks:
        engine = Engine(park_budget_bytes(states), delay_us_max=200)
        parked = Parked(engine, states)
        assert engine.stats()["used_bytes"] == engine.stats()["budget_bytes"]
    for step in range(5):
        loss_of(model, inputs).backward()
        if parks:
            assert all(x.numel() == 0 for x in states.values())
            with parked.here():
                optimizer.step(1e-3, 1.0)
                ema.update(step)
        else:
            optimizer.step(1e-3, 1.0)
            ema.update(step)
    if parks:
        parked.end()
        assert_no_leaks(engine)
    return {**states, **{name: p.detach() for name, p in model.named_parameters()}}


def test_training_is_bitwise_the_same() -> None:
    assert_same(train(parks=True), train(parks=False))


def test_reading_what_is_away_is_an_error_and_it_comes_back() -> None:
    engine, x = Engine(MIB), torch.arange(100.0)
    square = x.view(10, 10)
    parked = Parked(engine, {"x": x, "the same": square})
    assert engine.stats()["num_slots"] == 1
    with pytest.raises(RuntimeError, match="size"):
        torch.ones(100).mul_(x)
    with parked.here():
        x += 1
        assert x[3] == 4 and square[0, 3] == 4
    with parked.here():
        assert torch.equal(x, torch.arange(1.0, 101.0))
    parked.end()
    assert x.sum() == 5050
    assert_no_leaks(engine)


def test_an_exception_inside_leaves_them_parked() -> None:
    engine, x = Engine(MIB), torch.arange(100.0)
    parked = Parked(engine, {"x": x})
    with pytest.raises(ZeroDivisionError), parked.here():
        raise ZeroDivisionError
    assert x.numel() == 0
    parked.end()
    assert torch.equal(x, torch.arange(100.0))


def test_what_does_not_fit_or_is_a_part_is_refused_and_untouched() -> None:
    x, y = torch.arange(600.0), torch.arange(600.0)
    engine = Engine(4096)
    with pytest.raises(UserError, match="no room to offload y: .*at least"):
        Parked(engine, {"x": x, "y": y})
    assert torch.equal(x, torch.arange(600.0)) and torch.equal(y, x)
    assert_no_leaks(engine)
    with pytest.raises(UserError, match="cannot park half: .* got 1200 of 2400 bytes"):
        Parked(engine, {"half": x[:300]})
