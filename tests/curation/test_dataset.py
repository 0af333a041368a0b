"""Reading a curation folder: the funnel against a count in plain Python, and every way in which the files can be wrong.

Clips and scores are of real videos (curated_folder.py); the extra rows that a test adds are made up and said to be.
pytest tests/curation/test_dataset.py
"""

from __future__ import annotations

import builtins
import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from curated_folder import STAGES, Row, clip_rows, write_folder

from vchitect_fast.curation.dataset import HOURS, Dataset, duration, printable, read_stages
from vchitect_fast.curation.rules import Rule
from vchitect_fast.errors import UserError


def test_the_funnel_counts_what_the_cascade_did(tmp_path: Path) -> None:
    rows = clip_rows()
    funnel = Dataset(write_folder(tmp_path, rows)).funnel()
    assert [row.stage for row in funnel] == [stage["name"] for stage in STAGES]
    left = rows
    for row in funnel:
        dropped = [clip for clip in left if clip["dropped_by"] == row.stage]
        assert (row.num_in, row.num_dropped, row.num_quarantined) == (len(left), len(dropped), 0)
        left = [clip for clip in left if clip not in dropped]
        assert row.num_out == len(left)
        assert row.hours_out == pytest.approx(sum(clip["end"] - clip["start"] for clip in left) / 3600)
    assert left == [clip for clip in rows if clip["kept"]]
    assert [row.num_dropped for row in funnel] == [5, 3, 2, 0]  # so that the above compares something


def test_a_clip_that_breaks_two_rules_counts_for_both(tmp_path: Path) -> None:
    tone = Dataset(write_folder(tmp_path)).funnel()[1]
    dropped = [row for row in clip_rows() if row["dropped_by"] == "tone"]
    expected = {}
    for score, text in STAGES[1]["rules"].items():
        rule = Rule.parse("tone", score, text)
        expected[str(rule)] = sum(not rule.keeps(row[f"tone.{score}"]) for row in dropped)
    assert tone.by_rule == expected == {"tone.mean > 80": 1, "tone.is_dark == false": 3}


def with_other_ends() -> list[Row]:
    """The real rows and, made up: one dropped for its length, two quarantined, one that nothing has decided yet."""
    rows = clip_rows()
    for number, changes in enumerate(
        ({"dropped_by": "length"}, {"dropped_by": "quarantine", "reason": "r"}, {}, {}), 1
    ):
        row = dict(rows[0], clip=f"more-{number}", kept=False, dropped_by=None, reason=None) | changes
        rows.append({name: None if "." in name else value for name, value in row.items()})
    return rows


def test_quarantined_unfinished_and_foreign_ends_are_told_apart(tmp_path: Path) -> None:
    quarantine: list[Row] = [
        {"video": "bikes", "path": "p", "clip": "more-2", "stage": "tone", "reason": "r", "attempts": 2},
        {"video": "bikes", "path": "p", "clip": "more-2", "stage": "tone", "reason": "again"},  # tried twice: one clip
        {"video": "bikes", "path": "p", "clip": "more-3", "stage": "decode", "reason": "r"},
        {"video": "x", "path": "p", "clip": None, "stage": "probe", "reason": "a whole video: no clip of it exists"},
    ]
    data = Dataset(write_folder(tmp_path, with_other_ends(), quarantine=quarantine))
    found = {row.stage: (row.num_in, row.num_dropped, row.num_quarantined, row.num_out) for row in data.funnel()}
    assert found == {
        "decode": (19, 0, 1, 18), "length": (18, 1, 0, 17), "static": (17, 5, 0, 12), "tone": (12, 3, 1, 8),
        "aesthetics_proxy": (8, 2, 0, 6), "captions": (6, 0, 0, 6),
    }  # fmt: skip
    assert data.num_waiting() == 1
    assert data.rows("SELECT count(*) FROM clips WHERE dropped_by = 'quarantine'") == [(0,)]  # no stage has that name


def test_scores_are_of_judged_clips_and_finite(tmp_path: Path) -> None:
    rows = clip_rows()
    rows[0]["tone.mean"], rows[1]["tone.mean"] = float("nan"), float("inf")
    data = Dataset(write_folder(tmp_path, rows))
    expected = [row["tone.mean"] for row in rows[2:] if row.get("tone.mean") is not None]
    assert data.scores("tone", "mean").tolist() == expected
    kept = [row["tone.mean"] for row in rows[2:] if row["kept"]]
    assert data.scores("tone", "mean", "kept").tolist() == kept
    truths = [float(row["tone.is_dark"]) for row in rows if row.get("tone.is_dark") is not None]
    assert data.scores("tone", "is_dark").tolist() == truths


def test_columns_without_a_value_have_their_types(tmp_path: Path) -> None:
    """A table written without a schema has the type null where no clip has a value."""
    write_folder(tmp_path)
    path = tmp_path / "clips.parquet"
    table = pyarrow.parquet.read_table(path)
    for name in ("tone.mean", "tone.is_dark", "dropped_by", "reason"):
        table = table.set_column(table.column_names.index(name), name, pyarrow.array([None] * len(table)))
    pyarrow.parquet.write_table(table, path)
    data = Dataset(tmp_path)
    assert data.scores("tone", "is_dark").dtype == np.float64
    assert data.rows("SELECT count(*) FROM clips WHERE dropped_by = 'tone'") == [(0,)]


