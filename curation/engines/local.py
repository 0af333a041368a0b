"""The local engine: worker processes on this machine, one task each at a time. Knows which task a dead worker had.

Workers are forked from a clean server process that has the libraries loaded, so that starting one is quick and no thread
of the driver is copied. A worker that dies (killed, out of memory, crashed in a decoder) or outlasts the time limit costs
only the task that it had, which is tried again; the driver's own end ends the workers.
"""

from __future__ import annotations

import glob
import itertools
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from vchitect_fast.curation.engines import ATTEMPTS, WORKER, Outcome, Task, attempt
from vchitect_fast.errors import UserError

TASK_LIMIT_S = 3600.0  # a decoder that hangs; a chunk is minutes of video and takes seconds to minutes
WORKER_BYTES = 3 << 29  # 1.5 GiB: what a worker may need
WORKERS_A_GPU = 4  # some decode while one computes; each holds its own models


def cores() -> int:
    """Cores that this process may use, fewer where memory is short: 1.5 GiB a worker."""
    import psutil

    by_memory = int(psutil.virtual_memory().available // WORKER_BYTES)
    return max(1, min(len(os.sched_getaffinity(0)), by_memory))


def num_gpus() -> int:
    """GPUs that this process may use; no torch is loaded to find out."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in named.split(",") if name.strip()])
    return len(glob.glob("/dev/nvidia[0-9]*"))


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    job: tuple[Task, int] | None = None  # the task and which attempt it is
    since: float = 0.0
    ready: bool = False  # it has begun: from then on a death is blamed on its task


class LocalEngine:
    """`num_workers` processes (None: by cores and memory)."""

    name = "local"

    def __init__(self, num_workers: int | None = None) -> None:
        self.num_workers = num_workers or cores()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["vchitect_fast.curation.engines.local", "vchitect_fast.curation.tasks", "av", "cv2"]
        )
        self._workers: list[_Worker] = []
        self._num_stillborn = 0  # workers in a row
        self._num_started = 0

    def run(self, tasks: Iterable[Task], num_workers: int | None = None, *, gpu: bool = False) -> Iterator[Outcome]:
        """Outcomes as they come. Tasks are drawn as workers become free, so an iterator of tasks is not held in memory."""
        limit = min(num_workers or self.num_workers, self.num_workers)
        if gpu and num_gpus():
            limit = min(limit, WORKERS_A_GPU * num_gpus())
        waiting: deque[tuple[Task, int]] = deque()
        source = iter(tasks)
        while True:
            idle = [worker for worker in self._workers if worker.job is None]
            while (idle or len(self._workers) < limit) and self._busy() < limit:
                if not waiting:
                    waiting.extend((task, 1) for task in itertools.islice(source, 1))
                if not waiting:
                    break
                if not idle:
                    idle.append(self._start())
                self._give(idle.pop(), waiting.popleft())
            if not self._busy():
                return
            for worker, result in self._ended():
                assert worker.job
                (task, number), worker.job = worker.job, None
                kind, value, cpu_s = result
                if kind == "stillborn":
                    self._num_stillborn += 1
                    if self._num_stillborn == ATTEMPTS:
                        raise UserError(
                            f"worker processes end before they begin ({value}), as said above; "
                            "a script must start the run under `if __name__ == '__main__':`."
                        )
                    waiting.appendleft((task, number))
                elif kind == "value":
                    yield Outcome(task, value, None, number, cpu_s)
                elif smaller := task.split():  # which part it was is not known
                    waiting.extend((part, 1) for part in smaller)
                elif kind == "bad" or number == ATTEMPTS:
                    yield Outcome(task, None, value, number)
                else:
                    waiting.append((task, number + 1))

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()

    def _busy(self) -> int:
        return sum(worker.job is not None for worker in self._workers)

    def _start(self) -> _Worker:
        for trial in range(ATTEMPTS):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, self._num_started), daemon=True)
            self._num_started += 1
            try:
                process.start()
            except (EOFError, OSError):  # the server that forks was killed; the next try starts another
                ours.close()
                if trial + 1 == ATTEMPTS:
                    raise
                time.sleep(0.5)  # until the system has buried it
                continue
            finally:
                theirs.close()
            self._workers.append(_Worker(process, ours))
            break
        return self._workers[-1]

    def _give(self, worker: _Worker, job: tuple[Task, int]) -> None:
        worker.job, worker.since = job, time.monotonic()
        try:
            worker.pipe.send(job[0])
        except (BrokenPipeError, ConnectionResetError):
            pass  # dead: `_ended` finds it by its sentinel

    def _ended(self) -> list[tuple[_Worker, tuple[str, Any, float]]]:
        """Waits until a task ends, by its result, its worker's death or the time limit."""
        busy = [worker for worker in self._workers if worker.job is not None]
        wait([*(w.pipe for w in busy), *(w.process.sentinel for w in busy)], timeout=5.0)
        found = []
        for worker in busy:
            try:
                if worker.pipe.poll():
                    result = worker.pipe.recv()
                    if result is None:
                        worker.ready, self._num_stillborn = True, 0
                    else:
                        found.append((worker, result))
                    continue
            except (EOFError, ConnectionResetError):
                worker.process.join()
            if not worker.process.is_alive():
                how = _how(worker.process.exitcode)
                died = ("error", f"the worker died ({how})", 0.0) if worker.ready else ("stillborn", how, 0.0)
                found.append((worker, died))
                self._bury(worker)
            elif time.monotonic() - worker.since > TASK_LIMIT_S:
                self._bury(worker)
                found.append((worker, ("error", f"no result within {TASK_LIMIT_S:.0f} s", 0.0)))
        return found

    def _bury(self, worker: _Worker) -> None:
        self._end(worker)
        self._workers.remove(worker)

    def _end(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()


def _how(code: int | None) -> str:
    return f"signal {-code}" if code and code < 0 else f"exit code {code}"


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver
    driver.join()
    os._exit(1)


def _serve(pipe: Connection, number: int) -> None:
    """The worker's life: say that it has begun, take a task, send its result, until the driver is gone."""
    import signal
    import threading

    # In the middle of a task too: minutes of decoding for nobody would slow down the run that goes on.
    threading.Thread(target=_end_with_driver, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    os.nice(5)  # the machine stays usable
    os.environ[WORKER] = str(number)  # by which workers share out the GPUs (clip_model.pick_device)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # a process a core
    try:
        pipe.send(None)  # ready
        while True:
            pipe.send(attempt(pipe.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
