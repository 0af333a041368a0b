"""Times functions on one device: the median of several samples, and how far they spread. It knows no op.

Clock is for the ops of a block: operands from a large pool, results kept, as in training. `several` is for what brings its
own clock: copies, collectives, files. Nothing is fitted here (fit.py). Needs torch.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_RING = 64  # operands that a timed function goes round


@dataclass(frozen=True)
class Repeats:
    """Samples of one thing."""

    median_s: float
    spread: float  # (p90 - p10) / median
    number: int


def summary(samples: Sequence[float]) -> Repeats:
    """Of seconds, at least one."""
    ordered, number = sorted(samples), len(samples)
    middle = statistics.median(ordered)
    spread = (ordered[int(0.9 * (number - 1) + 0.5)] - ordered[int(0.1 * (number - 1))]) / middle
    return Repeats(middle, spread, number)


def several(once: Callable[[], float], number: int = 5) -> Repeats:
    """`once()` returns its seconds; the first call, which allocates and connects, is not counted."""
    once()
    return summary([once() for _ in range(number)])


def synchronize(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now_s(device: torch.device) -> float:
    """The clock, once the device has done what was asked of it."""
    synchronize(device)
    return time.perf_counter()


class Clock:
    """Times a function: median of several samples, each long enough for the clock.

    In a training step every op reads memory that others wrote long ago and writes new memory. So the function is called
    with a running number, takes another part of a large pool each time, and its results are kept for as many calls.
    """

    def __init__(self, device: torch.device, seconds_per_point: float, pool_bytes: int) -> None:
        self.device, self.seconds_per_point, self.pool_bytes = device, seconds_per_point, pool_bytes
        self._pool = torch.randn(pool_bytes // 4, device=device)
        self._pools = {torch.float32: self._pool, torch.bfloat16: self._pool.to(torch.bfloat16).repeat(2)}
        self._next, self._turn = 0, 0
        self.engine_s = (
            0.0  # of starting autograd, which a training step pays once and a single op's backward every time
        )
        x = torch.ones(1, device=device, requires_grad=True)
        out, gradient = x.view(1), torch.ones(1, device=device)
        self.engine_s = self.median_s(lambda _: torch.autograd.grad(out, x, gradient, retain_graph=True)).median_s

    def take(self, *shape: int, dtype: torch.dtype, requires_grad: bool = False) -> Tensor:
        """A tensor over the next part of the pool (noise), or new memory where the pool is too small."""
        number, pool = math.prod(shape), self._pools[dtype]
        if number > len(pool):
            return torch.randn(*shape, device=self.device, dtype=dtype, requires_grad=requires_grad)
        self._next = self._next if self._next + number <= len(pool) else 0
        part = pool[self._next : self._next + number].view(shape)
        self._next += number
        return part.detach().requires_grad_(requires_grad)

    def ring(self, call_bytes: int) -> int:
        """How many different operands a function that touches so many bytes should go round."""
        return max(1, min(MAX_RING, self.pool_bytes // call_bytes))

    def median_s(self, work: Callable[[int], object], ring: int = 1) -> Repeats:
        """`work(i)` with i from 0 to ring - 1, over and over."""
        kept: list[object] = [None] * ring
        once = self._sample(work, kept, 1)  # allocates, chooses algorithms
        if once < 0.05:
            once = self._sample(work, kept, ring) / ring
        inner = max(1, math.ceil(5e-4 / max(once, 1e-7)))
        number = min(15, max(3, int(self.seconds_per_point / max(once * inner, 1e-7))))
        return summary([self._sample(work, kept, inner) / inner for _ in range(number)])

    def _sample(self, work: Callable[[int], object], kept: list[object], calls: int) -> float:
        start_s = now_s(self.device)
        for _ in range(calls):
            self._turn = (self._turn + 1) % len(kept)
            kept[self._turn] = work(self._turn)
        return now_s(self.device) - start_s
