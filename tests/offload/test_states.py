"""Optimizer states and an EMA that lie in host memory between uses: bitwise the same training, nothing readable while away.

pytest tests/offload/test_states.py
"""

from __future__ import annotations

import random

import pytest
import torch
from offloading import MIB, assert_no_leaks, assert_same, loss_of, make_inputs, make_model, work_of
from torch import Tensor

from vchitect_fast.ema import EMA
from vchitect_fast.errors import UserError
from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.policy import SLOT_BYTES, pool_bytes
from vchitect_fast.offload.states import Parked, States, park_budget_bytes
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
    empty = torch.empty(0, 4)  # a rank's share of a small parameter
    Parked(engine, {"x": x, "empty": empty}).end()
    assert_no_leaks(engine)
    with pytest.raises(UserError, match="cannot park half: .* got 1200 of 2400 bytes"):
        Parked(engine, {"half": x[:300]})


def test_parts_come_and_go_by_themselves_in_pools_without_a_spare_slot() -> None:
    """In any order, for as often as one likes; in one pool for all of them they would break it up."""
    draw, names = random.Random(0), ("optimizer", "average", "other")
    sizes = [[draw.randrange(1, 2000) for _ in range(20)] for _ in names]
    parts = {
        name: {str(i): torch.full((n,), float(i)) for i, n in enumerate(s)}
        for name, s in zip(names, sizes, strict=True)
    }
    states = States(parts)
    stats = [parked.engine.stats() for parked in states.parts.values()]
    assert all(found["used_bytes"] == found["budget_bytes"] for found in stats)
    assert states.parked_bytes() == {name: 4 * sum(s) for name, s in zip(names, sizes, strict=True)}
    for _ in range(60):
        chosen = draw.sample(names, draw.randrange(4))
        with states.here(*chosen):
            for name, tensors in parts.items():
                is_here = not chosen or name in chosen
                assert all(
                    x.numel() == (n if is_here else 0)
                    for x, n in zip(tensors.values(), sizes[names.index(name)], strict=True)
                )
                if is_here:
                    [x.add_(1) for x in tensors.values()]
    with states.here():
        assert all(bool((x == x[0]).all()) for tensors in parts.values() for x in tensors.values())
    with States({}).here("optimizer"):  # nothing is parked
        pass


@pytest.mark.parametrize("seed", range(3))
def test_a_pool_of_several_chunks_has_room_for_what_its_formula_was_given(seed: int) -> None:
    """No slot crosses from one chunk into the next, so a part of each chunk may stay empty: 23 slots of 7 do not fit into
    161 in chunks of 64."""
    draw, chunk = random.Random(seed), 64 * SLOT_BYTES
    equal = [7 * SLOT_BYTES] * 23
    for sizes in (equal, [draw.randrange(1, 20 * SLOT_BYTES) for _ in range(60)]):
        whole = sum(-(-size // SLOT_BYTES) * SLOT_BYTES for size in sizes)
        needed = pool_bytes(sizes, chunk)
        assert whole < needed < 1.5 * whole
        engine = Engine(needed, chunk_bytes=chunk)
        for _ in range(20):
            held = [
                engine.offload(x, "x").handle(x)
                for x in (torch.zeros(n, dtype=torch.uint8) for n in draw.sample(sizes, len(sizes)))
            ]
            del held
            assert_no_leaks(engine)
    engine, x = Engine(23 * equal[0], chunk_bytes=chunk), torch.zeros(equal[0], dtype=torch.uint8)
    held = [engine.offload(x.clone(), "x").handle(x) for _ in equal[1:]]
    with pytest.raises(UserError, match="no room to offload x"):
        engine.offload(x, "x")
    assert len(held) == 22 and pool_bytes(equal) == 23 * equal[0]  # in one chunk nothing is added
