"""Shards: WebDataset tars of clips, `clips-000000.tar` with KEY.mp4, KEY.json (the row) and KEY.txt (the caption).

Beside each tar lies its own manifest, `clips-000000.jsonl`, written after it: a tar without one was not finished and is
written again. All rows together are `index.parquet`, a manifest whose paths point into the tars, which training reads in
place (members.py). `index` makes such a manifest for tars from elsewhere by reading their videos' packets. A tar with
links, names that leave its folder, double names or a missing end is refused; nothing is extracted, nothing compressed.
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vchitect_fast import members
from vchitect_fast.curation.places import Destination
from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file, write_text
from vchitect_fast.manifest import COLUMNS, write_manifest
from vchitect_fast.webdataset import BadSample, Sample, probe, samples, texts

Row = dict[str, Any]

INDEX = "index.parquet"
_NAME = re.compile(r"clips-(\d{6})\.jsonl")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,100}")  # no dot: WebDataset ends a key at its first


class ShardWriter:
    """Packs clips into tars of at most `max_bytes` and `max_clips`; a single larger clip has a tar of its own."""

    def __init__(self, destination: Destination, first_number: int, max_bytes: int, max_clips: int) -> None:
        self._destination, self._number = destination, first_number
        self._max_bytes, self._max_clips = max_bytes, max_clips
        self._waiting: list[tuple[str, Path, Row]] = []
        self._num_bytes = 0
        self.rows: list[Row] = []  # of finished shards, paths from the destination's folder

    def add(self, key: str, video: Path, row: Row) -> None:
        """Take a clip's file, which is removed once its tar is written, and its row, whose path is set here."""
        assert _KEY.fullmatch(key), key
        num_bytes = video.stat().st_size + 4096  # headers and texts; the limit is no exact science
        if self._waiting and (self._num_bytes + num_bytes > self._max_bytes or len(self._waiting) == self._max_clips):
            self.finish()
        self._waiting.append((key, video, row))
        self._num_bytes += num_bytes

    def finish(self) -> None:
        """Write what waits. UserError when the disk is full."""
        if not self._waiting:
            return
        name = f"clips-{self._number:06d}"
        rows = [{**row, "path": f"{name}.tar/{key}.mp4"} for key, _, row in self._waiting]
        tar = self._destination.work / f"{name}.tar"
        try:
            with whole_file(tar) as partial, tarfile.open(partial, "w") as archive:
                for (key, video, _), row in zip(self._waiting, rows, strict=True):
                    with video.open("rb") as file:
                        archive.addfile(_header(f"{key}.mp4", video.stat().st_size), file)
                    for ending, text in (
                        (".json", json.dumps(plain(row), ensure_ascii=False)),
                        (".txt", row["caption"]),
                    ):
                        content = text.encode()
                        archive.addfile(_header(key + ending, len(content)), io.BytesIO(content))
        except OSError as error:
            raise UserError(f"cannot write {tar} ({error.strerror}); free some space and export again.") from None
        self._destination.publish(tar.name)
        # Only now: this file says that the tar is done.
        write_text(self._destination.work / f"{name}.jsonl", "".join(json.dumps(plain(row)) + "\n" for row in rows))
        self._destination.publish(f"{name}.jsonl")
        for _, video, _ in self._waiting:
            video.unlink()
        self.rows += rows
        self._waiting, self._num_bytes, self._number = [], 0, self._number + 1


def finished(destination: Destination) -> tuple[list[Row], int]:
    """The rows of the shards that are done, and the number of the next one. UserError when a tar is gone or damaged."""
    names = destination.names()
    rows, number = [], 0
    for name in names:
        if not (found := _NAME.fullmatch(name)):
            continue
        tar = f"clips-{found[1]}.tar"
        if tar not in names:
            raise UserError(
                f"{destination.to} holds {name} without {tar}; remove {name} to have these clips exported again."
            )
        with destination.open(name) as file:
            rows += [json.loads(line) for line in file.read().decode().splitlines()]
        if (local := destination.work / tar).exists() and (damage := members.contents(local).damage):
            raise UserError(f"{local} {damage}; remove it and {name} to have these clips exported again.")
        number = int(found[1]) + 1
    return rows, number


