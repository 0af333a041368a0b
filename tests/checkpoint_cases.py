"""What the ranks of tests/parallel/test_checkpoint_sharded.py do: train, save, load with another sharding, fail on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from offloading import make_model
from shard_cases import full, microbatch, own_loss, sizes
from torch import Tensor

from vchitect_fast import checkpoint
from vchitect_fast.checkpoint_writer import Writer
from vchitect_fast.ema import EMA
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.parallel.mesh import ALONE, CPU, Mesh, make_mesh
from vchitect_fast.parallel.shard import reduce_gradients, shard
from vchitect_fast.resume import run_tensors

SAMPLES = 2  # a step, whatever the mesh


class Run:
    """A training run in fp64 on some mesh, its samples a step always the same."""

    def __init__(self, mesh: Mesh, seed: int = 0) -> None:
        self.mesh = mesh
        self.model = make_model(seed, dtype=torch.float64)
        shard(self.model, list(self.model.transformer_blocks), mesh, compute_dtype=torch.float64)
        self.optimizer = MasterAdamW(self.model, weight_decay=0.1, betas=(0.9, 0.95))
        self.ema = EMA(self.optimizer.masters, 0.5)
        self.tensors = run_tensors(self.model, self.optimizer, self.ema)

    def step(self, step: int) -> float:
        accumulation = SAMPLES // self.mesh.num_dp
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(accumulation):
            reduce_gradients(self.model, now=micro == accumulation - 1)
            inputs = microbatch(step, self.mesh.dp_rank * accumulation + micro, 1, torch.float64)
            loss = own_loss(self.model, inputs, self.mesh) / accumulation
            loss.backward()
            total += loss.detach()
        if self.mesh.axes is not None:
            dist.all_reduce(total)
        self.optimizer.step(1e-2, 0.05)
        self.ema.update(step)
        return float(total) / self.mesh.num_dp

    def whole(self) -> dict[str, Tensor]:
        return {name: full(tensor) for name, tensor in self.tensors.items()}


def mesh_of(shape: tuple[int, int, int] | None) -> Mesh:
    return make_mesh(sizes(*shape), "global", CPU) if shape else ALONE


def train_and_save(shape: tuple[int, int, int], run: str, steps: int, more: int) -> dict[str, Any]:
    """Save after `steps`, in the background of `more` steps; what was saved, and the losses that followed."""
    training = Run(mesh_of(shape))
    with Writer(Path(run), 2, training.mesh) as writer:
        for step in range(steps):
            training.step(step)
        saved = training.whole()
        writer.save(steps, training.tensors, {"seed": 3})
        losses = [training.step(step) for step in range(steps, steps + more)]
        folder = writer.wait()
    moved = sum(not torch.equal(tensor, saved[name]) for name, tensor in training.whole().items())
    assert folder is not None
    return {"saved": saved, "losses": losses, "folder": str(folder), "moved": moved}


def load_and_train(shape: tuple[int, int, int] | None, folder: str, more: int) -> dict[str, Any]:
    """From other random weights: what is loaded, and the losses that follow."""
    training = Run(mesh_of(shape), seed=1)
    state = checkpoint.load(Path(folder), training.tensors, training.mesh.host_group)
    loaded = training.whole()
    return {"state": state, "loaded": loaded, "losses": [training.step(state["step"] + i) for i in range(more)]}


def small(mesh: Mesh, value: float) -> dict[str, Tensor]:
    """Two tensors that are easy to know again, one sharded."""
    model = torch.nn.Linear(6, 4)
    torch.nn.init.constant_(model.weight, value)
    shard(model, [], mesh)
    return {"model.weight": model.weight.detach(), "optimizer.step": torch.tensor(value)}


def a_rank_cannot_write(run: str, failing: int) -> dict[str, Any]:
    """Step 1 is good, the disk of one rank refuses step 2, step 3 is good; what step 3 and the end say."""
    mesh = mesh_of((1, 2, 1))
    said = []
    with Writer(Path(run), 3, mesh) as writer:
        writer.save(1, small(mesh, 1.0), {})
        writer.wait()

        def refuse(*_args: Any, **_options: Any) -> None:
            raise OSError(28, "No space left on device")

        with patch.object(dcp.FileSystemWriter, "write_data", refuse if mesh.rank == failing else _write_data):
            writer.save(2, small(mesh, 2.0), {})  # starts, and goes on
            writer._thread.join()
        try:
            writer.save(3, small(mesh, 3.0), {})
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        writer.save(3, small(mesh, 3.0), {})
        newest = writer.wait()
    return {"said": said, "newest": str(newest)}


_write_data = dcp.FileSystemWriter.write_data


def killed_while_writing(run: str, victim: int) -> None:
    """Step 1 is good; rank `victim` is killed when step 2 is half written in the background."""
    mesh = mesh_of((1, 2, 1))
    writer = Writer(Path(run), 2, mesh)
    writer.save(1, small(mesh, 1.0), {})
    writer.wait()
    dist.barrier()

    def die(*args: Any, **options: Any) -> Any:
        assert threading.current_thread().name == "checkpoint"
        if mesh.rank == victim:
            time.sleep(0.2)  # the others are done with their files
            os.kill(os.getpid(), signal.SIGKILL)
        return _write_data(*args, **options)

    with patch.object(dcp.FileSystemWriter, "write_data", die):
        writer.save(2, small(mesh, 2.0), {})
        writer.wait()


def no_shared_folder(run: str) -> str:
    """Rank 1 writes into a folder of its own, as on a node whose disk nobody else sees."""
    mesh = mesh_of((1, 2, 1))
    plain = dcp.FileSystemWriter.__init__

    def elsewhere(writer: Any, path: Path, **options: Any) -> None:
        plain(writer, path.parent / f"{path.name}-of-rank-1" if mesh.rank else path, **options)

    with patch.object(dcp.FileSystemWriter, "__init__", elsewhere):
        try:
            checkpoint.save(Path(run), 1, small(mesh, 1.0), {}, 2, mesh.host_group)
        except checkpoint.UserError as error:
            return str(error)
    return "nothing was said"


def one_rank_cannot_read(folder: str) -> str:
    mesh = mesh_of((1, 2, 1))
    tensors = small(mesh, 0.0)
    if mesh.rank == 1:
        tensors["model.extra"] = torch.zeros(2)
    try:
        checkpoint.load(Path(folder), tensors, mesh.host_group)
    except checkpoint.UserError as error:
        return str(error)
    return "nothing was said"
