"""The formulas of workload.py and architecture.py against what the running model does.

pytest tests/test_workload.py; saved bytes are counted with saved-tensor hooks, FLOPs by torch's counter, parameters on the
meta device. Equality, not closeness: a formula that is nearly right is wrong.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from vchitect_fast.architecture import PRESETS, TransformerConfig, preset
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.model.blocks import Block, Branches
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

MATH = {"spatial": "math", "temporal": "math", "cross": "math"}  # written-out attention, whose products torch counts
SDPA = {"spatial": "sdpa", "temporal": "sdpa", "cross": "sdpa"}
# (batch, shape, text tokens): one sample, several with odd counts, more text than video, and images, whose slices are views.
WORKS = [
    (1, VideoShape(8, 96, 64), 16),
    (2, VideoShape(5, 96, 80), 7),
    (3, VideoShape(2, 32, 16), 20),
    (1, VideoShape(1, 96, 80), 7),
    (2, VideoShape(1, 48, 80), 7),
]


def block_inputs(work: Workload, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    config, shape = work.config, work.shape
    visual = (work.batch, shape.num_frames, shape.tokens_per_frame(), config.hidden_dim)
    text = (work.batch, shape.num_frames, work.num_text_tokens, config.hidden_dim)
    sizes = (visual, text, (work.batch, config.hidden_dim))
    return tuple(torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes)


def saved_bytes(block: Block, inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes of the storages that a forward saves, each once, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            found.setdefault(address, tensor)  # holding it keeps the address from being used again
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        block(*inputs, SDPA)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "shape", "text_tokens"), WORKS)
def test_saved_bytes_are_exact(batch: int, shape: VideoShape, text_tokens: int, dtype: torch.dtype, last: bool) -> None:
    for name in ("vchitect-nano", "vchitect-tiny"):
        work = Workload(preset(name), shape, batch, text_tokens)
        block = Block(work.config, last=last, branches=Branches()).to(dtype)
        counted = saved_bytes(block, block_inputs(work, dtype))
        assert work.saved_bytes_per_block(dtype.itemsize, last=last) == counted


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("batch", "shape", "text_tokens"), WORKS)
def test_block_flops_are_exact(batch: int, shape: VideoShape, text_tokens: int, last: bool) -> None:
    work = Workload(preset("vchitect-nano"), shape, batch, text_tokens)
    block = Block(work.config, last=last, branches=Branches())
    with FlopCounterMode(display=False) as counter:
        block(*block_inputs(work, torch.float32), MATH)
    modulation = 2 * batch * (8 if last else 12) * work.config.hidden_dim**2  # a row a sample; not in the formula
    assert counter.get_total_flops() == work.linear_flops(last=last) + work.attention_flops() + modulation


def test_model_flops_are_those_of_its_blocks() -> None:
    work = Workload(preset("vchitect-tiny"), VideoShape(4, 64, 48), 2, 16)
    config, shape = work.config, work.shape
    model = VchitectTransformer(config)
    model.attention_backend = MATH
    latents = torch.randn(2, 4, config.in_channels, shape.latent_height, shape.latent_width)
    text, pooled = torch.randn(2, 16, config.joint_attention_dim), torch.randn(2, config.pooled_projection_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, text, pooled, torch.full((2,), 500.0))
    by_module = counter.get_flop_counts()
    blocks = [f"VchitectTransformer.transformer_blocks.{index}" for index in range(config.num_layers)]
    modulation = [f"{block}.{name}" for block in blocks for name in ("norm1", "norm1_context")]
    counted = [sum(sum(by_module[name].values()) for name in names) for names in (blocks, modulation)]
    assert work.forward_flops() == counted[0] - counted[1]
    assert work.train_flops() == 3 * work.forward_flops()


def test_backward_is_two_forwards() -> None:
    """What train_flops rests on: each product has one for either operand's gradient."""
    work = Workload(preset("vchitect-nano"), VideoShape(4, 64, 48), 2, 5)
    block = Block(work.config, last=False, branches=Branches())
    inputs = block_inputs(work, torch.float32)
    with FlopCounterMode(display=False) as forward:
        x, c = block(*inputs, MATH)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward((x, c), (torch.ones_like(x), torch.ones_like(c)))
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.parametrize("name", PRESETS)
def test_num_parameters(name: str) -> None:
    with torch.device("meta"):
        model = VchitectTransformer(preset(name))
    assert preset(name).num_parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_parameters_of_the_release() -> None:
    assert preset("vchitect-2b").num_parameters() == 2_424_947_776


def test_num_parameters_of_odd_sizes() -> None:
    """Fields that the presets leave equal are told apart."""
    config: TransformerConfig = replace(
        preset("vchitect-nano"),
        num_layers=3,
        num_attention_heads=3,
        caption_projection_dim=24,
        patch_size=4,
        in_channels=5,
        out_channels=5,
    )
    with torch.device("meta"):
        model = VchitectTransformer(config)
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_block_input_bytes() -> None:
    work = Workload(preset("vchitect-nano"), VideoShape(4, 64, 48), 2, 5)
    x, c, _ = block_inputs(work, torch.bfloat16)
    assert work.block_input_bytes(2) == x.nbytes + c.nbytes
