"""Export: kept clips as files and a manifest; stopped anywhere it goes on and ends the same; failures are named.

Real video throughout (bikes.mp4). pytest tests/curation/test_export.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_video import bikes, bikes_clips

from vchitect_fast.curation import export as export_module
from vchitect_fast.curation.encoders import find_ffmpeg
from vchitect_fast.curation.export import export, key_of, run_export
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import read_manifest, read_rows, write_manifest
from vchitect_fast.video import read_video


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bikes.mp4 at 160x68, so that encoding takes little; the same frames at the same times."""
    target = tmp_path_factory.mktemp("small") / "small.mp4"
    command = [
        find_ffmpeg(),
        "-nostdin",
        "-v",
        "error",
        "-i",
        str(bikes()),
        "-vf",
        "scale=160:68",
        "-crf",
        "8",
        str(target),
    ]
    subprocess.run(command, check=True)
    return target


def curated(folder: Path, video: Path, **change: Any) -> Path:
    """A folder as `curate` leaves it: the six shots with scores, the third dropped."""
    rows = []
    for k, clip in enumerate(bikes_clips(video)):
        first = round(clip.start * 25)
        row = asdict(clip) | {
            "path": str(video),
            "width": 160,
            "height": 68,
            "clip": f"0a1b-{first}-{first + clip.num_frames - 1}",
        }
        row |= {"video": "0a1b", "first": first, "last": first + clip.num_frames - 1, "kept": k != 2}
        row |= {"dropped_by": "aesthetic" if k == 2 else None, "reason": "low" if k == 2 else None}
        row |= {"aesthetic.score": float("nan") if k == 0 else 1.5 * k, "text.words": ["a", "b"], "motion.flow": None}
        rows.append(row | change)
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(rows, folder / "clips.parquet")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its name, but for the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".export.lock"}  # fmt: skip


def test_clips_are_files_of_their_own_with_a_manifest(tmp_path: Path, small: Path) -> None:
    result = export(curated(tmp_path / "in", small), str(tmp_path / "out"))
    assert (result.num_clips, result.num_reused, result.num_exact, result.num_copied, result.failed) == (5, 0, 5, 0, [])
    rows = read_rows(tmp_path / "out" / "manifest.parquet")
    clips = read_manifest(tmp_path / "out" / "manifest.parquet")
    kept = [clip for k, clip in enumerate(bikes_clips()) if k != 2]
    source = read_video(small)[0].numpy().astype(np.float32)
    for row, clip, old in zip(rows, clips, kept, strict=True):
        first = round(old.start * 25)
        assert row["path"] == f"clips/0a1b-{first}-{first + old.num_frames - 1}.mp4"
        assert (clip.start, clip.num_frames, clip.caption) == (0.0, old.num_frames, old.caption)
        assert clip.end == pytest.approx(old.seconds)
        assert (row["source.path"], row["first"], row["video"]) == (str(small), first, "0a1b")
        assert row["source.start"] == pytest.approx(old.start)
        frames, fps = read_video(clip.path)
        assert (len(frames), round(fps, 9)) == (old.num_frames, 25.0)
        error = np.abs(frames.numpy() - source[first : first + old.num_frames]).mean()
        beside = first - 2 if first else 2
        assert error < np.abs(frames.numpy() - source[beside : beside + old.num_frames]).mean()
    assert [row["aesthetic.score"] for row in rows] == [None, 1.5, 4.5, 6.0, 7.5], "a NaN is a missing score"
    assert rows[0]["text.words"] == ["a", "b"]
    assert not {"kept", "dropped_by", "reason"} & rows[0].keys()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"clips", "manifest.parquet", ".export.lock"}


