"""Steps of tiled attention in Triton, shared by the ops whose keys do not fit one tile (cross.py, spatial.py).

    p = exp2(scale q k^T - lse),  o = p v;   delta = rowsum(do o),  ds = p (do v^T - delta)
    dq = ds k / sqrt(C),  dk = ds^T q / sqrt(C),  dv = p^T do        (the callers divide)
`scale` is log2(e) / sqrt(C) and lse is in base 2. Products accumulate in fp32; fp32 inputs multiply in fp32, not in TF32.
A row of queries beyond the end carries lse = +inf, so that its p is 0; a key beyond the end goes through `valid`.

A tensor [B, T, F, H, C] of any strides travels as one argument, a `source` (pointer, stride_b, stride_t, stride_f, stride_h).
Its rows begin at a (b, t, h) and run over the tokens; where they run on over the following frames, row r is r // F frames
and r % F tokens on, and FLAT leaves the division out (frames and tokens are one axis of constant stride). Offsets are int64.
Source: Dao et al. 2022, 2023 (FlashAttention 1 and 2).
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vchitect_fast.kernels.aot import Variant
from vchitect_fast.kernels.tiles import FlashTile

HEAD_DIMS = (64, 128)
Source = tuple[Tensor, int, int, int, int]


def source(x_BTFHC: Tensor) -> Source:
    """The tensor as a kernel's argument."""
    b, t, f, h, _ = x_BTFHC.stride()
    return x_BTFHC, b, t, f, h


def variant(kernel: Any, dtype: str, constants: dict[str, Any], tile: FlashTile, label: str) -> Variant:
    """Its ahead-of-time compilation; strides in the model's buffers are multiples of 16, a partial_* source is fp32."""
    signature: dict[str, str | tuple[str, ...]] = {}
    for name in (name for name in kernel.arg_names if not name.isupper()):
        if name.endswith("_ptr"):
            signature[name] = "*fp32:16"
        elif name.endswith("scale"):
            signature[name] = "fp32"
        elif name.startswith(("num_", "rows_")):
            signature[name] = "i32"
        else:
            signature[name] = ("*fp32:16" if name.startswith("partial_") else f"*{dtype}:16", *(4 * ["i32:16"]))
    return Variant(kernel, signature, constants | tile.blocks(), tile.num_warps, label, tile.num_stages)


def is_flat(*tensors: Tensor) -> bool:
    """Whether frame and token of each [B, T, F, H, C] are one axis of constant stride."""
    return all(x.shape[1] == 1 or x.stride(1) == x.shape[2] * x.stride(2) for x in tensors)


def tail_of(length: int, block: int) -> int:
    """Width of the tile behind the last full block of `length`: 0, or a power of two from 16 up to `block`.

    Kernels run it before their loop: behind it, ptxas serializes all wgmma of the loop (its warning C7515).
    """
    rest = length % block
    return max(16, triton.next_power_of_2(rest)) if rest else 0


def softmax_scales(head_dim: int) -> tuple[float, float]:
    """log2(e) / sqrt(C), which makes scores of base 2, and 1 / sqrt(C), which dq and dk are divided by."""
    return math.log2(math.e) / math.sqrt(head_dim), 1 / math.sqrt(head_dim)


@triton.jit
def _pointers(source, b, t, h, row, rows_per_frame, FLAT: tl.constexpr, HEAD_DIM: tl.constexpr):
    base = source[0] + b * source[1] + t * source[2] + h * source[4]
    if FLAT:
        offsets = row.to(tl.int64) * source[3]
    else:
        frame = row // rows_per_frame
        offsets = frame.to(tl.int64) * source[2] + (row - frame * rows_per_frame).to(tl.int64) * source[3]
    return base + offsets[:, None] + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def at(source, b, t, h):
    """The source that begins at (b, t, h): its rows are those of (0, 0, 0)."""
    return source[0] + b * source[1] + t * source[2] + h * source[4], 0, source[2], source[3], 0


@triton.jit
def one_of(is_first, first, second):
    """One of two sources that `at` returned."""
    stride_t, stride_f = tl.where(is_first, first[2], second[2]), tl.where(is_first, first[3], second[3])
    return tl.where(is_first, first[0], second[0]), 0, stride_t, stride_f, 0


@triton.jit
def looped_block(block, num_visual_blocks, visual, text, more, more_text, BLOCK: tl.constexpr):
    """Block `block` of one loop over two sources, visual first: whether it is visual, its rows, and its two tensors."""
    is_visual = block < num_visual_blocks
    row = tl.where(is_visual, block, block - num_visual_blocks) * BLOCK + tl.arange(0, BLOCK)
    return is_visual, row, one_of(is_visual, visual, text), one_of(is_visual, more, more_text)


