"""Files that are either whole or not there: write under a temporary name, fsync, rename.

Whatever stood at the destination stays until the new content is complete on disk. Standard library only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically; makes the parent folder."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


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
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; takes the place of `path` when the block ends well, and is removed when it does not."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for item in partial.rglob("*"):
            if item.is_file():
                with item.open("rb") as file:
                    os.fsync(file.fileno())
        aside = path.with_name(f"{path.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            path.rename(aside)
        partial.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only when the folder that holds the name is synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
