"""Video: the frame nearest in time, from every container, or a DecodeError; never another frame in silence.

Synthetic videos here encode each frame's number as its brightness (4 a frame), so that a decoded frame says which one it
is, and the expected number comes from the frame times alone; damage is tried on a real video. pytest tests/test_video.py
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from real_video import bikes, bikes_clips, remux, truncate

from vchitect_fast.buckets import Window
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import Clip
from vchitect_fast.shapes import VideoShape
from vchitect_fast.video import DecodeError, decode_window, fit, read_video, write_video

CONSTANT = [k / 25 for k in range(60)]
VARIABLE = [k / 25 + 0.013 * (k % 3) + (0.5 if k > 30 else 0.0) for k in range(60)]  # with a hole of half a second


def numbered(path: Path, times: list[float], gop: int = 12, rotation: int = 0) -> Path:
    """A grey video whose k-th frame has brightness 4 k and is shown at times[k] seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": str(gop), "bf": "2", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        stream.codec_context.time_base = Fraction(1, 90000)
        for k, time in enumerate(times):
            image = np.full((32, 48, 3), 4 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time * 90000), Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(frames: torch.Tensor) -> list[int]:
    """Which frame each decoded frame is."""
    return [round(float(frame.float().mean()) / 4) for frame in frames]


def nearest(times: list[float], clip: Clip, wanted: list[float]) -> list[int]:
    inside = [k for k, time in enumerate(times) if clip.start - 1e-3 <= time < clip.end - 1e-3]
    return [min(inside, key=lambda k: (round(abs(times[k] - target), 5), k)) for target in wanted]


@pytest.mark.parametrize("times", [CONSTANT, VARIABLE], ids=["constant", "variable"])
@pytest.mark.parametrize(("suffix", "gop"), [(".mp4", 12), (".mp4", 250), (".mkv", 12), (".ts", 12)])
@pytest.mark.parametrize(
    ("first", "stop", "skip_s", "fps", "count"),
    [
        (0, 60, 0.0, 8.0, 16),
        (7, 29, 0.0, 8.0, 6),
        (7, 29, 0.25, 8.0, 4),  # a later window
        (31, 60, 0.125, 12.5, 9),  # ties: 12.5 a second falls between frames of 25
        (20, 24, 0.0, 60.0, 8),  # slower than asked: repeats
        (40, 41, 0.0, 8.0, 1),
    ],
)
def test_the_frame_nearest_in_time_is_taken(
    tmp_path: Path, times: list[float], suffix: str, gop: int, first: int, stop: int, skip_s: float, fps: float, count: int
) -> None:  # fmt: skip
    path = numbered(tmp_path / f"v{suffix}", times, gop)
    end = times[stop] if stop < len(times) else times[-1] + 1 / 25
    clip = Clip(path, times[first], end, stop - first, 48, 32, 25.0, "")
    window = Window(clip, 0, times[first] + skip_s, count)
    frames = decode_window(window, VideoShape(count, 48, 32), fps)
    assert frames.shape == (count, 3, 32, 48)
    assert numbers(frames) == nearest(times, clip, window.times(fps))


def test_no_frame_of_the_neighbour_shot_enters_when_times_are_rounded(tmp_path: Path) -> None:
    path = numbered(tmp_path / "v.mp4", [k / 24 for k in range(60)])
    clip = Clip(path, round(13 / 24, 2), round(26 / 24, 2), 13, 48, 32, 24.0, "")
    window = Window(clip, 0, clip.start, 5)
    assert set(numbers(decode_window(window, VideoShape(5, 48, 32), 9.0))) <= set(range(13, 26))


