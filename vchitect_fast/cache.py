"""The cache of latents and text embeddings: a folder of safetensors files, one an entry, each whole or absent.

Ranks that hold the frames of one sample together read only their own frames of an entry. To write one, each writes its frames
as a part (`DIGEST.1of4.safetensors`), and whoever finds all parts there joins them: no rank waits for another, so a rank
that found the entry and one that did not stay in step, and what a killed run left is used by the next.
A damaged file counts as absent, is named and is written again. Nothing is ever removed but parts that were joined.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file
from vchitect_fast.parallel.collectives import share

FRAMES = "latents"  # the tensor of an entry whose first dimension is cut among ranks
log = logging.getLogger(__name__)


def cache_key(kind: str, *parts: object) -> str:
    """The name of an entry, which changes with every part; `kind` is its folder."""
    return f"{kind}/{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"


class Cache:
    """Entries by `cache_key`. Raises UserError where the folder cannot be read or written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> dict[str, Tensor] | None:
        """An entry's tensors, on the CPU; None when it is absent or damaged."""
        path = self._path(key)
        with _missing_or_damaged(path):
            return load(path.read_bytes())
        return None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Write an entry."""
        self._write(self._path(key), tensors)

    def get_frames(self, key: str, size: list[int], rank: int = 0, num_ranks: int = 1) -> Tensor | None:
        """The rank's share of the frames of an entry of `size` [T, ...]; None when it is absent, damaged or of another size."""
        whole, part = self._path(key), self._path(key, rank, min(num_ranks, size[0]))
        frames = share(size[0], num_ranks, rank)
        found = self._slice(whole, size, frames)
        if found is None and part != whole and frames.stop > frames.start:
            own = [frames.stop - frames.start, *size[1:]]
            found = self._slice(part, own, slice(0, own[0]))
            if found is None:  # joined between the two looks
                found = self._slice(whole, size, frames)
        return found

    def put_frames(self, key: str, frames: Tensor, num_frames: int, rank: int = 0, num_ranks: int = 1) -> None:
        """Write the rank's share [T_loc, ...] of an entry of `num_frames` frames; the last rank to come joins the shares."""
        num_parts = min(num_ranks, num_frames)  # more ranks than frames: the last ones have none
        if not len(frames):
            return
        self._write(self._path(key, rank, num_parts), {FRAMES: frames})
        if num_parts > 1:
            self._join(key, num_parts)

    def _join(self, key: str, num_parts: int) -> None:
        """Make parts an entry, once all are there. Two ranks may do so at the same time, with the same bytes."""
        paths = [self._path(key, part, num_parts) for part in range(num_parts)]
        if not all(path.exists() for path in paths):
            return
        try:
            parts = [load(path.read_bytes())[FRAMES] for path in paths]
        except FileNotFoundError:  # the other rank was faster
            return
        except (SafetensorError, KeyError) as error:
            log.warning("a part of the cache entry %s is damaged (%s) and is written again", self._path(key), error)
            return
        self.put(key, {FRAMES: torch.cat(parts)})
        for path in paths:
            path.unlink(missing_ok=True)

    def _path(self, key: str, part: int = 0, num_parts: int = 1) -> Path:
        kind, digest = key.split("/")
        which = f".{part}of{num_parts}" if num_parts > 1 else ""
        return self._folder / kind / digest[:2] / f"{digest}{which}.safetensors"

    def _slice(self, path: Path, size: list[int], frames: slice) -> Tensor | None:
        """Some of the first dimension of a file's frames, read alone, where they are all of `size`."""
        found: Tensor | None = None
        with _missing_or_damaged(path), safe_open(path, framework="pt") as file:
            if FRAMES in file.keys():
                tensor = file.get_slice(FRAMES)
                found = tensor[frames] if list(tensor.get_shape()) == size else None
        return found

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        try:
            with whole_file(path) as partial:
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(partial))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write the cache file {path} ({error}); free disk space or choose another cache folder."
            ) from None


@contextmanager
def _missing_or_damaged(path: Path) -> Iterator[None]:
    """Leaves the block where the file is absent, or damaged, which is said; UserError where it cannot be read."""
    try:
        yield
    except FileNotFoundError:
        return
    except SafetensorError as error:
        log.warning("the cache file %s is damaged (%s) and is written again", path, error)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot read the cache file {path} ({error.strerror or error}); mend its permissions or choose another cache folder."
    )
