"""The pipeline computes each thing once: what a second run, another rule, parameter, file or setting costs, counted.

bikes.mp4 has six clips, carphone_pristine.mp4 one. pytest tests/curation/test_pipeline.py
"""

from __future__ import annotations

import http.server
import os
import shutil
import threading
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from curated import CHEAP, Here, carphone, clips, copy, curate, quarantine
from made_up_stage import MadeUp, MadeUpReader, MadeUpSignal, judged
from real_video import bikes, truncate

from vchitect_fast.cli import main
from vchitect_fast.curation.inputs import find_videos
from vchitect_fast.errors import UserError

FIRST = {"ProbeTask": 2, "ScanTask": 2, "ClipTask": 2, "JudgeTask": 1}


@dataclass
class Desk:
    """A folder with two videos, and three stages that note whom they judge."""

    folder: Path

    def __post_init__(self) -> None:
        self.videos, self.out = self.folder / "videos", self.folder / "out"
        self.videos.mkdir()
        shutil.copy(bikes(), self.videos / "bikes.mp4")
        shutil.copy(carphone(), self.videos / "carphone.mp4")
        self.logs = {name: self.folder / name for name in ("frame", "reader", "signal")}

    def run(
        self, *, frame: float = 1.0, signal: float = 1.0, overrides: tuple[str, ...] = CHEAP, **more: Any
    ) -> Counter[str]:
        """The tasks that a run took."""
        engine = Here()
        stages = (
            MadeUp(str(self.logs["frame"]), frame), MadeUpReader(str(self.logs["reader"])),
            MadeUpSignal(str(self.logs["signal"]), signal),
        )  # fmt: skip
        self.found = curate(
            self.out, find_videos([str(self.videos)]), *stages, overrides=overrides, engine=engine, **more
        )
        return engine.ran

    def judged(self) -> dict[str, int]:
        """How many clips each stage judged since the last call; none twice."""
        names = {name: judged(log) for name, log in self.logs.items()}
        assert all(len(set(ids)) == len(ids) for ids in names.values())
        return {name: len(ids) for name, ids in names.items()}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    desk = Desk(tmp_path)
    assert desk.run() == FIRST
    assert desk.judged() == {"frame": 7, "reader": 7, "signal": 7}
    return desk


NOTHING = {"frame": 0, "reader": 0, "signal": 0}


def test_a_second_run_computes_nothing(desk: Desk) -> None:
    before = clips(desk.out)
    assert desk.run() == {}
    assert desk.judged() == NOTHING
    assert clips(desk.out) == before


def test_another_rule_computes_nothing(desk: Desk) -> None:
    assert desk.run(overrides=(*CHEAP, "rules.length.seconds=> 1.8")) == {}
    assert desk.judged() == NOTHING
    dropped = [row["reason"] for row in clips(desk.out) if not row["kept"]]
    assert dropped == [f"length.seconds > 1.8, got {seconds}" for seconds in ("1.16", "1.76", "0.28")]


