"""Times the way between a device and host memory: each way alone, both at once, and with all ranks of the node at once.

On a CPU the copies are those of the project's own engine, into its slab; on a GPU cudaMemcpyAsync between pinned memory
and the device, on a stream each way, released at once and timed by events. A rank that is alone stands for the others of
its node: they wait. Refused: a CPU build without the C++ module. What copies cost other work is contention.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from vchitect_fast.autotune.probe.clock import Repeats, several
from vchitect_fast.autotune.probe.fit import fit
from vchitect_fast.cluster import Link
from vchitect_fast.errors import UserError
from vchitect_fast.offload.engine import Engine
from vchitect_fast.parallel.mesh import Mesh, on_all, on_first, over_ranks

WAYS = {"device_to_host": (True, False), "host_to_device": (False, True)}
GIB = 2**30
R = TypeVar("R")


class Copies(Protocol):
    """Copies of one size between the device and host memory."""

    def seconds(self, out: bool, back: bool, calls: int) -> float:
        """Of one copy, `calls` after each other; with both ways at once, of the slower."""


class EngineCopies:
    """The engine of csrc on a CPU, whose "device" is ordinary memory."""

    def __init__(self, num_bytes: int) -> None:
        self._engine = Engine(2 * num_bytes + 2**16)  # the one that stays, the one that leaves
        self._mover, self._num_bytes = self._engine.mover, num_bytes
        self._source, self._target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
        self._resident = self._mover.offload(self._source.data_ptr(), num_bytes)
        self._mover.wait(self._resident)

    def seconds(self, out: bool, back: bool, calls: int) -> float:
        """See Copies."""
        start = time.perf_counter()
        for _ in range(calls):
            if out:
                leaving = self._mover.offload(self._source.data_ptr(), self._num_bytes)
            if back:
                self._mover.prefetch(self._resident, self._target.data_ptr())
                self._mover.wait(self._resident)
            if out:
                self._mover.wait(leaving)
                self._mover.release(leaving)
        return (time.perf_counter() - start) / calls


class CudaCopies:
    """cudaMemcpyAsync, a stream each way. Never run yet."""

    SPIN_CYCLES = 2_000_000  # about a millisecond: both queues are full before either begins

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._gate, self._out, self._back = (torch.cuda.Stream(device) for _ in range(3))
        self._on_device = [torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._on_host = [torch.ones(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        torch.cuda.synchronize(device)

    def seconds(self, out: bool, back: bool, calls: int) -> float:
        """See Copies. Waits for its own streams only, so that it can run beside other work of this device."""
        ways = [(self._out, self._on_host[0], self._on_device[0])] * out
        ways += [(self._back, self._on_device[1], self._on_host[1])] * back
        with torch.cuda.device(self._device):
            gate = torch.cuda.Event()
            with torch.cuda.stream(self._gate):
                torch.cuda._sleep(self.SPIN_CYCLES)
                gate.record(self._gate)
            spans = []
            for stream, target, source in ways:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with torch.cuda.stream(stream):
                    stream.wait_event(gate)
                    begin.record(stream)
                    for _ in range(calls):
                        target.copy_(source, non_blocking=True)
                    end.record(stream)
                spans.append((begin, end))
            for _, end in spans:
                end.synchronize()
        return max(begin.elapsed_time(end) for begin, end in spans) / 1e3 / calls


def open_copies(num_bytes: int, device: torch.device) -> Copies:
    """UserError: the C++ module is missing (CPU), or memory is."""
    return CudaCopies(num_bytes, device) if device.type == "cuda" else EngineCopies(num_bytes)


def measure_host_link(
    mesh: Mesh, sizes: tuple[int, ...], slab_bytes: int, source: str, advance: Callable[[], None]
) -> tuple[Link, ...]:
    """Both ways, with every rank of the mesh. `sizes` in bytes, the largest also both ways and together."""
    alone: dict[str, list[tuple[int, Repeats]]] = {way: [] for way in WAYS}
    both = together = None
    setup = _first_of_node(mesh, lambda: _slab(slab_bytes, mesh.device))
    for size in sorted(sizes):
        copies = on_all(mesh.host_group, lambda size=size: open_copies(size, mesh.device))  # type: ignore[misc]
        calls = max(1, min(64, sizes[-1] // 4 // size))
        for way, (out, back) in WAYS.items():
            alone[way].append((size, _first_of_node(mesh, lambda: several(lambda: copies.seconds(out, back, calls)))))  # noqa: B023
            advance()
        if size == max(sizes):
            both = _first_of_node(mesh, lambda: several(lambda: copies.seconds(True, True, calls)))  # noqa: B023
            advance()
            if mesh.local_world_size > 1:
                together = {way: _all_at_once(mesh, copies, ways, calls) for way, ways in WAYS.items()}
    assert both is not None
    links = []
    for way, timed in alone.items():
        found = fit([(size, repeats.median_s) for size, repeats in timed])
        spread = max(repeats.spread for _, repeats in timed)
        text = (
            f"{source}; median of {timed[0][1].number}, spread {spread:.0%}, a latency and a rate alone are off by "
            f"{found.residual:.0%}; {setup}"
        )
        links.append(
            Link(
                way, found.bytes_per_s, found.latency_s, text,
                both_ways_bytes_per_s=max(sizes) / both.median_s,
                together_bytes_per_s=max(sizes) / together[way] if together else None, points=found.points,
            )
        )  # fmt: skip
    return tuple(links)


def _first_of_node(mesh: Mesh, measure: Callable[[], R]) -> R:
    """On the first rank of each node while the others wait, then what the very first found, on all."""
    first = mesh.rank % mesh.local_world_size == 0
    found = on_all(mesh.host_group, lambda: measure() if first else None)
    return on_first(mesh.host_group, lambda: cast(R, found))


def _all_at_once(mesh: Mesh, copies: Copies, ways: tuple[bool, bool], calls: int) -> float:
    """Seconds of one copy on the slowest rank, median of five."""

    def once() -> float:
        dist.barrier(mesh.host_group)
        return over_ranks(mesh, [], [copies.seconds(*ways, calls)])[1][0]

    return several(once).median_s


def _slab(num_bytes: int, device: torch.device) -> str:
    """What setting up the pool costs: pages touched, and pinned where the device is a GPU."""
    try:
        seconds, what = Engine(num_bytes, device).stats()["setup_s"], "the pool"
    except UserError:  # no module, or none for this device
        if device.type == "cpu":
            raise
        start = time.perf_counter()
        torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        seconds, what = time.perf_counter() - start, "torch's pinned memory"
    return f"{what} is set up in {seconds * GIB / num_bytes:.3f} s a GiB"
