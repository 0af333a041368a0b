"""The clock: callables timed in interleaved rounds (A B C A B C), and the machine's two ceilings measured the same way.

On a GPU a sample is the time between two CUDA events, with the L2 cache overwritten before; on a CPU it is perf_counter
around the call. What drifts (clocks, temperature, other programs) then meets every callable alike. `prepare` runs before
each sample and is not timed. It knows nothing of ops, and reports what it saw: median, p10 and p90, no mean, no best.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # more than any L2 cache
MIN_ROUNDS, MAX_ROUNDS = 5, 50
MAX_HOST_ROUNDS = 500  # of what takes microseconds
WARM_UP_S = 0.05  # of each callable, so that clocks rise before the first sample


@dataclass(frozen=True)
class Work:
    """`run` is timed; it gets what `prepare` returned, made anew for every sample.

    once  one sample without warm-up: an interpreted kernel is run because it must work, not for its time
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    once: bool = False


@dataclass(frozen=True)
class Samples:
    """Median and percentiles of n samples, in seconds."""

    n: int
    median_s: float
    p10_s: float
    p90_s: float


def summary(samples_s: Sequence[float]) -> Samples:
    """Percentiles by linear interpolation between the ordered samples."""
    ordered = sorted(samples_s)
    return Samples(len(ordered), *(_quantile(ordered, q) for q in (0.5, 0.1, 0.9)))


def _quantile(ordered: Sequence[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


class Clock:
    """Times one sample on its device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None

    def sample_s(self, work: Work) -> float:
        """One timed call."""
        given = work.prepare()
        if self._flush is None:
            start = time.perf_counter()
            work.run(given)
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()  # also keeps the device busy while the host queues what follows
        begin.record()
        work.run(given)
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1000


def interleaved(
    clock: Clock, works: Mapping[str, Work], budget_s: float, *, rounds: int | None = None, max_rounds: int = MAX_ROUNDS
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Samples of every callable, and the reason of each that raised.

    budget_s  for the rounds of all callables together; 5 rounds are made in any case and `max_rounds` at most
    rounds    instead of the budget
    """
    failed: dict[str, str] = {}
    once_s: dict[str, float] = {}
    single_s: dict[str, float] = {}
    for name, work in works.items():
        try:
            first_s = clock.sample_s(work)  # compiles, allocates, chooses algorithms
            if work.once:
                single_s[name] = first_s
                continue
            once_s[name] = clock.sample_s(work)
            for _ in range(min(20, int(WARM_UP_S / max(once_s[name], 1e-6)))):
                once_s[name] = clock.sample_s(work)
        except Exception as error:
            failed[name] = reason(error)
    if rounds is None:
        rounds = int(budget_s / max(sum(once_s.values()), 1e-9))
        rounds = min(max_rounds, max(MIN_ROUNDS, rounds))
    found: dict[str, list[float]] = {name: [] for name in once_s}
    for _ in range(rounds):
        for name in list(found):
            try:
                found[name].append(clock.sample_s(works[name]))
            except Exception as error:
                failed[name] = reason(error)
                del found[name]
    found |= {name: [value] for name, value in single_s.items()}
    return {name: summary(values) for name, values in found.items()}, failed


def reason(error: Exception) -> str:
    """An exception as one short line; memory it held on the GPU is given back."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "the GPU's memory ran out"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def ceilings(clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches now: TFLOP/s of one large matmul in `dtype`, GB/s of a copy (read and write)."""
    on_gpu = clock.device.type == "cuda"
    side, num_bytes = (8192, 2**30) if on_gpu else (1024, 2**26)
    a, b = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
    source = torch.ones(num_bytes // 4, device=clock.device)
    target = torch.empty_like(source)
    works = {"matmul": Work(lambda _: a @ b), "copy": Work(lambda _: target.copy_(source))}
    samples, failed = interleaved(clock, works, budget_s=0.5)
    assert not failed, failed
    return {
        "TFLOP/s": 2 * side**3 / samples["matmul"].median_s / 1e12,
        "GB/s": 2 * num_bytes / samples["copy"].median_s / 1e9,
    }
