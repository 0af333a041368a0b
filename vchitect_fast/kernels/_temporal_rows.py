"""Rows of two sources turned by frame, in Triton: what the one-tile and the tiled kernels of temporal.py share.

A tensor comes as one tuple: its visual and text pointers, then the strides over (b, t, s, h) of the first and of the second.
Offsets are int64. Rotation is in fp32 over interleaved pairs; -sin turns back.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(source, place, heads, frames):
    """Pointers to the first element of each row of one source at a place."""
    is_text, batch, position = place
    if is_text:
        base = source[1] + (batch * source[6] + position * source[8])
    else:
        base = source[0] + (batch * source[2] + position * source[4])
    stride_t, stride_h = tl.where(is_text, source[7], source[3]), tl.where(is_text, source[9], source[5])
    return base + (frames.to(tl.int64) * stride_t + heads.to(tl.int64) * stride_h)


@triton.jit
def place_of(pid, num_visual, num_positions):
    """Source, sample and position within the source of the pid-th of B (S + N) positions."""
    joint = pid % num_positions
    is_text = joint >= num_visual
    return is_text, (pid // num_positions).to(tl.int64), tl.where(is_text, joint - num_visual, joint).to(tl.int64)


@triton.jit
def load(row_ptrs, valid, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """[rows, C]; rows that are not valid read 0."""
    pointers = row_ptrs[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    if MASKED:
        tile = tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store(row_ptrs, valid, tile, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Write valid rows in the buffer's dtype."""
    pointers = row_ptrs[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    if MASKED:
        tl.store(pointers, tile.to(row_ptrs.dtype.element_ty), mask=valid[:, None])
    else:
        tl.store(pointers, tile.to(row_ptrs.dtype.element_ty))


@triton.jit
def store_gradient(
    source, place, heads, frames, valid, tile, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, ADD_TEXT: tl.constexpr
):
    """Write valid rows; ADD_TEXT adds what lies there where the rows are text."""
    row_ptrs = rows_of(source, place, heads, frames)
    if ADD_TEXT:
        pointers = row_ptrs[:, None] + tl.arange(0, HEAD_DIM)[None, :]
        tile += tl.load(pointers, mask=valid[:, None] & place[0], other=0.0).to(tl.float32)
    store(row_ptrs, valid, tile, HEAD_DIM, MASKED)


@triton.jit
def tables(cos_ptr, sin_ptr, frames, valid, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """cos and sin [rows, C/2] of the frames."""
    offsets = frames * (HEAD_DIM // 2)
    cos = load(cos_ptr + offsets, valid, HEAD_DIM // 2, MASKED)
    return cos, load(sin_ptr + offsets, valid, HEAD_DIM // 2, MASKED)


@triton.jit
def turn(x, cos, sin):
    """Rotate the column pairs of x [rows, C] in fp32; the inverse takes -sin."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [x.shape[0], x.shape[1] // 2, 2]))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(pairs, [x.shape[0], x.shape[1]])


@triton.jit
def turned(source, place, head, frames, valid, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr):
    """Rows of q or k, turned, in their dtype."""
    x = load(rows_of(source, place, head, frames), valid, HEAD_DIM, True)
    cos, sin = tables(cos_ptr, sin_ptr, frames, valid, HEAD_DIM, True)
    return turn(x, cos, sin).to(x.dtype)
