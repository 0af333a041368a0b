"""Manifest: a table with one row a clip, as Parquet, JSON lines or CSV. What curation writes and training reads.

Eight columns are required, whatever else a row holds (scores) is kept as it is:

    path        video or image file; relative paths start at the manifest's own folder. "clips-000000.tar/KEY.mp4" is a
                member of that tar, read where it lies (members.py), unless there is a folder of that name
    start, end  seconds from the first frame of the file; the clip is start <= t < end
    num_frames  frames of the file within [start, end); 1 for an image
    width, height, fps   of the file: pixels, pixels, frames a second
    caption     text, may be empty

Every row is checked, when read and before anything is written. Nothing here opens a video: a missing column is an error
and never probed for. No torch; pyarrow only for Parquet.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file

# Required columns, and other tools' names for the same thing, for the hint in the error.
COLUMNS: dict[str, tuple[str, ...]] = {
    "path": ("file", "filename", "file_name", "video", "video_path", "filepath"),
    "start": ("start_s", "start_time", "begin"),
    "end": ("end_s", "end_time", "stop"),
    "num_frames": ("frames", "n_frames", "frame_count", "nframes"),
    "width": ("w", "resolution_width"),
    "height": ("h", "resolution_height"),
    "fps": ("frame_rate", "framerate", "rate"),
    "caption": ("text", "prompt", "description", "label"),
}
SUFFIXES = (".parquet", ".jsonl", ".csv")
Row = dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """One row of a manifest; the module's docstring has the meaning and unit of each field."""

    path: Path
    start: float
    end: float
    num_frames: int
    width: int
    height: int
    fps: float
    caption: str

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return self.end - self.start


def read_manifest(path: str | Path) -> list[Clip]:
    """The clips of a manifest, in its order, with absolute paths.

    Raises UserError, naming the column and the row (counted from 1), for whatever is missing or wrong.
    """
    folder = Path(path).resolve().parent
    return [_clip(row, f"row {k} of {path}", folder) for k, row in enumerate(read_rows(path), 1)]


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a manifest with every column, scores too, and paths as written; UserError as `read_manifest`."""
    path = Path(path)
    reader = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}.get(path.suffix)
    if reader is None:
        raise UserError(f"a manifest ends in {', '.join(SUFFIXES)}, got {path}; rename or convert it.")
    try:
        rows = reader(path)
    except OSError as error:
        raise UserError(
            f"cannot read the manifest {path} ({error.strerror or error}); make one with `vchitect-fast curate`."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"the manifest {path} must be UTF-8 text, got byte {error.start} that is not; convert it."
        ) from None
    if not rows:
        raise UserError(f"the manifest {path} has no rows; make one with `vchitect-fast curate`.")
    return [_checked(row, f"row {k} of {path}") for k, row in enumerate(rows, 1)]


def write_manifest(clips: Iterable[Clip | Mapping[str, Any]], path: str | Path) -> None:
    """Write clips, or rows with more columns, in the format that the suffix of `path` names; whole or not at all.

    A clip's path inside the manifest's folder is written relative to it, so that the folder can move; a row's path is
    written as it is. Raises UserError when a row could not be read back, before anything is written.
    """
    path = Path(path)
    rows = [_row(clip, path.resolve().parent) if isinstance(clip, Clip) else dict(clip) for clip in clips]
    if not rows:
        raise UserError(f"a manifest needs at least one row, got none for {path}; check what was to be written.")
    rows = [_checked(row, f"row {k} for {path}") for k, row in enumerate(rows, 1)]
    writer = {".parquet": _write_parquet, ".jsonl": _write_jsonl, ".csv": _write_csv}.get(path.suffix)
    if writer is None:
        raise UserError(f"a manifest ends in {', '.join(SUFFIXES)}, got {path}; choose one of these.")
    try:
        with whole_file(path) as partial:
            writer(rows, partial)
    except OSError as error:
        raise UserError(
            f"cannot write the manifest {path} ({error.strerror or error}); what stood there is unchanged."
        ) from None


def _clip(row: Row, where: str, folder: Path) -> Clip:
    return Clip(folder / row["path"], *(row[name] for name in list(COLUMNS)[1:]))


def _row(clip: Clip, folder: Path) -> Row:
    absolute = clip.path.resolve()
    inside = absolute.is_relative_to(folder)
    return {**asdict(clip), "path": str(absolute.relative_to(folder) if inside else absolute)}


def _checked(row: Row, where: str) -> Row:
    """The row with the required columns in their types; UserError naming the column otherwise."""
    for name, aliases in COLUMNS.items():
        if name not in row:
            near = next((alias for alias in aliases if alias in row), None)
            near = near or next(iter(difflib.get_close_matches(name, list(row), n=1, cutoff=0.6)), None)
            remedy = f"rename the column {near!r}" if near else "`vchitect-fast curate` makes all of them"
            raise UserError(
                f"{where} needs the column {name!r}, got {', '.join(map(str, row)) or 'nothing'}; {remedy}."
            )
    row = dict(row)
    for name in ("path", "caption"):
        if not isinstance(row[name], str) or (name == "path" and not row[name]):
            raise UserError(f"{name} in {where} must be text, got {row[name]!r}; correct it (a caption may be empty).")
    for name in ("start", "end", "fps"):
        row[name] = _number(row[name], name, where)
    for name in ("num_frames", "width", "height"):
        number = _number(row[name], name, where)
        if number < 1 or number != int(number):
            raise UserError(f"{name} in {where} must be a whole number above 0, got {row[name]!r}; correct it.")
        row[name] = int(number)
    if row["fps"] <= 0:
        raise UserError(f"fps in {where} must be above 0 frames a second, got {row['fps']!r}; for an image write 1.")
    if row["start"] < 0 or row["end"] < row["start"] or (row["end"] == row["start"] and row["num_frames"] > 1):
        raise UserError(
            f"start and end in {where} must be seconds with 0 <= start < end, got {row['start']!r} and {row['end']!r}; correct them."
        )
    return row


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name} in {where} must be a finite number, got {value!r}; correct it.")
    return float(value)


def _columns(rows: Sequence[Row]) -> list[str]:
    """Every column of any row, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for k, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"line {k} of {path} is not JSON ({error.msg}); write one object a line.") from None
            if not isinstance(row, dict):
                raise UserError(
                    f"line {k} of {path} must be a JSON object, got {type(row).__name__}; write one object a line."
                )
            rows.append(row)
    return rows


