"""The curation folder: whole parts or none, every row once, one process, and what a kill or a full disk leaves.

pytest tests/curation/test_store.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vchitect_fast.curation.store import MAX_PARTS, Store, read_table, write_table
from vchitect_fast.errors import UserError

COLUMNS: dict[str, type] = {"clip": str, "score": float, "boxes": list, "parameters": dict}
TABLE = "scores/made_up/0123"


def row(number: int) -> dict[str, object]:
    return {"clip": f"clip {number}", "score": number / 3, "boxes": [[1, 2], []], "parameters": {"k": None}}


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "state" / TABLE).iterdir())


def test_rows_come_back_as_written_in_order(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(TABLE, [row(2), row(1)], COLUMNS)
        store.append(TABLE, [], COLUMNS)
        store.append(TABLE, [{"clip": "bare"}], COLUMNS)
    with Store(tmp_path) as store:
        bare = {"clip": "bare", "score": None, "boxes": None, "parameters": None}
        assert store.rows(TABLE, COLUMNS) == [row(2), row(1), bare]
        assert store.rows("scores/nothing/0123", COLUMNS) == []
    assert len(parts(tmp_path)) == 2


def test_a_row_written_twice_is_read_once(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(TABLE, [row(1), row(2)], COLUMNS)
        store.append(TABLE, [row(2), row(3)], COLUMNS)
        assert store.rows(TABLE, COLUMNS) == [row(1), row(2), row(3)]


def test_many_parts_become_one_with_every_column(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for number in range(MAX_PARTS + 1):
            store.append(TABLE, [row(number)], COLUMNS)
        # Who asks for one column only, as the pipeline does for "is it judged", must not cost the others.
        assert len(store.rows(TABLE, {"clip": str})) == MAX_PARTS + 1
        assert len(parts(tmp_path)) == 1
        assert store.rows(TABLE, COLUMNS) == [row(number) for number in range(MAX_PARTS + 1)]


def test_a_kill_between_joining_and_removing_leaves_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path) as store:
        for number in range(MAX_PARTS + 1):
            store.append(TABLE, [row(number)], COLUMNS)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda self, missing_ok=False: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                store.rows(TABLE, COLUMNS)
    with Store(tmp_path) as store:
        assert store.rows(TABLE, COLUMNS) == [row(number) for number in range(MAX_PARTS + 1)]


def test_what_a_kill_left_of_a_write_is_cleared_and_never_read(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(TABLE, [row(1)], COLUMNS)
        signals = store.signals_path("0123", "video", 0)
        store.write_signals(signals, b"whole")
    half = [
        parts(tmp_path)[0].with_name(".1-2-3.77.partial.parquet"),
        signals.with_name(".video-1.77.partial.parquet"),
        tmp_path / ".clips.77.partial.parquet",
    ]
    for path in half:
        path.write_bytes(b"PAR1 half")
    with Store(tmp_path) as store:
        assert store.rows(TABLE, COLUMNS) == [row(1)]
    assert not any(path.exists() for path in half)
    assert signals.read_bytes() == b"whole"


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text"])
def test_a_damaged_part_is_one_sentence_that_names_it(tmp_path: Path, damage: str) -> None:
    with Store(tmp_path) as store:
        store.append(TABLE, [row(k) for k in range(100)], COLUMNS)
        (part,) = parts(tmp_path)
        whole = part.read_bytes()
        flipped = bytearray(whole)
        flipped[-9] ^= 255  # in the footer; Parquet's pages carry no checksum by default
        part.write_bytes({"cut": whole[:-20], "empty": b"", "flipped": bytes(flipped), "text": b"hello" * 9}[damage])
        with pytest.raises(UserError) as caught:
            store.rows(TABLE, COLUMNS)
    assert str(part) in str(caught.value)
    assert str(caught.value).endswith("remove it, and what it held is computed again.")
    assert "\n" not in str(caught.value)


def test_damaged_signals_are_named(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        path = store.signals_path("0123", "video", 0)
        store.write_signals(path, b"no Parquet")
        with pytest.raises(UserError, match="remove it, and what it held is computed again") as caught:
            store.read_signals(path)
    assert str(path) in str(caught.value)


def test_one_process_a_folder(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from vchitect_fast.curation.store import Store; Store(Path({str(tmp_path)!r}))"
    with Store(tmp_path):
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
        assert "is being curated by another process" in done.stderr
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0, "closing frees the folder"


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="choose another --out"):
        Store(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        write_table(tmp_path / "file" / "table.parquet", [row(1)], COLUMNS)


def test_a_write_that_fails_leaves_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path / "table.parquet", [row(1)], COLUMNS)

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device.*curate again to go on from here"):
        write_table(tmp_path / "table.parquet", [row(2)], COLUMNS)
    assert len(read_table(tmp_path / "table.parquet")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]
    with Store(tmp_path) as store, pytest.raises(UserError, match="No space left on device"):
        store.write_signals(store.signals_path("0123", "video", 0), b"content")
