"""What goes wrong outside: kills, damaged and hostile files, a stage that dies, a full disk. The run completes, nothing is lost.

The long variants (20 kills, 200 flipped files) are in tests/test_soak.py. pytest tests/curation/test_faults.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curated import CHEAP, carphone, clips, copy, curate, quarantine
from damaged import decodes_cleanly, first_frames, flipped, lying_headers, no_videos
from killed import kill_many
from made_up_stage import MadeUp, MadeUpReader, judged
from real_video import bikes, truncate

from vchitect_fast.cli import main
from vchitect_fast.curation.engines import ATTEMPTS, Outcome
from vchitect_fast.curation.engines.local import WORKER_BYTES, LocalEngine
from vchitect_fast.curation.frames import BadVideo
from vchitect_fast.curation.inputs import find_videos
from vchitect_fast.curation.probe import probe
from vchitect_fast.curation.shots import Shot
from vchitect_fast.curation.signals import scan
from vchitect_fast.curation.stitch import Event, cut_long
from vchitect_fast.curation.store import Store, read_table


def peak_bytes(process: int) -> int:
    """Most memory that a process ever held; 0 for one that has died."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


class Watched(LocalEngine):
    """Remembers how much memory a worker took at most."""

    peak_bytes = 0

    def run(self, *arguments: Any, **more: Any) -> Iterator[Outcome]:
        for outcome in super().run(*arguments, **more):
            for worker in self._workers:
                self.peak_bytes = max(self.peak_bytes, peak_bytes(worker.process.pid))
            yield outcome


@pytest.fixture(scope="module")
def workers() -> Iterator[Watched]:
    engine = Watched(2)
    yield engine
    engine.close()


# Kills ---------------------------------------------------------------------------------------------------------------