def _write_jsonl(rows: list[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            try:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except TypeError as error:
                raise UserError(
                    f"a JSONL manifest holds text, numbers, lists and objects ({error}); convert that score."
                ) from None


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            reader = csv.DictReader(file)
            rows: list[Row] = []
            for k, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    raise UserError(
                        f"row {k} of {path} must have {len(reader.fieldnames or ())} fields, got another number; quote commas."
                    )
                rows.append(
                    {name: text if name in ("path", "caption") else _from_csv(text) for name, text in row.items()}
                )
        except csv.Error as error:
            raise UserError(f"{path} is not CSV ({error}); write it as .jsonl instead.") from None
    return rows


def _from_csv(text: str) -> Any:
    """A number where the text is one as JSON writes it (so "007" stays text), a truth value, None if empty."""
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    if re.fullmatch(r"-?(0|[1-9]\d*)", text):
        return int(text)
    if text in ("nan", "inf", "-inf") or re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", text):
        return float(text)
    return text


def _write_csv(rows: list[Row], path: Path) -> None:
    for row in rows:
        for name, value in row.items():
            if value is not None and not isinstance(value, (str, int, float)):
                raise UserError(
                    f"a CSV manifest holds text and numbers only, got {type(value).__name__} in {name!r}; write .jsonl or .parquet."
                )
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file ({str(error).splitlines()[0]}); write it again.") from None


def _write_parquet(rows: list[Row], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    arrays = {}
    for name in _columns(rows):
        try:
            arrays[name] = pyarrow.array([row.get(name) for row in rows])
        except pyarrow.ArrowException as error:
            raise UserError(
                f"the column {name!r} must hold one type for Parquet ({error}); write .jsonl instead."
            ) from None
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)
