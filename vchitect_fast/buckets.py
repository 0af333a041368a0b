"""Buckets: which clips are read at which VideoShape.

A clip is sampled at `fps` frames a second, at start + i / fps, whatever its own rate (a slower source repeats its nearest
frame). A Window is a run of consecutive samples of one clip; windows do not overlap and nothing about them is random, so
that latents can be cached. `assign` gives every window its VideoShape; which of them make up step k is schedule.py's.
Opens no file; standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vchitect_fast.errors import UserError
from vchitect_fast.manifest import Clip
from vchitect_fast.shapes import VideoShape

# Sides rounded to multiples of 16 shift a ratio by a few percent (16:9 as 768x432 and as 1920x1088 differ by 0.7 %);
# within this distance of the nearest ratio (natural logarithm) the size decides.
SAME_RATIO = 0.03


@dataclass(frozen=True)
class Window:
    """`num_frames` samples of a clip, at start + i / fps seconds of the file."""

    clip: Clip
    index: int  # counts the clip's windows from 0
    start: float  # seconds from the first frame of the file
    num_frames: int

    def times(self, fps: float) -> list[float]:
        """The wanted times, in seconds from the first frame of the file."""
        return [self.start + i / fps for i in range(self.num_frames)]


@dataclass(frozen=True)
class Assignment:
    """Every window by its VideoShape (each shape has a key), and what could not be used."""

    windows: dict[VideoShape, tuple[Window, ...]]
    too_short: tuple[Clip, ...]  # clips with fewer samples than every bucket needs
    num_upscaled: int  # windows smaller than the smallest bucket of their ratio
    unused_s: float  # seconds of used clips beyond their last whole window

    def report(self) -> str:
        """One line a bucket, then what was left out and why."""
        lines = [f"{shape}: {len(windows)} windows" for shape, windows in self.windows.items()]
        if self.too_short:
            names = ", ".join(f"{c.path.name} {c.start:.2f}-{c.end:.2f} s" for c in self.too_short[:5])
            lines.append(
                f"{len(self.too_short)} clips too short for every bucket: {names}{', ...' if len(self.too_short) > 5 else ''}"
            )
        if self.num_upscaled:
            lines.append(f"{self.num_upscaled} windows are upscaled: their clips are smaller than every bucket")
        if self.unused_s >= 0.05:
            lines.append(f"{self.unused_s:.1f} s unused beyond the last whole window of a clip")
        return "\n".join(lines)


def num_samples(clip: Clip, fps: float) -> int:
    """Samples of a clip at `fps` frames a second: all start + i / fps before its end, at least one; one for an image."""
    return 1 if clip.num_frames == 1 else max(1, math.ceil(clip.seconds * fps - 1e-6))


def assign(clips: Sequence[Clip], shapes: Sequence[VideoShape], fps: float) -> Assignment:
    """Cut clips into windows and give each its bucket.

    A clip takes the largest number of frames T that fits and gives as many windows of T as it holds; then the
    nearest aspect ratio; then the largest size that does not upscale, or the smallest size if all do. Images (one frame)
    take one-frame buckets only. Raises UserError with counts when no clip fits any bucket.
    """
    assert shapes
    assert fps > 0
    windows: dict[VideoShape, list[Window]] = {shape: [] for shape in shapes}
    too_short: list[Clip] = []
    num_upscaled, unused_s = 0, 0.0
    for clip in clips:
        available = num_samples(clip, fps)
        fitting = [shape for shape in shapes if shape.num_frames <= available]
        if not fitting:
            too_short.append(clip)
            continue
        frames = max(shape.num_frames for shape in fitting)
        shape = nearest_size(clip, [shape for shape in fitting if shape.num_frames == frames])
        count = available // frames
        windows[shape] += [Window(clip, k, clip.start + k * frames / fps, frames) for k in range(count)]
        num_upscaled += count if _scale(clip, shape) > 1 else 0
        unused_s += 0 if clip.num_frames == 1 else max(0.0, clip.seconds - count * frames / fps)
    if not any(windows.values()):
        longest = max((num_samples(clip, fps) for clip in clips), default=0)
        raise UserError(
            f"no clip of {len(clips)} fits a bucket: the longest has {longest} frames at {fps:g} fps, the shortest bucket "
            f"needs {min(shape.num_frames for shape in shapes)}; plan shapes with fewer frames or raise fps."
        )
    return Assignment(
        {shape: tuple(found) for shape, found in windows.items()}, tuple(too_short), num_upscaled, unused_s
    )


def nearest_size(clip: Clip, shapes: Sequence[VideoShape]) -> VideoShape:
    """Of shapes with the same number of frames, the one for this clip: by ratio, then by size without upscaling."""
    ratio = math.log(clip.width / clip.height)
    distance = {shape: abs(math.log(shape.width / shape.height) - ratio) for shape in shapes}
    near = [shape for shape in shapes if distance[shape] <= min(distance.values()) + SAME_RATIO]
    whole = [shape for shape in near if _scale(clip, shape) <= 1]
    if whole:
        return max(whole, key=lambda shape: (shape.width * shape.height, -distance[shape], shape))
    return min(near, key=lambda shape: (shape.width * shape.height, distance[shape], shape))


def _scale(clip: Clip, shape: VideoShape) -> float:
    """How much the clip is enlarged to cover the shape; at most 1 where it is not upscaled."""
    return max(shape.width / clip.width, shape.height / clip.height)


def why_empty(shape: VideoShape, clips: Sequence[Clip], shapes: Sequence[VideoShape], fps: float) -> str:
    """Of a bucket without windows: which clips it takes, and what these clips are instead."""
    frames = sorted({other.num_frames for other in shapes})
    longer = next((num for num in frames if num > shape.num_frames), None)
    takes = f"{shape.num_frames}{f' to {longer - 1}' if longer else ' or more'} frames at {fps:g} fps"
    lengths = [num_samples(clip, fps) for clip in clips]
    fitting = sum(shape.num_frames <= num < (longer or math.inf) for num in lengths)
    if fitting:
        return f"of the clips with {takes} ({fitting} here) it takes those nearest to {shape.width}x{shape.height}, and all are nearer to another shape"
    return f"it takes clips with {takes}, and the {len(clips)} clips have {min(lengths)} to {max(lengths)}"
