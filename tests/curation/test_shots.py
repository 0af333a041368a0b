"""Shots: the cuts of a real video to the frame, exact frame counts, and the curate command with its refusals.

bikes.mp4 cuts at frames 30, 76, 137, 187 and 242: seen by eye on a contact sheet, and the five largest differences of
neighbouring frames. pytest tests/curation/test_shots.py
"""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_video import BIKES_CUTS, bikes, bikes_clips, remux, truncate

from vchitect_fast.cli import main
from vchitect_fast.curation.command import curate
from vchitect_fast.curation.shots import Shot, find_shots, probe, shots_between
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import read_manifest, read_rows, write_manifest
from vchitect_fast.video import read_video


def test_the_known_cuts_are_the_largest_differences() -> None:
    frames = read_video(bikes())[0].numpy().astype(np.int16)
    change = np.abs(frames[1:, ::4, ::4] - frames[:-1, ::4, ::4]).mean((1, 2, 3))
    assert sorted(int(k) + 1 for k in np.argsort(change)[-5:]) == list(BIKES_CUTS)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_bikes_has_six_shots_trimmed_at_the_cuts(tmp_path: Path, suffix: str) -> None:
    path = bikes() if suffix == ".mp4" else remux(bikes(), tmp_path / f"bikes{suffix}")
    source = probe(path)
    assert (source.width, source.height, source.fps) == (640, 272, 25.0)
    calls: list[int] = []
    shots = find_shots(source, lambda: calls.append(1))
    assert [(s.first, s.last) for s in shots] == [(0, 28), (31, 74), (77, 135), (138, 185), (188, 240), (243, 249)]
    assert [s.num_frames for s in shots] == [29, 44, 59, 48, 53, 7]
    # Milliseconds are all that a Matroska file keeps.
    assert [round(s.start * 25, 1) for s in shots] == [s.first for s in shots]
    assert [round(s.end * 25, 1) for s in shots] == [s.last + 1 for s in shots]
    assert len(calls) == 250


@pytest.mark.parametrize(
    ("cuts", "expected"),
    [
        ([], [Shot(0, 9, 0.0, 1.0)]),
        ([0.5], [Shot(0, 3, 0.0, 0.4), Shot(6, 9, 0.6, 1.0)]),
        ([0.4999, 0.7001], [Shot(0, 3, 0.0, 0.4), Shot(8, 9, 0.8, 1.0)]),  # two frames between cuts: nothing is left
        ([0.1], [Shot(2, 9, 0.2, 1.0)]),
    ],
)
def test_shots_lie_between_cuts_without_their_neighbours(cuts: list[float], expected: list[Shot]) -> None:
    assert shots_between([k / 10 for k in range(10)], cuts, 10.0) == expected


def test_curate_writes_what_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.parquet"
    assert (
        main(["curate", str(bikes()), "--out", str(out), "--min-seconds", "0.2", "--caption", "bikes in a city"]) == 0
    )
    clips = read_manifest(out)
    expected = bikes_clips()
    assert [(c.path, c.num_frames, c.width, c.height, c.fps) for c in clips] == [
        (c.path.resolve(), c.num_frames, c.width, c.height, c.fps) for c in expected
    ]
    assert [(c.start, c.end) for c in clips] == [pytest.approx((c.start, c.end)) for c in expected]
    assert {c.caption for c in clips} == {"bikes in a city"}
    printed = capsys.readouterr().out
    assert "6 clips of 6 shots" in printed
    assert "captions are empty" not in printed


def test_short_shots_are_dropped_and_the_table_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", str(bikes()), "--out", str(tmp_path / "m.jsonl")]) == 0
    assert len(read_manifest(tmp_path / "m.jsonl")) == 5
    printed = " ".join(capsys.readouterr().out.split())
    assert "dropped" in printed
    assert "5 clips of 6 shots" in printed
    assert "captions are empty" in printed


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all\n", ["all"] * 6), ("\n".join("abcdef") + "\n", list("abcdef")), ("a\n\nc\nd\ne\nf", ["a", "", *"cdef"])],
)
def test_captions_come_from_the_file_beside_the_video(tmp_path: Path, text: str, expected: list[str]) -> None:
    video = tmp_path / "ride.mp4"
    video.write_bytes(bikes().read_bytes())
    video.with_suffix(".txt").write_text(text)
    found = curate([video], tmp_path / "m.jsonl", caption="not this", min_seconds=0)
    assert [item.clip.caption for item in found] == expected
    assert [row["path"] for row in read_rows(tmp_path / "m.jsonl")] == ["ride.mp4"] * 6


def bad_video(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a video")
    elif kind == "truncated":
        truncate(bikes(), path, 0.4)
    elif kind == "truncated_indexed":
        truncate(remux(bikes(), folder / "whole.mp4", movflags="faststart"), path, 0.4)
    elif kind == "truncated_mkv":
        path = truncate(remux(bikes(), folder / "whole.mkv"), folder / "cut.mkv", 0.4)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "cannot read the video .*No such file"),
        ("empty", "cannot read the video .*Invalid data"),
        ("text", "cannot read the video"),
        ("truncated", "cannot read the video .*Invalid data"),
        ("truncated_indexed", r"must hold 250 frames and 10.0 s .* got \d\d frames .*truncated"),
        ("truncated_mkv", r"must hold . frames and 10.0 s .* got \d\d frames .*truncated"),
    ],
)
def test_a_bad_video_is_a_user_error_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, message: str
) -> None:
    path = bad_video(tmp_path, kind)
    with pytest.raises(UserError, match=message):
        curate([bikes(), path], tmp_path / "m.jsonl")
    assert main(["curate", str(path), "--out", str(tmp_path / "m.jsonl")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "m.jsonl").exists()


def test_damage_in_the_middle_is_found(tmp_path: Path) -> None:
    content = bytearray(bikes().read_bytes())
    content[100_000:400_000] = bytes(300_000)
    (tmp_path / "holes.mp4").write_bytes(content)
    with pytest.raises(UserError, match="must decode to about 250 frames, got .*damaged"):
        find_shots(probe(tmp_path / "holes.mp4"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-seconds", "9"], "no shot of 6 lasts 9 s, the longest has 2.36 s"),
        (["--min-seconds", "-1"], "--min-seconds must be 0 or more"),
        (["--out", "m.txt"], "a manifest ends in"),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["curate", str(bikes()), "--out", "m.jsonl", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_caption_file_of_another_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(bikes().read_bytes())
    (tmp_path / "v.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"v.txt must have 1 line or 6, .* got 2"):
        curate([tmp_path / "v.mp4"], tmp_path / "m.jsonl")


def test_a_manifest_with_captions_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "m.jsonl"
    curate([bikes()], out)
    curate([bikes()], out, min_seconds=2)  # nothing was written by hand: replaced
    rows = read_rows(out)
    assert len(rows) == 2
    rows[0]["caption"] = "written by hand"
    write_manifest(rows, out)
    before = out.read_bytes()
    with pytest.raises(UserError, match="exists with other clips, captions or scores"):
        curate([bikes()], out, min_seconds=2)
    assert out.read_bytes() == before


def test_without_scenedetect_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "scenedetect":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs PySceneDetect .*vchitect-fast\[curation\]"):
        curate([bikes()], tmp_path / "m.jsonl")
