"""What a run writes down: one JSON line an event, always; TensorBoard and Weights & Biases on request.

log.jsonl in the run's folder holds objects with a "kind": start, step, validation, sample, checkpoint, done.
A step has loss, grad_norm, learning rate, its time split (data / encode / forward / backward / optimizer), visual tokens
per second, model FLOPs (workload.py) and MFU, peak memory. What was not measured is null, never 0.
"""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from vchitect_fast.errors import UserError
from vchitect_fast.files import write_text

COMPUTE_TIMINGS = ("forward_s", "backward_s", "optimizer_s")
TIMINGS = ("data_s", "encode_s", *COMPUTE_TIMINGS)


class Writer(Protocol):
    """A place for scalars."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of one event."""

    def close(self) -> None:
        """Flush and end."""


class Log:
    """Appends events to log.jsonl and hands the numbers of each to the other writers; UserError when the disk refuses.

    start  steps already done: what TensorBoard has of later ones, from before a kill, is dropped; None keeps everything
    """

    def __init__(
        self, run: Path, *, start: int | None = None, tensorboard: bool = False, wandb_project: str | None = None
    ) -> None:
        self.path = run / "log.jsonl"
        with _writable(self.path):
            run.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._writers: list[Writer] = []
        if tensorboard:
            self._writers.append(_TensorBoard(run / "tensorboard", start))
        if wandb_project:
            self._writers.append(_WandB(wandb_project, run))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One event; every value must be JSON."""
        with _writable(self.path):
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        for writer in self._writers:
            writer.scalars(numbers, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_error: object) -> None:
        """Flush and close all writers."""
        for writer in self._writers:
            writer.close()
        with _writable(self.path):  # after a full disk this is the same error again: the line is still in the buffer
            self._file.close()


class NoLog(Log):
    """Of the ranks that do not write: takes everything and keeps nothing."""

    def __init__(self) -> None:
        """No file."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Nothing."""

    def __exit__(self, *_error: object) -> None:
        """Nothing."""


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"could not write {path} ({error}); free some space or choose another out=, then start the same command again."
        ) from None


def read_log(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Events of a run's log.jsonl, all or of one kind; a line cut short by a kill is passed over.

    Raises UserError when the file cannot be read.
    """
    events = []
    try:
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the log of {run} ({error}); give the folder of a training run.") from None
    for line in lines:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # only the last line of a killed run can be torn: each line is written and flushed whole
    return [event for event in events if kind in (None, event["kind"])]


def rewind_log(run: Path, step: int) -> None:
    """Drop the events after `step`, and a line cut short by a kill, before a run resumes there."""
    path = run / "log.jsonl"
    if path.exists():
        kept = [event for event in read_log(run) if event["step"] <= step]
        write_text(path, "".join(json.dumps(event) + "\n" for event in kept))


def measured(run: Path) -> dict[str, dict[str, float]]:
    """By shape: the median of each timing over the run's steps (the first of each shape left out, it warms up), and the peak.

    Keys as in Prediction: step_s, forward_s, backward_s, optimizer_s, and data_s, encode_s, mfu, peak_gib. `step_s` is
    without data and encode, which the Plan does not predict.
    """
    by_shape: dict[str, list[dict[str, Any]]] = {}
    for event in read_log(run, "step"):
        by_shape.setdefault(event["shape"], []).append(event)
    result = {}
    for shape, events in by_shape.items():
        warm = events[1:] or events
        values = {name: median(event[name] for event in warm) for name in TIMINGS}
        values["step_s"] = median(sum(event[name] for name in COMPUTE_TIMINGS) for event in warm)
        values["peak_gib"] = max(event["peak_gib"] for event in events)
        if all(event["mfu"] is not None for event in warm):
            values["mfu"] = median(event["mfu"] for event in warm)
        result[shape] = values
    return result


def reset_peak(device_kind: str) -> None:
    """Count the peak from here; where the system does not allow that for a CPU process, it counts from its start.

    Called before the model is built, or between two shapes: what is held at that moment counts.
    """
    if device_kind == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM of this process (man proc)
    except OSError:
        return


def peak_bytes(device_kind: str) -> int:
    """Most memory used since `reset_peak`, the quantity that autotune/memory.py predicts.

    On a GPU what torch allocated, without the CUDA context; on a CPU the resident bytes of the whole process.
    """
    if device_kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _TensorBoard:
    def __init__(self, folder: Path, start: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("tensorboard=true needs TensorBoard; pip install 'vchitect-fast[tensorboard]'.") from None
        # As rewind_log: events of step `start` stay, those after it are written again. From 0, all are.
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else start)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, project: str, run: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("wandb_project needs Weights & Biases; pip install 'vchitect-fast[wandb]'.") from None
        # The whole path: two runs may have folders of the same name.
        identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(project=project, name=run.name, dir=str(run), resume="allow", id=identity)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
