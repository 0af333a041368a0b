"""VideoData: the batch of step k is the same bits however it is reached, and a bad clip never stops or bends a run.

Real video (bikes.mp4) throughout; "the same" below is bitwise. pytest tests/test_data.py
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from real_video import bikes, bikes_clips, remux, truncate
from torch import Tensor

from vchitect_fast import data as data_module
from vchitect_fast.buckets import Window
from vchitect_fast.data import Batch, DecodeError, VideoData, decode_window
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import Clip
from vchitect_fast.model.text import load_text_encoder
from vchitect_fast.model.vae import load_codec
from vchitect_fast.parallel.mesh import Mesh
from vchitect_fast.shapes import VideoShape

SHORT, LONG = VideoShape(3, 64, 32), VideoShape(12, 48, 32)
BATCHES = {SHORT: 3, LONG: 2}
STEPS = 9


class CountingCodec:
    """The dct codec, counting what it encodes."""

    def __init__(self, fingerprint: str = "") -> None:
        self._codec = load_codec("dct")
        self.fingerprint = fingerprint or self._codec.fingerprint
        self.num_encoded = 0

    def encode(self, video: Tensor) -> Tensor:
        assert video.min() >= -1
        assert video.max() <= 1
        self.num_encoded += len(video)
        return self._codec.encode(video)


@pytest.fixture
def opened() -> Iterator[Any]:
    """A function that opens VideoData with this file's defaults; all are closed at the end."""
    made: list[VideoData] = []

    def make(clips: list[Clip], batches: dict[VideoShape, int] = BATCHES, **changes: Any) -> VideoData:
        options: dict[str, Any] = {
            "seed": 3, "fps": 8.0, "codec": CountingCodec(), "cache": None, "device": "cpu",
            "text_encoder": load_text_encoder("hash", width=24, pooled_width=20),
        }  # fmt: skip
        made.append(VideoData(clips, batches, **options | changes))
        return made[-1]

    yield make
    for item in made:
        item.close()


