"""What the ranks of tests/parallel/test_vae.py do: frames, captions, and whole VideoData, each on its own part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vchitect_fast import data as data_module
from vchitect_fast.data import VideoData
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import Clip
from vchitect_fast.model.text import load_text_encoder
from vchitect_fast.model.vae import load_codec
from vchitect_fast.parallel.mesh import Mesh, make_mesh
from vchitect_fast.parallel.vae import decode_frames, encode_frames, encode_texts, gather_frames, own_frames
from vchitect_fast.shapes import VideoShape
from vchitect_fast.video import DecodeError

WHOLE = {"dp_replicate": 1, "dp_shard": 1}


def video(B: int, T: int) -> Tensor:
    return torch.rand(B, T, 3, 32, 64, generator=torch.Generator().manual_seed(T)) * 2 - 1


def there_and_back(cases: list[tuple[int, int]]) -> list[tuple[slice, Tensor, Tensor, Tensor]]:
    """For each (B, T): own frames, their latents, and what came together of the decoded and of their bytes."""
    group, codec, found = dist.group.WORLD, load_codec("dct"), []
    for B, T in cases:
        own = own_frames(T, group)
        latents = encode_frames(codec, video(B, T)[:, own])
        decoded = decode_frames(codec, latents)
        shown = ((decoded + 1) * 127.5).to(torch.uint8)
        found.append((own, latents, gather_frames(decoded, T, group), gather_frames(shown, T, group)))
    return found


def texts(captions: list[list[str]]) -> list[tuple[list[tuple[Tensor, Tensor]], list[str]]]:
    """For each list of captions: their embeddings, and which this rank encoded."""
    encoder, found = load_text_encoder("hash", width=24, pooled_width=20), []
    for some in captions:
        encoded: list[str] = []

        def encode(caption: str, _encoded: list[str] = encoded) -> tuple[Tensor, Tensor]:
            _encoded.append(caption)
            embeds, pooled = encoder.encode([caption])
            return embeds[0], pooled[0]

        found.append((encode_texts(encode, some, dist.group.WORLD), encoded))
    return found


class CountingCodec:
    """The dct codec, counting the frames that it encodes."""

    def __init__(self) -> None:
        self._codec = load_codec("dct")
        self.fingerprint = self._codec.fingerprint
        self.num_frames = 0

    def encode(self, video: Tensor) -> Tensor:
        self.num_frames += video.shape[0] * video.shape[1]
        return self._codec.encode(video)


def opened(clips: list[Clip], batches: dict[VideoShape, int], cache: Path | None, mesh: Mesh) -> tuple[VideoData, Any]:
    codec: Any = CountingCodec()
    text_encoder = load_text_encoder("hash", width=24, pooled_width=20)
    return VideoData(
        clips, batches, seed=3, fps=8.0, codec=codec, cache=cache, device="cpu", text_encoder=text_encoder, mesh=mesh
    ), codec


def batches(
    clips: list[Clip], per_step: dict[VideoShape, int], steps: list[int], cache: Path | None, num_sp: int
) -> dict[str, Any]:
    """This rank's batches of some steps, then of validation, and how many frames it encoded for them."""
    sizes = {"dp_replicate": 1, "dp_shard": dist.get_world_size() // num_sp, "sp": num_sp}
    mesh = make_mesh(sizes, "global", torch.device("cpu"))
    data, codec = opened(clips, per_step, cache, mesh)
    with data:
        found = [data.batch(step) for step in steps]
        num_frames = codec.num_frames
        return {
            "batches": found,
            "first": data.first_batches(3),
            "num_frames": num_frames,
            "place": (mesh.dp_rank, mesh.sp_rank),
        }


def disagreeing(clips: list[Clip], per_step: dict[VideoShape, int]) -> str:
    """What is said when a file reads on rank 0 only."""
    mesh = make_mesh(WHOLE | {"sp": dist.get_world_size()}, "global", torch.device("cpu"))
    decode = data_module.decode_window

    def failing(window: Any, *rest: Any) -> Tensor:
        if mesh.rank == 1:
            raise DecodeError("stale file handle")
        return decode(window, *rest)

    data, _ = opened(clips, per_step, None, mesh)
    with data:
        first = data.schedule.batch(0)[1][0]
        data_module.decode_window = lambda window, *rest: (failing if window == first else decode)(window, *rest)
        try:
            data.batch(0)
        except UserError as error:
            return str(error)
        finally:
            data_module.decode_window = decode
    return ""