def test_a_rule_that_lets_more_through_judges_only_those(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    strict = (*CHEAP, "rules.length.seconds=> 1.8")
    desk.run(overrides=strict)
    assert desk.judged() == {"frame": 4, "reader": 4, "signal": 7}
    assert desk.run() == {"JudgeTask": 1}
    assert desk.judged() == {"frame": 3, "reader": 3, "signal": 0}


def test_another_parameter_computes_that_stage_and_what_reads_it(desk: Desk) -> None:
    before = clips(desk.out)
    assert desk.run(frame=2.0) == {"JudgeTask": 1}
    assert desk.judged() == {"frame": 7, "reader": 7, "signal": 0}
    assert [row["made_up_reader.mean"] for row in clips(desk.out)] == [2 * row["made_up.mean"] for row in before]
    assert desk.run(frame=2.0, signal=2.0) == {"ClipTask": 2}
    assert len(list((desk.out / "state" / "scores" / "motion").rglob("*.parquet"))) == 1, (
        "the other stages' scores stay"
    )
    assert desk.judged() == {"frame": 0, "reader": 0, "signal": 7}
    assert [row["made_up_signal.mean"] for row in clips(desk.out)] == [2 * row["made_up_signal.mean"] for row in before]
    assert desk.run() == {}, "back to what was: it is still there"
    assert desk.judged() == NOTHING
    assert clips(desk.out) == before


def test_other_cuts_decode_nothing_but_make_other_clips(desk: Desk) -> None:
    before = clips(desk.out)
    once = (*CHEAP, "shots.min_content_val=200", "shots.adaptive_threshold=200", "shots.gradual=off")
    tasks = desk.run(overrides=once)
    assert tasks == {"ClipTask": 2, "JudgeTask": 1}, "no scan, no probe"
    assert [(row["first"], row["last"]) for row in clips(desk.out)] == [(0, 249), (0, 119)]
    # carphone's one clip is the same one; what signals say comes with the cutting.
    assert desk.judged() == {"frame": 1, "reader": 1, "signal": 2}
    assert desk.run() == {}
    assert desk.judged() == NOTHING
    assert clips(desk.out) == before


def test_one_more_video_costs_one_video(desk: Desk) -> None:
    copy(carphone(), desk.videos / "more.mp4", 1)
    assert desk.run() == {"ProbeTask": 1, "ScanTask": 1, "ClipTask": 1}, "and it is a near-duplicate"
    assert desk.judged() == {"frame": 0, "reader": 0, "signal": 1}
    assert desk.run(overrides=(*CHEAP, "signature=off")) == {"JudgeTask": 1}
    assert desk.judged() == {"frame": 1, "reader": 1, "signal": 0}
    assert len(clips(desk.out)) == 8


def test_a_touched_or_moved_file_is_probed_and_no_more(desk: Desk) -> None:
    before = clips(desk.out)
    os.utime(desk.videos / "bikes.mp4", (1, 1))
    assert desk.run() == {"ProbeTask": 1}
    assert clips(desk.out) == before
    (desk.videos / "bikes.mp4").rename(desk.videos / "renamed.mp4")
    assert desk.run() == {"ProbeTask": 1}
    assert desk.judged() == NOTHING
    assert {row["path"] for row in clips(desk.out)} == {str(desk.videos / n) for n in ("carphone.mp4", "renamed.mp4")}
    assert {row["clip"] for row in clips(desk.out)} == {row["clip"] for row in before}


def test_the_same_bytes_under_two_names_are_read_once(desk: Desk) -> None:
    shutil.copy(desk.videos / "bikes.mp4", desk.videos / "again.mp4")
    assert desk.run() == {"ProbeTask": 1}
    assert desk.found.copies[clips(desk.out)[0]["video"]] == [str(desk.videos / "bikes.mp4")]
    assert clips(desk.out)[0]["path"] == str(desk.videos / "again.mp4"), "the name that sorts first"
    assert len(clips(desk.out)) == 7


def test_a_removed_video_leaves_and_comes_back_for_nothing(desk: Desk) -> None:
    before = clips(desk.out)
    (desk.videos / "bikes.mp4").rename(desk.folder / "aside")
    desk.run()
    assert len(clips(desk.out)) == 1
    (desk.folder / "aside").rename(desk.videos / "bikes.mp4")
    assert desk.run() == {}
    assert clips(desk.out) == before


def test_damage_is_quarantined_once_and_a_good_file_takes_its_place(desk: Desk) -> None:
    content = bytearray(bikes().read_bytes())
    for at in range(200_000, 201_000):
        content[at] ^= 85
    (desk.videos / "flipped.mp4").write_bytes(content)
    truncate(bikes(), desk.videos / "short.mp4", 0.7)
    assert desk.run() == {"ProbeTask": 2, "ScanTask": 1}
    reasons = {Path(row["path"]).name: (row["stage"], row["attempts"]) for row in quarantine(desk.out)}
    assert reasons == {"flipped.mp4": ("scan", 1), "short.mp4": ("probe", 1)}
    assert desk.run() == {}, "not tried again"
    assert len(quarantine(desk.out)) == 2
    assert desk.run(retry=True) == {"ProbeTask": 1, "ScanTask": 1}
    assert len(quarantine(desk.out)) == 2
    # The same names with other bytes are other files.
    copy(carphone(), desk.videos / "flipped.mp4", 2)
    copy(carphone(), desk.videos / "short.mp4", 3)
    assert desk.run() - Counter(JudgeTask=1) == {"ProbeTask": 2, "ScanTask": 2, "ClipTask": 2}
    assert quarantine(desk.out) == []
    assert len(clips(desk.out)) == 9


# Places --------------------------------------------------------------------------------------------------------------


def rows_without_place(out: Path) -> list[dict[str, Any]]:
    return sorted(
        ({name: value for name, value in row.items() if name != "path"} for row in clips(out)),
        key=lambda row: row["clip"],
    )


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "videos.zip", "w") as archive:
        archive.write(bikes(), "a/bikes.mp4")
        archive.write(carphone(), "carphone.mp4")
        archive.writestr("notes.txt", "no video")
    return tmp_path / "videos.zip"


