"""Quantising a tile by rows, inlined into the kernels that write fp8: the definition is reference.py's quantised_rows.

Triton's interpreter (3.8) drops the carry when it rounds to e4m3 (31.3 becomes 16), so there values are rounded by
arithmetic first and the cast is exact; a GPU rounds in its one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIRST_CC = 90  # of those that are compiled for; Triton has no e4m3 on sm_80


@triton.jit
def quantise(v, INTERPRETED: tl.constexpr):
    """e4m3 values and scales [rows, 1] of an fp32 tile that is 0 outside its columns; a row that is not finite: NaN."""
    size = tl.abs(v)
    bits = tl.max(size, axis=1, keep_dims=True).to(tl.int32, bitcast=True)
    # 448 is 1.75 x 2^8: a mantissa above 1.75 carries into the exponent.
    exponent = tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 1)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((exponent * -1 + 254) << 23).to(tl.float32, bitcast=True)
    strange = tl.max(tl.where(size < float("inf"), 0, 1), axis=1, keep_dims=True)
    return to_e4m3(v * inverse, INTERPRETED), tl.where(strange > 0, float("nan"), scale)


@triton.jit
def store_rows(
    ptr, scale_ptr, value, sample, row, d, stride_b, stride_l, num_rows, num_columns, INTERPRETED: tl.constexpr
):
    """_rows.py's store_tile of a tile quantised by rows, and the scales [B, L], contiguous."""
    is_row, is_column = row < num_rows, d < num_columns
    q, scale = quantise(tl.where(is_row & is_column, value, 0.0), INTERPRETED)
    tl.store(ptr + sample * stride_b + row * stride_l + d, q, mask=is_row & is_column)
    tl.store(scale_ptr + sample * num_rows + row, scale, mask=is_row)


@triton.jit
def to_e4m3(v, INTERPRETED: tl.constexpr):
    """Rounded to nearest, ties to even; |v| is at most 448."""
    if INTERPRETED:
        bits = tl.abs(v).to(tl.int32, bitcast=True)
        step = tl.maximum(bits >> 23, 127 - 6) - 3  # of the spacing of e4m3 around v; subnormals below 2^-6
        magic = (((step + 23) << 23) + 0x400000).to(tl.float32, bitcast=True)
        v = tl.where(v == v, (v + magic) - magic, v)
    return v.to(tl.float8e4nv)
