"""What a CPU can measure: the dispatch of an op, the copy engine, the planner. Each beside the plain way to do it.

dispatch   ops.bias_gelu whole (checks, autograd.Function, torch op, launcher) with a kernel that does nothing, beside an
           autograd.Function that calls the same launchers directly; goal: at most 3 x
engine     a slot out and back (offload 4 KiB, release) beside torch's empty and copy; 64 MiB each way beside memcpy
planner    plan_run for a declared device, no alternative
span       a profiling span that is off beside three empty calls; one that is on beside torch's own record_function
A sample is several calls; Records hold the time of one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vchitect_fast.benchmarks.record import BOTH, FORWARD
from vchitect_fast.benchmarks.timing import Work

NONE = "-"  # no direction, no dtype
MIB = 2**20


@dataclass(frozen=True)
class HostBench:
    """Callables to time beside each other; `absent` are providers that cannot run here, with the reason."""

    name: str
    shape: str
    direction: str
    works: dict[str, Work]
    calls: int = 1  # in one sample
    amount: float | None = None  # of one call, in the unit
    unit: str | None = None
    absent: dict[str, str] = field(default_factory=dict)


def host_benches() -> list[HostBench]:
    """Every one."""
    return [*_dispatch(), *_engine(), *_planner(), *_spans()]


def _dispatch() -> Iterator[HostBench]:
    ours, bare = "ops.bias_gelu (ours)", "bare autograd.Function"
    try:
        from vchitect_fast.kernels import bias_gelu as module
    except ImportError as error:
        why = f"triton cannot be imported ({error})"
        yield HostBench("dispatch", "empty kernel", FORWARD, {}, absent=dict.fromkeys((ours, bare), why))
        return
    from vchitect_fast.kernels import ops

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
            ctx.save_for_backward(x, bias)
            return module.launch_forward(x, bias)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            return module._launch_backward(dy, *ctx.saved_tensors)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, bias = (torch.ones(size, device=device, requires_grad=True) for size in ((4, 8), (8,)))
    dy = torch.ones(4, 8, device=device)
    calls = 10  # short samples: on a busy machine a long one meets the scheduler, and the slower callable more often
    forwards: dict[str, Callable[[], Tensor]] = {
        ours: lambda: ops.bias_gelu(x, bias, impl="triton"),
        bare: lambda: Bare.apply(x, bias),
    }

    def both(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), (x, bias), dy)

    def repeated(call: Callable[[], object]) -> Work:
        def run(_: None) -> None:
            with _empty_kernels(module):
                for _i in range(calls):
                    call()

        return Work(run)

    forward_works = {name: repeated(forward) for name, forward in forwards.items()}
    yield HostBench("dispatch", "empty kernel", FORWARD, forward_works, calls, 1, "1/s")
    both_works = {name: repeated(both(forward)) for name, forward in forwards.items()}
    yield HostBench("dispatch", "empty kernel", BOTH, both_works, calls, 1, "1/s")


class _EmptyKernel:
    """Launched like a Triton kernel; does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def _empty_kernels(module: Any) -> Iterator[None]:
    kept = module._forward_kernel, module._backward_kernel
    module._forward_kernel = module._backward_kernel = _EmptyKernel()
    try:
        yield
    finally:
        module._forward_kernel, module._backward_kernel = kept


