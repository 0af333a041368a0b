"""Members of tar files, read where they lie: a path like `shards/clips-000000.tar/KEY.mp4` is a file inside that tar.

Such a path is a member only where the system says that its parent is a file; a real file in a real folder whose name ends in
.tar is that file. Nothing is ever extracted. Refused, each with its reason, are compressed tars, members that are links,
devices or sparse, names that are absolute or hold "..", names that a tar holds twice, and a member that the tar ends
before. A tar is scanned once (as long as its size and time stay) for where its members begin. Standard library only.
"""

from __future__ import annotations

import errno
import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

SUFFIX = ".tar"
TARS_IN_MEMORY = 4096  # scanned tars whose tables are kept; about 0.2 MB each at a thousand members


@dataclass(frozen=True)
class Contents:
    """What a tar holds: plain files by name, as (first byte, number of bytes), in their order, and what was refused."""

    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # name as the tar has it -> reason
    damage: str = ""  # why reading ended before the tar's end, "" when it did not


class Range(io.RawIOBase):
    """Bytes begin..begin+size of a file, as a file of its own that can seek; closing it closes the file."""

    def __init__(self, file: BinaryIO, begin: int, size: int, name: str) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0
        self.name = name

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Position within the range."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move within the range; OSError before its beginning."""
        at = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence] + offset
        if at < 0:
            raise OSError(errno.EINVAL, "a seek before the beginning", self.name)
        self._at = at
        return at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read at most what is left of the range."""
        count = max(0, min(len(buffer), self._size - self._at))
        # pread: threads may share nothing, but a position that nobody moves needs no thought.
        data = os.pread(self._file.fileno(), count, self._begin + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file under it."""
        self._file.close()
        super().close()


def split(path: str | Path) -> tuple[Path, str] | None:
    """(tar, member's name) of a path into a tar, None for any other path, also one where nothing is."""
    path = Path(path)
    for parent in path.parents:
        if parent.suffix == SUFFIX and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


@contextmanager
def opened(path: str | Path) -> Iterator[str | BinaryIO]:
    """What a video library opens: the path itself, or a member as a file. OSError whose `strerror` is the reason."""
    found = split(path)
    if found is None:
        yield str(path)
        return
    tar, name = found
    with tar.open("rb") as file:
        begin, size = _locate(tar, name, os.fstat(file.fileno()))
        with Range(file, begin, size, str(path)) as member:
            yield cast(BinaryIO, member)


def located(path: str | Path) -> tuple[Path, int, int] | None:
    """(tar, first byte, number of bytes) of a member, None for a path that is none. OSError as `opened`."""
    found = split(path)
    return (found[0], *_locate(*found, found[0].stat())) if found else None


def stamp(path: str | Path) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a file, or of a member and its tar. OSError as `opened`."""
    found = split(path)
    if found is None:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    stat = found[0].stat()
    return _locate(*found, stat)[1], stat.st_mtime_ns


def contents(tar: str | Path) -> Contents:
    """Every member of a tar, without reading their content; OSError when the file cannot be read or is no plain tar."""
    stat = os.stat(tar)
    return _scan(str(Path(tar).absolute()), stat.st_size, stat.st_mtime_ns)


def _locate(tar: Path, name: str, stat: os.stat_result) -> tuple[int, int]:
    found = _scan(str(tar.absolute()), stat.st_size, stat.st_mtime_ns)
    # Refused first: of a name that comes twice one could be taken, and nobody would know which.
    reason = found.refused.get(name) or _bad_name(name)
    if not reason and name in found.members:
        return found.members[name]
    raise OSError(errno.EINVAL, f"{tar.name} {reason or found.damage or 'has no such member'}", str(tar / name))


@lru_cache(maxsize=TARS_IN_MEMORY)
def _scan(tar: str, size: int, mtime_ns: int) -> Contents:
    """`size` and `mtime_ns` make the key: a tar that was written again is scanned again."""
    found = Contents()
    damage = ""
    try:
        with tarfile.open(tar, "r:") as archive:
            while True:
                try:
                    member = archive.next()
                except tarfile.TarError as error:
                    damage = f"is damaged or cut short after {len(found.members)} members ({error})"
                    break
                if member is None:
                    damage = _no_end(archive, len(found.members))
                    break
                _take(member, size, found)
    except tarfile.TarError as error:
        raise OSError(errno.EINVAL, f"{Path(tar).name} is no uncompressed tar ({error})", tar) from None
    return Contents(found.members, found.refused, damage)


def _no_end(archive: tarfile.TarFile, num_members: int) -> str:
    """What is wrong where tarfile sees no further member: it takes garbage and a cut at a member's edge for the end."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if block.count(0) == tarfile.BLOCKSIZE:
        return ""
    return f"is {'damaged' if block else 'cut short'} after {num_members} members (no end mark)"


def _take(member: tarfile.TarInfo, size: int, found: Contents) -> None:
    """File a member under its plain name, or its refusal."""
    if member.isdir():
        return
    name = PurePosixPath(member.name).as_posix()  # "./a.mp4" as `tar cf x.tar .` writes it is "a.mp4"
    reason = _bad_name(member.name)
    if not reason and not member.isreg():
        reason = "holds it as a link or a device, only plain files are read"
    if not reason and member.issparse():
        reason = "holds it as a sparse file, only plain files are read"
    if not reason and member.offset_data + member.size > size:
        reason = "is cut short within it"
    if not reason and (name in found.members or name in found.refused):
        found.members.pop(name, None)
        reason = "holds it twice"
    if reason:
        found.refused[name] = reason
    else:
        found.members[name] = (member.offset_data, member.size)


def _bad_name(name: str) -> str:
    """Why a member's name is refused, "" when it is plain."""
    if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts or "\0" in name:
        return f"holds a member that would leave its folder ({name[:80]!r})"
    return ""
