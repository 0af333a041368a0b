"""Buckets: windows tile clips, every window gets the right shape, and step k is a pure function of (seed, step).

pytest tests/test_buckets.py
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from vchitect_fast.buckets import Schedule, Window, assign, num_samples
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
    with pytest.raises(UserError, match=r"no bucket has a window.*33x640x272: 0"):
        Schedule({shapes("33x640x272")[0]: []}, {}, 0)
    with pytest.raises(UserError, match="seed must be 0 or more"):
        Schedule(*_windows(), -1)


def _windows() -> tuple[dict[VideoShape, list[Window]], dict[VideoShape, int]]:
    small, large = shapes("8x640x272", "16x640x272")
    windows = {
        shape: [Window(replace(CLIP, path=Path(f"{shape}-{k}")), 0, 0.0, shape.num_frames) for k in range(count)]
        for shape, count in ((small, 7), (large, 4))
    }
    return windows, {small: 3, large: 2}


def test_an_epoch_sees_every_window_and_fills_the_last_batch() -> None:
    windows, batch = _windows()
    schedule = Schedule(windows, batch, 5)
    assert schedule.steps_per_epoch == 3 + 2
    for epoch in range(3):
        steps = [schedule.batch(epoch * 5 + k) for k in range(5)]
        seen = Counter(window for _, found in steps for window in found)
        assert set(seen) == {w for found in windows.values() for w in found}
        assert sorted(seen.values()) == [1] * 9 + [2] * 2  # 7 windows in 3 batches of 3
        assert all(len(found) == batch[shape] == len(set(found)) for shape, found in steps)
        assert all(window in windows[shape] for shape, found in steps for window in found)


def test_epochs_and_seeds_differ_and_shapes_are_mixed() -> None:
    orders = {tuple(map(str, Schedule(*_windows(), seed).batch(step)[1])) for seed in range(3) for step in range(10)}
    assert len(orders) > 25
    kinds = [tuple(Schedule(*_windows(), seed).batch(step)[0] for step in range(5)) for seed in range(8)]
    assert len(set(kinds)) > 2


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    walked = Schedule(*_windows(), 3)
    steps = [walked.batch(k) for k in range(40)]
    assert Schedule(*_windows(), 3).batch(39) == steps[39]
    backwards = Schedule(*_windows(), 3)
    assert [backwards.batch(k) for k in reversed(range(40))] == steps[::-1]


def test_another_bucket_leaves_a_buckets_permutation_alone() -> None:
    windows, batch = _windows()
    small = min(windows)
    alone = Schedule({small: windows[small]}, batch, 3)
    both = Schedule(windows, batch, 3)
    mine = [found for step in range(5) for shape, found in [both.batch(step)] if shape == small]
    assert sorted(map(str, mine)) == sorted(str(alone.batch(step)[1]) for step in range(3))


def test_a_batch_larger_than_its_bucket_repeats_windows() -> None:
    windows, _ = _windows()
    large = max(windows)
    shape, found = Schedule({large: windows[large]}, {large: 9}, 0).batch(0)
    assert (shape, len(found), len(set(found))) == (large, 9, 4)


def test_stand_ins_follow_the_permutation() -> None:
    schedule = Schedule(*_windows(), 3)
    shape, order = schedule.candidates(0)
    assert set(islice(order, schedule.num_windows(shape))) == set(_windows()[0][shape])


def test_the_order_is_fixed_for_good() -> None:
    """A resumed run depends on it: a new NumPy or another machine must draw the order written down here."""
    windows, _ = _windows()
    small = min(windows)
    _, found = Schedule({small: windows[small]}, {small: 7}, 7).batch(1)
    assert [str(window.clip.path)[-1] for window in found] == list("2460153")
