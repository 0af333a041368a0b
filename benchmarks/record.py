"""Record: one measured JSON line. What ran, how long it took, how far off it was, on what, by which command.

A Record is a measurement; what could not be measured is an Absent (suite.py) and never stands in a results file. Lines are
appended, none is changed. It refuses to name a person's machine: host names and paths stay out. Standard library only,
torch and triton are asked for their versions.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vchitect_fast.errors import UserError
from vchitect_fast.machine import cpu_name, this_device

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
RESULTS = Path("benchmarks/results")  # below the current folder: of a checkout, the folder that is committed
Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Record:
    """One provider of one bench at one shape in one direction."""

    bench: str
    provider: str
    shape: str
    dtype: str
    direction: str  # forward | backward | forward+backward
    n: int  # samples
    median_s: float
    p10_s: float
    p90_s: float
    rate: float | None  # in `unit`, by the bench's own formula of FLOPs or bytes
    unit: str | None  # TFLOP/s, GB/s, 1/s
    error_vs_fp64: float | None  # relative, 2-norm, the worst tensor; at the bench's check size
    ceiling: float | None  # in `unit`, measured in the same run
    saved_bytes: int | None  # kept for backward, parameters not counted; only of the whole block
    machine: str
    device: str
    torch: str
    triton: str | None
    commit: str | None  # with "+dirty" where the checkout had changes; None outside a checkout
    command: str
    date: str  # UTC
    exposed_s: float | None = None  # of median_s, what waits for other ranks; only of sequence parallelism
    sent_bytes: int | None = None  # between ranks, all of them together; likewise
    num_messages: int | None = None  # likewise
    loss: float | None = None  # mean of the last quarter of the steps; only of the fp8 parity
    loss_error: float | None = None  # what it differs from the reference's, in parts of it; likewise

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.p10_s <= self.median_s <= self.p90_s:
            raise UserError(
                f"a Record of {self.bench} needs samples and p10 <= median <= p90, got n={self.n}, {self.p10_s}, "
                f"{self.median_s}, {self.p90_s}; measure it again."
            )

    @property
    def key(self) -> Key:
        """What makes two Records comparable."""
        return self.bench, self.shape, self.direction, self.dtype, self.provider

    def to_line(self) -> str:
        """The JSON line."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str, place: str) -> Record:
        """Read a line; UserError naming `place` when it is not a Record."""
        remedy = "name a file that `vchitect-fast bench --out` wrote"
        try:
            values = json.loads(line)
            return cls(**values)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{place} is not JSON ({error}); {remedy}.") from None
        except TypeError as error:
            raise UserError(f"{place} is not a Record ({error}); {remedy}.") from None


@dataclass(frozen=True)
class Origin:
    """The fields of a Record that one run shares."""

    machine: str
    device: str
    torch: str
    triton: str | None
    commit: str | None
    command: str
    date: str


def origin(command: str) -> Origin:
    """What this process runs on and from. `command` as a person would type it, without paths."""
    import torch

    found = this_device()
    threads = os.cpu_count()
    plural = "" if found.num_threads == 1 else "s"
    device = found.name if found.kind == "cuda" else f"{found.name}, {found.num_threads} thread{plural}"
    return Origin(
        machine=f"{platform.system()} {platform.machine()}, {cpu_name()}, {threads} CPUs",
        device=device,
        torch=torch.__version__,
        triton=_version("triton"),
        commit=_commit(),
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def results_file(device: str) -> Path:
    """benchmarks/results/<device>.jsonl below the current folder."""
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl"


def append(path: str | Path, record: Record) -> None:
    """Add one line with one write, so that runs that share a file do not mix; makes the folder. UserError if refused."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, record.to_line().encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"could not write {path} ({error.strerror}); choose another place with --out.") from None


def load(path: str | Path) -> list[Record]:
    """All Records of a file in their order; UserError when it is absent or holds anything else."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); name a file that `vchitect-fast bench --out` wrote."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; name a file that `vchitect-fast bench --out` wrote.") from None
    return [Record.from_line(line, f"line {i} of {path}") for i, line in enumerate(lines, 1) if line.strip()]


def latest(records: list[Record]) -> dict[Key, Record]:
    """The last Record of each key."""
    return {record.key: record for record in records}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").exists():  # installed from a wheel
        return None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    # What a run writes itself is no change of what it measured.
    written = (":!benchmarks/results", ":!benchmarks/figures")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return head and head + ("+dirty" if changed else "")
