"""Videos with exact truth, made from the real clips of real_video.py: joined, mixed, held, recoded. Writes only where told.

Seven shots of different scenes, brought to 256x144: five of bikes.mp4, bigbuckbunny.mp4, carphone_pristine.mp4. Where a
video must be longer than a shot, the shot runs forwards and backwards, so that every frame stays a real one and moves.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from real_video import BIKES_CUTS, bikes

WIDTH, HEIGHT, FPS = 256, 144, 25
FAST = {"preset": "ultrafast", "crf": "23"}
LOSSLESS = {"codec": "ffv1", "options": {}}


def bunny() -> Path:
    """bigbuckbunny.mp4: 1280x720, 25 fps, 132 frames, one shot."""
    return bikes().with_name("bigbuckbunny.mp4")


def carphone(quality: str = "pristine") -> Path:
    """carphone_pristine.mp4 or carphone_distorted.mp4: 176x144, 29.97 fps, 120 frames, one shot."""
    return bikes().with_name(f"carphone_{quality}.mp4")


def decoded(path: Path, width: int | None = None, height: int | None = None) -> np.ndarray:
    """All frames, uint8 RGB [N,H,W,3], by PyAV from the beginning; nothing of ours takes part."""
    with av.open(str(path)) as container:
        frames = [
            f.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray() for f in container.decode(video=0)
        ]
    return np.stack(frames)


@lru_cache(maxsize=1)
def shots() -> dict[str, np.ndarray]:
    """Name -> frames, uint8 RGB [N,144,256,3]; without the neighbours of cuts, which compression blends."""
    rides, edges = decoded(bikes(), WIDTH, HEIGHT), [0, *BIKES_CUTS]
    found = {f"bikes{k}": rides[a + 2 : b - 2] for k, (a, b) in enumerate(itertools.pairwise(edges))}
    return found | {"bunny": decoded(bunny(), WIDTH, HEIGHT), "carphone": decoded(carphone(), WIDTH, HEIGHT)}


def tour(number: int = 7) -> list[int]:
    """Numbers of shots in an order that has every ordered pair of different shots as neighbours exactly once."""
    left = {a: [b for b in range(number) if b != a] for a in range(number)}
    stack, order = [0], []
    while stack:  # Hierholzer's Eulerian circuit
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            order.append(stack.pop())
    return order[::-1]


@dataclass
class Edit:
    """A video in the making: its frames, the first frames after hard cuts, and the frames (both in) of transitions."""

    frames: list[np.ndarray] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    gradual: list[tuple[int, int]] = field(default_factory=list)

    def cut_to(self, frames: Sequence[np.ndarray]) -> None:
        """A hard cut, or the beginning."""
        if self.frames:
            self.cuts.append(len(self.frames))
        self.frames += list(frames)

    def mix_to(self, leaving: Sequence[np.ndarray], coming: Sequence[np.ndarray], rest: Sequence[np.ndarray]) -> None:
        """A linear dissolve: frames of both shots, which go on, mixed; then `rest`."""
        num = len(leaving)
        self.gradual.append((len(self.frames), len(self.frames) + num - 1))
        for k, (old, new) in enumerate(zip(leaving, coming, strict=True), 1):
            part = k / (num + 1)
            self.frames.append(np.rint(old * (1 - part) + new * part).astype(np.uint8))
        self.frames += list(rest)

    def fade_through(self, level: int, leaving: Sequence[np.ndarray], coming: Sequence[np.ndarray], held: int) -> None:
        """A fade out to an even grey `level`, `held` such frames, and a fade in: one transition."""
        first = len(self.frames)
        even = np.full_like(leaving[0], level)
        self.mix_to(leaving, [even] * len(leaving), [even] * held)
        self.mix_to([even] * len(coming), coming, [])
        self.gradual[-2:] = [(first, len(self.frames) - 1)]


def moving(shot: np.ndarray, num: int, start: int = 0) -> Iterator[np.ndarray]:
    """`num` frames of a shot from `start`, forwards and backwards as often as needed, never the same one twice running."""
    period = 2 * len(shot) - 2
    for k in range(start, start + num):
        at = k % period
        yield shot[min(at, period - at)]


def write(
    path: Path, frames: Sequence[np.ndarray], *, fps: float | Fraction = FPS, times: Sequence[float] | None = None,
    codec: str = "libx264", pix_fmt: str = "yuv420p", options: dict[str, str] | None = None, audio: bool = False,
) -> Path:  # fmt: skip
    """Encode RGB frames; `times` (s) instead of a constant rate are kept to the millisecond."""
    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = pix_fmt, FAST if options is None else options
        tick = 1 / rate if times is None else Fraction(1, 1000)
        stream.codec_context.time_base = tick
        sound: Any = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if times is None else round(times[number] * 1000)
            frame.time_base = tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            wave = av.AudioFrame.from_ndarray(np.zeros((1, int(16000 * len(frames) / fps)), np.float32), "fltp", "mono")
            wave.sample_rate, wave.pts = 16000, 0
            container.mux(sound.encode(wave))
            container.mux(sound.encode())
    return path


def ffmpeg(*arguments: str | Path) -> None:
    """Run the ffmpeg of imageio-ffmpeg: for what PyAV cannot write (display rotation, edit lists, joins by stream copy)."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-loglevel", "error", "-y"]
    subprocess.run([*command, *map(str, arguments)], check=True)


def looped(source: Path, target: Path, times: int) -> Path:
    """A file's packets `times` over, by stream copy."""
    ffmpeg("-stream_loop", str(times - 1), "-i", source, "-map", "0:v", "-c", "copy", target)
    return target


def overlap(a: tuple[int, int], b: tuple[int, int]) -> float:
    """Intersection over union of two ranges of frames, both ends in."""
    shared = min(a[1], b[1]) - max(a[0], b[0]) + 1
    return max(0, shared) / (a[1] - a[0] + b[1] - b[0] + 2 - max(0, shared))
