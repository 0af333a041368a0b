"""Comparing sets: distances against their definition, features against plain Python, and what must not be compared.

Clips and scores are of real videos (curated_folder.py). pytest tests/curation/test_compare.py
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from curated_folder import STAGES, Row, clip_rows, write_folder
from real_video import bikes_clips

from vchitect_fast.curation.compare import compare, feature_rows, ks_distance, read_sets, run_compare
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import write_manifest


def other_stages() -> list[Row]:
    """The same stages with laxer rules, and aesthetics computed in another way."""
    stages = copy.deepcopy(STAGES)
    stages[0]["rules"] = {}
    stages[2] |= {"key": "00000000000000b3", "parameters": {"short_side": 144}}
    return stages


def manifest(path: Path, rows: list[Row]) -> Path:
    """Rows of a folder as a manifest."""
    write_manifest(rows, path)
    return path


@pytest.mark.parametrize(("num_a", "num_b"), [(1, 1), (7, 5), (40, 200)])
def test_the_distance_is_its_definition(num_a: int, num_b: int) -> None:
    draw = np.random.default_rng(num_a)
    a, b = draw.integers(0, 9, num_a) / 2, draw.integers(2, 12, num_b) / 2  # with ties within and between
    shares = [((a <= at).mean(), (b <= at).mean()) for at in np.arange(-1, 8, 0.25)]
    assert ks_distance(a, b) == max(abs(x - y) for x, y in shares)
    assert ks_distance(a, b) == ks_distance(b, a)


def test_the_distance_of_the_same_the_disjoint_and_the_empty() -> None:
    a = np.array([1.0, 2.0, 2.0, 5.0])
    assert ks_distance(a, a[::-1]) == ks_distance(a, np.tile(a, 3)) == 0
    assert ks_distance(a, a + 10) == 1
    assert ks_distance(a, np.empty(0)) is ks_distance(np.empty(0), a) is None


def test_features_are_those_of_the_clips_that_stay(tmp_path: Path) -> None:
    stages = other_stages()
    folders = [write_folder(tmp_path / "a"), write_folder(tmp_path / "b", clip_rows(stages), stages)]
    sets = read_sets(folders)
    for one, rows in zip(sets, (clip_rows(), clip_rows(stages)), strict=True):
        kept = [row for row in rows if row["kept"]]
        assert (one.num_clips, one.num_videos) == (len(kept), len({row["video"] for row in kept}))
        expected = {
            "length, s": [row["end"] - row["start"] for row in kept],
            "short side, pixels": [min(row["width"], row["height"]) for row in kept],
            "frames a second": [row["fps"] for row in kept],
            "words in the caption": [len(row["caption"].split()) for row in kept],
            **{name: [float(row[name]) for row in kept] for name in ("static.share", "tone.is_dark", "captions.num_words")},
        }  # fmt: skip
        for name, values in expected.items():
            assert sorted(one.features[name].tolist()) == sorted(values), name
        assert "captions.text" not in one.features and "tone.each" not in one.features
    assert sets[0].num_clips != sets[1].num_clips


def test_a_manifest_of_a_folder_is_the_same_set(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    kept = [row for row in clip_rows() if row["kept"]]
    rows = feature_rows(read_sets([folder, manifest(tmp_path / "m.parquet", kept)]))
    assert len(rows) == 10  # four of every clip, six scores
    for row in rows:
        assert row.num_clips == [5, 5] and row.distances == [0, 0] and row.medians[0] == row.medians[1]
    assert {row.note for row in rows if "." not in row.feature} == {""}
    assert {row.note for row in rows if "." in row.feature} == {"a manifest does not say how it was computed"}


def test_scores_computed_in_different_ways_are_marked(tmp_path: Path) -> None:
    stages = other_stages()
    sets = read_sets([write_folder(tmp_path / "a"), write_folder(tmp_path / "b", clip_rows(stages), stages)])
    notes = {row.feature: row.note for row in feature_rows(sets) if row.note}
    assert list(notes) == ["aesthetics_proxy.score"]
    assert notes["aesthetics_proxy.score"].startswith("computed in different ways, not comparable: sharpness (0000")
    page = compare([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html").read_text()
    assert page.count("not comparable") == 2  # beside its figure and in the table


def test_a_feature_of_one_set_only_has_no_distance_and_comes_last(tmp_path: Path) -> None:
    bare = manifest(tmp_path / "m.jsonl", [dict(vars(clip), path=str(clip.path)) for clip in bikes_clips()])
    rows = feature_rows(read_sets([bare, write_folder(tmp_path / "a")]))
    assert [row.num_clips[0] > 0 for row in rows] == [True] * 4 + [False] * 6
    assert all(row.distances == [None, None] and row.medians[0] is None for row in rows[4:])


def test_what_is_true_or_false_is_a_share(tmp_path: Path) -> None:
    rows = [row for row in clip_rows() if row["kept"]]
    for k, row in enumerate(rows):
        row["tone.is_dark"] = k < 2
    sets = read_sets([write_folder(tmp_path / "a", rows), write_folder(tmp_path / "b")])
    [row] = [row for row in feature_rows(sets) if row.feature == "tone.is_dark"]
    assert row.label == "tone.is_dark, share true"
    assert row.medians == [0.4, 0.0] and row.distances == [0.0, 0.4]
    assert "40.0 %" in compare([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html").read_text()


def test_sets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / parent / "clips") for parent in "ab"]
    assert [one.name for one in read_sets([*folders, folders[0]])] == ["clips", "clips (2)", "clips (3)"]


def test_the_page_has_a_figure_a_feature_and_no_foreign_markup(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / "<b>bold</b>\u202e".replace("/", "_")), write_folder(tmp_path / "b")]
    page = compare(folders, tmp_path / "compare.html").read_text()
    assert page.count("<figure>") == 10 and page.count("<svg") == 9  # the share that is true is no curve
    assert page.count("<polyline") == 18
    assert "<b>bold" not in page and "&lt;b&gt;bold&lt;_b&gt;\\u202e" in page


@pytest.mark.parametrize("num", [1, 7])
def test_two_to_six_sets_are_compared(tmp_path: Path, num: int) -> None:
    folder = write_folder(tmp_path)
    with pytest.raises(UserError, match=f"compare shows 2 to 6 sets, got {num}"):
        read_sets([folder] * num)
    assert len(read_sets([folder] * 6)) == 6


def test_a_set_without_clips_or_files_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    none = write_folder(tmp_path / "none", [row for row in clip_rows() if not row["kept"]])
    with pytest.raises(UserError, match="must have clips to compare, got none that stays"):
        read_sets([folder, none])
    with pytest.raises(UserError, match="found no clips.parquet"):
        read_sets([folder, tmp_path])
    with pytest.raises(UserError, match="cannot read the manifest"):
        read_sets([folder, tmp_path / "absent.jsonl"])


def test_the_command_prints_a_table_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages = other_stages()
    write_folder(tmp_path / "[red]a", clip_rows(), STAGES)
    write_folder(tmp_path / "b", clip_rows(stages), stages)
    assert run_compare(["[red]a", "b"]) == 0
    printed = capsys.readouterr().out
    assert "[red]a" in printed and "aesthetics_proxy.score *" in printed and "not comparable" in printed
    assert (tmp_path / "compare.html").is_file()
    assert run_compare(["[red]a", "b", "--json", "--out", "c.html"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = feature_rows(read_sets(["[red]a", "b"]))
    assert [row["feature"] for row in told["features"]] == [row.feature for row in rows]
    assert told["features"][0]["distances"] == rows[0].distances
    assert [one["num_clips"] for one in told["sets"]] == [5, sum(row["kept"] for row in clip_rows(stages))]
    assert told["page"] == "c.html" and (tmp_path / "c.html").is_file()
