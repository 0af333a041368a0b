"""The whole job in rehearsal: real videos to a report, with a few steps; started again it trains nothing anew.

The real run, `make quickstart`, is 1600 steps; its figures stand in README.md and docs/log.md.
Run: pytest tests/test_quickstart.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vchitect_fast import quickstart
from vchitect_fast.cli import main
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import read_manifest
from vchitect_fast.metrics import read_log
from vchitect_fast.plan import Plan


def test_from_videos_to_a_report_and_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "q"
    assert main(["quickstart", "--out", str(out), "--steps", "3"]) == 0
    printed = capfd.readouterr().out
    for command in ("curate", "autotune", "train"):
        assert re.search(rf"^\$ vchitect-fast {command} ", printed, re.MULTILINE), command
    assert str(out / "report.html") in printed

    clips = read_manifest(out / "clips.jsonl")
    assert [clip.caption for clip in clips] == [
        *quickstart.CAPTIONS["bikes.mp4"][:5],
        *quickstart.CAPTIONS["bigbuckbunny.mp4"],
    ]
    assert len(list((out / "samples").glob("*.mp4"))) == len(clips)
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="https?:', page), "the page must stand alone"
    assert page.count("data:image/png;base64,") == 3 * len(clips)
    for fragment in ("predicted", "measured", "What lost", clips[0].caption, "vchitect-fast autotune"):
        assert fragment in page
    entry = Plan.load(out / "plan.json").entries[0]
    assert f"{1000 * entry.predicted.step_s:.1f} ms" in page

    assert main(["quickstart", "--out", str(out), "--steps", "3"]) == 0
    printed = capfd.readouterr().out
    assert f"--cluster {out / 'cluster.json'}" in printed, "the machine is measured once"
    assert [event["step"] for event in read_log(out / "train", "step")] == [1, 2, 3]
    assert main(["quickstart", "--out", str(out), "--steps", "4"]) == 2
    assert "holds a quickstart of 3 steps, got 4" in capfd.readouterr().err


def test_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vchitect-fast\[quickstart\]'"):
        quickstart.example_folder()


def test_a_command_that_fails_stops_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="exit code 2; mend what it says above"):
        quickstart.vchitect_fast("train", "nowhere.yaml")
    assert "cannot read the run file nowhere.yaml" in capfd.readouterr().err
