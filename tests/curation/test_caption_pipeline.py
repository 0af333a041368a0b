"""Captions in the whole command: a real local server, one bad clip, a server that goes down and comes back.

pytest tests/curation/test_caption_pipeline.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from caption_server import Reply, Server, error, fine, models, serving
from real_video import bikes

from vchitect_fast.cli import main
from vchitect_fast.curation import pipeline
from vchitect_fast.manifest import read_rows


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as found:
        yield found


def say(server: Server, *replies: Reply) -> None:
    """What it answers to the next run: the models that it serves, then these, the last again and again."""
    server.requests.clear()
    server.script = [models("m"), *replies]


def curate(folder: Path, server: Server, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    words = [
        "--set",
        "text=off",
        "--set",
        f"caption={{url: '{server.url}', model: m, retries: 0}}",
        "--jobs",
        "1",
        "--json",
    ]
    capsys.readouterr()
    main(["curate", str(bikes()), "--out", str(folder / "set"), *words, *more])
    return json.loads(capsys.readouterr().out)


def captions(folder: Path) -> list[str]:
    return [row["caption"] for row in read_rows(folder / "set" / "manifest.parquet")]


def test_captions_reach_the_manifest_and_are_asked_for_once(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    say(server, fine("a street"))
    assert curate(tmp_path, server, capsys)["num_kept"] == 5
    assert captions(tmp_path) == ["a street"] * 5
    say(server, error(500, "must not be asked"))
    assert curate(tmp_path, server, capsys)["num_kept"] == 5
    assert [path for path, *_ in server.requests] == ["/v1/models"]


def test_a_clip_without_a_caption_is_asked_for_again_by_the_next_run(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    say(server, fine("a"), error(400, "too bright"), fine("a"))
    summary = curate(tmp_path, server, capsys)
    assert (summary["num_kept"], summary["num_quarantined"]) == (4, 1)
    assert "too bright" in summary["quarantine"][0]["reason"]
    say(server, fine("b"))
    assert curate(tmp_path, server, capsys)["num_quarantined"] == 0
    assert sorted(captions(tmp_path)) == ["a"] * 4 + ["b"]


def test_a_server_that_goes_down_is_left_alone(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "BATCH", 1)
    say(server, fine("a"), error(400, "gone"))
    summary = curate(tmp_path, server, capsys, "--set", "caption.concurrency=1")
    assert (summary["num_kept"], summary["num_quarantined"]) == (1, 4)
    chats = [path for path, *_ in server.requests if path.endswith("completions")]
    assert len(chats) == 3, "two batches without a caption, then none"
    assert sum("not asked for" in row["reason"] for row in summary["quarantine"]) == 2