def test_a_rotated_video_is_turned(tmp_path: Path) -> None:
    path = numbered(tmp_path / "v.mp4", CONSTANT, rotation=90)
    assert read_video(path)[0].shape == (60, 48, 32, 3)
    image = torch.zeros(1, 32, 48, 3, dtype=torch.uint8)
    image[:, :, :24] = 255  # the left half is white; shown turned by 90 degrees counter-clockwise, the lower half is
    write_video(tmp_path / "half.mp4", image, 25)
    with av.open(str(tmp_path / "half.mp4")) as old, av.open(str(tmp_path / "turned.mp4"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        stream.set_display_rotation(90)
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    with av.open(str(tmp_path / "turned.mp4")) as container:
        assert next(container.decode(video=0)).rotation == 90  # FFmpeg counts counter-clockwise
    shown = read_video(tmp_path / "turned.mp4")[0][0].float().mean(-1)
    assert shown[40:].mean() > 250
    assert shown[:8].mean() < 5


def test_fit_covers_and_keeps_the_centre() -> None:
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 200  # the centre square
    assert fit(image, 16, 16).unique().tolist() == [200]
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    assert torch.equal(fit(image, 96, 64).permute(1, 2, 0), torch.from_numpy(image))
    # Shrinking is antialiased: white noise comes out near its mean.
    assert fit(image, 16, 16).float().std() < 0.5 * image.std()


def test_an_image_file_is_one_frame(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (50, 40), (10, 200, 30)).save(tmp_path / "a.png")
    clip = Clip(tmp_path / "a.png", 0.0, 0.0, 1, 50, 40, 1.0, "")
    frames = decode_window(Window(clip, 0, 0.0, 1), VideoShape(1, 32, 32), 8.0)
    assert frames[0, :, 5, 5].tolist() == [10, 200, 30]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "Invalid data"), (b"not a video" * 99, "Invalid data")],
)
def test_a_file_that_is_no_video_condemns_itself(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "v.mp4"
    if content is not None:
        path.write_bytes(content)
    window = Window(bikes_clips(path)[0], 0, 0.0, 4)
    with pytest.raises(DecodeError, match=message) as caught:
        decode_window(window, VideoShape(4, 64, 32), 8.0)
    assert caught.value.whole_file


def test_a_file_without_video_condemns_itself(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(DecodeError, match="no video stream") as caught:
        read_video(tmp_path / "a.wav")
    assert caught.value.whole_file


def test_bikes_cut_at_40_percent_cannot_be_opened(tmp_path: Path) -> None:
    path = truncate(bikes(), tmp_path / "cut.mp4", 0.4)  # the index of this file stands at its end
    with pytest.raises(DecodeError, match="cannot open it as a video"):
        decode_window(Window(bikes_clips(path)[0], 0, 0.0, 4), VideoShape(4, 64, 32), 8.0)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_a_truncated_video_gives_the_true_frames_or_none(tmp_path: Path, suffix: str) -> None:
    """With the index in front, the frames before the cut are there; after it no stale or half frame may pass."""
    whole = remux(bikes(), tmp_path / f"whole{suffix}", **({"movflags": "faststart"} if suffix == ".mp4" else {}))
    cut = truncate(whole, tmp_path / f"cut{suffix}", 0.4)
    shape, outcomes = VideoShape(4, 64, 32), []
    for k in range(10):
        clip = Clip(cut, 1.0 * k, k + 1.0, 25, 640, 272, 25.0, "")
        true = decode_window(Window(replace(clip, path=whole), 0, clip.start, 4), shape, 8.0)
        outcomes.append(outcome(Window(clip, 0, clip.start, 4), shape, true))
    assert outcomes[0] == "true"
    assert outcomes[-1] == "error"
    assert "other" not in outcomes


def test_flipped_bytes_are_not_painted_over(tmp_path: Path) -> None:
    content = bytearray(bikes().read_bytes())
    draw = random.Random(0)  # of other draws some still parse as video, and no decoder can tell
    for _ in range(20):
        content[draw.randrange(5_000, 500_000)] ^= 0x55
    (tmp_path / "flipped.mp4").write_bytes(content)
    shape, outcomes = VideoShape(4, 64, 32), []
    for k in range(10):
        clip = Clip(bikes(), 1.0 * k, k + 1.0, 25, 640, 272, 25.0, "")
        true = decode_window(Window(clip, 0, clip.start, 4), shape, 8.0)
        outcomes.append(outcome(Window(replace(clip, path=tmp_path / "flipped.mp4"), 0, clip.start, 4), shape, true))
    assert "other" not in outcomes
    assert outcomes.count("error") >= 3


def outcome(window: Window, shape: VideoShape, true: torch.Tensor) -> str:
    """What decoding a damaged file came to: "true" frames, an "error", or "other" frames, which must never be."""
    try:
        return "true" if torch.equal(decode_window(window, shape, 8.0), true) else "other"
    except DecodeError:
        return "error"


def test_too_few_frames_are_an_error(tmp_path: Path) -> None:
    path = numbered(tmp_path / "v.mp4", CONSTANT)  # 2.4 s, last frame at 2.36 s
    clip = Clip(path, 0.0, 4.0, 100, 48, 32, 25.0, "")
    window = Window(clip, 0, 2.0, 4)  # 2.375 s is within a frame and half a sample of 2.36 s
    assert numbers(decode_window(window, VideoShape(4, 48, 32), 8.0))[-1] == 59
    with pytest.raises(DecodeError, match=r"no frame for 2.500 s, the last that decodes within the clip is at 2.360 s"):
        decode_window(Window(clip, 0, 2.0, 5), VideoShape(5, 48, 32), 8.0)
    with pytest.raises(DecodeError, match="no frame for 3.500 s"):
        decode_window(Window(clip, 0, 3.5, 2), VideoShape(2, 48, 32), 8.0)


def test_write_and_read_back(tmp_path: Path) -> None:
    rows, columns, time = np.mgrid[0:64, 0:96, 0:9].astype(np.float32)
    smooth = np.stack([127 + 100 * np.sin(rows / 20 + time / 3), columns * 2, 255 - rows * 3], -1).clip(0, 255)
    frames = torch.from_numpy(smooth.astype(np.uint8)).permute(2, 0, 1, 3)
    write_video(tmp_path / "out" / "v.mp4", frames, 8)
    back, fps = read_video(tmp_path / "out" / "v.mp4")
    assert back.shape == frames.shape
    assert fps == pytest.approx(8)
    mse = float((back.float() - frames.float()).square().mean())
    assert 10 * np.log10(255**2 / mse) > 35, "8-bit 4:2:0 H.264 at this quality is far above 35 dB on smooth frames"
    write_video(tmp_path / "one.mp4", frames[:1], 30000 / 1001)
    assert read_video(tmp_path / "one.mp4")[0].shape[0] == 1


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, 16, 16, 3), "uint8 frames .* got torch.float32"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8 frames"),
        (torch.zeros(0, 16, 16, 3, dtype=torch.uint8), "uint8 frames"),
        (torch.zeros(2, 15, 16, 3, dtype=torch.uint8), "even width and height, got 16x15"),
    ],
)
def test_frames_that_make_no_video_are_refused(tmp_path: Path, frames: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_video(tmp_path / "v.mp4", frames, 8)
    assert os.listdir(tmp_path) == []


def test_a_video_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(bikes(), tmp_path / "v.mp4")
    before = (tmp_path / "v.mp4").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(av.container.OutputContainer, "mux", full, raising=False)
    with pytest.raises(UserError, match="cannot write the video .*No space left"):
        write_video(tmp_path / "v.mp4", torch.zeros(2, 16, 16, 3, dtype=torch.uint8), 8)
    assert (tmp_path / "v.mp4").read_bytes() == before
    assert os.listdir(tmp_path) == ["v.mp4"]
