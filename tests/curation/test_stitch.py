"""Event stitching: a false cut is joined again, real cuts are not; long clips are cut without a frame lost or doubled.

pytest tests/curation/test_stitch.py
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import synthetic
from real_video import bikes, remux

from vchitect_fast.curation.probe import Source, probe
from vchitect_fast.curation.shots import Shot, ShotSettings, find_shots
from vchitect_fast.curation.signals import Signals, scan
from vchitect_fast.curation.stitch import Event, StitchSettings, cut_long, embedding_of, spans_of, stitch
from vchitect_fast.errors import UserError


@lru_cache
def scanned(path: Path) -> tuple[Source, Signals]:
    source = probe(str(path))
    return source, scan(source)


def events_of(path: Path, shots: list[Shot] | None = None, settings: StitchSettings | None = None) -> list[Event]:
    source, signals = scanned(path)
    settings = settings or StitchSettings()
    shots = find_shots(signals, source.fps, ShotSettings()) if shots is None else shots
    return stitch(shots, *embedding_of(source, signals, settings), settings)


def test_the_five_cuts_of_bikes_stay() -> None:
    events = events_of(bikes())
    assert [e.num_shots for e in events] == [1] * 6
    assert events[0].similarity is None
    assert all(e.similarity is not None and -1 <= e.similarity <= 0.6 for e in events[1:])


@pytest.mark.parametrize("name", ["bikes1", "bikes3", "bunny", "carphone"])
def test_a_flash_within_a_shot_is_joined_again(tmp_path: Path, name: str) -> None:
    shot = list(synthetic.moving(synthetic.shots()[name], 60))
    frames = [*shot[:30], *[np.full_like(shot[0], 255)] * 2, *shot[30:]]
    source, signals = scanned(synthetic.write(tmp_path / "v.mp4", frames))
    assert len(find_shots(signals, source.fps, ShotSettings())) == 2  # the flash cuts
    (event,) = events_of(tmp_path / "v.mp4")
    assert (event.shot.first, event.shot.last, event.num_shots) == (0, 61, 2)
    assert (event.shot.start, event.shot.end) == (0.0, pytest.approx(62 / 25))


@pytest.mark.parametrize("name", ["bikes0", "bikes1", "bikes2", "bikes3", "bikes4", "bunny", "carphone"])
def test_frames_cut_out_of_a_shot_leave_one_event(tmp_path: Path, name: str) -> None:
    """Three frames are missing and the cut is known: whether or not the detector sees it, stitching must join it."""
    shot = synthetic.shots()[name]
    half = len(shot) // 2
    path = synthetic.write(tmp_path / "v.mp4", [*shot[:half], *shot[half + 3 :]])
    source, signals = scanned(path)
    end = float(signals.time[-1]) + 1 / source.fps
    shots = [Shot(0, half - 2, 0.0, float(signals.time[half - 1])),
             Shot(half + 1, len(signals) - 1, float(signals.time[half + 1]), end)]  # fmt: skip
    assert [e.num_shots for e in events_of(path, shots)] == [2]


def test_cuts_between_all_pairs_of_real_shots_stay(tmp_path: Path) -> None:
    edit, shots = synthetic.Edit(), list(synthetic.shots().values())
    for number, shot in enumerate(synthetic.tour()):
        edit.cut_to(list(synthetic.moving(shots[shot], 20, number)))
    events = events_of(synthetic.write(tmp_path / "v.mp4", edit.frames))
    assert len(events) == 43


def test_the_threshold_decides_and_none_joins_nothing() -> None:
    shots = [Shot(0, 9, 0.0, 1.0), Shot(12, 19, 1.2, 2.0), Shot(20, 22, 2.0, 2.3)]
    asked: list[tuple[int, int]] = []

    def embed(first: int, last: int) -> np.ndarray:
        asked.append((first, last))
        return np.array([1.0, 0.0]) if last < 20 else np.array([0.6, 0.8])

    events = stitch(shots, embed, 8, StitchSettings())
    assert asked == [(2, 9), (12, 19), (12, 19), (20, 22)]  # the last 8 and the first 8, or what there is
    assert events == [Event(Shot(0, 19, 0.0, 2.0), 2, None), Event(Shot(20, 22, 2.0, 2.3), 1, pytest.approx(0.6))]
    (joined,) = stitch(shots, embed, 8, StitchSettings(similarity=0.59))
    assert joined == Event(Shot(0, 22, 0.0, 2.3), 3, None)
    assert len(stitch(shots, None, 0, StitchSettings(backend="none"))) == 3
    source, signals = scanned(bikes())
    assert embedding_of(source, signals, StitchSettings(backend="none")) == (None, 0)


@pytest.mark.parametrize("max_seconds", [0.01, 0.04, 0.3, 1.0, 1.18, 2.36, 60.0])
def test_long_events_are_cut_into_an_exact_partition(max_seconds: float) -> None:
    _, signals = scanned(bikes())
    events = events_of(bikes())
    parts = cut_long(events, signals.time, max_seconds)
    frames = [k for part in parts for k in range(part.shot.first, part.shot.last + 1)]
    assert frames == [k for e in events for k in range(e.shot.first, e.shot.last + 1)]
    for part in parts:
        assert part.shot.num_frames >= 1
        assert part.shot.seconds <= max_seconds + 1e-9 or part.shot.num_frames == 1
        assert part.shot.start == signals.time[part.shot.first]
    for a, b in itertools.pairwise(parts):
        assert a.shot.end <= b.shot.start
        assert a.shot.end == b.shot.start or a.shot.last + 1 < b.shot.first
    for event in events:
        lengths = [p.shot.num_frames for p in parts if event.shot.first <= p.shot.first <= event.shot.last]
        assert max(lengths) - min(lengths) <= 1
        needed = max(1, int(np.ceil(event.shot.seconds / max_seconds - 1e-9)))
        assert (
            min(needed, event.shot.num_frames) <= len(lengths) <= needed + 1
        )  # one more where whole frames do not fit


def test_clips_have_ids_of_their_bytes_and_frames(tmp_path: Path) -> None:
    source, _ = scanned(bikes())
    copy = tmp_path / "another name.mp4"
    copy.write_bytes(bikes().read_bytes())
    ids = [span.id for span in spans_of(source, events_of(bikes()))]
    assert ids == [span.id for span in spans_of(scanned(copy)[0], events_of(copy))]
    assert len(set(ids)) == 6 and ids[1] == f"{source.video}-31-74"
    other = remux(bikes(), tmp_path / "v.mkv")
    assert not set(ids) & {span.id for span in spans_of(scanned(other)[0], events_of(other))}
    span = spans_of(source, events_of(bikes()))[1]
    assert (span.path, span.num_frames, span.width, span.height, span.fps) == (str(bikes()), 44, 640, 272, 25.0)
    assert span.seconds == pytest.approx(44 / 25)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend": "vcilp"}, "stitch.backend.*viclip"),
        ({"backend": "clip"}, "stitch.backend=clip needs stitch.weights"),
        ({"max_seconds": 0.0}, "stitch.max_seconds must be above 0"),
        ({"max_seconds": float("nan")}, "stitch.max_seconds must be above 0"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StitchSettings(**values)  # type: ignore[arg-type]
