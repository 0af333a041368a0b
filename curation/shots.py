"""Shots: where a video cuts, and where it fades or dissolves, from the signals of its one decode. Opens no file.

Hard cuts are PySceneDetect's AdaptiveDetector (the library's own decision, replayed on stored scores, so that another
threshold decodes nothing) or TransNetV2's. Fades and dissolves are looked for by our own rule (`transitions`). A shot lies
between two of these, without a frame on either side of a cut (compression blends neighbours there) and without the frames
of a transition.

The paper says "AdaptiveDetector 21.0". As `adaptive_threshold` that finds none of five cuts of bikes.mp4, as
`min_content_val` all; both thresholds are explicit here and the preset `paper` is the second reading.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vchitect_fast.curation.signals import Signals
from vchitect_fast.errors import UserError, unknown_name

PRESETS = {"paper": (3.0, 21.0), "literal": (21.0, 15.0), "pyscenedetect": (3.0, 15.0)}
BACKENDS = ("adaptive", "transnet")


@dataclass(frozen=True)
class ShotSettings:
    """Parameters of shot detection.

    backend             "adaptive" (PySceneDetect) or "transnet" (TransNetV2, extra [transnet])
    adaptive_threshold  least ratio of a frame's content change to the mean of its neighbours'
    min_content_val     least content change, 0..255
    min_scene_frames    least distance of two cuts, in frames
    transnet_threshold  least probability of a cut, for "transnet"
    gradual             look for fades and dissolves too
    """

    backend: str = "adaptive"
    adaptive_threshold: float = PRESETS["paper"][0]
    min_content_val: float = PRESETS["paper"][1]
    min_scene_frames: int = 15
    transnet_threshold: float = 0.5
    gradual: bool = True

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise unknown_name("shots.backend", self.backend, BACKENDS)


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


def find_shots(signals: Signals, fps: float, settings: ShotSettings) -> list[Shot]:
    """Every shot in order; one shot when nothing cuts. A shot that trimming would leave empty is dropped."""
    if settings.backend == "transnet":
        from vchitect_fast.curation.transnet import cuts as transnet_shots

        # Its shots end with the frame before a cut, or the first of a gradual one: that and the next shot's first go.
        spans = transnet_shots(signals.cut, settings.transnet_threshold)
        edges = [(a_last, b_first) for (_, a_last), (b_first, _) in itertools.pairwise(spans)]
    else:
        edges = [(cut - 1, cut) for cut in adaptive_cuts(signals.content, fps, settings)]
    if settings.gradual:
        found = transitions(signals, fps)
        edges = [edge for edge in edges if not any(a <= edge[1] and edge[0] <= b for a, b in found)] + found
    return shots_between(signals.time, sorted(edges), fps)


def shots_between(times: Sequence[float] | np.ndarray, edges: Sequence[tuple[int, int]], fps: float) -> list[Shot]:
    """Shots from ascending frame times (s) and the frames (first, last) that belong to a cut or transition."""
    shots, first = [], 0
    for begin, end in [*edges, (len(times), len(times))]:
        last = begin - 1
        if first <= last:
            stop = float(times[last + 1]) if last + 1 < len(times) else float(times[last]) + 1 / fps
            shots.append(Shot(first, last, float(times[first]), stop))
        first = max(first, end + 1)
    return shots


def adaptive_cuts(content: np.ndarray, fps: float, settings: ShotSettings) -> list[int]:
    """First frames after each hard cut, as PySceneDetect's AdaptiveDetector decides on these scores (its content_val)."""
    try:
        from scenedetect import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector
    except ImportError as error:
        raise UserError(f"finding cuts needs PySceneDetect ({error}); pip install 'vchitect-fast[curation]'.") from None

    class Replay(AdaptiveDetector):
        """The library's decision without its pixels."""

        def _calculate_frame_score(self, timecode: Any, frame_img: Any) -> float:
            return float(content[timecode.frame_num])

    detector = Replay(
        adaptive_threshold=settings.adaptive_threshold,
        min_content_val=settings.min_content_val,
        min_scene_len=settings.min_scene_frames,
    )
    nothing = np.zeros((1, 1, 3), np.uint8)
    found = []
    for frame in range(len(content)):
        found += detector.process_frame(FrameTimecode(frame, fps), nothing)
    return [cut.frame_num for cut in found]