@pytest.mark.parametrize("url", ["zip://::file://{}", "zip://**/*.mp4::file://{}", "simplecache::zip://::file://{}"])
def test_videos_inside_an_archive(tmp_path: Path, zipped: Path, url: str) -> None:
    paths = find_videos([url.format(zipped)])
    assert [path.split("::file://")[1] for path in paths] == [str(zipped)] * 2
    out, engine = tmp_path / "out", Here()
    curate(out, paths, overrides=("text=off", *CHEAP[2:]), engine=engine)
    assert engine.ran == FIRST
    curate(tmp_path / "straight", [bikes(), carphone()], overrides=("text=off", *CHEAP[2:]))
    assert rows_without_place(out) == rows_without_place(tmp_path / "straight")
    assert [row["path"] for row in clips(out)] == [paths[0]] * 6 + [paths[1]]
    engine.ran.clear()
    curate(out, paths, overrides=("text=off", *CHEAP[2:]), engine=engine)
    assert engine.ran == {}


def test_file_urls(tmp_path: Path) -> None:
    shutil.copy(carphone(), tmp_path / "a.mp4")
    (url,) = find_videos([f"file://{tmp_path}/*.mp4"])
    assert main(["curate", url, "--out", str(tmp_path / "out"), "--jobs", "1", "--set", "text=off", "--json"]) == 0
    assert [row["path"] for row in clips(tmp_path / "out")] == [f"file://{tmp_path}/a.mp4"]
    assert clips(tmp_path / "out")[0]["aesthetic_proxy.score"] is not None, "its frames were looked at"


def test_http(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http by aiohttp, which is not installed")
    shutil.copy(carphone(), tmp_path / "a.mp4")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        engine = Here()
        curate(tmp_path / "out", find_videos([f"{host}/a.mp4", f"{host}/gone.mp4"]), engine=engine)
        server.shutdown()
    assert [row["path"] for row in clips(tmp_path / "out")] == [f"{host}/a.mp4"]
    assert [(row["path"], row["reason"]) for row in quarantine(tmp_path / "out")] == [
        (f"{host}/gone.mp4", f"cannot read the file ({host}/gone.mp4)")
    ]


@pytest.mark.parametrize("name", ["missing.mp4", "zip://a.mp4::file:///nowhere/a.zip", "nosuchprotocol://a.mp4"])
def test_refuses_places_that_are_nothing(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="correct the name|check the URL"):
        find_videos([name])


def test_a_folder_gives_its_videos_and_nothing_hidden(tmp_path: Path) -> None:
    for name in ("b.MP4", "a/x.mkv", "a/.hidden.mp4", ".trash/y.mp4", "a/notes.txt", "c.mp4/z.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    expected = [str(tmp_path / name) for name in ("a/x.mkv", "b.MP4", "c.mp4/z.webm")]
    assert find_videos([str(tmp_path), str(tmp_path / "b.MP4")]) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no file that ends like a video"):
        find_videos([str(tmp_path / "empty")])
