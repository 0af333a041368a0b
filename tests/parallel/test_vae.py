"""Frozen encoders and data on the ranks of a sp group: what they have together is, bit by bit, what one process has.

pytest tests/parallel/test_vae.py
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import vae_cases
from ranks import ranks
from real_video import bikes, bikes_clips, remux, truncate
from safetensors.torch import load_file
from torch import Tensor

from vchitect_fast.data import Batch
from vchitect_fast.manifest import Clip
from vchitect_fast.model.text import load_text_encoder
from vchitect_fast.model.vae import load_codec
from vchitect_fast.parallel.mesh import ALONE
from vchitect_fast.parallel.vae import decode_frames, encode_frames, encode_texts, gather_frames, own_frames
from vchitect_fast.shapes import VideoShape

IMAGE, SHORT, LONG = VideoShape(1, 32, 16), VideoShape(3, 64, 32), VideoShape(11, 48, 32)
PER_STEP = {SHORT: 2, LONG: 1}
AN_IMAGE = Clip(bikes(), 1.0, 1.0, 1, 640, 272, 25.0, "an image")
STEPS = [0, 1, 2, 3, 9]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_encode_and_decode_their_own_frames(world_size: int) -> None:
    cases = [(1, 1), (2, 1), (1, 2), (2, 5), (1, 7), (3, 6)]
    codec = load_codec("dct")
    for (B, T), *found in zip(cases, *ranks(world_size).run("vae_cases:there_and_back", cases), strict=True):
        latents = codec.encode(vae_cases.video(B, T))
        decoded = codec.decode(latents)
        assert [own for own, *_ in found] == [slice(*own) for own in _shares(T, world_size)]
        assert torch.equal(torch.cat([mine for _, mine, *_ in found], dim=1), latents)
        first, *others = found
        assert torch.equal(first[2], decoded)
        assert torch.equal(first[3], ((decoded + 1) * 127.5).to(torch.uint8))
        assert all(gathered.shape == (B, 0, *decoded.shape[2:]) for other in others for gathered in other[2:])


def _shares(T: int, num_ranks: int) -> list[tuple[int, int]]:
    edges = [0]
    for rank in range(num_ranks):
        edges.append(edges[-1] + T // num_ranks + (rank < T % num_ranks))
    return list(pairwise(edges))


def test_one_process_has_it_all() -> None:
    codec, video = load_codec("dct"), vae_cases.video(2, 3)
    latents = codec.encode(video)
    assert own_frames(3, None) == slice(0, 3)
    assert torch.equal(encode_frames(codec, video), latents)
    assert torch.equal(gather_frames(decode_frames(codec, latents), 3, None), codec.decode(latents))
    assert encode_frames(codec, video[:, :0]).shape == (2, 0, 16, 4, 8)
    assert encode_texts(lambda caption: (torch.ones(1), torch.zeros(1)), ["a", "b"], None)[1][0] == 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_captions_are_cut_among_ranks_and_known_to_all(world_size: int) -> None:
    lists = [[f"caption {k}" for k in range(num)] for num in (0, 1, 2, 3, 4, 7)]
    encoder = load_text_encoder("hash", width=24, pooled_width=20)
    for captions, *found in zip(lists, *ranks(world_size).run("vae_cases:texts", lists), strict=True):
        for texts, encoded in found:
            assert len(encoded) == (len(captions) if len(captions) < 2 else -(-len(captions) // world_size))
            for caption, (embeds, pooled) in zip(captions, texts, strict=True):
                exact = encoder.encode([caption])
                assert torch.equal(embeds, exact[0][0])
                assert torch.equal(pooled, exact[1][0])
        assert {caption for _, encoded in found for caption in encoded} == set(captions)


def with_bad_clips(folder: Path) -> list[Clip]:
    """The six shots, one that is absent, and one file of which only the first 40 % decode."""
    cut = truncate(remux(bikes(), folder / "whole.mp4", movflags="faststart"), folder / "cut.mp4", 0.4)
    return [bikes_clips(folder / "absent.mp4")[2], *bikes_clips(), Clip(cut, 0.0, 10.0, 250, 640, 272, 25.0, "cut")]


def alone(
    clips: list[Clip], per_step: dict[VideoShape, int], cache: Path | None
) -> tuple[list[Batch], list[Batch], int]:
    data, codec = vae_cases.opened(clips, per_step, cache, ALONE)
    with data:
        found = [data.batch(step) for step in STEPS]
        num_frames = codec.num_frames
        return found, data.first_batches(3), num_frames


def assert_together(parts: list[list[Batch]], whole: list[Batch], num_sp: int) -> None:
    """parts: by data-parallel rank, then by rank in its sp group."""
    for batch, *found in zip(whole, *parts, strict=True):
        groups = [found[k : k + num_sp] for k in range(0, len(found), num_sp)]
        for group in groups:
            for part in group:
                assert part.windows == group[0].windows
                assert torch.equal(part.text_embeds, group[0].text_embeds)
            assert [list(range(batch.shape.num_frames))[part.frames] for part in group] == [
                list(range(*edges)) for edges in _shares(batch.shape.num_frames, num_sp)
            ]
        assert [window for group in groups for window in group[0].windows] == batch.windows
        together = torch.cat([torch.cat([part.latents for part in group], dim=1) for group in groups])
        assert torch.equal(together, batch.latents)
        assert torch.equal(torch.cat([group[0].text_embeds for group in groups]), batch.text_embeds)
        assert torch.equal(torch.cat([group[0].pooled for group in groups]), batch.pooled)


@pytest.mark.parametrize(("world_size", "num_sp"), [(2, 2), (3, 3), (4, 2)])
def test_batches_together_are_those_of_one_process(world_size: int, num_sp: int, tmp_path: Path) -> None:
    """Without a cache, with bad files; an image bucket leaves ranks without frames."""
    clips = [*with_bad_clips(tmp_path), AN_IMAGE]
    num_dp = world_size // num_sp
    per_step = {IMAGE: 1} | PER_STEP
    whole, first, _ = alone(clips, {shape: num_dp * batch for shape, batch in per_step.items()}, None)
    found = ranks(world_size).run("vae_cases:batches", clips, per_step, STEPS, None, num_sp)
    assert [part["place"] for part in found] == [divmod(rank, num_sp) for rank in range(world_size)]
    assert len({batch.shape for batch in whole}) == 3
    assert_together([part["batches"] for part in found], whole, num_sp)
    for group in range(0, world_size, num_sp):  # every data-parallel rank validates on the same
        assert_together([part["first"] for part in found[group : group + num_sp]], split_up(first, per_step), num_sp)


def split_up(batches: list[Batch], per_step: dict[VideoShape, int]) -> list[Batch]:
    """As `first_batches` cuts them for so many samples a step."""
    found = []
    for batch in batches:
        size = per_step[batch.shape]
        for k in range(0, len(batch.windows), size):
            rows = slice(k, k + size)
            tensors: list[Tensor] = [batch.latents[rows], batch.text_embeds[rows], batch.pooled[rows]]
            found.append(Batch(batch.shape, *tensors, batch.windows[rows], 0.0, 0.0))
    return found


def entries(cache: Path) -> dict[str, dict[str, Tensor]]:
    return {str(path.relative_to(cache)): load_file(path) for path in sorted(cache.rglob("*.*")) if path.is_file()}


def test_the_cache_that_ranks_write_is_that_of_one_process(tmp_path: Path) -> None:
    clips, per_step = [*bikes_clips(), AN_IMAGE], {IMAGE: 1} | PER_STEP
    whole, first, num_frames = alone(clips, per_step, tmp_path / "alone")
    assert len({batch.shape for batch in whole}) == 3
    want = entries(tmp_path / "alone")
    assert num_frames > 30

    def run(cache: str, world_size: int) -> list[dict[str, Any]]:
        found = ranks(world_size).run("vae_cases:batches", clips, per_step, STEPS, tmp_path / cache, world_size)
        assert_together([part["batches"] for part in found], whole, world_size)
        assert_together([part["first"] for part in found], first, world_size)
        return found

    for world_size in (2, 3):
        cold = run(f"by-{world_size}", world_size)
        assert sum(part["num_frames"] for part in cold) == num_frames, "every frame is encoded on one rank"
        have = entries(tmp_path / f"by-{world_size}")
        assert have.keys() == want.keys(), "whole entries and no parts"
        assert all(torch.equal(have[name][key], tensor) for name in want for key, tensor in want[name].items())
    for cache, world_size in (("by-2", 3), ("alone", 2)):
        assert sum(part["num_frames"] for part in run(cache, world_size)) == 0
    assert alone(clips, per_step, tmp_path / "by-3")[2] == 0


def test_parts_that_a_killed_run_left_are_used(tmp_path: Path) -> None:
    clips = bikes_clips()
    whole, _, num_frames = alone(clips, PER_STEP, tmp_path / "cache")
    want = entries(tmp_path / "cache")
    from vchitect_fast.cache import Cache

    cache = Cache(tmp_path / "cache")
    for path in sorted(
        (tmp_path / "cache" / "latents").rglob("*.safetensors")
    ):  # rank 0 of 2 had written, rank 1 had not
        latents = load_file(path)["latents"]
        path.unlink()
        cache.put_frames(f"latents/{path.stem}", latents[: -(-len(latents) // 2)], len(latents), 0, 2)
    assert all("0of2" in path.name for path in (tmp_path / "cache" / "latents").rglob("*.*"))
    found = ranks(2).run("vae_cases:batches", clips, PER_STEP, STEPS, tmp_path / "cache", 2)
    assert_together([part["batches"] for part in found], whole, 2)
    assert found[0]["num_frames"] == 0
    assert 0 < found[1]["num_frames"] < num_frames / 2
    have = entries(tmp_path / "cache")
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name][key], tensor) for name in want for key, tensor in want[name].items())


def test_ranks_that_read_different_windows_end_with_the_reason() -> None:
    found = ranks(2).run("vae_cases:disagreeing", bikes_clips(), {SHORT: 1})
    assert all("the ranks of an sp group read different windows" in text for text in found)
    assert "stale file handle" in found[1]
