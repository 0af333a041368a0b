"""Files that are either whole or not there: write under a temporary name, fsync, rename.

Whatever stood at the destination stays until the new content is complete on disk. A place that cannot be written is
a UserError of `write_text` and an OSError of the two blocks, whose callers know what was being written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vchitect_fast.errors import UserError


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically; makes the parent folder. UserError when the system refuses."""
    try:
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"could not write {path} ({error}); free some space or choose another place.") from None


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; becomes `path` when the block ends well, and is removed when it does not.

    The suffix of `path` is kept at the end, so that writers that read the format from it work.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Per process: runs that share a cache may write the same file at the same time.
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; takes the place of `path` when the block ends well, and is removed when it does not."""
    # Hidden names: a folder `model.old` beside `model` is somebody's.
    partial, aside = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    _bring_back(path, aside)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for item in (*partial.rglob("*"), partial):
            _sync(item)
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            path.rename(aside)
        partial.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _bring_back(path, aside)
    _sync(path.parent)


def _bring_back(path: Path, aside: Path) -> None:
    """Undo the first of the two renames when the second did not happen: it failed, or a kill came between them."""
    if aside.exists() and not path.exists():
        aside.rename(path)


def _sync(path: Path) -> None:
    """A file's content, or the names in a folder: a rename survives a power cut only when its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
