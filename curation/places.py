"""Places: local folders and fsspec URLs that videos are fetched from and exports are put to, whole files only.

On a local folder files are made in place (temporary name, then renamed). For a URL they are made in a temporary folder,
uploaded under a temporary name and renamed there, so that no reader meets half a file. One export a local folder at a time.
Looks into no file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from vchitect_fast.curation.frames import BadVideo, reason
from vchitect_fast.errors import UserError

_PARTIAL = re.compile(r"\..+\.(\d+)\.partial(\..*)?")


def is_url(path: str) -> bool:
    """Whether fsspec opens it and not the system."""
    return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL and the path in it; UserError when fsspec or the protocol's package is missing."""
    try:
        import fsspec

        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{url} needs a package for its protocol ({error}); pip install it, or name a folder."
        ) from None


class Destination:
    """Where an export goes. `work` is the local folder to make files in, under their final names."""

    def __init__(self, to: str) -> None:
        """UserError when the place cannot be written."""
        self.to = to.rstrip("/") or to
        self._system: Any = None
        if is_url(to):
            self._system, self._root = filesystem(self.to)
            self.work = Path(tempfile.mkdtemp(prefix="vchitect-fast-export-"))
            return
        self.work = Path(to)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {to} ({error.strerror}); choose another --to.") from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder for this process, without what killed exports left half done; UserError when it is held."""
        if self._system:
            try:
                yield
            finally:
                shutil.rmtree(self.work, ignore_errors=True)
            return
        with (self.work / ".export.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another export writes to {self.to}; wait for it, or choose another --to.") from None
            for folder in (self.work, *(path for path in self.work.iterdir() if path.is_dir())):
                for path in folder.iterdir():
                    if _PARTIAL.fullmatch(path.name):
                        path.unlink(missing_ok=True)
            yield

    def publish(self, name: str) -> None:
        """Bring `work / name` to its place; UserError when the upload fails."""
        if not self._system:
            return
        target = f"{self._root}/{name}"
        folder, _, last = target.rpartition("/")
        partial = f"{folder}/.{last}.{os.getpid()}.partial"
        try:
            self._system.makedirs(folder, exist_ok=True)
            self._system.put_file(str(self.work / name), partial)
            self._system.mv(partial, target)
        except Exception as error:  # each fsspec backend has its own
            raise UserError(f"cannot upload {name} to {self.to} ({reason(error)}); try again to continue.") from None
        (self.work / name).unlink()

    def exists(self, name: str) -> bool:
        """Whether a whole file of that name is there."""
        return bool(self._system.exists(f"{self._root}/{name}")) if self._system else (self.work / name).is_file()

    def names(self) -> list[str]:
        """Names of the files at the top, sorted."""
        if not self._system:
            return sorted(path.name for path in self.work.iterdir() if path.is_file())
        if not self._system.exists(self._root):
            return []
        found = self._system.ls(self._root, detail=False)
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def open(self, name: str) -> BinaryIO:
        """Open a file that is there."""
        return cast(
            BinaryIO, self._system.open(f"{self._root}/{name}", "rb") if self._system else (self.work / name).open("rb")
        )


class Sources:
    """Videos as local files: a URL is downloaded once and removed after the last of its clips."""

    def __init__(self, paths: Iterable[str], folder: Path) -> None:
        """`paths`: one a clip; downloads go to `folder`."""
        self._left = Counter(path for path in paths if is_url(path))
        self._locks = {path: threading.Lock() for path in self._left}
        self._folder = folder

    @contextmanager
    def local(self, path: str) -> Iterator[str]:
        """A local path for one clip's work; BadVideo when it cannot be fetched."""
        if not is_url(path):
            yield path
            return
        target = self._folder / f"{hashlib.sha256(path.encode()).hexdigest()[:16]}{Path(path).suffix[:8]}"
        with self._locks[path]:
            if not target.exists():
                _download(path, target)
        try:
            yield str(target)
        finally:
            with self._locks[path]:
                self._left[path] -= 1
                if not self._left[path]:
                    target.unlink(missing_ok=True)


def _download(url: str, target: Path) -> None:
    system, name = filesystem(url)
    partial = target.with_suffix(".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(name, str(partial))
        partial.rename(target)
    except Exception as error:  # each fsspec backend has its own
        raise BadVideo(f"cannot fetch it ({reason(error)})") from None
