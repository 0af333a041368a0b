"""Inputs: the videos that a command names, as files, folders and URLs, in an order that does not depend on the machine.

A folder gives the files in it with a video's suffix, at any depth; a file that is named is taken whatever its suffix. A
name that is nothing is a UserError before any work; what a file holds is found out later.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vchitect_fast.curation.probe import file_stamp
from vchitect_fast.errors import UserError

SUFFIXES = frozenset(".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split())


def find_videos(inputs: Iterable[str]) -> list[str]:
    """Absolute paths and URLs, sorted, each once; URLs may hold wildcards where their file system lists files."""
    found: set[str] = set()
    for name in inputs:
        if "://" in name:
            found.update(_urls(name))
        elif Path(name).is_dir():
            inside = [
                os.path.join(folder, file)
                for folder, folders, files in os.walk(os.path.abspath(name))
                for file in files
                # A hidden folder or file is a tool's, and "._x.mp4" is no video.
                if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith(".") and not _hidden(folder, name)
            ]  # fmt: skip
            if not inside:
                raise UserError(f"{name} has no file that ends like a video; name the files, or another folder.")
            found.update(inside)
        elif os.path.lexists(name):
            found.add(os.path.abspath(name))
        else:
            raise UserError(f"expected a video, a folder or a URL, found nothing at {name}; correct the name.")
    return sorted(found)


def stamp_of(path: str) -> str:
    """`file_stamp` as text, "absent" where the file cannot be looked at."""
    try:
        return str(file_stamp(path))
    except Exception:  # each file system of fsspec has its own; the probe says what it is
        return "absent"


def _hidden(folder: str, top: str) -> bool:
    return any(part.startswith(".") for part in Path(os.path.relpath(folder, os.path.abspath(top))).parts)


def _urls(name: str) -> list[str]:
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(name)
        if system.isdir(path):
            names = [item for item in system.find(path) if os.path.splitext(item)[1].lower() in SUFFIXES]
        else:
            names = system.glob(path) if any(sign in path for sign in "*?[") else [path]
        # "simplecache::zip://a.mp4::file:///x.zip": the file system names only the link that has a place.
        links = name.split("::")
        place = next(k for k, link in enumerate(links) if "://" in link)
        urls = ["::".join([*links[:place], system.unstrip_protocol(item), *links[place + 1 :]]) for item in names]
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"cannot list {name} ({error}); check the URL, or install what opens it.") from None
    if not urls:
        raise UserError(f"{name} has no file that ends like a video; check the URL.")
    return urls
