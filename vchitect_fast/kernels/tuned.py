"""Tuned tables: what `vchitect-fast tune kernels` measured on one kind of GPU, and how a launch looks its choice up.

    choice = look_up("spatial", "dq", element_bytes=2, S=1296, N=333, C=64)      a dict of fields, or None: by size (tiles.py)

The row of exactly these sizes, else the nearest: the least sum of |log2(size / its size)| over the sizes, at most 1 (a factor
of 2 in all), of the same head dim or width and the same bytes an element; else none. Nothing here searches or measures.
Which file: the one that VCHITECT_FAST_TUNED names ("none" for no table), else kernels/tuned/<gpu>.json of this package where
there is one. A file that was named and cannot be used is a UserError; a shipped one of another schema, GPU, torch or triton
is passed over with one line in the log. It is read once a process; the ranks of a run hold `digest` against rank 0's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path

import torch

from vchitect_fast.errors import UserError
from vchitect_fast.files import write_text

SCHEMA_VERSION = 1
ENVIRONMENT = "VCHITECT_FAST_TUNED"
SHIPPED = Path(__file__).parent / "tuned"
FURTHEST = 1.0  # sum of |log2| of the ratios of sizes
EXACT = ("C", "D")  # sizes that a tile is made for: never from a neighbour
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
log = logging.getLogger(__name__)

Choice = dict[str, int | str]


@dataclass(frozen=True)
class Measured:
    """One choice and n interleaved samples of it, in seconds; its error is relative to fp64 (2-norm, the worst tensor)."""

    choice: Choice
    n: int
    median_s: float
    p10_s: float
    p90_s: float
    error_vs_fp64: float


@dataclass(frozen=True)
class Row:
    """The winner for one kernel at one size beside what tiles.py would have chosen, both measured in the same rounds."""

    op: str
    kernel: str
    dtype: str
    sizes: dict[str, int]
    winner: Measured
    heuristic: Measured


@dataclass(frozen=True)
class Table:
    """All rows of one GPU. The versions are those that measured; their first two numbers must be those that run."""

    gpu: str
    torch: str
    triton: str
    commit: str | None
    command: str
    date: str  # UTC
    rows: tuple[Row, ...]

    def save(self, path: str | Path) -> None:
        """Write the JSON whole or not at all. UserError where the place cannot be written."""
        write_text(path, json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Read a table; UserError where it is absent, no table, of another schema, or holds a choice that no kernel takes."""
        remedy = "name one that `vchitect-fast tune kernels` wrote, or tune again"
        try:
            content = json.loads(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the tuned table {path} ({error}); {remedy}.") from None
        found = content.pop("schema_version", None) if isinstance(content, dict) else None
        if found != SCHEMA_VERSION:
            raise UserError(f"expected a tuned table of schema {SCHEMA_VERSION}, got {found} in {path}; {remedy}.")
        try:
            table = cls(**{**content, "rows": tuple(_row(values) for values in content["rows"])})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no tuned table ({type(error).__name__}: {error}); {remedy}.") from None
        return table

    def misfit(self, gpu: str) -> str:
        """What of this table is not of here, or nothing."""
        here = {"GPU": gpu, "torch": version("torch"), "triton": version("triton")}
        of_table = {"GPU": self.gpu, "torch": self.torch, "triton": self.triton}
        for name, there in of_table.items():
            if there != here[name] if name == "GPU" else _release(there) != _release(here[name]):
                return f"is for {name} {there}, this is {here[name]}"
        return ""


def _row(values: dict[str, object]) -> Row:
    from vchitect_fast.kernels.tiles import check_choice  # which looks up here

    measured = {name: Measured(**values[name]) for name in ("winner", "heuristic")}  # type: ignore[arg-type]
    row = Row(**{**values, **measured})  # type: ignore[arg-type]
    if row.dtype not in ELEMENT_BYTES:
        raise ValueError(f"dtype {row.dtype!r}")
    if not row.sizes or any(type(size) is not int or size < 1 for size in row.sizes.values()):
        raise ValueError(f"sizes {row.sizes!r}")
    check_choice(row.op, row.kernel, row.winner.choice)
    return row


def _release(text: str) -> list[str]:
    return re.findall(r"\d+", text)[:2]


def file_name(gpu: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> nvidia-h100-80gb-hbm3.json."""
    return f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def gpu_name() -> str | None:
    """The current CUDA device; None on a CPU, where no table is read."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@cache
def _file() -> tuple[Table | None, str]:
    """The table in use and the hash of its file."""
    named, gpu = os.environ.get(ENVIRONMENT, ""), gpu_name()
    if gpu is None or named == "none":
        return None, "none"
    path = Path(named) if named else SHIPPED / file_name(gpu)
    if not named and not path.exists():
        return None, "none"
    try:
        table = Table.load(path)
        if misfit := table.misfit(gpu):
            raise UserError(
                f"the tuned table {path} {misfit}; tune again with `vchitect-fast tune kernels`, or set {ENVIRONMENT}=none."
            )
    except UserError as error:
        if named:
            raise
        log.warning("a shipped table is passed over, tiles are chosen by size: %s", error)
        return None, "none"
    return table, hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def digest() -> str:
    """Of the file in use, "none" without one. UserError where the file that was named cannot be used."""
    return _file()[1]


_trying: dict[tuple[str, str], Choice | None] = {}


@contextmanager
def trying(choices: Mapping[tuple[str, str], Choice | None]) -> Iterator[None]:
    """Every launch inside takes these by (op, kernel), None for the heuristic; of the process, as backward has a thread of its own."""
    before = dict(_trying)
    _trying.update(choices)
    try:
        yield
    finally:
        _trying.clear()
        _trying.update(before)


def look_up(op: str, kernel: str, *, element_bytes: int, **sizes: int) -> Choice | None:
    """The choice of the exact or nearest row; None where there is none."""
    if _trying and (op, kernel) in _trying:
        return _trying[op, kernel]
    return _found(op, kernel, element_bytes, tuple(sizes.items()))


@lru_cache(maxsize=4096)
def _found(op: str, kernel: str, element_bytes: int, sizes: tuple[tuple[str, int], ...]) -> Choice | None:
    table, _ = _file()
    rows = [
        (distance(row.sizes, dict(sizes)), row)
        for row in (table.rows if table else ())
        if (row.op, row.kernel) == (op, kernel) and ELEMENT_BYTES[row.dtype] == element_bytes
    ]
    far, row = min(rows, key=lambda pair: pair[0], default=(math.inf, None))  # the first of equals
    return row.winner.choice if row and far <= FURTHEST else None


def distance(row: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Sum of |log2| of the ratios; infinite where they are not comparable."""
    if row.keys() != sizes.keys() or any(row[name] != sizes[name] for name in EXACT if name in row):
        return math.inf
    return sum(abs(math.log2(row[name] / sizes[name])) for name in row)


def forget() -> None:
    """Read the file anew at the next look-up; for tests, and for a process that has just written one."""
    _file.cache_clear()
    _found.cache_clear()
