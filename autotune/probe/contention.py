"""Times a matrix product while something else runs: how many times as long compute takes beside copies or collectives.

The other work runs in a thread until it has done what it was given; a product counts when it began and ended meanwhile. On
a GPU its kernels and copies go to streams of their own. On a CPU both share the cores, as in training. Where too few
products fit, the answer is None: not measured. A figure below 1 is noise and is written as 1.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist

from vchitect_fast.autotune.probe.clock import several, summary, synchronize
from vchitect_fast.autotune.probe.host_link import Copies
from vchitect_fast.parallel.mesh import Mesh, over_ranks

LEAST = 3  # products beside the other work
PATIENCE = 3.0  # the other work lasts so many times as long as LEAST products alone need; contention makes both longer


class Product:
    """One square matrix product, the same each time."""

    def __init__(self, side: int, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device = device
        self._a, self._b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))

    def seconds(self) -> float:
        """Of one, from its start to its end."""
        start = time.perf_counter()
        torch.mm(self._a, self._b)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter() - start


def beside_copies(mesh: Mesh, copies: Copies, side: int) -> float | None:
    """While copies to host memory run; all ranks at once, the slowest counts."""
    product = Product(side, mesh.device)
    alone_s, once_s = several(product.seconds).median_s, several(lambda: copies.seconds(True, False, 1)).median_s
    calls = max(1, math.ceil(PATIENCE * LEAST * alone_s / once_s))

    def work() -> None:
        copies.seconds(True, False, calls)

    return _ratio(mesh, product, alone_s, work)


def beside_collectives(mesh: Mesh, group: dist.ProcessGroup, num_bytes: int, side: int) -> float | None:
    """While all_to_alls between the ranks of a group run; all groups at once, the slowest rank counts."""
    product, num_ranks = Product(side, mesh.device), dist.get_world_size(group)
    sent = torch.ones(-(-num_bytes // 4 // num_ranks) * num_ranks, device=mesh.device)
    received = torch.empty_like(sent)
    stream = torch.cuda.Stream(mesh.device) if mesh.device.type == "cuda" else None
    synchronize(mesh.device)  # the other stream reads what this one has filled

    def exchange(calls: int) -> float:
        start = time.perf_counter()
        with torch.cuda.stream(stream):  # None: does nothing
            for _ in range(calls):
                dist.all_to_all_single(received, sent, group=group)
            if stream is not None:
                stream.synchronize()
        return time.perf_counter() - start

    alone_s, once_s = several(product.seconds).median_s, several(lambda: exchange(1)).median_s
    # As many on every rank: what the slowest product needs, counted in the quickest exchange.
    longest_s, most = over_ranks(mesh, [], [alone_s, 1 / once_s])[1]
    return _ratio(mesh, product, alone_s, lambda: exchange(max(1, math.ceil(PATIENCE * LEAST * longest_s * most))))


def _ratio(mesh: Mesh, product: Product, alone_s: float, work: Callable[[], object]) -> float | None:
    if mesh.host_group is not None:
        dist.barrier(mesh.host_group)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with torch.cuda.device(mesh.device) if mesh.device.type == "cuda" else nullcontext():
                work()
        except BaseException as error:  # raised in the thread that waits for this one
            failures.append(error)

    thread, samples = threading.Thread(target=run), []
    thread.start()
    while thread.is_alive():
        seconds = product.seconds()
        if thread.is_alive():
            samples.append(seconds)
    thread.join()
    if failures:
        raise failures[0]
    synchronize(mesh.device)
    enough, ratio = len(samples) >= LEAST, max(1.0, summary(samples).median_s / alone_s) if samples else 0.0
    missing, slowest = over_ranks(mesh, [], [0.0 if enough else 1.0, ratio])[1]
    return None if missing else slowest