@triton.jit
def load_rows(
    source, b, t, h, row, num_rows, rows_per_frame, MASKED: tl.constexpr, FLAT: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """[rows, C]; MASKED reads 0 from row num_rows on."""
    pointers = _pointers(source, b, t, h, row, rows_per_frame, FLAT, HEAD_DIM)
    if MASKED:
        tile = tl.load(pointers, mask=(row < num_rows)[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(
    source, tile, b, t, h, row, num_rows, rows_per_frame, ADD: tl.constexpr, FLAT: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Write the rows before num_rows in the buffer's dtype; ADD adds what lies there."""
    pointers = _pointers(source, b, t, h, row, rows_per_frame, FLAT, HEAD_DIM)
    inside = (row < num_rows)[:, None]
    if ADD:
        tile += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointers, tile.to(source[0].dtype.element_ty), mask=inside)


@triton.jit
def forward_step(q, k, v, acc, row_max, row_sum, scale, valid, MASKED: tl.constexpr):
    """One block of keys of the online softmax."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shrink = tl.exp2(row_max - new_max)
    p = tl.exp2(scores - new_max[:, None])
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def dq_step(q, do, k, v, lse, delta, dq, scale, valid, MASKED: tl.constexpr):
    """One block of keys: dq + ds k."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
    if MASKED:
        p = tl.where(valid[None, :], p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision="ieee")


@triton.jit
def dkv_step(k, v, q, do, lse, delta, dk, dv, scale):
    """One block of queries: dk + ds^T q, dv + p^T do. Keys beyond the end fill rows that nobody stores."""
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    return tl.dot(ds, q, dk, input_precision="ieee"), dv


@triton.jit
def forward_tail(
    q, k_source, v_source, acc, row_max, row_sum, b, t, h, num_keys, scale, TAIL: tl.constexpr, BLOCK_N: tl.constexpr
):
    """forward_step over the TAIL keys behind the last full block of one source at (b, t, h)."""
    HEAD_DIM: tl.constexpr = q.shape[1]
    if TAIL > 0:
        key = num_keys // BLOCK_N * BLOCK_N + tl.arange(0, TAIL)
        k = load_rows(k_source, b, t, h, key, num_keys, 1, True, True, HEAD_DIM)
        v = load_rows(v_source, b, t, h, key, num_keys, 1, True, True, HEAD_DIM)
        acc, row_max, row_sum = forward_step(q, k, v, acc, row_max, row_sum, scale, key < num_keys, True)
    return acc, row_max, row_sum


@triton.jit
def dq_tail(
    q, do, k_source, v_source, lse, delta, dq, b, t, h, num_keys, scale, TAIL: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dq_step over the TAIL keys behind the last full block of one source at (b, t, h)."""
    HEAD_DIM: tl.constexpr = q.shape[1]
    if TAIL > 0:
        key = num_keys // BLOCK_N * BLOCK_N + tl.arange(0, TAIL)
        k = load_rows(k_source, b, t, h, key, num_keys, 1, True, True, HEAD_DIM)
        v = load_rows(v_source, b, t, h, key, num_keys, 1, True, True, HEAD_DIM)
        dq = dq_step(q, do, k, v, lse, delta, dq, scale, key < num_keys, True)
    return dq


@triton.jit
def dkv_tail(
    k,
    v,
    dk,
    dv,
    q_source,
    do_source,
    lse_ptr,
    delta_ptr,
    b,
    t,
    h,
    end,
    rows_per_frame,
    scale,
    FLAT: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dkv_step over the TAIL queries behind the last full block before row `end` of one source.

    lse_ptr and delta_ptr point to row 0. Where no row is left it adds 0.
    """
    HEAD_DIM: tl.constexpr = k.shape[1]
    if TAIL > 0:
        row = end // BLOCK_M * BLOCK_M + tl.arange(0, TAIL)
        q = load_rows(q_source, b, t, h, row, end, rows_per_frame, True, FLAT, HEAD_DIM)
        do = load_rows(do_source, b, t, h, row, end, rows_per_frame, True, FLAT, HEAD_DIM)
        lse = tl.load(lse_ptr + row, mask=row < end, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=row < end, other=0.0)
        dk, dv = dkv_step(k, v, q, do, lse, delta, dk, dv, scale)
    return dk, dv


@triton.jit
def load_gradients(
    q_source, do_source, o_source, b, t, h, row, num_rows, rows_per_frame, FLAT: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """q and do of a block of query rows, and delta = rowsum(do o)."""
    q = load_rows(q_source, b, t, h, row, num_rows, rows_per_frame, True, FLAT, HEAD_DIM)
    do = load_rows(do_source, b, t, h, row, num_rows, rows_per_frame, True, FLAT, HEAD_DIM)
    o = load_rows(o_source, b, t, h, row, num_rows, rows_per_frame, True, FLAT, HEAD_DIM)
    return q, do, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
