"""The codec's formulas against diffusers' AutoencoderKL in SD3's sizes: parameters, FLOPs and live bytes are counted, not timed."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vchitect_fast.autotune.codec import CHANNELS, NUM_RESNETS, encode_bytes, encode_flops, encoder_parameters
from vchitect_fast.shapes import LATENT_CHANNELS, VideoShape


@pytest.fixture(scope="module")
def vae() -> Any:
    """On the meta device: sizes without numbers."""
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[sd3]'")
    with torch.device("meta"):
        return diffusers.AutoencoderKL(
            block_out_channels=CHANNELS, down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
            up_block_types=("UpDecoderBlock2D",) * len(CHANNELS), layers_per_block=NUM_RESNETS,
            latent_channels=LATENT_CHANNELS, norm_num_groups=32, use_quant_conv=False, use_post_quant_conv=False,
        ).requires_grad_(False)  # fmt: skip


class Live(TorchDispatchMode):
    """Bytes of the storages that ops made and that are still alive; `most_bytes` at the fullest moment."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most_bytes = max(self.most_bytes, sum(self.sizes.values()))
        return made


def test_parameters(vae: Any) -> None:
    assert encoder_parameters() == sum(parameter.numel() for parameter in vae.encoder.parameters())


@pytest.mark.parametrize("shape", ["1x64x64", "2x256x256", "3x512x384", "2x96x272"])
def test_flops(vae: Any, shape: str) -> None:
    video = VideoShape.parse(shape)[0]
    with FlopCounterMode(display=False) as counter:
        vae.encode(torch.empty(video.num_frames, 3, video.height, video.width, device="meta"))
    assert encode_flops(video) == counter.get_total_flops()


@pytest.mark.parametrize(("shape", "mini_batch"), [("2x96x64", 8), ("8x64x128", 4)])
def test_bytes_at_the_fullest_moment(vae: Any, shape: str, mini_batch: int) -> None:
    video = VideoShape.parse(shape)[0]
    frames = torch.empty(min(mini_batch, video.num_frames), 3, video.height, video.width, device="meta")
    with torch.no_grad(), Live() as live:
        vae.encode(frames)
    assert encode_bytes(video, mini_batch, frames.element_size()) == live.most_bytes + frames.nbytes
