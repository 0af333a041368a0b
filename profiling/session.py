"""Profiles a run: the real training loop for a few steps, in a folder of its own, with a tool at work after the warm-up.

    profile_run(config, Request(folder, ...))    -> trace-rank0.json.gz and memory-rank0.json in the folder
    profile_steps(run, Request(folder, ...))     the same of any callable whose steps are spans step/N

The loop is `train` itself, unchanged: its spans say where steps begin and end, and after the last one the run is ended from
there, so that no checkpoint is written. The user's run folder is not touched; its cache of latents is used, as the run
would. It refuses what `train` refuses, a rank that is not there, and a folder in which a run left a checkpoint.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file, write_text
from vchitect_fast.parallel.mesh import read_launch
from vchitect_fast.profiling.owners import Owners
from vchitect_fast.profiling.span import NvtxSink, Sink, TorchSink, recording
from vchitect_fast.train import train

MAX_SNAPSHOT_ENTRIES = 200_000  # of the CUDA allocator's history


@dataclass(frozen=True)
class Request:
    """What to record.

    folder     where everything goes; the run's own files in folder/train
    num_steps  that are recorded, after num_warmup that are not
    ranks      that record; the others run beside them and stop with them
    tool       "torch" records with torch.profiler; "nsys" only marks spans and the stretch, Nsight Systems records
    """

    folder: Path
    num_steps: int = 5
    num_warmup: int = 2
    ranks: tuple[int, ...] = (0,)
    tool: str = "torch"

    def __post_init__(self) -> None:
        for name, least in (("num_steps", 1), ("num_warmup", 1)):
            if getattr(self, name) < least:
                flag = {"num_steps": "--steps", "num_warmup": "--warmup"}[name]
                raise UserError(f"{flag} must be at least {least}, got {getattr(self, name)}; give a larger one.")


class _Enough(Exception):
    """The last step of a profile is over."""


class _Tool(Sink):
    """What begins before the first recorded step and ends after the last. The profiler itself warms up one step."""

    def prepare(self) -> None:
        """Before the last step of the warm-up."""

    def start(self) -> None:
        """Before the first recorded step."""

    def stop(self) -> None:
        """After the last."""

    def enter(self, name: str) -> None:
        """A span begins."""

    def leave(self, name: str) -> None:
        """It ends."""

    def told(self, parts: dict[str, Any]) -> None:
        """What the run said."""


class _Steps(_Tool):
    """Counts steps, tells the tools, and ends the run after the last."""

    def __init__(self, request: Request, tools: list[_Tool]) -> None:
        self.request, self.tools, self.num_done = request, tools, 0

    def enter(self, name: str) -> None:
        if name.startswith("step/"):
            for tool in self.tools:
                if self.num_done == self.request.num_warmup - 1:
                    tool.prepare()
                if self.num_done == self.request.num_warmup:
                    tool.start()

    def leave(self, name: str) -> None:
        if name.startswith("step/"):
            self.num_done += 1
            if self.num_done == self.request.num_warmup + self.request.num_steps:
                for tool in self.tools:
                    tool.stop()
                raise _Enough


class _TorchProfiler(_Tool):
    """torch.profiler over the recorded steps, with shapes, FLOPs and memory; the trace is written when it stops."""

    def __init__(self, path: Path) -> None:
        self._path = path
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities, record_shapes=True, profile_memory=True,
            schedule=lambda step: [torch.profiler.ProfilerAction.WARMUP, torch.profiler.ProfilerAction.RECORD][step > 0],
        )  # fmt: skip
        self._profile.record_steps = False  # our spans mark the steps

    def prepare(self) -> None:
        self._profile.start()

    def start(self) -> None:
        self._profile.step()

    def stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        # Ranks share the folder, so each writes the plain text in one of its own; torch's own .gz is slower, at level 9.
        with TemporaryDirectory(dir=self._path.parent) as own, whole_file(self._path) as partial:
            plain = Path(own, "trace.json")
            self._profile.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(partial, "wb", compresslevel=3) as target:
                shutil.copyfileobj(source, target)


class _CudaRange(_Tool):
    """The stretch that `nsys profile --capture-range=cudaProfilerApi` records; without a GPU it records everything."""

    def start(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()

    def stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()


class _CudaHistory(_Tool):
    """The CUDA allocator's own history as a snapshot for pytorch.org/memory_viz; nothing on a CPU."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=MAX_SNAPSHOT_ENTRIES)

    def stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._path))
            torch.cuda.memory._record_memory_history(enabled=None)


