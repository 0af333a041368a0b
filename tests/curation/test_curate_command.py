"""The curate command as people use it: one line from videos to what training reads, again, and its refusals.

Stages, tables and faults have tests of their own; here only the real command on real clips, without text reading, which
takes seconds. pytest tests/curation/test_curate_command.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from real_video import bikes, bikes_clips, truncate

from vchitect_fast.cli import main
from vchitect_fast.manifest import read_manifest, read_rows

QUICK = ["--set", "text=off", "--jobs", "1"]


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curated") / "set"
    words = ["--caption", "bikes in a city", "--profile", str(out.with_name("traces")), *QUICK]
    assert main(["curate", str(bikes()), "--out", str(out), *words]) == 0
    return out


def test_the_manifest_is_what_training_reads(curated: Path) -> None:
    clips, expected = read_manifest(curated / "manifest.parquet"), bikes_clips()[:5]  # the sixth lasts 0.28 s
    assert [(c.path, c.num_frames, c.width, c.height, c.fps) for c in clips] == [
        (c.path.resolve(), c.num_frames, c.width, c.height, c.fps) for c in expected
    ]
    assert [(c.start, c.end) for c in clips] == [pytest.approx((c.start, c.end)) for c in expected]
    assert {c.caption for c in clips} == {"bikes in a city"}
    [row, *_] = read_rows(curated / "manifest.parquet")
    assert row["static.share"] == 0
    assert row["motion.dynamic"] is True
    assert "aesthetic_proxy.score" in row and "aesthetics.score" not in row, "a proxy has a name of its own"


def test_it_prints_the_funnel_and_where_things_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    bad = truncate(bikes(), tmp_path / "[bold]half.mp4", 0.4)
    assert main(["curate", str(bikes()), str(bad), "--out", str(out), *QUICK]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "from 1 videos",
        "dropped by length -1",
        "kept 5",
        "[bold]half.mp4 probe:",
        "video-s a core-s",
        "report.html",
    ):
        assert text in printed, text
    assert (out / "report.html").is_file()
    assert json.loads((out / "runs.jsonl").read_text())["num_kept"] == 5


def test_the_profile_says_where_the_worker_was(curated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "analyse", str(curated.with_name("traces")), "--json"]) == 0
    [rank] = json.loads(capsys.readouterr().out)["ranks"]
    [step] = rank["steps"]
    calls = {span["name"]: span["num_calls"] for span in step["by_span"]}
    assert calls["curate/signals"] == 250 and calls["curate/aesthetic_proxy"] == 1
    assert calls["data/decode"] == 250 + 1 + 5  # frames, the end of the file, clips that are judged


def test_again_decodes_nothing_and_says_the_same(curated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_rows(curated / "manifest.parquet")
    assert main(["curate", str(bikes()), "--out", str(curated), "--caption", "bikes in a city", "--json", *QUICK]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["num_kept"], summary["scanned_s"], summary["cpu_s"]) == (5, 0, 0)
    assert read_rows(curated / "manifest.parquet") == before


def test_rules_and_lengths_by_option(curated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["curate", str(bikes()), "--out", str(curated), "--json", *QUICK]
    assert main([*words, "--min-seconds", "0.2"]) == 0
    assert json.loads(capsys.readouterr().out)["num_kept"] == 6
    assert main([*words, "--set", "rules.motion.degree=> 3"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == {"length": 1, "motion": 2}
    assert main([*words, "--min-seconds", "9"]) == 1, "no clip stays: done, with a doubt"
    assert not (curated / "manifest.parquet").exists(), "an old manifest would be taken for this one"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all\n", ["all"] * 6), ("\n".join("abcdef") + "\n", list("abcdef")), ("a\n\nc\nd\ne\nf", ["a", "", *"cdef"])],
)
def test_captions_come_from_the_file_beside_the_video(tmp_path: Path, text: str, expected: list[str]) -> None:
    video = tmp_path / "ride.mp4"
    video.write_bytes(bikes().read_bytes())
    video.with_suffix(".txt").write_text(text)
    words = [
        "curate",
        str(video),
        "--out",
        str(tmp_path / "set"),
        "--caption",
        "not this",
        "--min-seconds",
        "0",
        *QUICK,
    ]
    assert main(words) == 0
    assert [clip.caption for clip in read_manifest(tmp_path / "set" / "manifest.parquet")] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.mp4", "--out", "set"], "found nothing at absent.mp4"),
        ([".", "--out", "set"], "has no file that ends like a video"),
        ([str(bikes()), "--out", "m.jsonl"], "--out is a folder, got m.jsonl; the manifest will be m/manifest.parquet"),
        ([str(bikes()), "--out", "set", "--jobs", "0"], "--jobs must be 1 or more"),
        ([str(bikes()), "--out", "set", "--ray-address", "auto"], "needs --engine ray"),
        ([str(bikes()), "--out", "set", "--set", "motion"], "--set takes section.name=value"),
        ([str(bikes()), "--out", "set", "--set", "rules.static.share=<"], "a rule for static.share is a comparison"),
        ([str(bikes()), "--out", "set", "--config", "absent.yaml"], "cannot read the settings absent.yaml"),
        ([str(bikes()), "--out", "set", "--set", "motion.backend=raft"], "motion needs model"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["curate", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["report", "what-if", "compare", "export", "index"])
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["curate", verb, "--help"])
    assert ended.value.code == 0
    assert f"vchitect-fast curate {verb}" in capsys.readouterr().out.split("example", 1)[1]
