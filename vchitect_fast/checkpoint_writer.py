"""Checkpoints that are written while the steps go on: the tensors are copied to host memory, a thread writes the copy.

    with Writer(run, keep_last, mesh) as writer:
        writer.save(step, tensors, state)      returns once they are copied
        newest = writer.wait()                 until the last one is on the disk

One write at a time: a save waits for the one before, and raises what that one failed with. Leaving the block waits as well.
A step that is not written yet when the machine dies is lost, the checkpoint before is whole. The format is checkpoint.py's.
"""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from vchitect_fast import checkpoint
from vchitect_fast.parallel.mesh import ALONE, Mesh, host_group

GIVE_UP_S = 60.0  # for the last write when a step has failed: the other ranks may be gone


class Writer:
    """Writes the checkpoints of one run. Every rank makes one, and calls `save` for the same steps.

    in_background  False writes before `save` returns, from the tensors themselves: no copy in host memory
    """

    def __init__(self, run: Path, keep_last: int, mesh: Mesh = ALONE, *, in_background: bool = True) -> None:
        self.run, self.keep_last, self.in_background = run, keep_last, in_background
        # A group of its own: the thread's collectives must not mix with those of the steps.
        self._group = host_group() if mesh.host_group is not None else None
        on_gpu = mesh.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
            )
        )
        self._thread: Thread | None = None
        self._written: Path | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Start to write a checkpoint as checkpoint.save does; raises what the one before failed with."""
        self.wait()
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        if not self.in_background:
            self._write(step, detached, state)
            self.wait()
            return
        copies = self._stager.stage(detached)
        # Not joined when the process ends by an error that `wait` has given up on.
        self._thread = Thread(target=self._write, args=(step, copies, state), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> Path | None:
        """The newest checkpoint that this writer wrote, once nothing is being written; raises what a write failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return self._written

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            with torch.no_grad():
                self._written = checkpoint.save(self.run, step, tensors, state, self.keep_last, self._group)
        except BaseException as error:  # raised where it is waited for
            self._failure = error

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        else:
            if self._thread is not None:
                self._thread.join(GIVE_UP_S)
            if self._failure is not None:
                error.add_note(f"the checkpoint before it was not written: {self._failure}")
        self._stager.close()
