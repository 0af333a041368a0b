"""The clips that `manifest:` names: those of a manifest's file, or of WebDataset tars made anywhere, which are then the manifest.

    clips.parquet                   a manifest (manifest.py)
    shards/                         all .tar files in a folder
    shards/*.tar, x-{000..099}.tar  a glob, or a range of numbers; each tar must be there

A tar is read once: its samples (webdataset.py) with their sizes and captions are kept in an index file, as long as its size and
time stay, so every process and every resume has the same clips in the same order. A sample that cannot be used, a tar
that cannot be read and what lies behind the damage of one are left out and named; nothing usable at all is an error.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vchitect_fast import members
from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file
from vchitect_fast.manifest import SUFFIXES, Clip, read_manifest
from vchitect_fast.webdataset import BadSample, Sample, facts, samples, texts

INDEX_FOLDER = ".vchitect-fast"  # beside the tars
INDEX_VERSION = 1
PATIENCE_S = 2.0  # before a bar is shown
MAX_NAMED = 3  # bad samples of a tar, and bad tars in an error
Advance = Callable[[int, int], None]  # tars and clips done
log = logging.getLogger(__name__)


def read_clips(name: str | Path, index: str | Path | None = None) -> list[Clip]:
    """The clips of a manifest or of tars, in their order, with absolute paths.

    index  folder for the index files of tars, a run's `cache`; None puts them into `.vchitect-fast` beside each tar

    Raises UserError as `read_manifest`, and for tars of which none is there, has a usable sample, or can be indexed.
    """
    tars = _tars(str(name))
    if tars is None:
        return read_manifest(name)
    clips: list[Clip] = []
    reasons: list[str] = []
    with _bar(len(tars)) as advance:
        for tar in tars:
            found = _contents(tar, Path(index) if index else None, advance)
            clips += [Clip(**{**row, "path": tar / row["path"]}) for row in found.rows]
            if said := found.report(tar):
                log.warning("%s", said)
                reasons.append(said)
            advance(1, 0)
    if not clips:
        said = "; ".join(reasons[:MAX_NAMED]) or "they hold no video and no image"
        raise UserError(f"no clip in the {len(tars)} tars of {name} can be used ({said}); check the files.")
    return clips


@dataclass(frozen=True)
class _Index:
    """What a tar gives: rows of Clip's fields with the member as path, and member -> reason of what is left out."""

    rows: list[dict[str, Any]]
    left_out: dict[str, str]
    damage: str = ""  # of the tar itself

    def report(self, tar: Path) -> str:
        """What is left out and why, "" for nothing."""
        parts = [self.damage] if self.damage else []
        if self.left_out:
            named = ", ".join(f"{name[:80]!r} {why}" for name, why in list(self.left_out.items())[:MAX_NAMED])
            more = ", ..." if len(self.left_out) > MAX_NAMED else ""
            parts.append(f"{len(self.left_out)} samples are left out: {named}{more}")
        return f"{tar} {'; '.join(parts)}" if parts else ""


def _tars(name: str) -> list[Path] | None:
    """The absolute paths of the tars that a name means, None where it means no tars. UserError when there are none."""
    if Path(name).is_dir():
        found = sorted(Path(name).glob(f"*{members.SUFFIX}"))
    elif name.endswith(members.SUFFIX):
        numbered = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", name)
        if numbered:
            before, first, last, after = numbered.groups()
            found = [Path(f"{before}{k:0{len(first)}d}{after}") for k in range(int(first), int(last) + 1)]
        else:
            found = [Path(name)] if Path(name).exists() else sorted(map(Path, glob.glob(name, recursive=True)))
        if absent := [tar for tar in found if not tar.exists()]:
            raise UserError(
                f"{len(absent)} of the {len(found)} tars of {name} are absent, first {absent[0]}; correct it."
            )
    else:
        return None
    if not found:
        raise UserError(
            f"expected {', '.join(SUFFIXES)} or .tar files as the manifest, found none at {name}; correct it."
        )
    return [tar.absolute() for tar in found]


def _contents(tar: Path, index: Path | None, advance: Advance) -> _Index:
    """From the tar's index file, or read and put there."""
    try:
        stamp = list(members.stamp(tar))
    except OSError as error:
        return _Index([], {}, f"cannot be read ({error.strerror or error})")
    path = _index_path(tar, index)
    try:
        known = json.loads(path.read_bytes())
        if known["version"] == INDEX_VERSION and known["stamp"] == stamp:
            return _Index(known["rows"], known["left_out"], known["damage"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: made again
    found = _read(tar, advance)
    try:
        with whole_file(path) as partial:
            partial.write_text(json.dumps({"version": INDEX_VERSION, "stamp": stamp, **asdict(found)}))
    except OSError as error:
        raise UserError(
            f"cannot write the index of {tar} to {path} ({error.strerror or error}); set cache= to a folder that can be written, or make a manifest "
            "with `vchitect-fast curate index TAR... --out index.parquet`."
        ) from None
    return found


def _read(tar: Path, advance: Advance) -> _Index:
    """Every sample of a tar."""
    try:
        contents = members.contents(tar)
        found = samples(tar, contents)
    except OSError as error:
        return _Index([], {}, f"cannot be read ({error.strerror or error})")
    except BadSample as error:
        return _Index([], {}, str(error))
    rows, left_out = [], dict(contents.refused)
    for sample in found:
        member = sample.path.relative_to(tar).as_posix()
        try:
            rows.append({"path": member, **_row(sample)})
        except BadSample as error:
            left_out[member] = str(error)
        advance(0, 1)
    return _Index(rows, left_out, contents.damage)


def _row(sample: Sample) -> dict[str, Any]:
    caption, said = texts(sample)
    return {**facts(sample, said), "caption": caption}


def _index_path(tar: Path, index: Path | None) -> Path:
    if index is None:
        return tar.parent / INDEX_FOLDER / f"{tar.name}.json"
    return index / "tars" / f"{hashlib.sha256(str(tar).encode()).hexdigest()[:32]}.json"


@contextmanager
def _bar(num_tars: int) -> Iterator[Advance]:
    """Call what it gives with (tars done, clips done): a bar on a terminal once it takes longer than PATIENCE_S."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, began, num_clips = Console(stderr=True), time.monotonic(), 0
    columns = (TextColumn("indexing tars"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())  # fmt: skip
    bars = Progress(*columns, console=console, transient=True)
    task = bars.add_task("", total=num_tars, note="")

    def advance(tars: int, clips: int) -> None:
        nonlocal num_clips
        num_clips += clips
        bars.update(task, advance=tars, note=f"{num_clips:,} clips")
        if not bars.live.is_started and console.is_terminal and time.monotonic() - began > PATIENCE_S:
            bars.start()

    try:
        yield advance
    finally:
        if bars.live.is_started:
            bars.stop()
