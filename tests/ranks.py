"""Processes for tests of what runs on many ranks: gloo groups that live as long as a test file's tests, one a world size.

    results = ranks(4).run("sequence_cases:losses", spec, seed)        a list, by rank

`run` calls the function, of a module that lies in tests/, on every rank at once; torch.distributed is up there and the
arguments and results are pickled. An exception of a rank is raised here with the rank and its traceback; where the other ranks
then wait for it in vain, or nothing comes for `timeout_s`, all are killed and the next `run` starts new ones.

The first import of torch costs seconds, so a starter process imports it once and forks the ranks. One thread each. They end with
the file (conftest.py): each group that a test makes has a thread of gloo's that wakes a hundred times a second, and DTensor's
caches do not outlive a group, so none can be given back.
Tests of kills start their own processes: these are shared.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
TIMEOUT_S = 120.0
GRACE_S = 3.0  # for the other ranks to answer as well, after one has failed
GONE = "it ended without an answer"
_groups: dict[int, Ranks] = {}


class RankError(Exception):
    """What one rank raised, or that it is gone."""


class Ranks:
    """`world_size` processes that answer to `run`."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._starter: subprocess.Popen[bytes] | None = None
        self._connections: list[Connection] = []

    def run(self, function: str, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """function(*args) on every rank; "module:name". Raises RankError."""
        self._start()
        call = pickle.dumps((function, args))
        for connection in self._connections:
            connection.send_bytes(call)
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.world_size:
            waiting = {c: rank for rank, c in enumerate(self._connections) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    answers[rank] = False, GONE
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        silent = sorted(set(range(self.world_size)) - answers.keys())
        failed = {rank: text for rank, (good, text) in answers.items() if not good}  # in the order of their answers
        gone = [rank for rank, text in failed.items() if text == GONE]
        if silent or gone or 0 < len(failed) < self.world_size:  # the others may be out of step
            self.stop()
        if failed:
            rank = (gone or list(failed))[0]  # the others' errors follow from this one
            raise RankError(f"{function}: rank {rank} of {self.world_size} (failed: {sorted(failed)}): {failed[rank]}")
        if silent:
            raise RankError(f"{function}: ranks {silent} of {self.world_size} did not answer within {timeout_s} s")
        return [answers[rank][1] for rank in range(self.world_size)]

    def _start(self) -> None:
        if self._starter:
            return
        pairs = [socket.socketpair() for _ in range(self.world_size)]
        numbers = [theirs.fileno() for _, theirs in pairs]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_CORE")}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
        command = [sys.executable, "-P", __file__, *map(str, numbers)]
        self._starter = subprocess.Popen(command, env=environment, pass_fds=numbers, start_new_session=True)
        self._connections = []
        for ours, theirs in pairs:
            theirs.close()
            self._connections.append(Connection(ours.detach()))

    def stop(self) -> None:
        """End the processes; the next `run` starts new ones."""
        starter, self._starter = self._starter, None
        if starter is None:
            return
        for connection in self._connections:
            connection.close()
        os.killpg(starter.pid, signal.SIGKILL)  # a session of its own: the starter and its ranks, nobody else
        starter.wait()


def ranks(world_size: int) -> Ranks:
    """The ranks of a world size, the same ones for a whole file."""
    return _groups.setdefault(world_size, Ranks(world_size))


@atexit.register
def stop_all() -> None:
    """End the processes of every world size; a `run` starts new ones."""
    for group in _groups.values():
        group.stop()


def _answer(rank: int, world_size: int, connection: Connection, store: str) -> None:
    """The life of one rank: join, then call what is asked for until the test session closes the connection."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S)
    )
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        module, _, name = function.partition(":")
        try:
            torch.manual_seed(0)
            answer = True, getattr(importlib.import_module(module), name)(*args)
            packed = pickle.dumps(answer)
        except BaseException:
            packed = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(packed)


def _fork(numbers: list[int]) -> None:
    """Import once, fork a process a file descriptor, wait for them."""
    import torch.distributed

    import vchitect_fast.model  # noqa: F401  what nearly every rank uses

    assert torch.distributed.is_available()
    with tempfile.TemporaryDirectory() as folder:
        for rank, number in enumerate(numbers):
            if os.fork() == 0:
                for other in numbers:
                    if other != number:
                        os.close(other)
                _answer(rank, len(numbers), Connection(number), f"{folder}/store")
                os._exit(0)
        for number in numbers:
            os.close(number)
        for _ in numbers:
            os.wait()


if __name__ == "__main__":
    _fork([int(number) for number in sys.argv[1:]])
