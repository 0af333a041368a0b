"""One forward and backward of a small model, cut over the ranks and in one process: what tests/parallel/test_sequence*.py ask of ranks.

Each function runs on every rank of tests/ranks.py. The whole inputs come from a seed, each rank takes its frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vchitect_fast.model import Branches, VchitectTransformer, preset
from vchitect_fast.model.flow import flow_loss
from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.parallel.collectives import share
from vchitect_fast.plan import Policy, ShardSpec

FRAMES = ShardSpec("frames", temporal="tokens")
HEADS = ShardSpec("tokens", spatial="heads")
ROWS = ShardSpec("tokens", spatial="frames")
SPECS = {"frames": FRAMES, "tokens to heads": HEADS, "tokens to frames": ROWS}
CONFIG = replace(
    preset("vchitect-nano"), num_attention_heads=6, attention_head_dim=8, caption_projection_dim=48, num_layers=3,
    rope_scaling_factor=1.5,
)  # fmt: skip
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """What is computed; the grid is h/2 x w/2 tokens a frame."""

    spec: ShardSpec
    B: int = 1
    T: int = 3
    h: int = 4
    w: int = 6
    N: int = 5
    policies: tuple[Policy, ...] = ()
    branches: Branches = Branches()  # noqa: RUF009  frozen
    dtype: str = "float64"


def make_model(case: Case, dtype: torch.dtype) -> VchitectTransformer:
    """Random weights everywhere: AdaLN-Zero would give the blocks no gradient. The same on every rank."""
    torch.manual_seed(0)
    model = VchitectTransformer(CONFIG, branches=case.branches)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model = model.to(dtype)
    if case.policies:
        model.saving = Saving(Engine(8 * MIB, delay_us_max=50), keep_last=0)
        model.set_policy(case.policies)
    return model


def make_batch(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Latents, text, pooled, sigma, noise; whole."""
    draw = torch.Generator().manual_seed(case.B * 1000 + case.T)
    video = (case.B, case.T, CONFIG.in_channels, case.h, case.w)
    text = (case.B, case.N, CONFIG.joint_attention_dim)
    latents, words, pooled, noise = (
        torch.randn(size, generator=draw).to(dtype)
        for size in (video, text, (case.B, CONFIG.pooled_projection_dim), video)
    )
    return [latents, words, pooled, torch.rand(case.B, generator=draw), noise]


def own_frames(case: Case, tensor: Tensor) -> Tensor:
    """This rank's of [B, T, ...]."""
    return tensor[:, share(case.T, dist.get_world_size(), dist.get_rank())]


def whole(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Losses and gradients in one process that keeps everything."""
    model = make_model(replace(case, policies=()), dtype)
    return values(model, flow_loss(model, *make_batch(case, dtype)))


def sharded(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same of this rank's frames."""
    model = make_model(case, dtype)
    model.set_shard(case.spec, dist.group.WORLD, case.T)
    latents, text, pooled, sigma, noise = make_batch(case, dtype)
    own = own_frames(case, latents), text, pooled, sigma, own_frames(case, noise)
    return values(model, flow_loss(model, *own, num_frames=case.T))


def values(model: VchitectTransformer, loss_B: Tensor) -> dict[str, Tensor]:
    """The losses and every gradient that there is, by name."""
    loss_B.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss_B.detach(), **found}


def summed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Over the ranks. All must have the same names."""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, sorted(found))
    assert all(other == names[0] for other in names)
    for name in sorted(found):
        dist.all_reduce(found[name])
    return found


def equal(cases: Sequence[Case]) -> list[tuple[float, str]]:
    """The largest error of each case in fp64, relative to the largest number of its gradient, and whose it is."""
    worst = []
    for case in cases:
        found = summed(sharded(case, torch.float64))
        if dist.get_rank():
            continue
        expected = whole(case, torch.float64)
        assert found.keys() == expected.keys(), (case, found.keys() ^ expected.keys())
        floor = 1e-6 * max(float(value.abs().max()) for value in expected.values())  # keys' biases have no gradient
        errors = {}
        for name, value in expected.items():
            if value.abs().max() == 0:
                assert found[name].abs().max() == 0, (case, name)
            errors[name] = float((found[name] - value).abs().max() / max(float(value.abs().max()), floor))
        worst.append(max((error, name) for name, error in errors.items()))
    return worst
