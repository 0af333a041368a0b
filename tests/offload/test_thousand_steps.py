"""A thousand steps with random Policies, random delays of the copy threads and random views: bitwise as without offload.

Two copies of a model and of a module that saves random views train side by side, one of them with everything random; after
each step every parameter must be equal. `make soak` runs twenty thousand.
pytest tests/offload/test_thousand_steps.py
"""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from offloading import MIB, NUM_BLOCKS, assert_no_leaks, loss_of, make_inputs, make_model, work_of
from torch import Tensor, nn

from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.plan import Policy

pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")
ACTIONS = ("keep", "recompute", "offload")


class Views(nn.Module):
    """Saves views of few storages in many ways: which, and in which order, is drawn from `draw` at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, draw: random.Random) -> Tensor:
        pieces = [x]
        for linear in self.linears:
            y = torch.tanh(linear(pieces[-1]))
            for _ in range(draw.randrange(1, 4)):
                y = torch.tanh(self._view(y, draw))  # bounded: a NaN would be equal to nothing
            pieces.append(y + 0.1 * draw.choice(pieces))
        return torch.stack([piece.mul(piece).mean() for piece in pieces]).sum()

    @staticmethod
    def _view(y: Tensor, draw: random.Random) -> Tensor:
        kind = draw.randrange(6)
        if kind == 0:
            return y * y.flip(0)
        if kind == 1:
            return torch.sigmoid(y.view(4, -1, 16).transpose(0, 1)).transpose(0, 1).reshape(y.shape)
        if kind == 2:  # a small part of a storage, packed by rows
            columns = y[:, 3:7]
            return y + (columns * columns).sum(-1, keepdim=True)
        if kind == 3:
            first = y[:1].expand(y.shape[0], -1)
            return y * torch.cos(first)
        if kind == 4:
            left, right = y.chunk(2, dim=-1)
            return torch.cat((left * right, right.exp()), dim=-1)
        return y * y.unfold(0, y.shape[0], 1).squeeze(0).t()[:, :16]


def random_policy(draw: random.Random) -> Policy:
    if draw.random() < 0.1:
        return Policy.keep()
    branch_out = draw.choice(ACTIONS)
    stats = branch_out if branch_out == "recompute" else draw.choice(("keep", "offload"))
    return Policy(
        draw.choice(("keep", "offload")), draw.choice(ACTIONS), branch_out, draw.choice(ACTIONS), stats
    )  # fmt: skip


def train_side_by_side(num_steps: int, seed: int) -> dict[str, float]:
    """The figures of the engine at the end; fails at the first step after which a parameter differs."""
    draw, work = random.Random(seed), replace(work_of("2x32x16"), batch=1)
    models = [make_model(seed)]
    models.append(copy.deepcopy(models[0]))
    views = [Views()]
    views.append(copy.deepcopy(views[0]))
    engine = Engine(4 * MIB, max_in_flight_bytes=20_000, delay_us_max=60, seed=seed)
    saving = Saving(engine, depth=1, keep_last=0)
    models[1].saving = saving
    parameters = [[*model.parameters(), *view.parameters()] for model, view in zip(models, views, strict=True)]
    optimizers = [torch.optim.SGD(group, lr=1e-6, momentum=0.9) for group in parameters]
    for step in range(num_steps):
        models[1].set_policy([random_policy(draw) for _ in range(NUM_BLOCKS)])
        saving.depth, saving.keep_last = draw.randrange(3), draw.randrange(2)
        engine.max_in_flight_bytes = draw.choice((0, 2_000, 20_000, MIB))
        num_micro, shape_of_views = draw.choice((1, 1, 1, 2)), draw.randrange(10**9)
        parts = draw.choice(("blocks", "views", "views", "views", "both"))
        batches = [make_inputs(work, draw.randrange(10**9)) for _ in range(num_micro)]
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
        together = draw.random() < 0.3  # all forwards first, then one backward
        for i in range(2):
            optimizers[i].zero_grad(set_to_none=True)
            held = []
            for inputs in batches:
                loss = torch.zeros((), dtype=torch.float64)
                if parts != "blocks":
                    with saving.anonymous("views", draw.choice((0, 512))) if i else nullcontext():
                        loss = loss + 1e3 * views[i](x, random.Random(shape_of_views))
                if parts != "views":
                    loss = loss + loss_of(models[i], inputs)
                held.append(loss)
                del loss
                if not together:
                    held.pop().backward()
            if held:
                torch.stack(held).sum().backward()
            optimizers[i].step()
        same = [torch.equal(a, b) for a, b in zip(*parameters, strict=True)]
        assert all(same), f"step {step}: {same.count(False)} of {len(same)} parameters differ"
        if step % 100 == 99:
            del held
            assert_no_leaks(engine)
    return engine.stats()


def test_a_thousand_random_steps_are_bitwise_those_without_offload() -> None:
    stats = train_side_by_side(1000, seed=0)
    assert stats["offload_num_copies"] > 10_000 and stats["prefetch_num_copies"] > 1_000


@pytest.mark.soak
def test_twenty_thousand_random_steps() -> None:
    for seed in range(1, 11):
        train_side_by_side(2000, seed)
