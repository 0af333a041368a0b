"""Measures this machine: one CPU or one CUDA device -> a Cluster with rates, timings of single ops and their source.

It times what a block of the model is made of - linear layers, attention, elementwise passes, the optimizer - at several
sizes, since efficiency depends on size and most on a CPU. Every number is the median of several repeats; sizes held out of
the fit tell how well interpolation between the others works. It decides nothing and loads no model. Needs torch.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch
import torch.nn.functional as F
from torch import Tensor

from vchitect_fast.autotune.cost import Rates
from vchitect_fast.cluster import Cluster, Device, Timing
from vchitect_fast.machine import host_memory_bytes, resident_bytes, this_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD_DIM = 64  # of every released size


@dataclass(frozen=True)
class Grid:
    """The sizes that are timed. Each op's grid is complete, so that interpolation needs no guess."""

    rows: tuple[int, ...]  # of linear
    widths: tuple[int, ...]
    attention_rows: tuple[int, ...]
    attention_width: int  # heads x head dim
    lengths: tuple[int, ...]
    elements: tuple[int, ...]  # of multiply, gelu, layer_norm, adamw
    square: int  # side of the matmul that gives the peak
    copy_bytes: int
    held_out_linear: tuple[tuple[int, int], ...]  # (rows, width)
    held_out_attention: tuple[tuple[int, int], ...]  # (rows, length)
    held_out_elements: tuple[int, ...]
    seconds_per_point: float = 0.06  # repeats go on until this much was spent, three at least and fifteen at most


# The largest CPU points take 0.1 to 0.5 s on two cores; the widths are those of vchitect-tiny and -2b and neighbours.
CPU_GRID = Grid(
    rows=(64, 512, 4096), widths=(64, 192, 768, 1536), attention_rows=(512, 4096), attention_width=192,
    lengths=(8, 32, 128, 512), elements=(2**12, 2**16, 2**19, 2**22), square=2048, copy_bytes=2**27,
    held_out_linear=((256, 192), (1536, 384)), held_out_attention=((1536, 64),), held_out_elements=(2**17, 2**20),
)  # fmt: skip
CUDA_GRID = Grid(
    rows=(256, 2048, 16384, 65536), widths=(192, 768, 1536, 3072), attention_rows=(8192, 65536), attention_width=1536,
    lengths=(32, 256, 1024, 4096), elements=(2**16, 2**20, 2**24, 2**27), square=8192, copy_bytes=2**30,
    held_out_linear=((4096, 1536), (32768, 2304)), held_out_attention=((16384, 512),), held_out_elements=(2**22, 2**25),
)  # fmt: skip


def probe(progress: bool = True, grid: Grid | None = None) -> Cluster:
    """Measure this machine, with the threads torch has now.

    progress  a bar on standard error
    grid      sizes to time; CPU_GRID or CUDA_GRID by default

    Returns a Cluster of one device. Takes about 15 s on two quiet CPU cores.
    """
    found = this_device()
    grid = grid or (CUDA_GRID if found.kind == "cuda" else CPU_GRID)
    clock = _Clock(torch.device(found.kind), grid.seconds_per_point)
    base_bytes = _process_bytes(found.kind)
    points = list(_points(grid, clock))
    with _bar(len(points), progress) as advance:
        measured = []
        for held_out, measure in points:
            measured.append((held_out, measure()))
            advance()
    timings = tuple(timing for held_out, timing in measured if not held_out)
    view = next(timing for timing in timings if timing.op == "view")
    device = replace(
        found,
        memory_bytes_per_s=2 * grid.copy_bytes / clock.median_s(_copy(grid.copy_bytes, clock.device)).median_s,
        matmul_flops={name: _peak_flops(grid.square, dtype, clock) for name, dtype in DTYPES.items()},
        attention_flops=_best_attention_flops(timings),
        op_overhead_s=view.forward_s,
        process_bytes=base_bytes,
        timings=timings,
        source=_source(found),
    )
    device = replace(device, fit_error=_fit_error(device, [timing for held_out, timing in measured if held_out]))
    return Cluster(name=f"this machine: {found.name}", device=device, host_memory_bytes=host_memory_bytes())


@dataclass(frozen=True)
class _Repeats:
    median_s: float
    spread: float
    number: int