def index(tars: Sequence[Path], out: Path) -> tuple[int, dict[str, str]]:
    """Write the manifest `out` of the videos in tars made anywhere; returns its rows and path -> reason of those left out.

    A video's caption is the text of KEY.txt, else "caption" or "text" of KEY.json, else empty; the other fields of
    KEY.json become columns, what names a column of the manifest excepted: sizes and times are the video's own.
    Raises UserError for a tar that cannot be trusted, before anything is written, and when no video is usable.
    """
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for tar in tars:
        for sample in _samples(tar):
            try:
                facts = probe(sample.path)
            except BadSample as error:
                failed[str(sample.path)] = str(error)
                continue
            row = {"path": _relative(sample.path, out), **facts, **_texts(tar, sample)}
            rows.append({name: row[name] for name in (*COLUMNS, *(row.keys() - COLUMNS.keys()))})
    if not rows:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(failed.items())[:3]) or "no videos in them"
        raise UserError(f"no clip in {len(tars)} tars can be used ({reasons}); check the files.")
    write_manifest(in_one_type(rows), out)
    return len(rows), failed


def _samples(tar: Path) -> list[Sample]:
    """The videos of a tar; UserError for one that cannot be trusted."""
    try:
        contents = members.contents(tar)
        found = samples(tar, contents)
    except OSError as error:
        raise UserError(f"cannot read {tar} ({error.strerror or error}); name uncompressed .tar files.") from None
    except BadSample as error:
        raise UserError(f"{tar} {error}.") from None
    problem = next(iter(contents.refused.items()), None)
    if problem or contents.damage or tar.suffix != members.SUFFIX:
        what = f"{problem[1]} ({problem[0]!r})" if problem else contents.damage or "does not end in .tar"
        raise UserError(f"{tar} {what}; write it again with plain files under relative names, each once.")
    return [sample for sample in found if not sample.is_image]


def _texts(tar: Path, sample: Sample) -> Row:
    """The caption and the further columns that a sample's text and JSON members say."""
    try:
        caption, said = texts(sample)
    except BadSample as error:
        raise UserError(f"{tar}: {error}; write the tar again.") from None
    return {"caption": caption} | {name: value for name, value in said.items() if name not in COLUMNS}


def _relative(path: Path, out: Path) -> str:
    """As a manifest names it: from the manifest's folder when it lies inside, so that the folder can move."""
    absolute, folder = path.resolve(), out.resolve().parent
    text = str(absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute)
    if not text.isprintable():
        raise UserError(f"a manifest holds printable paths, got {text!r}; write the tar again with plain names.")
    return text


def _header(name: str, size: int) -> tarfile.TarInfo:
    """Without time and owner: the same clips make the same bytes."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o644
    return header


def plain(value: Any) -> Any:
    """A value as every reader of JSON takes it: NaN and infinity become null, what JSON has no type for its text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def in_one_type(rows: Iterable[Row]) -> list[Row]:
    """Rows whose columns Parquet can hold: one with objects, or with types that do not mix, becomes JSON text."""
    import pyarrow

    rows = [dict(row) for row in rows]
    for name in dict.fromkeys(name for row in rows for name in row if name not in COLUMNS):
        values = [row.get(name) for row in rows]
        try:
            fits = not any(isinstance(value, dict) for value in values) and pyarrow.array(values) is not None
        except pyarrow.ArrowException:
            fits = False
        for row in rows if not fits else []:
            row[name] = None if row.get(name) is None else json.dumps(plain(row[name]), ensure_ascii=False)
    return rows


def run_index(words: list[str]) -> int:
    """`vchitect-fast curate index TAR... --out index.parquet`: 0, or 1 when videos had to be left out."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(
        prog="vchitect-fast curate index",
        description="Write the manifest of WebDataset tars, so that train reads their videos in place.",
        epilog="example: vchitect-fast curate index shards/*.tar --out shards/index.parquet",
    )
    parser.add_argument("tars", nargs="+", type=Path, metavar="TAR", help="uncompressed .tar files")
    parser.add_argument("--out", required=True, type=Path, help="manifest to write: .parquet, .jsonl or .csv")
    args = parser.parse_args(words)
    num_rows, failed = index(args.tars, args.out)
    for path, reason in failed.items():
        print(f"left out: {path}: {reason}", file=sys.stderr)
    print(f"{num_rows} clips in {len(args.tars)} tars -> {args.out}")
    return 1 if failed else 0