def test_kills_of_drivers_and_workers_leave_no_trace(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    short = first_frames(carphone(), tmp_path / "short.mp4", 48)
    for number in range(3):
        copy(short, videos / f"{number}.mp4", number)
    copy(bikes(), videos / "bikes.mp4", 0)
    kill_many(videos, tmp_path, num_driver=3, num_worker=3, seed=0, most=3)


# Files ---------------------------------------------------------------------------------------------------------------


def fates(out: Path, paths: list[Path]) -> tuple[dict[str, str], dict[str, int]]:
    """(name -> reason of what is in quarantine, name -> last frame of the last clip of what is curated); each is one of them."""
    bad = {Path(row["path"]).name: row for row in quarantine(out)}
    copies = {Path(row["path"]).name: json.loads(row["copies"]) for row in read_table(out / "sources.parquet")}
    good: dict[str, int] = {}
    for row in clips(out):
        good[Path(row["path"]).name] = max(good.get(Path(row["path"]).name, 0), row["last"])
    named = [*bad, *good, *(Path(path).name for several in copies.values() for path in several)]
    assert sorted(named) == sorted(path.name for path in paths)
    for row in bad.values():
        assert row["reason"]
        assert row["reason"].isprintable()
        assert row["attempts"] == 1, "trying again is no use"
    return {name: row["reason"] for name, row in bad.items()}, good


def test_flipped_bytes_end_in_quarantine_or_in_clips_that_decode(tmp_path: Path, workers: Watched) -> None:
    """Each of 40 files is named with a reason, or every frame of its clips decodes in a decoder that complains."""
    (tmp_path / "videos").mkdir()
    short = first_frames(carphone(), tmp_path / "short.mp4", 24)
    paths = [flipped(short, tmp_path / "videos" / f"{seed}.mp4", seed) for seed in range(40)]
    curate(tmp_path / "out", paths, overrides=("text=off", *CHEAP[2:], "signature=off"), engine=workers)
    bad, good = fates(tmp_path / "out", paths)
    assert len(bad) >= 10, "the damage must be felt"
    assert len(good) >= 1
    for name, last in good.items():
        assert decodes_cleanly(tmp_path / "videos" / name, last + 1), name
    assert workers.peak_bytes < WORKER_BYTES


def test_damage_that_a_decoder_paints_over_is_seen_every_time(tmp_path: Path) -> None:
    """1000 bytes of bikes.mp4: one frame is painted over. FFmpeg's frame threads report it in half of the runs."""
    content = bytearray(bikes().read_bytes())
    for at in range(200_000, 201_000):
        content[at] ^= 85
    (tmp_path / "painted.mp4").write_bytes(content)
    assert not decodes_cleanly(tmp_path / "painted.mp4", 250)
    source = probe(str(tmp_path / "painted.mp4"))
    for _ in range(10):
        with pytest.raises(BadVideo, match=r"the frame at 3\.880 s is corrupt"):
            scan(source)


def test_truncated_files_are_named(tmp_path: Path, workers: Watched) -> None:
    paths = [truncate(bikes(), tmp_path / f"{percent}.mp4", percent / 100) for percent in (1, 10, 50, 90, 99)]
    paths.append(copy(carphone(), tmp_path / "whole.mp4", 0))
    curate(tmp_path / "out", paths, engine=workers)
    bad, good = fates(tmp_path / "out", paths)
    assert good == {"whole.mp4": 119}
    assert all("truncated" in reason or "Invalid data" in reason for reason in bad.values()), bad


def test_headers_that_lie_and_names_that_are_no_video(tmp_path: Path, workers: Watched) -> None:
    """None waits for ever, none takes more than a worker's memory, each is named."""
    (tmp_path / "videos").mkdir()
    expected = lying_headers(tmp_path / "videos") | no_videos(tmp_path / "videos")
    paths = [Path(path) for path in find_videos([str(tmp_path / "videos")])]
    assert {path.name for path in paths} == expected.keys()
    curate(tmp_path / "out", paths, engine=workers)
    bad, good = fates(tmp_path / "out", paths)
    assert good.keys() == {name for name, reason in expected.items() if not reason}
    for name, reason in bad.items():
        assert expected[name] in reason, name
    assert workers.peak_bytes < WORKER_BYTES


def test_a_frame_shown_for_minutes_among_many_is_cut_at_once() -> None:
    """As a slideshow that turns into a video: the parts are few, and finding them takes no longer than looking."""
    times = np.arange(100_000) / 25
    times[50_000:] += 600
    (event,) = [Event(Shot(0, 99_999, 0.0, float(times[-1]) + 0.04), 1, None)]
    parts = [part.shot for part in cut_long([event], times, 60.0)]
    assert len(parts) <= 2 * 4000 / 60 + 2
    assert [part.first for part in parts] == [0, *(part.last + 1 for part in parts[:-1])]
    assert [part.num_frames for part in parts if part.seconds > 60 + 1e-9] == [1]


# A stage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "reason"),
    [("dies_at", "the worker died (signal 9)"), ("raises_at", "RuntimeError: a made-up mistake in two lines")],
)
def test_a_clip_that_a_stage_cannot_judge_is_quarantined_alone(
    tmp_path: Path, workers: Watched, how: str, reason: str
) -> None:
    curate(tmp_path / "out", [bikes()])
    ids = [row["clip"] for row in clips(tmp_path / "out")]
    log = tmp_path / "log"

    def run(stage: MadeUp, **more: Any) -> list[str]:
        curate(tmp_path / "out", [bikes()], stage, MadeUpReader(str(tmp_path / "reader")), engine=workers, **more)
        return judged(log)

    stage = MadeUp(str(log), **{how: ids[2]})
    seen = run(stage)
    assert seen.count(ids[2]) == ATTEMPTS + 1, "once among its neighbours, then alone"
    assert set(seen) == set(ids)
    (bad,) = quarantine(tmp_path / "out")
    assert (bad["clip"], bad["path"], bad["stage"], bad["reason"], bad["attempts"]) == (
        ids[2], str(bikes()), "judge", reason, ATTEMPTS,
    )  # fmt: skip
    rows = clips(tmp_path / "out")
    assert [row["kept"] for row in rows] == [True, True, False, True, True, True]
    assert (rows[2]["dropped_by"], rows[2]["reason"]) == ("quarantine", f"judge: {reason}")
    assert [row["made_up_reader.mean"] is not None for row in rows] == [row["kept"] for row in rows]

    assert run(stage) == [], "the next run does not try it again"
    assert quarantine(tmp_path / "out") == [bad]
    assert set(run(stage, retry=True)) == {ids[2]}, "--retry does, and nothing else"
    assert quarantine(tmp_path / "out") == [bad]
    assert run(MadeUp(str(log)), retry=True) == [ids[2]]
    assert quarantine(tmp_path / "out") == []
    assert all(row["kept"] for row in clips(tmp_path / "out"))


# Names ---------------------------------------------------------------------------------------------------------------

