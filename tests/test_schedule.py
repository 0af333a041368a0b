"""Schedule: step k is a pure function of (seed, step), whatever the number of ranks, and a mixture keeps to its weights.

pytest tests/test_schedule.py
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from vchitect_fast.buckets import Window
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import Clip
from vchitect_fast.schedule import Mixture, Schedule
from vchitect_fast.shapes import VideoShape

CLIP = Clip(Path("a.mp4"), 1.0, 5.0, 100, 640, 272, 25.0, "")
SMALL, LARGE, IMAGE = VideoShape(8, 640, 272), VideoShape(16, 640, 272), VideoShape(1, 640, 272)


def windows_of(shape: VideoShape, count: int) -> list[Window]:
    return [Window(replace(CLIP, path=Path(f"{shape}-{k}")), 0, 0.0, shape.num_frames) for k in range(count)]


def _windows() -> tuple[dict[VideoShape, list[Window]], dict[VideoShape, int]]:
    return {SMALL: windows_of(SMALL, 7), LARGE: windows_of(LARGE, 4)}, {SMALL: 3, LARGE: 2}


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


@pytest.mark.parametrize("num_dp", [1, 2, 3, 6])
@pytest.mark.parametrize("count", [1, 5, 6, 7, 12, 18, 29])
def test_ranks_share_a_step_as_one_process_sees_it(num_dp: int, count: int) -> None:
    """Six samples a step in all, each with the same stand-ins on any number of ranks, among which every window is once."""
    windows = {LARGE: windows_of(LARGE, count)}
    alone = Schedule(windows, {LARGE: 6}, 3)
    shared = Schedule(windows, {LARGE: 6 // num_dp}, 3, num_dp=num_dp)
    assert shared.steps_per_epoch == alone.steps_per_epoch == math.ceil(count / 6)
    for step in range(2 * alone.steps_per_epoch):
        ranks = [shared.candidates(step, rank) for rank in range(num_dp)]
        assert {shape for shape, _ in ranks} == {LARGE}
        parts = [list(samples) for _, found in ranks for samples in found]
        assert parts == [list(samples) for samples in alone.candidates(step)[1]]
        assert all(sorted(map(str, part)) == sorted(map(str, windows[LARGE])) for part in parts)
        assert [part[0] for part in parts] == [w for rank in range(num_dp) for w in shared.batch(step, rank)[1]]


def test_no_two_samples_of_a_step_come_to_the_same_stand_in() -> None:
    windows = windows_of(LARGE, 29)
    _, order = Schedule({LARGE: windows}, {LARGE: 29}, 3).batch(0)  # the permutation of epoch 0
    schedule = Schedule({LARGE: windows}, {LARGE: 2}, 3, num_dp=3)
    seen = set()
    for step in range(5):
        samples = [list(found) for rank in range(3) for found in schedule.candidates(step, rank)[1]]
        first = order.index(samples[0][0])
        seen.add(first)
        for k, found in enumerate(samples):
            own = [order[(first + j) % 29] for j in range(k, 29, 6)]
            assert found[: len(own)] == own
        assert len({window for found in samples for window in found[:4]}) == 4 * 6
    assert seen == {0, 6, 12, 18, 24}


def test_the_order_is_fixed_for_good() -> None:
    """A resumed run depends on it: a new NumPy or another machine must draw the order written down here."""
    windows, _ = _windows()
    small = min(windows)
    _, found = Schedule({small: windows[small]}, {small: 7}, 7).batch(1)
    assert [str(window.clip.path)[-1] for window in found] == list("2460153")


# --- mixtures

MIXTURES = [
    {SMALL: 1.0, LARGE: 1.0}, {SMALL: 0.7, LARGE: 0.3}, {IMAGE: 0.05, SMALL: 0.9, LARGE: 0.05}, {SMALL: 3, LARGE: 2, IMAGE: 2},
    {VideoShape(k, 64, 64): 1 / k for k in (1, 2, 4, 5, 8)}, {VideoShape(k, 64, 64): k for k in range(1, 14)}, {SMALL: 0.001, LARGE: 0.999},
]  # fmt: skip


@pytest.mark.parametrize("weights", MIXTURES, ids=lambda weights: ":".join(f"{w:g}" for w in weights.values()))
@pytest.mark.parametrize("seed", [0, 7])
def test_after_any_step_each_shape_had_its_share_to_within_one_step(
    weights: dict[VideoShape, float], seed: int
) -> None:
    mixture, total = Mixture(weights, list(weights), seed), sum(weights.values())
    again = Mixture(weights, list(weights), seed)
    counts: Counter[VideoShape] = Counter()
    for step in range(3000):
        shape, number = mixture.at(step)
        assert number == counts[shape], "which step of its shape it is"
        assert mixture.step_of(shape, number) == step
        counts[shape] += 1
        for each, weight in weights.items():
            assert abs(counts[each] - (step + 1) * weight / total) < 1
    assert again.at(2999) == mixture.at(2999), "a step does not depend on the steps before"


def test_seeds_begin_a_mixture_with_different_shapes() -> None:
    weights = {VideoShape(k, 64, 64): 1.0 for k in (1, 2, 3, 4)}
    orders = {tuple(Mixture(weights, list(weights), seed).at(step)[0] for step in range(4)) for seed in range(20)}
    assert len(orders) > 5
    assert all(len(set(order)) == 4 for order in orders)


def test_a_mixed_schedule_takes_its_shapes_from_the_mixture_and_every_window_in_turn() -> None:
    windows, batch = _windows()
    weights = {SMALL: 1, LARGE: 4}
    schedule, mixture = Schedule(windows, batch, 5, weights=weights), Mixture(weights, [SMALL, LARGE], 5)
    steps = [schedule.batch(step) for step in range(60)]
    assert [shape for shape, _ in steps] == [mixture.at(step)[0] for step in range(60)]
    for shape, num_steps in ((SMALL, 3), (LARGE, 2)):
        mine = [found for which, found in steps if which == shape]
        for epoch in range(len(mine) // num_steps):
            of_epoch = mine[epoch * num_steps : (epoch + 1) * num_steps]
            assert {window for found in of_epoch for window in found} == set(windows[shape])
    assert Schedule(windows, batch, 5, weights=weights).batch(59) == steps[59]
    whole = {window for found in windows.values() for window in found}
    for num_steps in (schedule.steps_per_epoch - 1, schedule.steps_per_epoch):
        seen = {window for _, found in steps[:num_steps] for window in found}
        assert (seen == whole) == (num_steps == schedule.steps_per_epoch)


def test_ranks_agree_on_the_shape_of_every_step_of_a_mixture() -> None:
    windows, batch = _windows()
    schedule = Schedule(windows, batch, 5, num_dp=3, weights={SMALL: 0.3, LARGE: 0.7})
    for step in range(30):
        shapes = {schedule.candidates(step, rank)[0] for rank in range(3)}
        assert len(shapes) == 1


def test_a_shape_of_weight_0_is_left_out() -> None:
    windows, batch = _windows()
    schedule = Schedule(windows | {IMAGE: []}, batch, 5, weights={SMALL: 2, LARGE: 0, IMAGE: 0})
    assert {schedule.batch(step)[0] for step in range(20)} == {SMALL}


@pytest.mark.parametrize(
    ("weights", "fragment"),
    [
        ({SMALL: -1.0, LARGE: 1.0}, "must be a number from 0 up, got -1.0 for 8x640x272"),
        ({SMALL: math.nan, LARGE: 1.0}, "must be a number from 0 up, got nan"),
        ({SMALL: math.inf, LARGE: 1.0}, "must be a number from 0 up, got inf"),
        ({SMALL: 0.0, LARGE: 0.0}, "needs a weight above 0, got none"),
        ({SMALL: math.pi, LARGE: 1.0}, "round them to three digits"),
        ({SMALL: 1.0, IMAGE: 0.5}, "gives 1x640x272 the weight 0.5 and no clip fits it"),
    ],
)
def test_weights_of_no_use_are_refused(weights: dict[VideoShape, float], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        Schedule(*_windows(), 5, weights=weights)


def test_no_window_and_a_negative_seed_are_refused() -> None:
    with pytest.raises(UserError, match=r"no bucket has a window.*16x640x272: 0"):
        Schedule({LARGE: []}, {}, 0)
    with pytest.raises(UserError, match="seed must be 0 or more"):
        Schedule(*_windows(), -1)


def test_the_order_of_a_mixture_is_fixed_for_good() -> None:
    """A resumed run depends on it, as on the order of windows."""
    mixture = Mixture({SMALL: 5, LARGE: 3, IMAGE: 1}, [SMALL, LARGE, IMAGE], 7)
    assert (
        "".join({SMALL: "s", LARGE: "l", IMAGE: "i"}[mixture.at(step)[0]] for step in range(18)) == "slslssilsslslssils"
    )
