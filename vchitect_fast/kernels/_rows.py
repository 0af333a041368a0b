"""Row arithmetic that adaln and gated_residual share, inlined into their kernels. A tile is [rows, columns] in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def statistics(x, is_column, num_columns, eps):
    """mean and 1 / sqrt(var + eps) of every row, [rows, 1]; two passes over registers, so a large mean costs nothing."""
    mean = tl.sum(x, axis=1, keep_dims=True) / num_columns
    centred = tl.where(is_column, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / num_columns + eps)


@triton.jit
def norm_gradient(g, xhat, rstd, num_columns):
    """dL/dx of xhat = (x - mean) rstd for g = dL/dxhat; g and xhat are 0 outside the columns."""
    mean_g = tl.sum(g, axis=1, keep_dims=True) / num_columns
    mean_gx = tl.sum(g * xhat, axis=1, keep_dims=True) / num_columns
    return rstd * (g - mean_g - xhat * mean_gx)


@triton.jit
def load_vector(ptr, sample, stride_b, d, is_column):
    """Row `sample` of a [B, D] matrix as [1, columns] in fp32, 0 outside."""
    return tl.load(ptr + sample * stride_b + d, mask=is_column, other=0.0).to(tl.float32)


@triton.jit
def load_tile(ptr, sample, row, d, stride_b, stride_l, inside):
    """Rows `row` of sample `sample` of a [B, L, D] array as a tile in fp32, 0 outside."""
    return tl.load(ptr + sample * stride_b + row * stride_l + d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, value, sample, row, d, stride_b, stride_l, inside):
    """The counterpart of load_tile, rounded to the array's type."""
    tl.store(ptr + sample * stride_b + row * stride_l + d, value.to(ptr.dtype.element_ty), mask=inside)
