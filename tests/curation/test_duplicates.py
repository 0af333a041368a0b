"""Near-duplicates: recoded, scaled, brighter and turned copies of real shots are found, the largest stays, nothing else falls.

pytest tests/curation/test_duplicates.py
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import synthetic
from real_video import BIKES_CUTS, bikes

from vchitect_fast.curation.cheap import Signature
from vchitect_fast.curation.duplicates import MAX_BITS, duplicates
from vchitect_fast.curation.probe import probe
from vchitect_fast.curation.shots import ShotSettings, find_shots
from vchitect_fast.curation.signals import scan
from vchitect_fast.curation.stage import ClipSpan, Sample

Clip = tuple[ClipSpan, str]


@lru_cache
def clips_of(path: Path, prefix: str) -> list[Clip]:
    """Every shot of a file over half a second as a clip with its signature."""
    source = probe(str(path))
    signals = scan(source)
    found = []
    for shot in find_shots(signals, source.fps, ShotSettings()):
        if shot.seconds < 0.5:
            continue
        span = ClipSpan(f"{prefix}-{shot.first}", str(path), shot.first, shot.last, shot.start, shot.end,
                        source.width, source.height, source.fps)  # fmt: skip
        sample = Sample(span, [], {}, signals[slice(shot.first, shot.last + 1)])
        found.append((span, str(Signature().score([sample])[0]["bits"])))
    return found


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Clip]]:
    folder = tmp_path_factory.mktemp("copies")
    changes = {
        "poor": ("-crf", "36"),
        "small": ("-crf", "23", "-vf", "scale=320:136"),
        "bright": ("-crf", "23", "-vf", "eq=brightness=0.08:contrast=1.1"),
        "turned": ("-crf", "23", "-vf", "transpose=clock"),
    }
    found = {"original": clips_of(bikes(), "original")}
    for name, change in changes.items():
        path = folder / f"{name}.mp4"
        synthetic.ffmpeg("-i", bikes(), "-c:v", "libx264", "-preset", "ultrafast", *change, path)
        if name == "turned":  # its pixels lie on their side, and the file says how to show them
            synthetic.ffmpeg("-display_rotation", "90", "-i", path, "-c", "copy", folder / "shown.mp4")
            path = folder / "shown.mp4"
        found[name] = clips_of(path, name)
    return found


@pytest.mark.parametrize("name", ["poor", "small", "bright", "turned"])
def test_a_changed_copy_is_found_and_the_larger_picture_stays(copies: dict[str, list[Clip]], name: str) -> None:
    assert [span.first for span, _ in copies[name]] == [span.first for span, _ in copies["original"]]
    found = duplicates([*copies[name], *copies["original"]])
    pairs = zip(copies[name], copies["original"], strict=True)
    if name == "small":
        assert found == {small.id: large.id for (small, _), (large, _) in pairs}
    else:  # the same size and length: the id that sorts first
        assert found == {max(a.id, b.id): min(a.id, b.id) for (a, _), (b, _) in pairs}


def test_different_shots_are_no_duplicates(copies: dict[str, list[Clip]]) -> None:
    others = [clip for path in (synthetic.bunny(), synthetic.carphone()) for clip in clips_of(path, path.stem)]
    assert len(others) == 2 and len(copies["original"]) == len(BIKES_CUTS)
    assert duplicates([*copies["original"], *others]) == {}


def test_the_answer_does_not_depend_on_the_order(copies: dict[str, list[Clip]]) -> None:
    clips = [clip for several in copies.values() for clip in several]
    expected = duplicates(clips)
    assert len(expected) == 4 * len(copies["original"])
    assert all(kept not in expected for kept in expected.values())  # nobody is kept in place of one that fell
    generator = random.Random(0)
    for _ in range(5):
        generator.shuffle(clips)
        assert duplicates(clips) == expected


def test_a_part_is_no_duplicate_of_the_whole(copies: dict[str, list[Clip]]) -> None:
    span, bits = copies["original"][2]
    for seconds, alike in [(span.seconds / 1.19, True), (span.seconds / 1.21, False)]:
        part = ClipSpan("part", "", 0, span.num_frames - 20, 0.0, seconds, 640, 272, 25.0)
        assert (duplicates([(span, bits), (part, bits)]) == {"part": span.id}) is alike


def test_black_clips_are_nobodys_duplicate(tmp_path: Path) -> None:
    black = [np.full((144, 256, 3), level, np.uint8) for level in (0, 255) for _ in range(60)]
    path = synthetic.write(tmp_path / "black.mp4", black)
    clips = clips_of(path, "a") + clips_of(path, "b")
    assert len(clips) == 4 and len({bits for _, bits in clips}) < 4  # equal bits, and nothing in them
    assert duplicates(clips) == {}


def flipped(bits: str, places: list[int]) -> str:
    content = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))
    content[places] ^= 1
    return np.packbits(content).tobytes().hex()


def test_the_limit_is_exact_and_likeness_is_not_handed_on(copies: dict[str, list[Clip]]) -> None:
    """a ~ b and b ~ c need not make a ~ c: each is compared with clips that stay, so here c stays beside a and b falls."""
    span, bits = copies["original"][0]
    places = list(range(0, 2 * MAX_BITS))
    at, over = flipped(bits, places[:MAX_BITS]), flipped(bits, places[: MAX_BITS + 1])
    a, b, c = (ClipSpan(name, "", 0, 28, span.start, span.end, 640, 272, 25.0) for name in "abc")
    assert duplicates([(a, bits), (b, at)]) == {"b": "a"}
    assert duplicates([(a, bits), (b, over)]) == {}
    far = flipped(at, places[MAX_BITS:])
    assert duplicates([(b, at), (c, far)]) == {"c": "b"}
    assert duplicates([(a, bits), (b, at), (c, far)]) == {"b": "a"}
