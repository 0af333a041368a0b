"""What the tests of offload share: a nano model that gives every weight a gradient, its gradients, and the check of leaks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vchitect_fast.model import VchitectTransformer, preset
from vchitect_fast.offload.engine import Engine
from vchitect_fast.plan import Policy
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

NANO = preset("vchitect-nano")
NUM_BLOCKS = NANO.num_layers
TEXT_TOKENS = 5
MIB = 2**20
ALL = Policy("offload", "offload", "offload", "offload", "offload")
INPUT = Policy("offload", "recompute", "recompute", "recompute", "recompute")


def work_of(shape: str = "4x32x32", batch: int = 2, config=NANO, text_tokens: int = TEXT_TOKENS) -> Workload:
    return Workload(config, VideoShape.parse(shape)[0], batch, text_tokens)


def make_model(seed: int = 0, config=NANO, dtype: torch.dtype = torch.float32) -> VchitectTransformer:
    """Random weights everywhere: AdaLN-Zero would give the blocks no gradient."""
    torch.manual_seed(seed)
    model = VchitectTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.to(dtype)


def make_inputs(work: Workload, seed: int = 0) -> list[Tensor]:
    config, shape = work.config, work.shape
    draw = torch.Generator().manual_seed(seed)
    sizes = [
        (work.batch, shape.num_frames, config.in_channels, shape.latent_height, shape.latent_width),
        (work.batch, work.num_text_tokens, config.joint_attention_dim),
        (work.batch, config.pooled_projection_dim),
    ]
    inputs = [torch.randn(size, generator=draw) for size in sizes]
    return [*inputs, 1000 * torch.rand(work.batch, generator=draw)]


def loss_of(model: VchitectTransformer, inputs: Sequence[Tensor]) -> Tensor:
    return model(*inputs).double().square().sum()


def gradients(model: VchitectTransformer, *batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of the summed losses of the batches, one backward each (gradient accumulation)."""
    model.zero_grad(set_to_none=True)
    for inputs in batches:
        loss_of(model, inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bitwise, NaN equal to nothing."""
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different, f"{len(different)} of {len(found)} differ, first {different[0]}"


def assert_no_leaks(engine: Engine) -> None:
    """No slot, no source held, nothing in flight."""
    engine.settle()
    stats = engine.stats()
    left = {name: stats[name] for name in ("num_slots", "used_bytes", "in_flight_bytes")}
    assert not any(left.values()), left
    assert not engine._known and not engine._dead and not engine._in_flight