class _Memory(_Tool):
    """Whose memory is whose, as memory.py needs it beside the trace."""

    def __init__(self, path: Path) -> None:
        self._path, self.owners, self._recording = path, Owners(), False

    def told(self, parts: dict[str, Any]) -> None:
        self.owners.told(parts)

    def start(self) -> None:
        self._recording = True
        self.owners.hold()

    def enter(self, name: str) -> None:
        if self._recording and name == "optimizer/step":
            self.owners.see_gradients()

    def stop(self) -> None:
        self._recording = False
        write_text(self._path, json.dumps(self.owners.to_json()))


def this_rank() -> tuple[int, int]:
    """(rank, number of ranks) as the launcher says (torchrun, Slurm); one process is rank 0 of 1."""
    launch = read_launch(os.environ)
    return (launch.rank, launch.world_size) if launch else (0, 1)


def parse_ranks(text: str, num_ranks: int) -> tuple[int, ...]:
    """ "all", or numbers with commas; UserError for one that is not there."""
    if text == "all":
        return tuple(range(num_ranks))
    try:
        ranks = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UserError(f"--ranks must be all, or numbers as in 0,3, got {text!r}; correct it.") from None
    if ranks[0] < 0 or ranks[-1] >= num_ranks:
        raise UserError(
            f"--ranks must be within 0 to {num_ranks - 1}, got {text}; correct it, or start more processes."
        )
    return ranks


def trace_path(folder: Path, rank: int) -> Path:
    """Where the trace of a rank goes."""
    return folder / f"trace-rank{rank}.json.gz"


def memory_path(folder: Path, rank: int) -> Path:
    """Where a rank says whose memory is whose."""
    return folder / f"memory-rank{rank}.json"


def profile_run(config: TrainConfig, request: Request) -> None:
    """Run the warm-up and the recorded steps; files of this rank are in the folder when it returns.

    Raises UserError for what `train` refuses, and when the run ended before its last recorded step.
    """
    total = request.num_warmup + request.num_steps
    config = replace(
        config, out=str(request.folder / "train"), steps=max(total, config.steps), validate_every=0, sample_every=0,
        save_every=0, resume=False, tensorboard=False, wandb_project=None,
    )  # fmt: skip
    profile_steps(lambda: train(config), request)


def profile_steps(run: Callable[[], object], request: Request) -> None:
    """The same for any `run` whose spans step/N say where its steps begin and end; `tell` says whose memory is whose."""
    rank, _ = this_rank()
    folder = request.folder
    folder.mkdir(parents=True, exist_ok=True)
    tools: list[_Tool] = []
    spans: list[Sink] = []
    if rank in request.ranks:
        trace_path(folder, rank).unlink(missing_ok=True)  # an earlier profile's: nobody may take it for this one's
        tools.append(_Memory(memory_path(folder, rank)))
        if request.tool == "torch":
            snapshot = _CudaHistory(folder / f"memory-rank{rank}.pickle")
            tools += [_TorchProfiler(trace_path(folder, rank)), snapshot]
            spans.append(TorchSink())
        else:
            tools.append(_CudaRange())
            spans.append(NvtxSink())
    steps = _Steps(request, tools)
    try:
        # Entered first, left last: the profiler runs before the step's own span begins and after it ended.
        with recording(steps, *tools, *spans):
            run()
    except _Enough:
        return
    raise UserError(
        f"the run ended after {steps.num_done} of {request.num_warmup + request.num_steps} steps and nothing was recorded "
        "(SIGTERM?); start it again."
    )