NAMES = [
    "two\nlines.mp4", "-rf.mp4", "'quotes' \"double\".mp4", "<script>alert(1)<script>.mp4", "[red]markup[red].mp4",
    "bell\a\x1b[31m.mp4", "\u202egnp.mp4", " .mp4", "% $HOME `id`; *.mp4", "x" * 252 + ".ts", "\U0001f600.mp4",
]  # fmt: skip


def test_hostile_names(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One good and one bad file under each name; a name that is not UTF-8 is named in quarantine."""
    videos = tmp_path / "videos"
    (videos / "bad").mkdir(parents=True)
    short = first_frames(carphone(), tmp_path / "short.mp4", 36)
    for number, name in enumerate(NAMES):
        copy(short, videos / name, number)
        (videos / "bad" / name).write_bytes(b"no video")
    latin = os.path.join(os.fsencode(videos), b"caf\xe9.mp4")
    with open(latin, "wb") as file:
        file.write(carphone().read_bytes())
    monkeypatch.chdir(videos)
    out = tmp_path / "<b>out\x1b[31m"
    command = ["curate", ".", "--out", str(out), "--set", "text=off", "--set", "signature=off", "--jobs", "2"]
    assert main(command) == 0
    captured = capfd.readouterr()
    printed = captured.out + captured.err
    assert all(c.isprintable() or c == "\n" for c in printed), [c for c in printed if not c.isprintable()]
    assert {Path(row["path"]).name for row in clips(out)} == {*NAMES}
    bad = {row["path"]: row["reason"] for row in quarantine(out)}
    assert bad.pop(f"{videos}/caf\\udce9.mp4") == "its name is not UTF-8; rename it"
    assert {Path(path).name for path in bad} == set(NAMES)
    page = (out / "report.html").read_text()
    assert "<script>alert" not in page
    assert "<b>out" not in page
    assert "\x1b" not in page
    assert main([*command, "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["quarantine"]) == len(NAMES) + 1


def test_an_out_folder_that_is_not_utf8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9"))
    assert main(["curate", str(carphone()), "--out", out]) == 2
    assert "--out must be a name in UTF-8, got b'" in capsys.readouterr().err
    assert not os.path.exists(out)


# The folder ----------------------------------------------------------------------------------------------------------


def run_alone(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)


def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(tmp_path: Path) -> None:
    """The limits strike at the first table, at a video's signals, at the report, and at the table of clips."""
    out, arguments = tmp_path / "out", ["curate", str(bikes()), "--set", "text=off", "--jobs", "1", "--out"]
    for limit_bytes, place in (
        (2_500, "/state/sources/"),
        (20_000, "/signals/"),
        (60_000, "report.html"),
        (10_000, "clips."),
    ):
        limited = (
            "import resource, signal, sys; from vchitect_fast.cli import main\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))\n"
            f"if __name__ == '__main__': sys.exit(main({[*arguments, str(out)]!r}))"
        )
        done = run_alone(limited)
        assert done.returncode == 2, done.stderr
        (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("vchitect-fast curate: ")]
        assert re.search(f"(could not|cannot) write .*{place}.*File too large", sentence)
        assert "Traceback" not in done.stderr
        assert not list(out.rglob(".*.partial*"))
    assert main([*arguments, str(out)]) == 0
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    assert clips(out) == clips(tmp_path / "whole")
    assert [json.loads(line)["num_clips"] for line in (out / "runs.jsonl").read_text().splitlines()] == [6, 6]


def test_two_processes_cannot_curate_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store(tmp_path / "out"):
        assert main(["curate", str(carphone()), "--out", str(tmp_path / "out")]) == 2
    assert "is being curated by another process; wait for it or choose another --out" in capsys.readouterr().err


def test_a_table_damaged_by_hand_is_named_and_can_be_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    curate(out, [carphone()])
    whole = clips(out)
    for table in ("sources", "clips", "scores/motion", "signals"):
        part = min((out / "state" / table).rglob("*.parquet"))
        part.write_bytes(part.read_bytes()[:-30])
        # Signals are looked at only where clips are to be made.
        settings = ["shots.min_scene_frames=14"] if table == "signals" else []
        command = ["curate", str(carphone()), "--out", str(out), "--jobs", "1"]
        for override in (*CHEAP, *settings):
            command += ["--set", override]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert str(part) in error
        assert "remove it, and what it held is computed again" in error
        part.unlink()
        curate(out, [carphone()])
        assert clips(out) == whole
