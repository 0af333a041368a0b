"""The curation folder: append-only Parquet tables of what was computed, so that any stop loses seconds and nothing is redone.

    state/sources/*.parquet            what each file is, by (path, stamp)
    state/signals/KEY/VIDEO-CHUNK.parquet   signals of a chunk (signals.py)
    state/clips/KEY/*.parquet          a row a clip, and a row with a null clip for a video that is done and has none
    state/scores/STAGE/KEY/*.parquet   a row a clip
    state/quarantine/*.parquet         what could not be used: path, clip, stage, key, reason, attempts

KEY is a hash of everything that decides the rows, so that another parameter is another table and going back finds the old one.
A part is written whole or not at all; rows that a kill made twice are the same rows, and reading takes each once. One process
a folder, by a kernel lock. Nothing here computes a score.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file

Row = dict[str, Any]
MAX_PARTS = 64  # of a table before they are joined into one
PARTIAL = ".*.partial*"  # how files.py names what is not whole yet
KEYS = {
    "sources": ("path", "stamp"),
    "clips": ("video", "clip"),
    "scores": ("clip",),
    "quarantine": ("path", "video", "clip", "key"),
}


class Store:
    """The tables of one folder, open for one process. Use as a context, or close it.

    Raises UserError when another process has the folder, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            raise UserError(f"--out must be a name in UTF-8, got {os.fsencode(folder)!r}; choose another.") from None
        self.folder, self._state = folder, folder / "state"
        self._number = itertools.count()
        try:
            self._state.mkdir(parents=True, exist_ok=True)
            self._lock = (self._state / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is being curated by another process; wait for it or choose another --out."
            ) from None
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror}); choose another --out.") from None
        # What a kill in the middle of a write left; nobody else writes here.
        for left in (*folder.glob(PARTIAL), *self._state.rglob(PARTIAL)):
            left.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(self, table: str, rows: Sequence[Row], columns: Mapping[str, type]) -> None:
        """Add rows as one part; `columns` gives every column's type. UserError when the disk refuses."""
        if rows:
            write_table(self._state / table / self._new_name(), rows, columns)

    def rows(self, table: str, columns: Mapping[str, type]) -> list[Row]:
        """Every row once, in the order first written. A part that is damaged is a UserError that names it."""
        parts = sorted((self._state / table).glob("*.parquet"))
        key = KEYS[table.split("/")[0]]
        rows: dict[tuple[Any, ...], Row] = {}
        for part in parts:
            for row in read_table(part):
                rows.setdefault(tuple(row[name] for name in key), row)
        if len(parts) > MAX_PARTS:
            self._join(parts)
        return [{name: _back(row.get(name), kind) for name, kind in columns.items()} for row in rows.values()]

    def _join(self, parts: Sequence[Path]) -> None:
        """Make one part of several, with every column that they have; a kill in between leaves rows twice, which is allowed."""
        import pyarrow
        import pyarrow.parquet

        whole = pyarrow.concat_tables(
            [pyarrow.parquet.ParquetFile(part).read() for part in parts], promote_options="default"
        )
        _write(parts[0].with_name(self._new_name()), whole)
        for part in parts:
            part.unlink()

    def _new_name(self) -> str:
        return f"{time.time_ns()}-{os.getpid()}-{next(self._number)}.parquet"

    def forget(self, table: str) -> None:
        """Remove a table."""
        for part in (self._state / table).glob("*.parquet"):
            part.unlink()

    def signals_path(self, key: str, video: str, chunk: int) -> Path:
        """Where a chunk's signals are."""
        return self._state / "signals" / key / f"{video}-{chunk}.parquet"

    def write_signals(self, path: Path, content: bytes) -> None:
        """Keep a chunk's signals; whole or not at all."""
        try:
            with whole_file(path) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise _refused(path, error) from None

    def read_signals(self, path: Path) -> bytes:
        """What `write_signals` kept; UserError naming the file when it is no longer whole."""
        import pyarrow.parquet

        try:
            content = path.read_bytes()
            pyarrow.parquet.read_table(io.BytesIO(content))
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from None
        return content


def write_table(path: Path, rows: Iterable[Row], columns: Mapping[str, type]) -> None:
    """Rows as one Parquet file, whole or not at all; lists and dicts as JSON text, null where a row lacks a column."""
    import pyarrow
    import pyarrow.parquet

    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    rows = list(rows)
    arrays = {
        name: pyarrow.array([_plain(row.get(name), kind) for row in rows], kinds.get(kind, pyarrow.string()))
        for name, kind in columns.items()
    }
    _write(path, pyarrow.table(arrays))


def read_table(path: Path) -> list[Row]:
    """Rows as written; UserError naming the file when it is no whole Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _write(path: Path, table: Any) -> None:
    import pyarrow.parquet

    try:
        with whole_file(path) as partial:
            pyarrow.parquet.write_table(table, partial)
    except OSError as error:
        raise _refused(path, error) from None


def _plain(value: Any, kind: type) -> Any:
    if value is None or kind not in (list, dict):
        return value if value is None else kind(value)
    return json.dumps(value)


def _back(value: Any, kind: type) -> Any:
    return json.loads(value) if kind in (list, dict) and isinstance(value, str) else value


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"cannot read {path} ({reason}); remove it, and what it held is computed again.")


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path} ({error.strerror or error}); free disk space, and curate again to go on from here."
    )
