"""The stages without pictures: exact static shares, colour, shake, motion, length, on real frames changed by known amounts.

pytest tests/curation/test_cheap.py
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import synthetic
from real_video import bikes

from vchitect_fast.curation.cheap import DisMotion, Length, Looks, Signature, Static
from vchitect_fast.curation.motion_rule import dynamic_degree
from vchitect_fast.curation.probe import probe
from vchitect_fast.curation.signals import Signals, scan
from vchitect_fast.curation.stage import ClipSpan, Sample, Scores, SignalStage


def sample_of(path: Path, first: int = 0, last: int | None = None, signals: Signals | None = None) -> Sample:
    source = probe(str(path))
    signals = scan(source) if signals is None else signals
    last = len(signals) - 1 if last is None else last
    end = float(signals.time[last + 1]) if last + 1 < len(signals) else float(signals.time[last]) + 1 / source.fps
    span = ClipSpan(
        "c", str(path), first, last, float(signals.time[first]), end, source.width, source.height, source.fps
    )
    return Sample(span, [], {}, signals[slice(first, last + 1)])


def scores(stage: SignalStage, sample: Sample) -> Scores:
    (found,) = stage.score([sample])
    assert set(found) == set(stage.columns)
    return found


@pytest.mark.parametrize("held", [(0,), (10, 10, 10), (5, 6, 7, 20, 30, 30), tuple(range(40))])
def test_the_static_share_of_frozen_video_is_exact(tmp_path: Path, held: tuple[int, ...]) -> None:
    """Frame k is shown once more for every k in `held`; without loss, and every other frame moves by over 0.9."""
    shot = synthetic.shots()["bikes1"][:40]
    frames = [frame for k, frame in enumerate(shot) for _ in range(1 + held.count(k))]
    sample = sample_of(synthetic.write(tmp_path / "v.mkv", frames, **synthetic.LOSSLESS))
    assert sample.signals is not None and np.unique(
        sample.signals.luma_change[1:][sample.signals.luma_change[1:] < 0.9]
    ).tolist() == [0]
    assert scores(Static(), sample)["share"] == len(held) / (39 + len(held))


def test_what_static_means_is_a_parameter_and_at_the_limit_a_frame_moves() -> None:
    sample = sample_of(synthetic.carphone("distorted"))
    assert sample.signals is not None
    change = sample.signals.luma_change[1:]
    assert scores(Static(), sample)["share"] == (change < 0.9).mean() == pytest.approx(0.437, abs=0.0005)
    limit = float(change[50])
    assert scores(Static(difference=limit), sample)["share"] == (change < limit).mean() < (change <= limit).mean()


def test_the_frame_before_the_clip_does_not_count(tmp_path: Path) -> None:
    shots = synthetic.shots()
    path = synthetic.write(tmp_path / "v.mkv", [shots["bikes1"][0], *[shots["bunny"][0]] * 10], **synthetic.LOSSLESS)
    assert scores(Static(), sample_of(path, 1))["share"] == 1.0
    assert scores(Static(), sample_of(path, 0))["share"] == 0.9
    assert scores(Static(), sample_of(path, 4, 4))["share"] == 1.0  # one frame


def test_length_is_that_of_the_span() -> None:
    assert scores(Length(), sample_of(synthetic.carphone(), 30, 59))["seconds"] == pytest.approx(30 * 1001 / 30000)


def test_a_desaturated_copy_is_monochrome(tmp_path: Path) -> None:
    for name in ("bikes1", "bunny", "carphone"):
        frames = synthetic.shots()[name][:20]
        grey = np.repeat(frames.mean(-1, keepdims=True).astype(np.uint8), 3, -1)
        pale = np.rint(frames * 0.1 + grey * 0.9).astype(np.uint8)
        plain, without = (
            sample_of(synthetic.write(tmp_path / f"{k}.mp4", list(f))) for k, f in enumerate((frames, grey))
        )
        assert not scores(Looks(), plain)["monochrome"] and scores(Looks(), without)["monochrome"]
        assert scores(Looks(), without)["saturation"] < 5 < 10 < scores(Looks(), plain)["saturation"]
        some = scores(Looks(), sample_of(synthetic.write(tmp_path / "pale.mp4", list(pale))))["saturation"]
        assert scores(Looks(), without)["saturation"] < some < scores(Looks(), plain)["saturation"]


def test_brightness_and_contrast_follow_a_known_change(tmp_path: Path) -> None:
    """Half the level and half the deviation, in lossless RGB; a half rounds by at most 0.5."""
    frames = synthetic.shots()["bunny"][:10]
    plain, half = (
        scores(
            Looks(),
            sample_of(synthetic.write(tmp_path / f"{k}.mkv", list(f), codec="ffv1", pix_fmt="bgr0", options={})),
        )
        for k, f in enumerate((frames, frames // 2))
    )
    for name in ("brightness", "contrast"):
        assert abs(half[name] - plain[name] / 2) <= 1.0  # halving, shrinking and grey round by up to half a level each


def test_a_jittered_copy_shakes(tmp_path: Path) -> None:
    """The same shot, cut out of larger frames at places that jump by up to 6 pixels at every sampled frame, or not at all."""
    frames = synthetic.decoded(bikes(), 320, 180)[80:130]
    jumps = np.random.default_rng(0).integers(0, 7, (len(frames), 2)).repeat(3, 0)[: len(frames)]
    still = [f[4:148, 4:260] for f in frames]
    jittered = [f[y : y + 144, x : x + 256] for f, (y, x) in zip(frames, jumps, strict=True)]
    a, b = (
        scores(Looks(), sample_of(synthetic.write(tmp_path / f"{k}.mp4", f))) for k, f in enumerate((still, jittered))
    )
    assert not a["shaky"] and b["shaky"]
    # From jump to jump the shift changes by the second difference of the places, at a scale of 128 / 144, and by what the
    # shot itself does: the triangle inequality bounds the mean of the sums.
    known = np.linalg.norm(np.diff(jumps[::3].astype(float), n=2, axis=0), axis=1).mean() * 128 / 144
    assert abs(b["shake"] - known) <= a["shake"]


def test_shake_is_null_where_there_is_nothing_to_compare() -> None:
    path = synthetic.carphone()
    signals = scan(probe(str(path)))
    assert scores(Looks(), sample_of(path, 0, 7, signals))["shake"] is None  # sampled: 0, 4
    assert scores(Looks(), sample_of(path, 0, 8, signals))["shake"] is not None


def test_motion_takes_pairs_inside_the_clip_only() -> None:
    path = bikes()  # 25 frames a second: sampled are 0, 3, 6, ...
    signals = scan(probe(str(path)))
    assert np.flatnonzero(~np.isnan(signals.flow)).tolist() == list(range(3, 250, 3))
    for first, last, pairs in [
        (0, 29, range(3, 30, 3)),
        (31, 74, range(36, 75, 3)),
        (33, 74, range(36, 75, 3)),
        (31, 35, []),
    ]:
        flow = signals.flow[list(pairs)] if pairs else np.zeros(0)
        found = scores(DisMotion(), sample_of(path, first, last, signals))
        assert found == dynamic_degree(flow, len(flow) + 1, 128) and found["num_pairs"] == len(list(pairs))


def test_a_held_picture_does_not_move_and_bikes_do(tmp_path: Path) -> None:
    held = sample_of(synthetic.write(tmp_path / "v.mkv", [synthetic.shots()["bikes1"][0]] * 30, **synthetic.LOSSLESS))
    assert scores(DisMotion(), held) == {"dynamic": False, "degree": 0.0, "flow": 0.0, "num_pairs": 9, "num_over": 0}
    assert scores(DisMotion(), sample_of(bikes(), 77, 135))["dynamic"]


def test_a_signature_has_half_its_bits_set_and_follows_the_picture() -> None:
    path = bikes()
    signals = scan(probe(str(path)))
    found = [scores(Signature(), sample_of(path, a, b, signals))["bits"] for a, b in ((0, 28), (31, 74), (77, 135))]
    bits = np.unpackbits(np.array([list(bytes.fromhex(text)) for text in found], np.uint8), axis=1)
    assert bits.shape == (3, 320)
    assert (bits.reshape(3, 5, 64).sum(2) <= 32).all() and bits.sum() >= 0.9 * 3 * 160
    assert all((a != b).sum() > 60 for a, b in itertools.combinations(bits, 2))