def _engine() -> Iterator[HostBench]:
    slot, copy = "copy engine, slot", "copy engine, copy"
    try:
        from vchitect_fast import _C
    except ImportError as error:
        why = f"the C++ module is not there ({error}); it was built with VCHITECT_FAST_EXT=0"
        for name in (slot, copy):
            yield HostBench(name, NONE, NONE, {}, absent={"engine (ours)": why})
        return

    calls, small = 10, torch.zeros(4096, dtype=torch.uint8)
    engine = _C.Engine(budget_bytes=MIB)

    def slots(_: None) -> None:
        for _i in range(calls):
            engine.release(engine.offload(small.data_ptr(), small.nbytes))

    def empties(_: None) -> None:
        for _i in range(calls):
            torch.empty_like(small).copy_(small)

    works = {"offload and release (ours)": Work(slots), "torch empty and copy": Work(empties)}
    yield HostBench(slot, "4 KiB", NONE, works, calls, 1, "1/s")

    source = torch.ones(64 * MIB, dtype=torch.uint8)
    target = torch.zeros_like(source)
    large = _C.Engine(budget_bytes=source.nbytes)
    held: list[int] = []

    def free() -> None:
        while held:
            large.release(held.pop())

    def out(_: None) -> None:
        held.append(large.offload(source.data_ptr(), source.nbytes))
        large.wait(held[-1])

    def offloaded() -> int:
        free()
        held.append(large.offload(source.data_ptr(), source.nbytes))
        large.wait(held[-1])
        return held[-1]

    def back(ticket: int) -> None:
        large.prefetch(ticket, target.data_ptr())
        large.wait(ticket)

    works = {
        "offload (ours)": Work(out, free),
        "prefetch (ours)": Work(back, offloaded),
        "memcpy": Work(lambda _: ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)),
        "torch copy": Work(lambda _: target.copy_(source)),
    }
    yield HostBench(copy, "64 MiB", NONE, works, 1, 2 * source.nbytes, "GB/s")  # read and written


def _planner() -> Iterator[HostBench]:
    from vchitect_fast.architecture import preset
    from vchitect_fast.autotune.search import plan_run
    from vchitect_fast.shapes import VideoShape

    device, config = _declared_device(), preset("vchitect-2b")
    shapes = [VideoShape.parse(text)[0] for text in ("32x256x256", "32x512x384", "40x768x432", "128x256x256")]
    for number in (1, len(shapes)):

        def plan(_: None, chosen: list[VideoShape] = shapes[:number]) -> None:
            plan_run(config, chosen, device, batch=4, num_text_tokens=333, dtype="bfloat16")

        shape = "one shape" if number == 1 else f"{number} shapes"
        yield HostBench("planner", shape, NONE, {"plan_run (ours)": Work(plan)}, 1, number, "1/s")


def _spans() -> Iterator[HostBench]:
    from vchitect_fast.profiling.span import TorchSink, recording, span

    calls = 1000

    def empty() -> None:
        pass

    def three_calls(_: None) -> None:
        for _i in range(calls):
            empty()
            empty()
            empty()

    def spans(_: None) -> None:
        for _i in range(calls):
            with span("forward/spatial"):
                pass

    def recorded(_: None) -> None:
        with recording(TorchSink()):
            spans(None)

    def bare(_: None) -> None:
        for _i in range(calls):
            with torch.profiler.record_function("forward/spatial"):
                pass

    off = {"span, off (ours)": Work(spans), "three empty calls": Work(three_calls)}
    yield HostBench("span", "off", NONE, off, calls, 1, "1/s")
    on = {"span, on (ours)": Work(recorded), "record_function": Work(bare)}
    yield HostBench("span", "on", NONE, on, calls, 1, "1/s")


def _declared_device() -> Any:
    """A device with as many timings as the probe leaves, at round rates: the planner's work depends on their number."""
    from vchitect_fast.cluster import Device, Timing

    flops, bytes_per_s, timings = 5e14, 2e12, []
    for rows in (256, 2048, 16384, 65536):
        for width in (192, 768, 1536, 3072):
            seconds = 2 * rows * width**2 / flops
            timings.append(Timing("linear", "bfloat16", rows, width, seconds, 2 * seconds))
    for rows in (8192, 65536):
        for length in (32, 256, 1024, 4096):
            seconds = 4 * rows * 1536 * length / flops
            timings.append(Timing("attention", "bfloat16", rows, 1536, seconds, 2 * seconds, length=length))
    for rows in (256, 4096, 65536, 524288):
        seconds = 6 * 256 * rows / bytes_per_s
        timings += [
            Timing(op, "bfloat16", rows, 256, seconds, seconds) for op in ("multiply", "gelu", "layer_norm", "rotate")
        ]
    timings += [Timing("adamw", "float32", 1, size, 28 * size / bytes_per_s) for size in (2**16, 2**27)]
    timings.append(Timing("view", "float32", 4, 4, 1e-6))
    return Device(
        name="declared", kind="cuda", memory_bytes=80 * 2**30, matmul_flops={"bfloat16": flops},
        memory_bytes_per_s=bytes_per_s, op_overhead_s=1e-6, process_bytes=2**29, timings=tuple(timings),
        fit_error=0.1, source="declared for this bench",
    )  # fmt: skip