def test_quarantine_may_be_absent_and_lack_attempts(tmp_path: Path) -> None:
    assert Dataset(write_folder(tmp_path)).rows("SELECT * FROM quarantine") == []
    write_folder(tmp_path, quarantine=[{"video": "v", "path": "p", "stage": "probe", "reason": "r"}])
    path = tmp_path / "quarantine.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns("attempts"), path)
    assert Dataset(tmp_path).rows("SELECT stage, attempts FROM quarantine") == [("probe", None)]


def test_a_folder_of_any_name_is_that_folder(tmp_path: Path) -> None:
    """DuckDB reads * and [] as patterns, and a quote ends its strings."""
    folders = {"it's a [1]?*": 3, "it's a 1xy": 5}
    for name, num in folders.items():
        write_folder(tmp_path / name, clip_rows()[:num])
    for name, num in folders.items():
        assert Dataset(tmp_path / name).rows("SELECT count(*) FROM clips") == [(num,)]


def test_an_empty_set_has_an_empty_funnel(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "clips.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)
    data = Dataset(tmp_path)
    assert [(row.num_in, row.num_out, row.hours_out) for row in data.funnel()] == [(0, 0, 0.0)] * 4
    assert data.rows(f"SELECT {HOURS} FROM clips") == [(None,)]


@pytest.mark.parametrize("name", ["clips.parquet", "sources.parquet", "stages.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_folder(tmp_path) / name).unlink()
    with pytest.raises(UserError, match=name):
        Dataset(tmp_path)


@pytest.mark.parametrize(("name", "column"), [("clips", "tone.mean"), ("clips", "kept"), ("sources", "seconds")])
def test_a_missing_column_is_named(tmp_path: Path, name: str, column: str) -> None:
    path = write_folder(tmp_path) / f"{name}.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns(column), path)
    with pytest.raises(UserError, match=f"{name}.parquet must have the column '{column}'"):
        Dataset(tmp_path)


def test_a_column_of_another_type_is_damage(tmp_path: Path) -> None:
    path = write_folder(tmp_path) / "clips.parquet"
    table = pyarrow.parquet.read_table(path)
    words = pyarrow.array(["wide"] * len(table))
    pyarrow.parquet.write_table(table.set_column(table.column_names.index("start"), "start", words), path)
    with pytest.raises(UserError, match="are damaged .*'wide'"):
        Dataset(tmp_path).funnel()


def test_flipped_and_missing_bytes_never_end_in_a_traceback(tmp_path: Path) -> None:
    """Made-up damage of a real table: bytes overwritten at random, or the end cut off. What can be read is read."""
    path = write_folder(tmp_path) / "clips.parquet"
    good, draw, refused = path.read_bytes(), random.Random(3), 0
    for number in range(60):
        content = bytearray(good)
        if number % 6 == 0:
            content = content[: draw.randrange(len(content))]
        else:
            for _ in range(draw.choice((1, 5, 50))):
                content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            data = Dataset(tmp_path)
            data.funnel()
            for stage in data.stages:
                for score in stage.numeric():
                    data.scores(stage.name, score)
        except UserError as error:  # any other error fails the test
            refused += "run `vchitect-fast curate`" in str(error)
    assert refused > 30


def changed(number: int, **changes: Any) -> str:
    stages = copy.deepcopy(STAGES)
    stages[number] |= changes
    return json.dumps(stages)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "must hold a list of stages"),
        ("[1]", "must hold a list of stages"),
        (changed(1, backend=None), "stage 2 .* must have 'backend' as str, got None"),
        (changed(1, rules=[]), r"stage 2 .* must have 'rules' as dict, got \[\]"),
        (changed(0, rules={"no": "< 1"}), r"stage 1 .*\(static\) has the unknown score 'no'"),
        (changed(0, main="no"), "has the unknown score 'no'"),
        (changed(0, columns={"share": "complex"}), "has the unknown type 'complex'"),
        (changed(0, rules={"share": "small"}), "a rule for static.share is a comparison"),
        (changed(1, name="static"), "has the name of an earlier stage"),
    ],
)
def test_bad_stages_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_stages(tmp_path / "stages.json")


def test_only_a_proxy_says_so(tmp_path: Path) -> None:
    stages = Dataset(write_folder(tmp_path)).stages
    assert [stage.name for stage in stages if stage.is_proxy] == ["aesthetics_proxy"]


def test_without_duckdb_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "duckdb":
            raise ModuleNotFoundError("No module named 'duckdb'", name=name)
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs DuckDB .*vchitect-fast\[curation\]"):
        Dataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\r\x1b[31m", "a\\nb\\u000d\\u001b[31m"),
        ("\u202egpj.exe\u2066\u200f", "\\u202egpj.exe\\u2066\\u200f"),
        ("\u2028\ufeff\udc80", "\\u2028\\ufeff\\udc80"),
        ("می\u200cکنم 中文　👩\u200d🚀 é <b>&", "می\u200cکنم 中文　👩\u200d🚀 é <b>&"),
    ],
)
def test_text_loses_its_power_and_nothing_else(text: str, expected: str) -> None:
    assert printable(text) == expected


@pytest.mark.parametrize(
    ("hours", "expected"), [(0, "0.0 s"), (0.02, "72.0 s"), (1.5, "90.0 min"), (2.25, "2.2 h"), (52_000, "52,000 h")]
)
def test_durations_read_as_people_say_them(hours: float, expected: str) -> None:
    assert duration(hours) == expected
