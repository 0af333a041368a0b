"""Manifest: what is written is what is read, in all three formats; what is wrong is refused by row and column.

pytest tests/test_manifest.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vchitect_fast.errors import UserError
from vchitect_fast.manifest import SUFFIXES, Clip, read_manifest, read_rows, write_manifest

ROW: dict[str, Any] = {
    "path": "a.mp4", "start": 0.1, "end": 2.0 / 3.0, "num_frames": 14, "width": 640, "height": 272, "fps": 25.0, "caption": "a, \"b\"\nü",
}  # fmt: skip


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_clips_round_trip(tmp_path: Path, suffix: str) -> None:
    clips = [
        Clip(tmp_path / "videos" / "a.mp4", 0.1, 2.0 / 3.0, 14, 640, 272, 30000 / 1001, 'a, "b"\nü'),
        Clip(tmp_path.parent / "outside.mp4", 0.0, 0.0, 1, 16, 16, 1.0, ""),
    ]
    write_manifest(clips, tmp_path / f"m{suffix}")
    assert read_manifest(tmp_path / f"m{suffix}") == clips
    assert read_rows(tmp_path / f"m{suffix}")[0]["path"] == os.path.join("videos", "a.mp4")


@pytest.mark.parametrize("first", SUFFIXES)
@pytest.mark.parametrize("second", SUFFIXES)
def test_rows_with_scores_survive_every_conversion(tmp_path: Path, first: str, second: str) -> None:
    scores: list[dict[str, Any]] = [
        {"aesthetic": 4.25, "text": "007", "static": True, "count": 3, "tool": "v1.0.2"},
        {"aesthetic": None, "text": "x", "static": False, "count": -4, "tool": "1e"},
    ]
    rows = [ROW | score for score in scores]
    write_manifest(rows, tmp_path / f"a{first}")
    write_manifest(read_rows(tmp_path / f"a{first}"), tmp_path / f"b{second}")
    back = read_rows(tmp_path / f"b{second}")
    assert back == rows
    assert [[type(v) for v in row.values()] for row in back] == [[type(v) for v in row.values()] for row in rows]


def test_relative_paths_start_at_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    write_manifest([ROW], tmp_path / "m.jsonl")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_manifest(Path("..") / "m.jsonl")[0].path == tmp_path.resolve() / "a.mp4"


def test_a_csv_typed_by_hand_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("path,start,end,num_frames,width,height,fps,caption\na.mp4,0,1.50,36,640,272,24,007\n")
    assert read_manifest(path) == [Clip(tmp_path.resolve() / "a.mp4", 0.0, 1.5, 36, 640, 272, 24.0, "007")]


@pytest.mark.parametrize(
    ("missing", "instead", "message"),
    [
        ("path", "file", "needs the column 'path'.*rename the column 'file'"),
        ("caption", "text", "needs the column 'caption'.*rename the column 'text'"),
        ("caption", "captoin", "rename the column 'captoin'"),
        ("num_frames", "score", "needs the column 'num_frames'.*vchitect-fast curate"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_column_is_named_with_the_nearest(
    tmp_path: Path, missing: str, instead: str, message: str, suffix: str
) -> None:
    row = {(instead if name == missing else name): value for name, value in ROW.items()}
    path = tmp_path / f"m{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({name: [value] for name, value in row.items()}), path)
    elif suffix == ".jsonl":
        write_lines(path, row)
    else:
        path.write_text(",".join(row) + "\n" + ",".join(["1"] * len(row)) + "\n")
    with pytest.raises(UserError, match=message):
        read_manifest(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": "0"}, "start in row 2 .* must be a finite number, got '0'"),
        ({"end": float("nan")}, "end in row 2 .* got nan"),
        ({"fps": True}, "fps in row 2 .* got True"),
        ({"fps": 0}, "fps in row 2 .* above 0"),
        ({"num_frames": 2.5}, "num_frames in row 2 .* whole number above 0, got 2.5"),
        ({"width": 0}, "width in row 2"),
        ({"caption": None}, "caption in row 2 .* must be text, got None"),
        ({"path": ""}, "path in row 2"),
        ({"end": 0.1}, "0 <= start < end, got 0.1 and 0.1"),
        ({"start": -1.0}, "0 <= start < end"),
    ],
)
def test_a_wrong_value_is_named_by_row_and_column(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "m.jsonl", ROW, ROW | change)
    with pytest.raises(UserError, match=message):
        read_manifest(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", b"", "has no rows"),
        ("m.csv", b"path,start\n", "has no rows"),
        ("m.csv", b"path,start\na,1,2\n", "row 1 .* must have 2 fields"),
        ("m.csv", b"path,start\na\n", "row 1 .* must have 2 fields"),
        ("m.jsonl", b"{}\n{", "line 2 .* is not JSON"),
        ("m.jsonl", b"[1]\n", "line 1 .* must be a JSON object, got list"),
        ("m.jsonl", b"{}\n", "needs the column 'path', got nothing"),
        ("m.jsonl", b"\xff\xfe", "must be UTF-8"),
        ("m.parquet", b"PAR1 but not really", "is not a Parquet file"),
        ("m.parquet", b"", "is not a Parquet file"),
        ("m.txt", b"", "ends in .parquet, .jsonl, .csv"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_absent_file_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UserError, match="cannot read the manifest .*No such file"):
        read_manifest(tmp_path / f"m{suffix}")


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("m.jsonl", [], "at least one row"),
        ("m.jsonl", [ROW, ROW | {"fps": "x"}], "fps in row 2"),
        ("m.csv", [ROW | {"boxes": [1, 2]}], "text and numbers only, got list in 'boxes'"),
        ("m.parquet", [ROW | {"score": 1}, ROW | {"score": "high"}], "'score' must hold one type"),
        ("m.jsonl", [ROW | {"score": b"raw"}], "not JSON serializable"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, name: str, rows: Any, message: str) -> None:
    path = tmp_path / name
    write_manifest([ROW], path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=message):
        write_manifest(rows, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [name], "a temporary file was left behind"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the manifest"):
        write_manifest([ROW], tmp_path / "file" / "m.jsonl")
