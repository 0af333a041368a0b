"""Buckets: windows tile clips, and every window gets the right shape.

pytest tests/test_buckets.py
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from vchitect_fast.buckets import assign, num_samples, why_empty
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import Clip
from vchitect_fast.shapes import VideoShape

CLIP = Clip(Path("a.mp4"), 1.0, 5.0, 100, 640, 272, 25.0, "")
IMAGE = Clip(Path("a.png"), 0.0, 0.0, 1, 640, 272, 1.0, "")


def shapes(*texts: str) -> list[VideoShape]:
    return [VideoShape.parse(text)[0] for text in texts]


def chosen(clip: Clip, *texts: str, fps: float = 8.0) -> str:
    [shape] = [shape for shape, windows in assign([clip], shapes(*texts), fps).windows.items() if windows]
    return str(shape)


@pytest.mark.parametrize(
    ("seconds", "fps", "expected"),
    [
        (4.0, 8.0, 32),  # the sample at 4 s would be the next shot's
        (4.001, 8.0, 33),
        (0.1 + 0.2, 10.0, 3),  # 0.30000000000000004
        (29 / 25, 8.0, 10),  # 0 .. 1.125
        (0.01, 8.0, 1),
    ],
)
def test_samples_of_a_clip_lie_before_its_end(seconds: float, fps: float, expected: int) -> None:
    assert num_samples(replace(CLIP, start=0.0, end=seconds), fps) == expected


def test_a_long_clip_gives_consecutive_windows() -> None:
    [shape] = shapes("12x640x272")
    found = assign([CLIP], [shape], 8.0)
    assert [(w.index, w.start, w.num_frames) for w in found.windows[shape]] == [(0, 1.0, 12), (1, 2.5, 12)]
    assert found.windows[shape][1].times(8.0)[-1] == 2.5 + 11 / 8
    assert found.unused_s == pytest.approx(1.0)
    assert "1.0 s unused" in found.report()


@pytest.mark.parametrize(
    ("clip", "among", "expected"),
    [
        (CLIP, ("16x640x272", "32x256x112", "40x640x272"), "32x256x112"),  # most frames first
        (CLIP, ("8x256x256", "8x512x384", "8x256x112"), "8x256x112"),  # then the ratio
        (CLIP, ("8x256x112", "8x640x272", "8x1280x544"), "8x640x272"),  # then the largest that does not upscale
        (CLIP, ("8x1280x544", "8x1920x816"), "8x1280x544"),  # all upscale: the smallest
        (replace(CLIP, width=1920, height=1080), ("8x768x432", "8x1024x576", "8x512x512"), "8x1024x576"),
        # 768x432 is nearer 16:9 than 1920x1088 by 0.7 %, which is the rounding to 16 and must not decide.
        (replace(CLIP, width=3840, height=2160), ("8x768x432", "8x1920x1088"), "8x1920x1088"),
        (IMAGE, ("8x640x272", "1x640x272"), "1x640x272"),  # images never become videos
        (replace(CLIP, end=1.5), ("8x640x272", "1x640x272"), "1x640x272"),  # a short video may become images
    ],
)
def test_a_window_gets_the_right_bucket(clip: Clip, among: tuple[str, ...], expected: str) -> None:
    assert chosen(clip, *among) == expected
    assert chosen(clip, *reversed(among)) == expected


def test_a_slow_source_is_allowed() -> None:
    [shape] = shapes("32x640x272")
    assert len(assign([replace(CLIP, fps=2.0, num_frames=8)], [shape], 8.0).windows[shape]) == 1


def test_short_clips_are_counted_and_named() -> None:
    found = assign(
        [CLIP, replace(CLIP, path=Path("short.mp4"), end=1.5), IMAGE], shapes("8x640x272", "60x640x272"), 8.0
    )
    assert [clip.path.name for clip in found.too_short] == ["short.mp4", "a.png"]
    assert "2 clips too short for every bucket: short.mp4 1.00-1.50 s, a.png" in found.report()
    assert "60x640x272: 0 windows" in found.report()


def test_no_clip_that_fits_is_an_error_with_counts() -> None:
    with pytest.raises(UserError, match="no clip of 2 fits a bucket: the longest has 32 frames at 8 fps.*needs 33"):
        assign([CLIP, IMAGE], shapes("33x640x272", "60x16x16"), 8.0)


@pytest.mark.parametrize(
    ("empty", "planned", "why"),
    [
        ("33x640x272", ("33x640x272", "8x640x272"), "it takes clips with 33 or more frames at 8 fps, and the 2 clips have 1 to 32"),
        ("2x640x272", ("32x640x272", "2x640x272", "8x640x272"), "it takes clips with 2 to 7 frames at 8 fps, and the 2 clips have 1 to 32"),
        ("8x256x256", ("8x640x272", "8x256x256"), r"with 8 or more frames at 8 fps \(1 here\) it takes those nearest to 256x256, and all are nearer"),
    ],
)  # fmt: skip
def test_an_empty_bucket_says_what_would_fill_it(empty: str, planned: tuple[str, ...], why: str) -> None:
    assert re.search(why, why_empty(*shapes(empty), [CLIP, IMAGE], shapes(*planned), 8.0))
