"""Optimizer states and an EMA that lie in host memory between uses: bitwise the same training, nothing readable while away.

pytest tests/offload/test_states.py
"""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from offloading import MIB, assert_no_leaks, assert_same, loss_of, make_inputs, make_model, work_of
from torch import Tensor

from vchitect_fast.ema import EMA
from vchitect_fast.errors import UserError
from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.policy import SLOT_BYTES, pool_bytes, turns
from vchitect_fast.offload.states import Parked, States, park_budget_bytes
from vchitect_fast.optimizer import MasterAdamW

pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")


def train(parks: str) -> dict[str, Tensor]:
    """Five steps with states that stay, come all "at once", or "in turn"."""
    model, inputs = make_model(), make_inputs(work_of())
    optimizer = MasterAdamW(model, weight_decay=0.1, betas=(0.9, 0.99))
    ema = EMA(optimizer.masters, 0.9)
    moments = {name: x for name, x in optimizer.state().items() if not name.startswith("step.")}
    states = States({"optimizer": moments, "average": ema.average} if parks else {})
    kept = [*moments.values(), *ema.average.values()]
    for parked in states.parts.values():
        stats = parked.engine.stats()
        assert stats["used_bytes"] == stats["budget_bytes"]
    for step in range(5):
        loss_of(model, inputs).backward()
        assert not parks or all(x.numel() == 0 for x in kept)
        if parks == "in turn":
            optimizer.step(1e-3, 1.0, states.in_turn("optimizer"))
            ema.update(step, states.in_turn("average"))
            continue
        with states.here():
            assert states.in_turn("other") is None
            optimizer.step(1e-3, 1.0)
            ema.update(step)
    for parked in states.parts.values():
        parked.end()
        assert_no_leaks(parked.engine)
    found = moments | {f"ema.{name}": x for name, x in ema.average.items()}
    return found | {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("parks", ["at once", "in turn"])
def test_training_is_bitwise_the_same(parks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(turns, most_bytes=20_000)
    monkeypatch.setattr("vchitect_fast.optimizer.turns", few)
    monkeypatch.setattr("vchitect_fast.ema.turns", few)
    assert_same(train(parks), train(""))


def test_in_turn_three_groups_are_here_at_most_and_find_their_places_again() -> None:
    draw = random.Random(0)
    tensors = {str(i): torch.full((draw.randrange(1, 3000),), float(i)) for i in range(40)}
    sizes = {name: x.numel() for name, x in tensors.items()}
    engine = Engine(park_budget_bytes(tensors), delay_us_max=200)
    parked, groups = Parked(engine, tensors), turns({name: 4 * n for name, n in sizes.items()}, 20_000)
    assert 5 < len(groups) < 20
    seen = []

    def work(place: int) -> None:
        here = [name for name, x in tensors.items() if x.numel()]
        assert (
            set(groups[place])
            <= set(here)
            <= {name for group in groups[max(0, place - 1) : place + 1] for name in group}
        )
        for name in groups[place]:
            assert tensors[name].numel() == sizes[name]
            tensors[name].add_(1)
        seen.append(place)

    for _ in range(20):
        parked.in_turn(groups, work)
        assert not any(x.numel() for x in tensors.values())
        assert engine.stats()["used_bytes"] == engine.stats()["budget_bytes"]
    assert seen == 20 * list(range(len(groups)))
    with parked.here():
        assert all(bool((x == int(name) + 20).all()) for name, x in tensors.items())
    parked.end()
    assert_no_leaks(engine)


def test_an_error_in_the_middle_of_a_turn_leaves_all_parked_with_what_was_done() -> None:
    tensors = {name: torch.full((300,), float(i)) for i, name in enumerate("abcd")}
    engine = Engine(park_budget_bytes(tensors), delay_us_max=200)
    parked = Parked(engine, tensors)

    def work(place: int) -> None:
        tensors["abcd"[place]].add_(10)
        if place == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        parked.in_turn(list("abcd"), work)
    assert not any(x.numel() for x in tensors.values())
    with pytest.raises(AssertionError, match="other tensors"):
        parked.in_turn(["a", "b"], work)
    parked.end()
    assert [float(x[0]) for x in tensors.values()] == [10, 11, 12, 3]
    assert_no_leaks(engine)


def test_turns_cut_by_bytes_in_order() -> None:
    assert turns({"a": 3, "b": 4, "c": 9, "d": 1, "e": 6}, 7) == [["a", "b"], ["c"], ["d", "e"]]
    assert turns({}) == []


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