# Fades and dissolves -----------------------------------------------------------------------------------------------

HALF_WIDTHS_S = (0.1, 0.16, 0.24, 0.32, 0.48, 0.64, 0.9)  # half the lengths (s) looked for: about 0.2 to 2 s
MIN_CHANGE = 18.0  # mean absolute change of the 8x8 layout across a transition, 0..255: two pictures, not one moving
MAX_RESIDUAL = 0.2  # distance of the frames between from a mixture of the two ends, as a share of that change
EVEN = 4.0  # deviation of the grey thumb, 0..255, below which a picture is even: black, white, one colour
MAX_EVEN_S = 2.0  # even pictures for longer are a shot, whatever it shows
BLOCK = 20_000  # frames looked at together, so that memory does not grow with the video


def transitions(signals: Signals, fps: float) -> list[tuple[int, int]]:
    """Frames (first, last) of every fade and dissolve, in order.

    A dissolve mixes two pictures: every frame in it lies, as an 8x8 colour layout, on the straight line between the layouts
    before and after, and moves along it evenly. A moving camera leaves that line, a hard cut jumps along it. A fade is a
    dissolve with an even picture; a fade out and the fade in after it become one transition. Even pictures for a moment
    (black, white) are one by themselves: a fade of few frames leaves nothing else.
    """
    found = _even_runs(signals, fps)
    for half in sorted({max(3, round(width * fps)) for width in HALF_WIDTHS_S}):
        for begin in range(0, len(signals), BLOCK):
            block = signals[slice(max(0, begin - half), begin + BLOCK + half)]
            offset = max(0, begin - half)
            found += [(a + offset, b + offset) for a, b in _mixtures(block.layout.astype(np.float32), half)]
    return _merged(sorted(found), signals)


def _mixtures(layout: np.ndarray, half: int) -> list[tuple[int, int]]:
    """Ranges of frames t whose neighbours t - half .. t + half mix the two ends evenly."""
    num = len(layout) - 2 * half
    if num <= 0:
        return []
    at = np.flatnonzero(np.abs(layout[2 * half :] - layout[:num]).mean(1) >= MIN_CHANGE)
    last_part = np.zeros(len(at), np.float32)
    for step in (round(2 * half * k / 6) for k in range(1, 6)):  # each on the ends that those before left
        before = layout[at]
        change, middle = layout[at + 2 * half] - before, layout[at + step] - before
        part = (middle * change).sum(1) / (change**2).sum(1)
        residual = np.abs(middle - part[:, None] * change).mean(1) / np.abs(change).mean(1)
        # Even progress: a sixth of the way a step, at least a quarter of that and at most thrice.
        good = (residual <= MAX_RESIDUAL) & (part - last_part >= 1 / 24) & (part - last_part <= 1 / 2)
        at, last_part = at[good], part[good]
    return [(int(t), int(t) + 2 * half) for t in at[1 - last_part >= 1 / 24]]


def _even_runs(signals: Signals, fps: float) -> list[tuple[int, int]]:
    """Runs of even pictures of at most MAX_EVEN_S, unless the video shows nothing else."""
    even = np.concatenate([[False], signals.contrast < EVEN, [False]])
    edges = np.flatnonzero(even[1:] != even[:-1]).reshape(-1, 2)
    return [(int(a), int(b) - 1) for a, b in edges if b - a <= min(MAX_EVEN_S * fps, len(signals) - 1)]


def _merged(ranges: list[tuple[int, int]], signals: Signals) -> list[tuple[int, int]]:
    """Overlapping ranges joined, then those that are separated by an even picture (black, white) only."""
    merged: list[tuple[int, int]] = []
    for first, last in ranges:
        if merged and (first <= merged[-1][1] + 1 or (signals.contrast[merged[-1][1] : first + 1] < EVEN).all()):
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged
