"""Seconds of single ops on one device, forward and backward: between the probe's timings, or from declared rates.

    Rates          of a device that was probed: interpolated between its timings in log size
    DeclaredRates  of a device known from a data sheet and public measurements (clusters/*.yaml):
      linear       2 rows in out FLOPs / declared FLOP/s of the nearest product, not below its bytes / bandwidth
                   backward: the gradients of input and weight, as many FLOPs each, and one reading for the bias
      attention    4 rows width length FLOPs / declared FLOP/s at that length; backward 2.5 times the FLOPs at its own rate
      elementwise  bytes that the op reads and writes (table below) / bandwidth

`rates_of` takes the measured ones where there are any. Refuses an op or dtype of which nothing is known. Layer 0 only.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from vchitect_fast.cluster import AttentionPoint, Device, Timing
from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.workload import DTYPE_BYTES

BACKWARD_ATTENTION = 2.5  # of forward's FLOPs: five products instead of two; as attention's backward rates are quoted


@dataclass(frozen=True)
class Moved:
    """Bytes that one op moves an element: so many elements of the dtype and, beside them, fp32 ones."""

    forward: float  # elements of the dtype read and written
    backward: float
    forward_wide: float = 0.0  # bytes, where the op widens a narrower dtype to fp32 inside; all of its traffic then
    backward_wide: float = 0.0


# Rotary, eagerly (kernels/reference.py), in elements: a pass over one half reads both, since even and odd lie side by
# side. Forward: 4 products (1 read, 1/2 written), 2 sums, a stack; backward: a negation, 3 products and one of what it
# wrote, 2 sums, a stack. A narrower dtype is widened to fp32 first (4 bytes written) and narrowed at the end (4 read).
ROTATE_FORWARD, ROTATE_BACKWARD = 4 * 1.5 + 2 * 1.5 + 2, 1.5 + 3 * 1.5 + 1 + 2 * 1.5 + 2
MOVED = {
    "multiply": Moved(3, 0),  # reads two, writes one; its backward is counted in passes by cost.py
    "gelu": Moved(2, 3),  # backward reads input and gradient, writes one
    "layer_norm": Moved(2, 3),
    "rotate": Moved(
        ROTATE_FORWARD, ROTATE_BACKWARD, forward_wide=4 * (ROTATE_FORWARD + 2), backward_wide=4 * (ROTATE_BACKWARD + 2)
    ),
    "adamw": Moved(7, 0),  # fp32: reads gradient, reads and writes parameter and both moments
}


@dataclass(frozen=True)
class Seconds:
    """Time of something, forward and backward."""

    forward_s: float
    backward_s: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.forward_s + other.forward_s, self.backward_s + other.backward_s)

    def __mul__(self, times: float) -> Seconds:
        return Seconds(times * self.forward_s, times * self.backward_s)


class Rates:
    """Seconds of single ops on one device, between the sizes that were measured.

    Raises UserError when the device carries no timings.
    """

    def __init__(self, device: Device) -> None:
        if not device.timings or device.op_overhead_s is None or not device.memory_bytes_per_s:
            raise UserError(
                f"the cluster file has no timings of {device.name}; run `vchitect-fast autotune probe` on that machine."
            )
        self.device, self.memory_bytes_per_s = device, device.memory_bytes_per_s
        self._grids: dict[tuple[str, str], _Grid] = {}
        for op, dtype in {(timing.op, timing.dtype) for timing in device.timings}:
            self._grids[op, dtype] = _Grid([t for t in device.timings if (t.op, t.dtype) == (op, dtype)])

    def linear(self, dtype: str, rows: int, fan_in: int, fan_out: int) -> Seconds:
        """[rows, fan_in] -> [rows, fan_out] with bias; sized by the geometric mean of the widths."""
        return self._of("linear", dtype, (rows, math.sqrt(fan_in * fan_out)))

    def attention(self, dtype: str, rows: int, width: int, length: int) -> Seconds:
        """`rows` queries of `width` = heads x head dim, each over `length` keys."""
        return self._of("attention", dtype, (rows * width, length))

    def elementwise(self, op: str, dtype: str, elements: int) -> Seconds:
        """One pass of multiply, gelu, layer_norm or rotate, or one adamw update."""
        return self._of(op, dtype, (elements,))

    def of_timing(self, timing: Timing) -> Seconds:
        """What these rates say about a measured point."""
        return self._of(timing.op, timing.dtype, _coordinates(timing))

    def _of(self, op: str, dtype: str, at: tuple[float, ...]) -> Seconds:
        if (op, dtype) not in self._grids:
            raise UserError(
                f"the cluster file has no timings of {op} in {dtype}; run `vchitect-fast autotune probe` again."
            )
        return self._grids[op, dtype].seconds(at)


class DeclaredRates:
    """Seconds of single ops on one device, from declared rates.

    Raises UserError when the device declares no bandwidth, no overhead or no product's rate.
    """

    def __init__(self, device: Device) -> None:
        if not device.matmul_flops or device.op_overhead_s is None or not device.memory_bytes_per_s:
            raise UserError(
                f"the cluster declares no matmul_flops, memory_bytes_per_s or op_overhead_s of {device.name}; "
                "add them with their source, or run `vchitect-fast autotune probe` on that machine."
            )
        self.device, self.memory_bytes_per_s, self.overhead_s = device, device.memory_bytes_per_s, device.op_overhead_s
        self._lengths: dict[str, list[AttentionPoint]] = {}
        for point in sorted(device.attention_points, key=lambda point: point.length):
            self._lengths.setdefault(point.dtype, []).append(point)

    def linear(self, dtype: str, rows: int, fan_in: int, fan_out: int) -> Seconds:
        """[rows, fan_in] -> [rows, fan_out] with bias."""
        ahead = self._product(dtype, rows, fan_in, fan_out)
        behind = self._product(dtype, rows, fan_out, fan_in) + ahead  # gradients of the input, of the weight
        return Seconds(ahead, behind + self._moving(DTYPE_BYTES[dtype] * rows * fan_out))

    def attention(self, dtype: str, rows: int, width: int, length: int) -> Seconds:
        """`rows` queries of `width` = heads x head dim, each over `length` keys."""
        flops = 4 * rows * width * length
        ahead, behind = self._attention_flops(dtype, length)
        return Seconds(max(flops / ahead, self.overhead_s), max(BACKWARD_ATTENTION * flops / behind, self.overhead_s))

    def elementwise(self, op: str, dtype: str, elements: int) -> Seconds:
        """One pass of multiply, gelu, layer_norm or rotate, or one adamw update."""
        if op not in MOVED:
            raise unknown_name("op", op, MOVED)
        moved, size = MOVED[op], DTYPE_BYTES[dtype]
        if moved.forward_wide and size < 4:  # fp32 inside, the dtype itself once in and once out
            return Seconds(
                self._moving(elements * (moved.forward_wide + 2 * size)),
                self._moving(elements * (moved.backward_wide + 2 * size)),
            )
        return Seconds(self._moving(elements * moved.forward * size), self._moving(elements * moved.backward * size))

    def _moving(self, num_bytes: float) -> float:
        return max(num_bytes / self.memory_bytes_per_s, self.overhead_s) if num_bytes else 0.0

    def _product(self, dtype: str, rows: int, fan_in: int, fan_out: int) -> float:
        moved = DTYPE_BYTES[dtype] * (rows * (fan_in + fan_out) + fan_in * fan_out)
        return max(2 * rows * fan_in * fan_out / self._matmul_flops(dtype, fan_in, fan_out), self._moving(moved))

    def _matmul_flops(self, dtype: str, fan_in: int, fan_out: int) -> float:
        """Of the declared products the one that is nearest in log size; without any, of a large square one."""
        points = [point for point in self.device.matmul_points if point.dtype == dtype]
        if points:
            return min(
                points,
                key=lambda p: abs(math.log(p.fan_in / fan_in)) + abs(math.log(p.fan_out / fan_out)),
            ).flops
        if dtype not in self.device.matmul_flops:
            raise self._not_declared("matmul_flops", dtype)
        return self.device.matmul_flops[dtype]

    def _attention_flops(self, dtype: str, length: int) -> tuple[float, float]:
        """FLOP/s forward and backward, interpolated in log length; below the shortest the time of a row stays."""
        points = self._lengths.get(dtype)
        if not points:
            if dtype not in self.device.attention_flops:
                raise self._not_declared("attention_points", dtype)
            rate = self.device.attention_flops[dtype]
            return rate, rate
        high = bisect.bisect_left([point.length for point in points], length)
        if high == 0:
            share = length / points[0].length
            return points[0].forward_flops * share, points[0].backward_flops * share
        low, high = high - 1, min(high, len(points) - 1)
        a, b = points[low], points[high]
        weight = math.log(length / a.length) / math.log(b.length / a.length) if low != high else 0.0
        return _mix(a.forward_flops, b.forward_flops, weight), _mix(a.backward_flops, b.backward_flops, weight)

    def _not_declared(self, what: str, dtype: str) -> UserError:
        return UserError(
            f"the cluster declares no {what} of {self.device.name} in {dtype}; add them with their source, plan in another "
            "dtype, or run `vchitect-fast autotune probe` on that machine."
        )


def added_seconds(device: Device, what: str) -> Seconds:
    """Host time that a "checkpoint" or a "frame" adds to one block of the model; none where nobody measured it."""
    timing = next((timing for timing in device.timings if timing.op == what), None)
    return Seconds(timing.forward_s, timing.backward_s or 0.0) if timing else Seconds(0.0, 0.0)


def rates_of(device: Device) -> Rates | DeclaredRates:
    """Measured rates where the device has timings, declared ones otherwise."""
    if device.timings or not device.matmul_flops:
        return Rates(device)
    return DeclaredRates(device)


def _coordinates(timing: Timing) -> tuple[float, ...]:
    if timing.op == "linear":
        return (timing.rows, timing.width)
    if timing.op == "attention":
        return (timing.rows * timing.width, timing.length)
    return (timing.rows * timing.width,)


class _Grid:
    """Timings of one op on a complete grid; seconds are interpolated linearly between logarithms, axis by axis.

    Beyond the largest size the rate stays that of the largest; below the smallest the time stays that of the smallest.
    """

    def __init__(self, timings: list[Timing]) -> None:
        self.exponents = {"linear": (1, 2), "attention": (1, 1)}.get(timings[0].op, (1,))
        self.points = {_coordinates(timing): timing for timing in timings}
        self.axes = [sorted({at[axis] for at in self.points}) for axis in range(len(self.exponents))]
        if len(self.points) != math.prod(len(axis) for axis in self.axes):
            raise UserError(
                f"the timings of {timings[0].op} do not form a grid; run `vchitect-fast autotune probe` again."
            )

    def seconds(self, at: tuple[float, ...]) -> Seconds:
        above = 1.0  # work beyond the largest size, at the largest size's rate
        inside = []
        for value, axis, exponent in zip(at, self.axes, self.exponents, strict=True):
            inside.append(min(max(value, axis[0]), axis[-1]))
            above *= max(1.0, value / axis[-1]) ** exponent
        return self._between((), inside) * above

    def _between(self, fixed: tuple[float, ...], rest: list[float]) -> Seconds:
        if not rest:
            point = self.points[fixed]
            return Seconds(point.forward_s, point.backward_s or 0.0)
        axis, value = self.axes[len(fixed)], rest[0]
        high = min(bisect.bisect_left(axis, value), len(axis) - 1)
        low = max(0, high - 1) if axis[high] != value else high
        if low == high:
            return self._between((*fixed, axis[low]), rest[1:])
        weight = math.log(value / axis[low]) / math.log(axis[high] / axis[low])
        below, beyond = self._between((*fixed, axis[low]), rest[1:]), self._between((*fixed, axis[high]), rest[1:])
        return Seconds(
            _mix(below.forward_s, beyond.forward_s, weight), _mix(below.backward_s, beyond.backward_s, weight)
        )


def _mix(a: float, b: float, weight: float) -> float:
    return math.exp((1 - weight) * math.log(a) + weight * math.log(b)) if a > 0 and b > 0 else 0.0
