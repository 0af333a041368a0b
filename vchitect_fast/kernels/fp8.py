"""Rows in fp8 and their products by torch's scaled GEMM: what the linears of a block in fp8 are made of (model/fp8_steps.py).

    format    e4m3 (float8_e4m3fn: 3 bits of mantissa, 2^-9 to 448), of gradients too. e5m2 has twice the rounding error for a
              range that a scale a row makes needless; the published recipes with a scale a row or a block do the same
              (torchao's rowwise, DeepSeek-V3), e5m2 is of those with one scale a tensor (Micikevicius et al. 2022).
    rows      x[r, k] = q[r, k] s_r, s_r a power of two: reference.py's quantised_rows
    turned    x[r, k] = qT[k, r] S, S = max s_r, for products that sum over the rows: reference.py's turned. A scale a column
              would need one more pass over the rows in 16 bits, this reads 8. Nothing is rounded again but what S makes
              smaller than 2^-6; a row 2^18 times smaller than the largest vanishes in such a product, beside it.
    product   a b^T, both with the summed dim last, as the tensor cores want it, summed in fp32 throughout
              (use_fast_accum=False); the result in the dtype that the rows had

    forward           y = x W^T          rows of x, rows of W
    input gradient    dx = d W           rows of d, W turned: the rounded weight is that of forward
    weight gradient   dW = d^T x         d turned, x turned, R = rows up to a multiple of 16 with zeros
The scaled GEMM wants sizes that are multiples of 16: columns of hidden rows are (head dims), rows are padded when turned.
FLOPs as in 16 bits. Bytes beside the GEMM's: rows 3 R K (read 2, write 1), turned 2 R K. Not measured on a GPU.

R rows, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Quantised:
    """q [..., K] in e4m3, and a scale for each row, [...] in fp32, or one for all, [1]; stands for rows of `dtype`."""

    q: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the rows that it stands for."""
        return self.q.shape

    def __getitem__(self, sample: int) -> Quantised:
        """The rows of one sample."""
        return Quantised(self.q[sample], self.scale[sample], self.dtype)

    def view(self, shape: Sequence[int]) -> Quantised:
        """The rows in other leading dims."""
        return Quantised(self.q.view(shape), self.scale.view(shape[:-1]), self.dtype)


def product(a: Quantised, b: Quantised, *, bias_N: Tensor | None = None, out_MN: Tensor | None = None) -> Tensor:
    """a b^T + bias [M, N], into a contiguous `out` if given; a [M, K], b [N, K]. By torch._scaled_mm, on a GPU or a CPU."""
    if a.scale.numel() == b.scale.numel() == 1:
        scales = a.scale[0], b.scale[0]
    else:
        scales = a.scale.expand(len(a.q)).contiguous()[:, None], b.scale.expand(len(b.q)).contiguous()[None]
    how: dict[str, Any] = {"bias": bias_N, "out_dtype": a.dtype, "use_fast_accum": False}
    if out_MN is not None:
        how["out"] = out_MN
    return torch._scaled_mm(a.q, b.q.T, *scales, **how)