class _Clock:
    """Times a function: median of several samples, each long enough for the clock."""

    def __init__(self, device: torch.device, seconds_per_point: float) -> None:
        self.device, self.seconds_per_point = device, seconds_per_point
        self.engine_s = 0.0  # of starting autograd, which a training step pays once and a single op's backward every time
        x = torch.ones(1, device=device, requires_grad=True)
        out, gradient = x.view(1), torch.ones(1, device=device)
        self.engine_s = self.median_s(lambda: torch.autograd.grad(out, x, gradient, retain_graph=True)).median_s

    def median_s(self, work: Callable[[], object]) -> _Repeats:
        self._sample(work, 1)  # allocates, chooses algorithms
        once = self._sample(work, 1)
        inner = max(1, math.ceil(5e-4 / max(once, 1e-7)))
        number = min(15, max(3, int(self.seconds_per_point / max(once * inner, 1e-7))))
        samples = sorted(self._sample(work, inner) for _ in range(number))
        middle = statistics.median(samples)
        spread = (samples[int(0.9 * (number - 1) + 0.5)] - samples[int(0.1 * (number - 1))]) / middle
        return _Repeats(middle, spread, number)

    def _sample(self, work: Callable[[], object], inner: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(inner):
            work()
        self._wait()
        return (time.perf_counter() - start) / inner

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _points(grid: Grid, clock: _Clock) -> Iterator[tuple[bool, Callable[[], Timing]]]:
    """Every point to time: (held out of the fit?, what to call)."""

    def point(held_out: bool, function: Callable[..., Timing], *args: object) -> tuple[bool, Callable[[], Timing]]:
        return held_out, lambda: function(clock, *args)

    for name in DTYPES:
        square = [(False, rows, width) for rows in grid.rows for width in grid.widths]
        for held_out, rows, width in square + [(True, *size) for size in grid.held_out_linear]:
            yield point(held_out, _time_linear, name, rows, width)
        pairs = [(False, rows, length) for rows in grid.attention_rows for length in grid.lengths]
        for held_out, rows, length in pairs + [(True, *size) for size in grid.held_out_attention]:
            yield point(held_out, _time_attention, name, rows, grid.attention_width, length)
        sizes = [(False, size) for size in grid.elements] + [(True, size) for size in grid.held_out_elements]
        for op in ("multiply", "gelu", "layer_norm"):
            for held_out, size in sizes:
                yield point(held_out, _time_elementwise, op, name, size)
    for size in grid.elements:
        yield point(False, _time_adamw, size)
    yield point(False, _time_view)


def _time_linear(clock: _Clock, name: str, rows: int, width: int) -> Timing:
    make = {"dtype": DTYPES[name], "device": clock.device, "requires_grad": True}
    x, weight, bias = torch.randn(rows, width, **make), torch.randn(width, width, **make), torch.randn(width, **make)
    return _timing(clock, "linear", name, rows, width, lambda: F.linear(x, weight, bias), (x, weight, bias))


def _time_attention(clock: _Clock, name: str, rows: int, width: int, length: int) -> Timing:
    make = {"dtype": DTYPES[name], "device": clock.device, "requires_grad": True}
    heads = width // HEAD_DIM
    q, k, v = (torch.randn(max(1, rows // length), length, heads, HEAD_DIM, **make) for _ in range(3))

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    return _timing(clock, "attention", name, rows, width, attend, (q, k, v), length)


def _time_elementwise(clock: _Clock, op: str, name: str, elements: int) -> Timing:
    width = min(256, elements)
    make = {"dtype": DTYPES[name], "device": clock.device}
    x = torch.randn(elements // width, width, requires_grad=op != "multiply", **make)
    other = torch.randn(elements // width, width, **make)
    work = {
        "multiply": lambda: x * other,
        "gelu": lambda: F.gelu(x, approximate="tanh"),
        "layer_norm": lambda: F.layer_norm(x, (width,)),
    }[op]
    return _timing(clock, op, name, elements // width, width, work, (x,) if x.requires_grad else ())


def _time_adamw(clock: _Clock, elements: int) -> Timing:
    parameter = torch.randn(elements, device=clock.device, requires_grad=True)
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    return _timing(clock, "adamw", "float32", 1, elements, optimizer.step, ())


def _time_view(clock: _Clock) -> Timing:
    x = torch.randn(4, 4, device=clock.device, requires_grad=True)
    return _timing(clock, "view", "float32", 4, 4, lambda: x.view(2, 8), ())


def _timing(
    clock: _Clock, op: str, name: str, rows: int, width: int, forward: Callable[[], object], inputs: tuple[Tensor, ...],
    length: int = 0,
) -> Timing:  # fmt: skip
    """Time the forward, and the backward alone on a graph that is kept."""
    ahead = clock.median_s(forward)
    backward_s = None
    if inputs:
        out = forward()
        assert isinstance(out, Tensor)
        gradient = torch.randn_like(out)
        behind = clock.median_s(lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)).median_s
        backward_s = max(behind - clock.engine_s, ahead.median_s)  # no op here has a backward cheaper than its forward
    return Timing(op, name, rows, width, ahead.median_s, backward_s, length, ahead.number, ahead.spread)


def _peak_flops(side: int, dtype: torch.dtype, clock: _Clock) -> float:
    a, b = (torch.randn(side, side, dtype=dtype, device=clock.device) for _ in range(2))
    return 2 * side**3 / clock.median_s(lambda: a @ b).median_s


def _copy(num_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _best_attention_flops(timings: tuple[Timing, ...]) -> dict[str, float]:
    best: dict[str, float] = {}
    for timing in timings:
        if timing.op == "attention":
            rate = 4 * timing.rows * timing.width * timing.length / timing.forward_s
            best[timing.dtype] = max(rate, best.get(timing.dtype, 0.0))
    return best


def _fit_error(device: Device, held_out: list[Timing]) -> float | None:
    """Mean relative error of predicting the held-out points from the others, forward and backward."""
    rates = Rates(device)
    errors = []
    for timing in held_out:
        predicted = rates.of_timing(timing)
        errors.append(abs(predicted.forward_s / timing.forward_s - 1))
        if timing.backward_s is not None:
            errors.append(abs(predicted.backward_s / timing.backward_s - 1))
    return statistics.mean(errors) if errors else None


def _process_bytes(kind: str) -> int:
    """What a training process takes before it holds any tensor of ours: its imports, or the CUDA context."""
    import vchitect_fast.model  # noqa: F401  (loaded so that its share is counted)

    if kind == "cpu":
        return resident_bytes()
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _source(device: Device) -> str:
    day = datetime.now(UTC).date().isoformat()
    threads = f", {device.num_threads} threads" if device.kind == "cpu" else ""
    return f"measured {day} by vchitect-fast autotune probe, torch {torch.__version__}{threads}"


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not shown, transient=True) as bars:
        task = bars.add_task("measuring this machine", total=total)
        yield lambda: bars.advance(task)
