"""Operations and bytes of an op from its input shapes, and what it reached of the measured roof.

Rules are written for ops whose answer follows from their inputs: matrix products, attention (without a mask: a causal one
counts as a full one, twice its work), and elementwise ops and norms by the bytes that they must move. Each input is read
once and each output written once; caches, padding and expanded inputs are not seen. Every other op has its time and no rate.
The roof is measured by `vchitect-fast autotune probe`; without it a share is "not measured", never a data sheet's.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from vchitect_fast.cluster import Cluster
from vchitect_fast.profiling.facts import CLASSES, COPY, OpTime, Roof, StepAnalysis
from vchitect_fast.profiling.nesting import innermost
from vchitect_fast.profiling.trace import Kind, Trace
from vchitect_fast.profiling.work import Work

MAX_OPS = 200
# As PyTorch's traces write them -> (name, bytes).
DTYPES = {
    "float": ("float32", 4), "c10::BFloat16": ("bfloat16", 2), "c10::Half": ("float16", 2), "double": ("float64", 8),
    "c10::Float8_e4m3fn": ("float8", 1), "c10::Float8_e5m2": ("float8", 1), "long int": ("int64", 8), "long": ("int64", 8),
    "int": ("int32", 4), "bool": ("bool", 1), "unsigned char": ("uint8", 1), "signed char": ("int8", 1),
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    flops: float | None
    num_bytes: float
    dtype: str  # of the first tensor


Dims = list[list[int]]  # of the inputs that are tensors, [] for a number


def read_roof(path: str | Path) -> Roof:
    """The roof out of the Cluster file of `autotune probe`; UserError where it is none."""
    device = Cluster.load(path).device
    return Roof(device.name, dict(device.matmul_flops), device.memory_bytes_per_s, device.source)


def cost(name: str, shapes: str) -> Cost | None:
    """The cost of an op with these inputs (a Trace's `shapes` text); None where no rule knows it."""
    rule = _RULES.get(name)
    if rule is None:
        return None
    try:
        dims, types = ast.literal_eval(shapes)
        sizes = [DTYPES[kind][1] if kind in DTYPES else 0 for kind in types]
        flops, numbers = rule(dims)
        dtype = next(DTYPES[kind][0] for kind in types if kind in DTYPES)
        # Outputs have the type of the first tensor.
        first = next(size for size in sizes if size)
        read = sum(size * prod(shape) for size, shape in zip(sizes, dims, strict=False) if shape)
        return Cost(flops, read + first * numbers, dtype)
    except (ValueError, SyntaxError, TypeError, IndexError, StopIteration, MemoryError, RecursionError):
        return None  # another layout of inputs than the rule knows, or not recorded


def _product(dims: Dims) -> tuple[float, int]:
    """Floating-point operations of the last two matrices in the list, and the numbers that come out."""
    a, b = [shape for shape in dims if len(shape) >= 2][-2:]
    if a[-1] != b[-2] or a[:-2] != b[:-2]:
        raise ValueError("not a product")
    out = prod(a[:-1]) * b[-1]
    return 2.0 * out * a[-1], out


def _attention(num_products: int, num_outputs: int, first: int) -> Callable[[Dims], tuple[float, int]]:
    """So many products of B x H x Sq x Sk x C, and so many tensors like the query written; the query is input `first`."""

    def rule(dims: Dims) -> tuple[float, int]:
        query, key = dims[first : first + 2]
        batch, heads, num_queries, channels = query
        return 2.0 * num_products * batch * heads * num_queries * key[2] * channels, num_outputs * prod(query)

    return rule


# Backward has the output's gradient before the query; it makes the scores again, then does four products.
_FORWARD, _BACKWARD = _attention(2, 1, 0), _attention(5, 3, 1)
_HEAVY = (_product, _FORWARD, _BACKWARD)


def _broadcast(dims: Dims) -> tuple[None, int]:
    """Elementwise: as many numbers come out as the inputs broadcast to."""
    shapes = [shape for shape in dims if shape and all(isinstance(size, int) for size in shape)]
    return None, prod(np.broadcast_shapes(*map(tuple, shapes))) if shapes else 1


def _like_first(dims: Dims) -> tuple[None, int]:
    return None, prod(dims[0])


def _reduced(dims: Dims) -> tuple[None, int]:
    return None, 0


def _written(dims: Dims) -> tuple[None, int]:
    """In place over the first input, which is not read: its reading stands for the writing."""
    return None, 0


_RULES: dict[str, Callable[[Dims], tuple[Any, int]]] = {
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm"), _product),
    **{
        f"aten::_scaled_dot_product_{how}{end}": rule
        for how in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
        for end, rule in (("", _FORWARD), ("_backward", _BACKWARD))
    },
    **{
        f"aten::{name}{end}": _broadcast
        for name in ("mul", "add", "sub", "div", "gelu", "gelu_backward", "silu", "silu_backward", "sigmoid", "tanh", "exp",
                     "neg", "rsqrt", "pow", "where", "lerp", "clamp")
        for end in ("", "_")
    },
    **dict.fromkeys(("aten::native_layer_norm", "aten::native_layer_norm_backward", "aten::_softmax", "aten::rms_norm"), _like_first),
    **dict.fromkeys(("aten::sum", "aten::mean", "aten::norm", "aten::linalg_vector_norm"), _reduced),
    **dict.fromkeys(("aten::copy_", "aten::fill_", "aten::zero_"), _written),
}  # fmt: skip


def op_times(trace: Trace, work: Work, steps: tuple[StepAnalysis, ...], roof: Roof | None) -> tuple[OpTime, ...]:
    """The ops of all steps with their rates, longest first, at most MAX_OPS; copies of a device under their own names."""
    if not len(work) or not steps:
        return ()
    inside = np.zeros(len(work), dtype=bool)
    for step in steps:
        inside |= (work.start >= step.start_us) & (work.start < step.start_us + step.wall_us)
    event, dur_us = work.event[inside], (work.end - work.start)[inside]
    moved = np.isin(trace.kind[event], (Kind.COPY, Kind.FILL))
    op = np.where(moved, -1, _op_behind(trace, work)[inside])
    # An op by its name and shapes; what no op is known of by its own name, with the number of no shape.
    num_shapes = len(trace.shapes) + 2
    shape = np.where(op >= 0, trace.shape[op], -2) + 2
    name = np.where(op >= 0, trace.name[op], trace.name[event]).astype(np.int64)
    keys, group = np.unique(name * num_shapes + shape, return_inverse=True)
    cell = group * len(CLASSES) + work.kernel_class[inside]
    by_class_us = np.bincount(cell, dur_us, len(keys) * len(CLASSES)).reshape(-1, len(CLASSES))
    total_us = by_class_us.sum(axis=1)
    moved_bytes = np.bincount(group, np.where(moved, np.maximum(trace.bytes[event], 0), 0))
    calls = np.unique(group * len(trace) + np.where(op >= 0, op, event)) // len(trace)
    num_calls = np.bincount(calls, minlength=len(total_us))
    found = []
    for k in np.argsort(-total_us, kind="stable")[:MAX_OPS].tolist():
        number, shapes = divmod(int(keys[k]), num_shapes)
        kernel_class = CLASSES[
            int(by_class_us[k].argmax())
        ]  # of most of its time: a product may have a reduction behind it
        text = trace.shapes[shapes - 2] if shapes >= 2 else ""
        one, own = cost(trace.names[number], text), float(moved_bytes[k])
        if one is None and own:
            one = Cost(None, own / int(num_calls[k]), "")
        found.append(
            _op_time(trace.names[number], kernel_class, text, one, int(num_calls[k]), float(total_us[k]), roof)
        )
    return tuple(found)


def _op_behind(trace: Trace, work: Work) -> np.ndarray:
    """The op that a piece counts for: the product or attention that it is a part of, else the innermost op."""
    heavy_name = np.array([_RULES.get(name) in _HEAVY for name in trace.names], dtype=bool)
    heavy = np.flatnonzero((trace.kind == Kind.OP) & heavy_name[trace.name])
    found = work.op.copy()
    for lane in np.unique(trace.lane[heavy]).tolist():
        own, here = heavy[trace.lane[heavy] == lane], np.flatnonzero(work.lane == lane)
        place = innermost(trace.start_us[own], trace.end_us[own]).at(work.moment[here])
        found[here] = np.where(place >= 0, own[np.maximum(place, 0)], found[here])
    return found


def _op_time(
    name: str, kernel_class: str, shapes: str, one: Cost | None, num_calls: int, device_us: float, roof: Roof | None
) -> OpTime:  # fmt: skip
    flops = one.flops * num_calls if one and one.flops is not None else None
    num_bytes = one.num_bytes * num_calls if one else None
    seconds = device_us / 1e6
    # A copy between memories has a roof of its own, that of the link, which is not this one.
    share = _roof_share(flops, num_bytes, one.dtype, seconds, roof) if one and kernel_class != COPY else None
    return OpTime(
        name, kernel_class, *_shown(shapes), num_calls, device_us, flops, num_bytes,
        flops / seconds if flops and seconds else None, num_bytes / seconds if num_bytes and seconds else None, share,
    )  # fmt: skip


def _roof_share(
    flops: float | None, num_bytes: float | None, dtype: str, seconds: float, roof: Roof | None
) -> float | None:
    """Ideal / measured time, the ideal being the longer of computing and moving at the peaks."""
    if roof is None or num_bytes is None or not seconds or not roof.memory_bytes_per_s:
        return None
    ideal = num_bytes / roof.memory_bytes_per_s
    if flops is not None:
        if not roof.matmul_flops.get(dtype):
            return None
        ideal = max(ideal, flops / roof.matmul_flops[dtype])
    return ideal / seconds


def _shown(shapes: str) -> tuple[str, str]:
    """("4096x1536 1536x1536", "bfloat16") of a Trace's `shapes` text; lists of tensors by their number."""
    try:
        dims, types = ast.literal_eval(shapes or "((), ())")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return "", ""
    parts = []
    for shape in dims:
        if shape and all(isinstance(size, int) for size in shape):
            parts.append("x".join(map(str, shape)))
        elif shape:
            parts.append(f"{len(shape)} tensors")
    dtype = next((DTYPES[kind][0] for kind in types if isinstance(kind, str) and kind in DTYPES), "")
    return " ".join(parts), dtype
