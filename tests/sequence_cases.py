"""One forward and backward of a small model, cut over the ranks and in one process: what tests/parallel/test_sequence*.py ask of ranks.

Each function runs on every rank of tests/ranks.py. The whole inputs come from a seed, each rank takes its frames.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import close
import torch
import torch.distributed as dist
from offloading import assert_no_leaks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vchitect_fast.errors import UserError
from vchitect_fast.model import Branches, VchitectTransformer, preset
from vchitect_fast.model.flow import flow_loss
from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.parallel.collectives import Flight, share
from vchitect_fast.parallel.sequence import sharding
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


def make_model(case: Case, dtype: torch.dtype, device: str = "cpu") -> VchitectTransformer:
    """Random weights everywhere: AdaLN-Zero would give the blocks no gradient. The same on every rank and device."""
    torch.manual_seed(0)
    model = VchitectTransformer(CONFIG, branches=case.branches)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model = model.to(dtype).to(device)
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
    return _whole(replace(case, spec=ShardSpec(), policies=()), dtype)


@lru_cache(maxsize=32)
def _whole(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    model = make_model(case, dtype)
    return values(model, flow_loss(model, *make_batch(case, dtype)))


def sharded(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """The same of this rank's frames."""
    model = make_model(case, dtype, device)
    model.set_shard(case.spec, dist.group.WORLD, case.T)
    latents, text, pooled, sigma, noise = (tensor.to(device) for tensor in make_batch(case, dtype))
    own = own_frames(case, latents), text, pooled, sigma, own_frames(case, noise)
    found = values(model, flow_loss(model, *own, num_frames=case.T))
    if model.saving.engine:
        assert_no_leaks(model.saving.engine)
    return found


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


def close_in_fp32(cases: Sequence[Case], device: str = "cpu") -> int:
    """By the rule of close.py; one process on the CPU is the reference in fp32 and the exact one in fp64. How many were held to it."""
    num_held = 0
    for case in cases:
        found = {name: value.cpu() for name, value in summed(sharded(case, torch.float32, device)).items()}
        if dist.get_rank() == 0:
            exact, reference = whole(case, torch.float64), whole(case, torch.float32)
            assert found.keys() == exact.keys()
            reduced = max(4 * CONFIG.hidden_dim, case.B * case.T * (case.h * case.w // 4 + case.N))
            for name, value in found.items():
                close.assert_close_to_exact(
                    value, exact[name], reference[name], reduced=reduced, name=f"{name} of {case}"
                )
                num_held += 1
    return num_held


def without_gradients(cases: Sequence[Case]) -> list[float]:
    """The largest error of the velocity of this rank's frames in fp64, relative to the largest velocity: as in sampling."""
    errors = []
    for case in cases:
        model = make_model(case, torch.float64)
        latents, text, pooled, sigma, _ = make_batch(case, torch.float64)
        with torch.no_grad():
            expected = model(latents, text, pooled, 1000 * sigma)
            model.set_shard(case.spec, dist.group.WORLD, case.T)
            found = model(own_frames(case, latents), text, pooled, 1000 * sigma)
        wanted = own_frames(case, expected)
        assert found.shape == wanted.shape
        errors.append(float((found - wanted).abs().sum() / expected.abs().max()))
    return errors


class Log(TorchDispatchMode):
    """What happens in order: "start", "wait", "attend", "attend back", "product"; and the numbers sent to others.

    Every collective of torch.distributed is an op of the namespace c10d: one that is not ours shows by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.num_sent: list[int] = []  # of each start

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "c10d::alltoall_base_":
            self.events.append("start")
            self.num_sent.append(sum(args[4]) - args[4][dist.get_rank()])
        elif "c10d" in name:
            self.events.append(name)
        elif "scaled_dot_product" in name:
            self.events.append("attend back" if "backward" in name else "attend")
        elif name == "aten::addmm":
            self.events.append("product")
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self._end = Flight._end

        def logged(flight: Flight, parts: Any) -> Any:
            self.events.append("wait")
            return self._end(flight, parts)

        Flight._end = logged  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Flight._end = self._end  # type: ignore[method-assign]
        super().__exit__(*error)


def logged(case: Case, *, last: bool = False) -> tuple[Log, Log, dict[tuple[int, str, str], int]]:
    """One block alone: its forward, its backward, and the bytes that it saves by (block, group, action)."""
    model, size, rank = make_model(case, torch.float32), dist.get_world_size(), dist.get_rank()
    S, D = case.h * case.w // 4, CONFIG.hidden_dim
    cut = sharding(case.spec, dist.group.WORLD, case.T, S, case.N, CONFIG.num_attention_heads)
    own = {n: len(range(n)[share(n, size, rank)]) for n in (case.T, S, case.N)}
    shapes = (
        [(own[case.T], S), (own[case.T], case.N)]
        if case.spec.axis == "frames"
        else [(case.T, own[S]), (case.T, own[case.N])]
    )
    # Not leaves, which would not be counted.
    x, c = (torch.randn(case.B, *shape, D, requires_grad=True).neg() for shape in shapes)
    temb = torch.randn(case.B, D, requires_grad=True).neg()
    block = model.transformer_blocks[-1 if last else 0]
    run = partial(block, backend=model.attention_backend, sharding=cut)
    saving, policy = model.saving, case.policies[0] if case.policies else Policy.keep()
    saving.count = True
    with Log() as forward:
        out, text = saving.run_block(run, policy, 0, saving.new_pass(), x, c, temb)
    with Log() as backward:
        (out.sum() + (0 if text is None else text.sum())).backward()
    return forward, backward, dict(saving.bytes)


def events(cases: Sequence[Case], *, last: bool = False) -> list[dict[str, Any]]:
    """What `logged` found, in plain values."""
    found = []
    for case in cases:
        forward, backward, saved = logged(case, last=last)
        found.append(
            {"forward": forward.events, "backward": backward.events, "bytes": saved}
            | {"sent": forward.num_sent, "sent back": backward.num_sent}
        )
    return found


def events_last(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Of the last block."""
    return events(cases, last=True)


def forgotten(case: Case) -> tuple[int, int]:
    """Flights and slots of the pool that a forward leaves whose graph is thrown away, without a garbage collection."""
    model = make_model(case, torch.float32)
    model.set_shard(case.spec, dist.group.WORLD, case.T)
    latents, text, pooled, sigma, _ = make_batch(case, torch.float32)
    gc.collect()
    gc.disable()
    out = model(own_frames(case, latents), text, pooled, sigma)
    del out
    deadline = time.monotonic() + 5
    while (flights := _num_flights()) and time.monotonic() < deadline:
        time.sleep(0.01)  # gloo's thread keeps the state of the thread that called it until it has tidied up
    gc.enable()
    assert model.saving.engine is not None
    model.saving.engine.settle()
    return flights, int(model.saving.engine.stats()["num_slots"])


def _num_flights() -> int:
    return sum(type(item) is Flight for item in gc.get_objects())


def refused(changes: Sequence[dict[str, Any]]) -> list[str]:
    """What a model says to each set_shard, or to what is done to it after that."""
    said = []
    for change in changes:
        model = make_model(Case(FRAMES), torch.float32)
        try:
            if change.get("before"):
                getattr(model, change["before"][0])(change["before"][1])
            model.set_shard(change["spec"], dist.group.WORLD, change.get("num_frames", 3))
            if change.get("after"):
                getattr(model, change["after"][0])(change["after"][1])
            latents, text, pooled, sigma, _ = make_batch(Case(FRAMES), torch.float32)
            model(latents, text, pooled, sigma)
        except UserError as error:
            said.append(str(error))
    return said
