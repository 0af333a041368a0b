"""Times what a block of the model is made of: linear layers, attention, elementwise passes, saving, and the optimizer.

At several sizes, since efficiency depends on size and most on a CPU; sizes held out of the fit tell how well interpolation
between the others works. A Device with its timings comes out. Links, ranks and data are measured beside it. Needs torch.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vchitect_fast.architecture import preset
from vchitect_fast.attention import rotary_tables, rotate
from vchitect_fast.autotune.probe.bar import Bar
from vchitect_fast.autotune.probe.clock import Clock
from vchitect_fast.autotune.probe.saving import measure_saving
from vchitect_fast.autotune.rates import Rates
from vchitect_fast.cluster import Device, Timing
from vchitect_fast.machine import resident_bytes
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.optimizer import MasterAdamW

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
    elements: tuple[int, ...]  # of multiply, gelu, layer_norm, rotate, adamw
    square: int  # side of the matmul that gives the peak
    copy_bytes: int
    held_out_linear: tuple[tuple[int, int], ...]  # (rows, width)
    held_out_attention: tuple[tuple[int, int], ...]  # (rows, length)
    held_out_elements: tuple[int, ...]
    held_out_products: tuple[tuple[int, int, int], ...]  # (rows, fan in, fan out) of the block's own linear layers
    pool_bytes: int  # larger than the caches, so that operands come from memory as in training
    seconds_per_point: float = 0.04  # repeats go on until this much was spent, three at least and fifteen at most


# The largest CPU points take 0.1 to 0.5 s on two cores; the widths are those of vchitect-tiny and -2b and neighbours.
CPU_GRID = Grid(
    rows=(8, 64, 512, 2048), widths=(64, 192, 768, 1536), attention_rows=(512, 4096), attention_width=192,
    lengths=(8, 32, 128, 512), elements=(2**12, 2**16, 2**19, 2**22), square=2048, copy_bytes=2**27,
    held_out_linear=((256, 192), (1024, 384)), held_out_attention=((1536, 64),), held_out_elements=(2**17, 2**20),
    held_out_products=((512, 192, 768), (512, 768, 192), (512, 192, 576)), pool_bytes=2**26,
)  # fmt: skip
CUDA_GRID = Grid(
    rows=(256, 2048, 16384, 65536), widths=(192, 768, 1536, 3072), attention_rows=(8192, 65536), attention_width=1536,
    lengths=(32, 256, 1024, 4096), elements=(2**16, 2**20, 2**24, 2**27), square=8192, copy_bytes=2**30,
    held_out_linear=((4096, 1536), (32768, 2304)), held_out_attention=((16384, 512),), held_out_elements=(2**22, 2**25),
    held_out_products=((16384, 1536, 6144), (16384, 6144, 1536), (16384, 1536, 4608)), pool_bytes=2**29,
)  # fmt: skip


def measure_ops(found: Device, device: torch.device, grid: Grid, bar: Bar) -> Device:
    """`found` with everything that is measured of it; process_bytes first, before the measurements take memory."""
    process_bytes = _process_bytes(device)
    clock = Clock(device, grid.seconds_per_point, grid.pool_bytes)
    points = list(_points(grid, clock))
    measured = []
    with bar("ops of a block", len(points)) as advance:
        for held_out, measure in points:
            measured.append((held_out, measure()))
            advance()
    timings = (*(timing for held_out, timing in measured if not held_out), *measure_saving(device))
    view = next(timing for timing in timings if timing.op == "view")
    result = replace(
        found,
        memory_bytes_per_s=2 * grid.copy_bytes / clock.median_s(_copy(grid.copy_bytes, clock.device)).median_s,
        matmul_flops={name: _peak_flops(grid.square, dtype, clock) for name, dtype in DTYPES.items()},
        attention_flops=_best_attention_flops(timings),
        op_overhead_s=view.forward_s,
        process_bytes=process_bytes,
        timings=timings,
    )
    return replace(result, fit_error=_fit_error(result, [timing for held_out, timing in measured if held_out]))


def _points(grid: Grid, clock: Clock) -> Iterator[tuple[bool, Callable[[], Timing]]]:
    """Every point to time: (held out of the fit?, what to call)."""

    def point(held_out: bool, function: Callable[..., Timing], *args: object) -> tuple[bool, Callable[[], Timing]]:
        return held_out, lambda: function(clock, *args)

    for name in DTYPES:
        for rows, width in itertools.product(grid.rows, grid.widths):
            yield point(False, _time_linear, name, rows, width, width)
        for rows, fan_in, fan_out in (*((rows, w, w) for rows, w in grid.held_out_linear), *grid.held_out_products):
            yield point(True, _time_linear, name, rows, fan_in, fan_out)
        pairs = [(False, rows, length) for rows in grid.attention_rows for length in grid.lengths]
        for held_out, rows, length in pairs + [(True, *size) for size in grid.held_out_attention]:
            yield point(held_out, _time_attention, name, rows, grid.attention_width, length)
        sizes = [(False, size) for size in grid.elements] + [(True, size) for size in grid.held_out_elements]
        for op in ("multiply", "gelu", "layer_norm", "rotate"):
            for held_out, size in sizes:
                yield point(held_out, _time_elementwise, op, name, size)
    for size in grid.elements:
        yield point(False, _time_adamw, size)
    yield point(False, _time_view)


def _time_linear(clock: Clock, name: str, rows: int, fan_in: int, fan_out: int) -> Timing:
    """Its width is the geometric mean of both, by which rates are found (rates.py)."""
    dtype, width = DTYPES[name], round(math.sqrt(fan_in * fan_out))
    shapes = ((rows, fan_in), (fan_out, fan_in), (fan_out,))

    def operands() -> tuple[Tensor, ...]:
        return tuple(clock.take(*shape, dtype=dtype, requires_grad=True) for shape in shapes)

    call_bytes = dtype.itemsize * (rows * (fan_in + fan_out) + fan_in * fan_out)
    return _timing(clock, "linear", name, rows, width, F.linear, operands, call_bytes)


def _time_attention(clock: Clock, name: str, rows: int, width: int, length: int) -> Timing:
    dtype, size = DTYPES[name], (max(1, rows // length), length, width // HEAD_DIM, HEAD_DIM)

    def operands() -> tuple[Tensor, ...]:
        return tuple(clock.take(*size, dtype=dtype, requires_grad=True) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    return _timing(clock, "attention", name, rows, width, attend, operands, 4 * dtype.itemsize * rows * width, length)


def _time_elementwise(clock: Clock, op: str, name: str, elements: int) -> Timing:
    dtype, width = DTYPES[name], 4 * HEAD_DIM
    rows = elements // width
    cos, sin = rotary_tables(1, HEAD_DIM, 1.0, clock.device)

    def operands() -> tuple[Tensor, ...]:
        if op == "multiply":
            return clock.take(rows, width, dtype=dtype), clock.take(rows, width, dtype=dtype)
        return (clock.take(rows, width, dtype=dtype, requires_grad=True),)

    work: dict[str, Callable[..., Tensor]] = {
        "multiply": torch.mul,
        "gelu": lambda x: F.gelu(x, approximate="tanh"),
        "layer_norm": lambda x: F.layer_norm(x, (width,)),
        "rotate": lambda x: rotate(x.view(1, 1, rows, -1, HEAD_DIM), cos, sin),
    }
    return _timing(clock, op, name, rows, width, work[op], operands, 3 * dtype.itemsize * elements)


def _time_adamw(clock: Clock, elements: int) -> Timing:
    parameter = torch.randn(elements, device=clock.device, requires_grad=True)
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    repeats = clock.median_s(lambda _: optimizer.step())
    return Timing("adamw", "float32", 1, elements, repeats.median_s, num_repeats=repeats.number, spread=repeats.spread)


def _time_view(clock: Clock) -> Timing:
    x = torch.randn(4, 4, device=clock.device, requires_grad=True)
    repeats = clock.median_s(lambda _: x.view(2, 8))
    return Timing("view", "float32", 4, 4, repeats.median_s, num_repeats=repeats.number, spread=repeats.spread)


def _timing(
    clock: Clock, op: str, name: str, rows: int, width: int, work: Callable[..., Tensor],
    operands: Callable[[], tuple[Tensor, ...]], call_bytes: int, length: int = 0,
) -> Timing:  # fmt: skip
    """Time the forward, and the backward alone on graphs that are kept."""
    inputs = [operands() for _ in range(clock.ring(call_bytes))]
    ahead = clock.median_s(lambda turn: work(*inputs[turn]), len(inputs))
    backward_s = None
    if inputs[0][0].requires_grad:
        outputs = [work(*item) for item in inputs]
        gradients = [clock.take(*out.shape, dtype=out.dtype) for out in outputs]

        def behind(turn: int) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs[turn], inputs[turn], gradients[turn], retain_graph=True)

        # No op here has a backward much cheaper than its forward; the floor guards the difference of two noisy times.
        backward_s = max(clock.median_s(behind, len(inputs)).median_s - clock.engine_s, 0.5 * ahead.median_s)
    return Timing(op, name, rows, width, ahead.median_s, backward_s, length, ahead.number, ahead.spread)


def _peak_flops(side: int, dtype: torch.dtype, clock: Clock) -> float:
    a, b = (torch.randn(side, side, dtype=dtype, device=clock.device) for _ in range(2))
    return 2 * side**3 / clock.median_s(lambda _: a @ b).median_s


def _copy(num_bytes: int, device: torch.device) -> Callable[[int], Tensor]:
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda _: target.copy_(source)


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


def _process_bytes(device: torch.device) -> int:
    """What a training process takes beside its own tensors: imports, what torch loads when first used, the CUDA context.

    Taken after one step of the smallest preset, since the optimizer and the kernels load their parts then.
    """
    import vchitect_fast.data  # noqa: F401  (video decoding; loaded so that its share is counted)

    model = VchitectTransformer(preset("vchitect-nano")).to(device)
    optimizer = MasterAdamW(model, weight_decay=0.01, betas=(0.9, 0.99))
    config = model.config
    latents, text = torch.randn(1, 2, config.in_channels, 4, 4), torch.randn(1, 4, config.joint_attention_dim)
    inputs = (latents, text, torch.randn(1, config.pooled_projection_dim), torch.full((1,), 500.0))
    model(*(tensor.to(device) for tensor in inputs)).square().mean().backward()
    optimizer.step(1e-4, 1.0)
    if device.type == "cpu":
        return resident_bytes()
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