def test_a_second_export_cuts_nothing_and_a_damaged_file_is_cut_again(tmp_path: Path, small: Path) -> None:
    source, out = curated(tmp_path / "in", small), tmp_path / "out"
    export(source, str(out))
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in (out / "clips").iterdir()}
    assert export(source, str(out)).num_reused == 5
    assert {path: path.stat().st_mtime_ns for path in times} == times
    damaged = sorted(times)[0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert export(source, str(out)).num_reused == 4
    assert contents(out) == before, "the same bytes again"
    captioned = curated(tmp_path / "in", small, caption="new")
    assert export(captioned, str(out)).num_reused == 5, "a caption is no reason to cut again"
    assert {clip.caption for clip in read_manifest(out / "manifest.parquet")} == {"new"}
    result = export(source, str(out), encoder="libopenh264")
    assert (result.num_reused, result.encoder) == (0, "libopenh264"), "an encoder that is asked for is used"


# A process that kills itself (-9) at its n-th step: while an ffmpeg runs, and before and after each rename and removal.
KILLED = """
import os, subprocess, sys, time
from pathlib import Path
steps, count = int(sys.argv[1]), 0
def step():
    global count
    count += 1
    if count == steps: os.kill(os.getpid(), 9)
run, replace, unlink = subprocess.run, Path.replace, Path.unlink
def replace_(self, target): step(); replace(self, target); step()
def unlink_(self, missing_ok=False): step(); unlink(self, missing_ok)
def run_(command, **rest):
    if count or command[-1].endswith(".partial.mp4"):
        with subprocess.Popen(command, stdin=-3, stdout=-3, stderr=-3): time.sleep(0.01); step()
    return run(command, **rest)
subprocess.run, Path.replace, Path.unlink = run_, replace_, unlink_
from vchitect_fast.curation.export import run_export
sys.exit(run_export(sys.argv[2:]))
"""


@pytest.mark.parametrize("form", ["clips", "shards"])
def test_killed_anywhere_it_goes_on_and_ends_the_same(tmp_path: Path, small: Path, form: str) -> None:
    source = curated(tmp_path / "in", small)
    words = [str(source), "--form", form, "--jobs", "1", "--max-shard-clips", "2", "--encoder", "libx264", "--to"]
    assert run_export([*words, str(tmp_path / "straight")]) == 0
    want, out, states = contents(tmp_path / "straight"), tmp_path / "out", set()
    for steps in (1, 2, 3, 4, 9, 11, 12):
        command = [sys.executable, "-P", "-c", KILLED, str(steps), *words, str(out)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode == 0:
            break
        assert process.returncode == -9, process.stderr
        for name, content in contents(out).items():
            if ".partial" not in name and not name.startswith(".cut/"):
                assert content == want[name], name
        states.add(frozenset(contents(out)))
    assert len(states) > 3, "it was killed in different states"
    assert run_export([*words, str(out)]) == 0
    assert contents(out) == want


def test_what_cannot_be_cut_is_named_and_the_rest_exported(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = curated(tmp_path / "in", small)
    rows = read_rows(folder / "clips.parquet")
    shutil.copy(small, tmp_path / "half.mp4")
    os.truncate(tmp_path / "half.mp4", small.stat().st_size // 2)
    rows[0]["path"], rows[1]["path"], rows[3]["num_frames"] = "gone.mp4", str(tmp_path / "half.mp4"), 999
    write_manifest(rows, folder / "clips.parquet")
    assert run_export([str(folder), "--to", str(tmp_path / "out"), "--json"]) == 1
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    reasons = {item["clip"]: item["reason"] for item in summary["failed"]}
    assert summary["num_clips"] == 2
    assert "No such file" in reasons["0a1b-0-28"]
    assert "0a1b-31-74" in reasons
    assert reasons["0a1b-138-185"] == "it has 48 frames from 5.520 s to 7.440 s where its row says 999"
    assert captured.err.count("failed: clip ") == 3
    assert [row["clip"] for row in read_rows(tmp_path / "out" / "manifest.parquet")] == ["0a1b-188-240", "0a1b-243-249"]


def test_copies_say_what_is_missing(tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grouped = tmp_path / "grouped.mp4"
    options = ["-c:v", "libx264", "-g", "12", "-bf", "2", "-x264-params", "scenecut=0"]
    subprocess.run([find_ffmpeg(), "-nostdin", "-v", "error", "-i", str(small), *options, str(grouped)], check=True)
    assert run_export([str(curated(tmp_path / "in", grouped)), "--to", str(tmp_path / "out"), "--mode", "copy"]) == 0
    rows = read_rows(tmp_path / "out" / "manifest.parquet")
    modes = [row["export.mode"] for row in rows]
    assert modes == ["copy", "copy", "copy", "copy", "exact"]
    assert rows[4]["export.why"] == "no key frame within the clip"
    assert "cut exactly instead of copied: 1 clips, no key frame within the clip" in capsys.readouterr().out
    source = read_video(grouped)[0]
    for row in rows[:4]:
        frames = read_video(tmp_path / "out" / row["path"])[0]
        assert row["last"] - row["first"] + 1 == row["num_frames"] == len(frames)
        assert row["source.start"] == pytest.approx(row["first"] / 25)
        assert np.array_equal(frames, source[row["first"] : row["last"] + 1])
    result = export(tmp_path / "in", str(tmp_path / "out"), mode="copy")
    assert (result.num_reused, result.num_copied) == (5, 4)
    assert read_rows(tmp_path / "out" / "manifest.parquet") == rows


@pytest.mark.parametrize("form", ["clips", "shards"])
def test_a_url_takes_and_gives_the_same_files(tmp_path: Path, small: Path, form: str) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe("/videos/small.mp4", small.read_bytes())
    source = curated(tmp_path / "in", small, path="memory://videos/small.mp4")
    for _ in range(2):
        result = export(source, "memory://set/v1", form=form, encoder="libx264")
        assert result.failed == []
    assert result.num_reused == 5
    export(source, str(tmp_path / "out"), form=form, encoder="libx264")
    uploaded = {path.removeprefix("/set/v1/"): memory.cat(path) for path in memory.find("/set/v1")}
    assert uploaded == contents(tmp_path / "out")
    assert (
        export(curated(tmp_path / "in", small, path="memory://videos/none.mp4"), str(tmp_path / "o"))
        .failed[0]["reason"]
        .startswith("cannot fetch it")
    )


def test_a_manifest_without_ids_and_with_hostile_names_is_exported(tmp_path: Path, small: Path) -> None:
    video = tmp_path / "a:b -i %03d 'x';rm.mp4"
    shutil.copy(small, video)
    clips = bikes_clips(video)[3:]
    write_manifest(clips, tmp_path / "m.jsonl")
    assert export(tmp_path / "m.jsonl", str(tmp_path / "out")).num_clips == 3
    names = [Path(row["path"]).name for row in read_rows(tmp_path / "out" / "manifest.parquet")]
    assert len(set(names)) == 3
    assert all(name.removesuffix(".mp4").replace("-", "").replace("_", "").isalnum() for name in names)
    assert key_of("0a1b-3-5") == "0a1b-3-5"
    assert key_of("../../etc/passwd").startswith("_etc_passwd-")
    assert key_of("a.b") != key_of("a_b") != key_of("a/b") != key_of("a.b")


def test_what_makes_no_export_is_refused(tmp_path: Path, small: Path) -> None:
    folder, out = curated(tmp_path / "in", small), str(tmp_path / "out")
    with pytest.raises(UserError, match="keeps no clip"):
        export(curated(tmp_path / "none", small, kept=False), out)
    with pytest.raises(UserError, match="cannot read the manifest .*clips.parquet"):
        export(tmp_path / "absent", out)
    with pytest.raises(UserError, match="for the second time"):
        export(curated(tmp_path / "twice", small, clip="same"), out)
    with pytest.raises(UserError, match="must be above 0, got 0"):
        export(folder, out, jobs=0)
    with pytest.raises(UserError, match="unknown encoder 'h264'"):
        export(folder, out, encoder="h264")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        export(folder, str(tmp_path / "file"))
    with export_module.Destination(out).alone(), pytest.raises(UserError, match="another export writes to"):
        export(folder, out)
