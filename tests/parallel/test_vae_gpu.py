"""Frames come together through NCCL: on one GPU a group of one rank, in every dtype that is sent.

pytest -m gpu tests/parallel/test_vae_gpu.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import vae_cases

from vchitect_fast.model.vae import load_codec
from vchitect_fast.parallel.vae import decode_frames, encode_frames, gather_frames, own_frames

pytestmark = pytest.mark.gpu


@pytest.fixture
def _nccl() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_nccl")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_frames_come_together_on_the_gpu(dtype: torch.dtype) -> None:
    group, codec, video = dist.group.WORLD, load_codec("dct", device="cuda"), vae_cases.video(2, 5).cuda()
    latents = encode_frames(codec, video[:, own_frames(5, group)])
    decoded = ((decode_frames(codec, latents) + 1) * 127).to(dtype)
    gathered = gather_frames(decoded, 5, group)
    assert gathered.device == decoded.device
    assert torch.equal(gathered, decoded)
