"""Frames of clips: after a seek they are those of a decode from the beginning, whatever the container and the groups.

Real frames of bikes.mp4, recoded so that every twelfth is a key frame. pytest tests/curation/test_frames.py
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import synthetic
from real_video import bikes, remux

from vchitect_fast.curation import frames
from vchitect_fast.curation.frames import BadVideo, ahead, clip_frames, frames_from, open_video, to_rgb
from vchitect_fast.curation.probe import probe
from vchitect_fast.curation.stage import ClipSpan, Want

NUM = 60
GROUPS = "bframes=3:b-pyramid=normal:keyint=12:min-keyint=12:scenecut=0:log-level=error"
X264 = ("-c:v", "libx264", "-preset", "veryfast", "-x264-params")
CODERS = {
    "closed": (*X264, GROUPS),
    "open": (*X264, GROUPS + ":open-gop=1"),
    "hevc": ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "keyint=12:min-keyint=12:open-gop=1:bframes=3:log-level=none"),
    "mpeg2": ("-c:v", "mpeg2video", "-bf", "2", "-g", "12", "-q:v", "3"),
    "mpeg4": ("-c:v", "mpeg4", "-bf", "2", "-g", "12", "-q:v", "3"),
    "vp9": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-g", "12"),
    "interlaced": (*X264, "tff=1:keyint=12:bframes=2:log-level=error", "-flags", "+ilme+ildct"),
}  # fmt: skip


def coded(folder: Path, coder: str, suffix: str, *before: str) -> Path:
    target = folder / f"{coder}{suffix}"
    size = ("-frames:v", str(NUM), "-vf", "scale=160:68")
    synthetic.ffmpeg(*before, "-i", bikes(), *size, *CODERS[coder], target)
    return target


def every_frame(path: Path) -> tuple[list[float], list[np.ndarray]]:
    with open_video(str(path)) as container:
        found = [(time, to_rgb(frame)) for time, frame in frames_from(container, 0.0)]
    return [time for time, _ in found], [picture for _, picture in found]


def span_of(path: Path, times: list[float], first: int, last: int) -> ClipSpan:
    source = probe(str(path))
    end = times[last + 1] if last + 1 < len(times) else times[last] + 1 / source.fps
    return ClipSpan("", str(path), first, last, times[first], end, source.width, source.height, source.fps)


@pytest.mark.parametrize(
    ("coder", "suffix"),
    [("closed", ".mp4"), ("closed", ".ts"), ("open", ".mp4"), ("open", ".mkv"), ("open", ".ts"), ("hevc", ".mp4"),
     ("mpeg2", ".ts"), ("mpeg4", ".avi"), ("vp9", ".webm"), ("interlaced", ".mp4")],
)  # fmt: skip
def test_a_seek_gives_what_a_decode_from_the_beginning_gives(tmp_path: Path, coder: str, suffix: str) -> None:
    path = coded(tmp_path, coder, suffix)
    times, pictures = every_frame(path)
    assert len(pictures) == NUM and np.array_equal(np.stack(pictures), synthetic.decoded(path))
    for k in range(0, NUM, 1 if suffix != ".ts" else 3):
        span = span_of(path, times, k, min(k + 1, NUM - 1))
        first, second = clip_frames(span, [Want((span.start + times[k] + 0.04) / 2), Want(span.end - 0.02)])
        assert np.array_equal(first, pictures[k]), k
        assert np.array_equal(second, pictures[min(k + 1, NUM - 1)]), k


def test_long_groups_are_found_from_further_back(tmp_path: Path) -> None:
    path = tmp_path / "long.ts"  # one key frame in 10 s: the first
    synthetic.ffmpeg("-i", bikes(), "-vf", "scale=64:28", *X264, "keyint=999:scenecut=0:log-level=error", path)
    times, _ = every_frame(path)
    for k in (3, 60, 249):
        assert np.array_equal(
            clip_frames(span_of(path, times, k, k), [Want(times[k] + 0.01)])[0], synthetic.decoded(path)[k]
        )


@pytest.mark.parametrize("begin", [1.1, 1.5])
def test_an_edit_list_hides_frames_and_the_first_one_shown_has_time_0(tmp_path: Path, begin: float) -> None:
    whole = coded(tmp_path, "closed", ".mp4")
    synthetic.ffmpeg("-ss", str(begin), "-i", whole, "-c", "copy", tmp_path / "cut.mp4")
    times, pictures = every_frame(tmp_path / "cut.mp4")
    first = round(begin * 25 + 0.49)
    assert times[0] == 0.0 and len(pictures) == NUM - first
    assert np.array_equal(np.stack(pictures), synthetic.decoded(whole)[first:])
    for k in (0, 1, 7, len(times) - 1):
        span = span_of(tmp_path / "cut.mp4", times, k, k)
        assert np.array_equal(clip_frames(span, [Want(times[k])])[0], pictures[k])


@pytest.mark.parametrize(("turn", "k"), [("90", 1), ("180", 2), ("-90", 3)])
def test_frames_are_turned_as_shown(tmp_path: Path, turn: str, k: int) -> None:
    plain = coded(tmp_path, "closed", ".mp4")
    synthetic.ffmpeg("-display_rotation", turn, "-i", plain, "-c", "copy", tmp_path / "turned.mp4")
    source = probe(str(tmp_path / "turned.mp4"))
    assert (source.width, source.height) == ((68, 160) if k % 2 else (160, 68))
    times, pictures = every_frame(tmp_path / "turned.mp4")
    assert np.array_equal(pictures[5], np.rot90(synthetic.decoded(plain)[5], k))
    found = clip_frames(span_of(tmp_path / "turned.mp4", times, 5, 5), [Want(times[5]), Want(times[5], 34)])
    assert np.array_equal(found[0], pictures[5])
    assert found[1].shape == ((80, 34, 3) if k % 2 else (34, 80, 3))


def test_the_frame_shown_at_a_time_is_the_last_that_is_not_later(tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.5, 0.52, 2.0]
    pictures = list(synthetic.shots()["bikes1"][:5])
    path = synthetic.write(tmp_path / "v.mkv", pictures, times=times, **synthetic.LOSSLESS, pix_fmt="bgr0")
    span = ClipSpan("", str(path), 0, 4, 0.0, 2.1, 256, 144, 2.0)
    wanted = {0.0: 0, 0.039: 0, 0.04: 1, 0.49: 1, 0.5: 2, 0.51: 2, 1.99: 3, 2.0: 4, 2.1: 4}
    found = clip_frames(span, [Want(t) for t in wanted])
    for picture, number in zip(found, wanted.values(), strict=True):
        assert np.array_equal(picture, pictures[number])
    backwards = clip_frames(span, [Want(t) for t in reversed(wanted)])
    assert all(np.array_equal(a, b) for a, b in zip(found, reversed(backwards), strict=True))


def test_equal_wants_share_one_array_and_small_frames_stay_small() -> None:
    span = ClipSpan("", str(bikes()), 40, 60, 1.6, 2.4, 640, 272, 25.0)
    a, b, c, d = clip_frames(span, [Want(2.0, 128), Want(2.01, 128), Want(2.0, 999), Want(2.0)])
    assert a is b and a.shape == (128, 301, 3)
    assert c.shape == (272, 640, 3) and np.array_equal(c, d)


def test_what_cannot_be_read_has_a_reason(tmp_path: Path) -> None:
    span = ClipSpan("", str(bikes()), 0, 249, 0.0, 10.0, 640, 272, 25.0)
    with pytest.raises(BadVideo, match="no frame decodes for 10.5"):
        clip_frames(span, [Want(10.5)])
    with pytest.raises(BadVideo, match="no frame is shown at -0.5"):
        clip_frames(span, [Want(-0.5)])
    with pytest.raises(BadVideo, match="cannot open it as a video .*No such file"):
        clip_frames(ClipSpan("", str(tmp_path / "none.mp4"), 0, 0, 0.0, 1.0, 2, 2, 25.0), [Want(0.0)])
    synthetic.ffmpeg("-f", "lavfi", "-i", "sine=d=1", tmp_path / "sound.m4a")
    with pytest.raises(BadVideo, match="no video stream"):
        clip_frames(ClipSpan("", str(tmp_path / "sound.m4a"), 0, 0, 0.0, 1.0, 2, 2, 25.0), [Want(0.0)])


def test_damage_is_no_picture(tmp_path: Path) -> None:
    content = bytearray(bikes().read_bytes())
    content[200_000:200_400] = bytes(400)
    path = tmp_path / "holes.mp4"
    path.write_bytes(content)
    with pytest.raises(BadVideo, match="decoding stopped|is corrupt"):
        clip_frames(ClipSpan("", str(path), 0, 249, 0.0, 10.0, 640, 272, 25.0), [Want(9.9)])


def test_frames_without_times_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "raw.mp4"
    synthetic.write(path, list(synthetic.shots()["bikes1"][:10]))
    with open_video(str(path)) as container:
        packets = list(container.demux(container.streams.video[0]))
        for packet in packets:
            if packet.size:
                packet.pts = packet.dts = None
        stub = _Stub(container.streams, packets)
        with pytest.raises(BadVideo, match="no presentation times"):
            list(frames_from(stub, 0.0))


class _Stub:
    """A container that hands out given packets."""

    def __init__(self, streams: object, packets: list[av.Packet]) -> None:
        self.streams, self._packets = streams, packets

    def demux(self, stream: object) -> list[av.Packet]:
        return self._packets


def test_a_url_is_read_through_fsspec(tmp_path: Path) -> None:
    path = remux(bikes(), tmp_path / "ride.mkv")
    spans = [ClipSpan("", name, 50, 60, 2.0, 2.44, 640, 272, 25.0) for name in (str(path), f"file://{path}")]
    a, b = (clip_frames(span, [Want(2.2)])[0] for span in spans)
    assert np.array_equal(a, b)
    with pytest.raises(BadVideo, match="cannot open it as a video"):
        clip_frames(ClipSpan("", "nosuchstore://x/y.mp4", 0, 0, 0.0, 1.0, 2, 2, 25.0), [Want(0.0)])


def test_a_seek_that_fails_on_the_way_goes_on_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = coded(tmp_path, "closed", ".mp4")
    times, pictures = every_frame(path)
    genuine = frames._from_key

    def breaks(*arguments: Any) -> Iterator[Any]:
        for number, packet in enumerate(genuine(*arguments)):
            if number == 9:
                raise av.InvalidDataError(1, "a reference is missing")
            yield packet

    monkeypatch.setattr(frames, "_from_key", breaks)
    with open_video(str(path)) as container:
        found = [(time, to_rgb(frame)) for time, frame in frames_from(container, times[40])]
    assert [time for time, _ in found] == times[36:]
    assert all(np.array_equal(a, b) for (_, a), b in zip(found, pictures[36:], strict=True))


def test_what_is_drawn_ahead_comes_in_order_and_its_error_last() -> None:
    def items() -> Iterator[int]:
        yield from range(20)
        raise BadVideo("the end is missing")

    seen: list[int] = []
    with ahead(items()) as drawn, pytest.raises(BadVideo, match="the end is missing"):
        seen.extend(drawn)
    assert seen == list(range(20))


def test_leaving_early_ends_the_thread_and_draws_little_more() -> None:
    given = []

    def items() -> Iterator[int]:
        for item in range(1000):
            given.append(item)
            yield item

    before = threading.active_count()
    with ahead(items(), 2) as drawn:
        assert [next(drawn), next(drawn)] == [0, 1]
        assert len(given) <= 2 + 2 + 2  # used, waiting, and one in each hand
    assert threading.active_count() == before
    assert len(given) < 10
