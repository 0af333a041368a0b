"""What a stage is: a judge that looks at frames of a clip and gives it scores. It keeps nothing and drops nothing.

A stage is a frozen dataclass whose fields are its parameters. Its `key` is a hash of everything that decides its scores
(version, backend, parameters, weights, and the keys of the stages whose scores it reads), so that scores are found again
as long as nothing of that changed. What a score must be for a clip to stay is not a parameter but a rule (rules.py):
changing a rule computes nothing anew.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vchitect_fast.errors import UserError

if TYPE_CHECKING:
    from vchitect_fast.curation.signals import Signals

Scores = dict[str, Any]  # name -> float, int, bool, str, a list of these, or None; JSON and Parquet hold them all


@dataclass(frozen=True)
class ClipSpan:
    """Frames first..last of a video, both in, counted from 0; start <= t < end in seconds from its first frame."""

    id: str  # "<video>-<first>-<last>": the same frames of the same file have the same id
    path: str  # a local path, or a URL that fsspec opens
    first: int
    last: int
    start: float
    end: float
    width: int  # pixels, as shown (after rotation)
    height: int
    fps: float  # mean frames a second of the file

    @property
    def num_frames(self) -> int:
        """Frames in the clip."""
        return self.last - self.first + 1

    @property
    def seconds(self) -> float:
        """Length."""
        return self.end - self.start

    def spread(self, num: int) -> list[float]:
        """`num` times (s) at the middles of `num` equal parts of the clip."""
        return [self.start + (k + 0.5) * self.seconds / num for k in range(num)]

    def ends(self) -> list[float]:
        """The times (s) of the first, the middle and the last frame, half a frame inside so that rounding cannot leave."""
        half = 0.5 * self.seconds / self.num_frames
        return [self.start + half, self.start + self.seconds / 2, self.end - half]


@dataclass(frozen=True)
class Want:
    """A frame that a stage asks for: the one shown at `time` (s), shrunk to `short_side` pixels (None: as it is)."""

    time: float
    short_side: int | None = None


@dataclass
class Sample:
    """A clip as a stage sees it."""

    span: ClipSpan
    frames: list[np.ndarray]  # one a want, in that order; uint8 RGB [H,W,3], turned as shown
    scores: Mapping[str, Scores]  # by stage name, of the stages in `reads`
    signals: Signals | None = None  # the clip's rows, for a SignalStage


class Stage(ABC):
    """Base of every judge. Subclasses are frozen dataclasses, so that they hash, compare and pickle.

    name      of the stage and of its score table; a proxy for a model has a name of its own, never the model's
    backend   what computes the scores; stored with each of them
    version   raised whenever the same parameters give other scores
    cost      order in the cascade, cheapest first; a rough number of milliseconds a clip
    columns   score name -> its type: float, int, bool, str, or list
    main      the score that `what-if --NAME CONDITION` means
    rules     score name -> condition that keeps a clip, when the user says nothing; {} keeps everything
    reads     names of stages whose scores this one uses
    extra     what `pip install 'vchitect-fast[...]'` must bring
    """

    name: ClassVar[str]
    backend: ClassVar[str]
    version: ClassVar[int]
    cost: ClassVar[float]
    columns: ClassVar[Mapping[str, type]]
    main: ClassVar[str]
    rules: ClassVar[Mapping[str, str]] = {}
    reads: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "curation"

    @abstractmethod
    def wants(self, span: ClipSpan) -> list[Want]:
        """The frames to look at, in ascending time."""

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """One dict with the keys of `columns` a sample, in order. May batch. Deterministic.

        Raises whatever went wrong: the pipeline tries again sample by sample, then quarantines with the reason.
        """

    def results(self, samples: Sequence[Sample]) -> list[Scores | Exception]:
        """`score`, for a stage that can say which sample has none: the error in its place, and the others keep theirs."""
        return [*self.score(samples)]

    def check(self) -> None:
        """Called once before any work: UserError where parameters, packages or weights make scoring impossible.

        The default asks nothing. A backend whose library is missing names its extra here.
        """
        return None

    @property
    def weights(self) -> str:
        """Hash of the weights' bytes (`weights_hash`), "" for a backend without weights."""
        return ""

    def parameters(self) -> dict[str, Any]:
        """The fields that decide scores; those marked `field(metadata={"key": False})` (a device, a URL) do not."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)  # type: ignore[arg-type]
            if f.metadata.get("key", True)
        }

    def key(self, read_keys: Sequence[str] = ()) -> str:
        """16 hex digits of everything that decides the scores; `read_keys` are the keys of the stages in `reads`."""
        parts = [self.name, self.backend, self.version, self.weights, self.parameters(), list(read_keys)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class SignalStage(Stage):
    """A judge that needs no picture: it reads the signals that the one decode of the video left (signals.py)."""

    def wants(self, span: ClipSpan) -> list[Want]:
        """Nothing."""
        return []


_HASHES: dict[tuple[str, int, int], str] = {}  # (path, bytes, mtime) -> digest, so that a process hashes a file once


def weights_hash(*files: Path) -> str:
    """16 hex digits over the bytes of weight files, independent of where they lie; UserError when one cannot be read."""
    digests = []
    for file in files:
        try:
            stat = file.stat()
            known = (str(file), stat.st_size, stat.st_mtime_ns)
            if known not in _HASHES:
                with file.open("rb") as content:
                    _HASHES[known] = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"cannot read the weights {file} ({error.strerror}); give the folder that holds them."
            ) from None
        digests.append(_HASHES[known])
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]
