"""The memory model: resident bytes exactly, the peak against what torch's allocator counts, and what must be monotone.

pytest tests/autotune/test_memory.py; the allocator's events come from the profiler, so nothing else in the process counts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_up_device import device
from torch.autograd.profiler import profile

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.memory import states_bytes, step_memory
from vchitect_fast.ema import EMA
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.model.blocks import Block, Branches
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.plan import Policy
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

TINY = preset("vchitect-tiny")
# What the formula leaves out: sums between ops that it does not list, small tensors, autograd's order. Counted, not timed.
COUNTED_WITHIN = 0.06


def build(dtype: torch.dtype) -> tuple[VchitectTransformer, MasterAdamW]:
    model = VchitectTransformer(TINY)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model, MasterAdamW(model, weight_decay=0.0, betas=(0.9, 0.99))


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_states_are_what_the_optimizer_and_ema_hold(name: str) -> None:
    model, optimizer = build(getattr(torch, name))
    held = [*model.parameters(), *model.buffers(), *optimizer.masters.values(), *optimizer.state().values()]
    held += EMA(optimizer.masters, 0.9).average.values()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in held if tensor.ndim
    }  # AdamW's step counters are scalars
    work = Workload(TINY, VideoShape(1, 64, 64), 1, 4)
    assert states_bytes(work, name) == sum(storages.values())
    assert states_bytes(work, name) - states_bytes(work, name, ema=False) == 4 * TINY.num_parameters()


@pytest.mark.parametrize("last", [False, True])
def test_block_parameters(last: bool) -> None:
    block = Block(TINY, last=last, branches=Branches())
    assert TINY.num_block_parameters(last=last) == sum(parameter.numel() for parameter in block.parameters())


def counted_peak(work: Workload, name: str, num_recomputed: int) -> int:
    """Most bytes that forward and backward of one microbatch hold at once beside the states."""
    dtype = getattr(torch, name)
    model, optimizer = build(dtype)
    layers = TINY.num_layers
    model.set_policy([Policy.recompute()] * num_recomputed + [Policy.keep()] * (layers - num_recomputed))
    shape = work.shape
    z = torch.randn(work.batch, shape.num_frames, TINY.in_channels, shape.latent_height, shape.latent_width)
    text = torch.randn(work.batch, work.num_text_tokens, TINY.joint_attention_dim)
    pooled, timestep = torch.randn(work.batch, TINY.pooled_projection_dim), torch.full((work.batch,), 500.0)

    def passes() -> None:
        (model(z, text, pooled, timestep).float() - z).square().mean().backward()

    passes()
    optimizer.step(0.0, 1.0)  # drops the gradients
    with profile(profile_memory=True) as events:
        passes()
    now = most = 0
    for event in events.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_recomputed", [0, 2, 4])
@pytest.mark.parametrize(
    ("shape", "text_tokens"), [(VideoShape(8, 96, 64), 16), (VideoShape(4, 256, 128), 16), (VideoShape(4, 96, 64), 77)]
)
def test_peak_is_what_the_allocator_counts(shape: VideoShape, text_tokens: int, num_recomputed: int, name: str) -> None:
    work = Workload(TINY, shape, 1, text_tokens)
    found = step_memory(work, device(), name, num_recomputed=num_recomputed, accumulation=1)
    predicted = found.peak_bytes - found.process_bytes - found.states_bytes
    counted = counted_peak(work, name, num_recomputed)
    assert abs(predicted / counted - 1) <= COUNTED_WITHIN, f"predicted {predicted}, counted {counted}"


WORK = Workload(TINY, VideoShape(8, 176, 96), 2, 16)


def peak(work: Workload, *, recomputed: int = 0, accumulation: int = 1, dtype: str = "float32") -> int:
    return step_memory(work, device(), dtype, num_recomputed=recomputed, accumulation=accumulation).peak_bytes


def test_more_recompute_never_takes_more_memory() -> None:
    peaks = [peak(replace(WORK, batch=8), recomputed=number) for number in range(TINY.num_layers + 1)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[-1]


def test_more_work_takes_more_memory() -> None:
    for more in (
        replace(WORK, batch=3),
        replace(WORK, num_text_tokens=40),
        replace(WORK, shape=VideoShape(9, 176, 96)),
    ):
        assert peak(more) > peak(WORK)


def test_accumulation_keeps_all_gradients() -> None:
    assert peak(WORK, accumulation=2) > peak(WORK)
    found = step_memory(WORK, device(), "float32", num_recomputed=0, accumulation=2)
    assert found.gradients_bytes == 4 * TINY.num_parameters()


def test_parts_sum_to_the_peak() -> None:
    found = step_memory(WORK, device(), "bfloat16", num_recomputed=1, accumulation=1)
    assert sum(found.parts_gib().values()) == pytest.approx(found.peak_bytes / 2**30)