def assert_same(one: Batch, other: Batch) -> None:
    assert one.shape == other.shape
    assert one.windows == other.windows
    for name in ("latents", "text_embeds", "pooled"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def with_bad_clips(folder: Path) -> list[Clip]:
    """The six shots, two copies that are absent and empty, and one of which only the first 40 % decode."""
    (folder / "empty.mp4").touch()
    cut = truncate(remux(bikes(), folder / "whole.mp4", movflags="faststart"), folder / "cut.mp4", 0.4)
    bad = [bikes_clips(folder / "absent.mp4")[2], bikes_clips(folder / "empty.mp4")[1]]
    # One clip over the whole of the cut file: its first windows are good, the later ones are not.
    return bad + bikes_clips() + [Clip(cut, 0.0, 10.0, 250, 640, 272, 25.0, "cut")]


def test_a_batch_is_what_its_windows_say(opened: Any) -> None:
    data = opened(bikes_clips())
    codec, text = load_codec("dct"), load_text_encoder("hash", width=24, pooled_width=20)
    seen = set()
    for step in range(4):
        batch = data.batch(step)
        shape, windows = data.schedule.batch(step)
        assert (batch.shape, batch.windows) == (shape, windows)
        seen.add(shape)
        size = (BATCHES[shape], shape.num_frames, 16, shape.height // 8, shape.width // 8)
        assert batch.latents.shape == size
        assert batch.latents.dtype == torch.float32
        for row, window in enumerate(windows):
            frames = decode_window(window, shape, 8.0)
            assert torch.equal(batch.latents[row], codec.encode(frames[None].float() / 127.5 - 1)[0])
            embeds, pooled = text.encode([window.clip.caption])
            assert torch.equal(batch.text_embeds[row], embeds[0])
            assert torch.equal(batch.pooled[row], pooled[0])
        assert batch.captions == [clip.caption for clip in batch.clips]
        assert batch.encode_s > 0
        assert batch.data_s >= 0
    assert seen == {SHORT, LONG}


@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
@pytest.mark.parametrize("cached", [False, True], ids=["fresh", "cached"])
def test_step_k_is_the_same_however_it_is_reached(opened: Any, tmp_path: Path, bad: bool, cached: bool) -> None:
    clips = with_bad_clips(tmp_path) if bad else bikes_clips()
    cache = tmp_path / "cache" if cached else None
    walked = opened(clips, cache=cache)
    batches = [walked.batch(step) for step in range(STEPS)]
    for step in (STEPS - 1, 4):
        assert_same(opened(clips, cache=cache).batch(step), batches[step])
        assert_same(opened(clips).batch(step), batches[step])
    backwards = opened(clips, cache=cache)
    for step in reversed(range(STEPS)):
        assert_same(backwards.batch(step), batches[step])
    if bad:
        files = {Path(path).name for path in walked.skipped}
        assert files == {"absent.mp4", "empty.mp4", "cut.mp4"}
        used = {w.clip.path.name for batch in batches for w in batch.windows}
        assert used == {"bikes.mp4", "cut.mp4"}, "the good windows of the cut file are used"


def test_a_window_that_fails_is_replaced_by_the_first_good_one_of_its_stand_ins(opened: Any, tmp_path: Path) -> None:
    clips = [replace(clip, path=tmp_path / "absent.mp4") if k == 2 else clip for k, clip in enumerate(bikes_clips())]
    data = opened(clips, {SHORT: 2})
    for step in range(data.schedule.steps_per_epoch):
        _, samples = data.schedule.candidates(step)
        good = [next(window for window in found if window.clip.path.name != "absent.mp4") for found in samples]
        assert data.batch(step).windows == good


@pytest.mark.parametrize(("bad", "mixture"), [(False, None), (True, {SHORT: 1, LONG: 3})], ids=["good", "bad, mixed"])
def test_ranks_have_the_parts_of_what_one_process_has(
    opened: Any, tmp_path: Path, bad: bool, mixture: dict[VideoShape, float] | None
) -> None:
    """Three data-parallel ranks with 1 sample each, one process with 3; files that do not decode included."""
    clips = with_bad_clips(tmp_path) if bad else bikes_clips()
    alone = opened(clips, {SHORT: 3, LONG: 6}, mixture=mixture)
    ranks = [
        opened(
            clips, {SHORT: 1, LONG: 2}, mixture=mixture, mesh=Mesh({"dp_replicate": 1, "dp_shard": 3, "sp": 1}, rank)
        )
        for rank in range(3)
    ]
    shapes = set()
    for step in (7, 0, 1, 2, 5):
        whole, parts = alone.batch(step), [data.batch(step) for data in ranks]
        shapes.add(whole.shape)
        assert {part.shape for part in parts} == {whole.shape}
        assert [window for part in parts for window in part.windows] == whole.windows
        for name in ("latents", "text_embeds", "pooled"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert shapes == {SHORT, LONG}
    firsts = [data.first_batches(5) for data in (alone, *ranks)]
    assert len({tuple(window for batch in found for window in batch.windows) for found in firsts}) == 1


def test_a_bad_file_is_named_once_and_not_tried_again(
    opened: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[Window] = []

    def counted(window: Window, *rest: Any) -> Tensor:
        try:
            return decode_window(window, *rest)
        except DecodeError:
            failed.append(window)
            raise

    monkeypatch.setattr(data_module, "decode_window", counted)
    clips = with_bad_clips(tmp_path)
    data = opened(clips)
    with caplog.at_level(logging.WARNING, logger="vchitect_fast.data"):
        for step in range(3 * data.schedule.steps_per_epoch):
            data.batch(step)
    for name, reason in (("absent.mp4", "No such file"), ("empty.mp4", "Invalid data"), ("cut.mp4", "")):
        lines = [record.message for record in caplog.records if name in record.message]
        assert len(lines) == 1, lines
        assert reason in data.skipped[str(tmp_path / name)]
        assert "\n" not in lines[0]
    names = [window.clip.path.name for window in failed]
    assert names.count("absent.mp4") == names.count("empty.mp4") == 1
    assert names.count("cut.mp4") >= 3, "of a file that opens, every window is judged by itself"
    assert len(failed) == len(set(failed)) == data.num_failed_windows


def test_a_bucket_without_a_good_window_ends_with_the_reasons(opened: Any, tmp_path: Path) -> None:
    data = opened(bikes_clips(tmp_path / "absent.mp4") + [replace(c, path=tmp_path / "b.mp4") for c in bikes_clips()])
    for _ in range(2):
        with pytest.raises(UserError, match=r"can be decoded \(.*absent.mp4: cannot open .*No such file.*; .*b.mp4"):
            data.batch(0)
    with pytest.raises(UserError, match="no clip for any shape can be decoded"):
        data.first_batches(2)


def test_a_planned_shape_without_clips_is_refused_in_training_and_not_in_validation(opened: Any) -> None:
    far = VideoShape(400, 64, 32)
    data = opened(bikes_clips(), {SHORT: 2, far: 2})
    for call in (data.require_windows, lambda: data.batch(0)):
        with pytest.raises(
            UserError, match=r"400x64x32: it takes clips with 400 or more frames .* have 3 to 19.*weight 0"
        ):
            call()
    assert len(data.first_batches(2)) == 1
    opened(bikes_clips(), {SHORT: 2, far: 2}, mixture={SHORT: 1, far: 0}).batch(0)
    with pytest.raises(UserError, match="400x64x32: it takes clips"):
        opened(bikes_clips(), {SHORT: 2, far: 2}, mixture={SHORT: 1, far: 0.1}).batch(0)


@pytest.mark.parametrize(
    ("mixture", "fragment"),
    [
        ({SHORT: 1.0}, "must have a weight for each planned shape .*12x48x32 lacks one; 0 leaves it out"),
        ({SHORT: 1.0, LONG: 1.0, VideoShape(5, 16, 16): 1.0}, "has a weight for 5x16x16, which is not planned"),
        ({SHORT: 0.0, LONG: 0.0}, "needs a weight above 0, got none"),
        ({SHORT: 1.0, LONG: -1.0}, "must be a number from 0 up, got -1.0 for 12x48x32"),
    ],
)
def test_a_mixture_of_other_shapes_is_refused(opened: Any, mixture: dict[VideoShape, float], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        opened(bikes_clips(), mixture=mixture)


def test_the_cache_is_used_and_its_key_holds_what_matters(opened: Any, tmp_path: Path) -> None:
    video = tmp_path / "bikes.mp4"
    shutil.copy(bikes(), video)
    clips, options = bikes_clips(video), {"cache": tmp_path / "cache"}

    def encoded(clips: list[Clip], **changes: Any) -> int:
        codec = changes.pop("codec", CountingCodec())
        data = opened(clips, {SHORT: 2}, codec=codec, **options | changes)
        for step in range(data.schedule.steps_per_epoch):
            data.batch(step)
        return codec.num_encoded

    total = encoded(clips)
    assert total > 5
    assert encoded(clips) == 0
    assert encoded(clips, seed=4) == 0
    assert encoded([replace(clip, caption="other") for clip in clips]) == 0
    assert encoded(clips, codec=CountingCodec("another codec")) == total
    assert encoded(clips, fps=8.5) > 0
    assert encoded([replace(clips[1], start=clips[1].start + 0.04)]) > 0
    os.utime(video, ns=(1, 1))
    assert encoded(clips) == total
    assert not list((tmp_path / "cache").rglob("*partial*"))


@pytest.mark.parametrize("damage", ["truncated", "empty"])
def test_a_damaged_cache_file_is_written_again(
    opened: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    first = opened(bikes_clips(), cache=tmp_path).batch(0)
    files = sorted(tmp_path.rglob("*.safetensors"))
    whole = {path: path.read_bytes() for path in files}
    assert {path.relative_to(tmp_path).parts[0] for path in files} == {"latents", "text"}
    for path in files:
        path.write_bytes(whole[path][:-7] if damage == "truncated" else b"")
    with caplog.at_level(logging.WARNING, logger="vchitect_fast.data"):
        again = opened(bikes_clips(), cache=tmp_path)
        assert_same(again.batch(0), first)
        again.close()
    named = {path for path in files if any(str(path) in record.message for record in caplog.records)}
    needed = {path for path in files if path.read_bytes() == whole[path]}
    assert named >= needed
    assert len(needed) >= 2, "latents and texts of the first step"


def test_a_cache_that_cannot_be_written_is_a_user_error(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the cache file .*choose another cache folder"):
        opened(bikes_clips(), cache=tmp_path / "file" / "cache").batch(0)


def test_decoding_runs_ahead_in_one_thread(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()

    def slow(window: Window, shape: VideoShape, *_rest: Any) -> Tensor:
        names.add(threading.current_thread().name)
        time.sleep(0.05)
        return torch.zeros(shape.num_frames, 3, shape.height, shape.width, dtype=torch.uint8)

    monkeypatch.setattr(data_module, "decode_window", slow)
    data = opened(bikes_clips(), {SHORT: 4})
    assert data.batch(0).data_s > 0.15  # four windows of 0.05 s
    time.sleep(0.6)
    assert data.batch(1).data_s < 0.05, "step 1 was decoded while the caller slept"
    assert len(names) == 1
    assert threading.current_thread().name not in names
    data.close()
    assert not [thread for thread in threading.enumerate() if thread.name in names]


def test_an_unexpected_error_in_the_thread_reaches_the_caller(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(data_module, "decode_window", broken)
    with pytest.raises(ZeroDivisionError):
        opened(bikes_clips()).batch(0)


def test_first_batches_are_the_first_good_windows_each_once(opened: Any, tmp_path: Path) -> None:
    clips = with_bad_clips(tmp_path)[:8]
    data = opened(clips)
    batches = data.first_batches(5)
    windows = [window for batch in batches for window in batch.windows]
    assert len(windows) == len(set(windows)) == 5
    assert all(len(batch.latents) == len(batch.windows) <= BATCHES[batch.shape] for batch in batches)
    assert {window.clip.path for window in windows} == {bikes()}
    good = [w for found in data.assignment.windows.values() for w in found if w.clip.path == bikes()]
    assert windows == good[:5]
    assert (
        data.captions(2) == list(dict.fromkeys(w.clip.caption for f in data.assignment.windows.values() for w in f))[:2]
    )
