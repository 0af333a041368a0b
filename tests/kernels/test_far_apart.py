"""Rows that lie more than 2^31 elements apart: the same bits as contiguous ones, forward and backward, from every op of rows.

pytest tests/kernels/test_far_apart.py; interpreted where there is no GPU. Only the pages that hold a value are taken there.
Attention has tests of its own (test_spatial.py, test_temporal.py, test_cross.py), on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vchitect_fast.kernels import ops

DISTANCE = 2**30 + 16  # elements from one row, or sample, to the next; there are three
SLOT = 4096  # elements for each tensor's part of a row


def far_apart(tensors: list[Tensor]) -> list[Tensor]:
    """The same values in one buffer of 4 GB, their first dim DISTANCE apart."""
    buffer = torch.empty(2 * DISTANCE + len(tensors) * SLOT, dtype=tensors[0].dtype, device=tensors[0].device)
    found = []
    for slot, tensor in enumerate(tensors):
        strides = (DISTANCE, *tensor.stride()[1:])
        found.append(buffer.as_strided(tensor.shape, strides, slot * SLOT).copy_(tensor))
    return found


def of_rows(rows: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    x, dy = (t.detach().requires_grad_() if i == 0 else t for i, t in enumerate(rows[:2]))
    y = ops.bias_gelu(x, vectors[0], impl="triton")
    return [y, *torch.autograd.grad(y, x, dy)]


def of_norm(rows: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    x = rows[0].detach().requires_grad_()
    y = ops.modulated_norm(x, vectors[0], vectors[1], 1e-6, impl="triton")
    return [y, *torch.autograd.grad(y, x, rows[1])]


def of_residual(rows: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    x, branch = (t.detach().requires_grad_() for t in rows[:2])
    y = ops.gated_residual(x, branch, vectors[0], impl="triton")
    return [y, *torch.autograd.grad(y, (x, branch), rows[2])]


def of_residual_norm(rows: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    x, branch = (t.detach().requires_grad_() for t in rows[:2])
    outputs = ops.gated_residual_norm(x, branch, *vectors, 1e-6, impl="triton")
    return [*outputs, *torch.autograd.grad(outputs, (x, branch), rows[2:4])]


def in_place(rows: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """What the hand-written block does: what is written lies far apart too."""
    from vchitect_fast.kernels import gated_residual as module

    x, branch, dy, dn = rows
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    gate, shift, scale = vectors
    module.forward_into(x, branch, gate, x, (shift, scale, 1e-6, dn, mean, rstd))
    sums = module.backward_into(dy, branch, gate, branch, (dy, x, scale, mean, rstd, dy))
    return [x, dn, branch, dy, *sums]


CASES: dict[str, tuple[Callable[[list[Tensor], list[Tensor]], list[Tensor]], tuple[int, ...], tuple[int, ...]]] = {
    "bias_gelu": (of_rows, (3, 40), (40,)),
    "modulated_norm": (of_norm, (3, 2, 40), (3, 40)),
    "gated_residual": (of_residual, (3, 2, 40), (3, 40)),
    "gated_residual_norm": (of_residual_norm, (3, 2, 40), (3, 40)),
    "gated_residual_norm, in place": (in_place, (3, 2, 40), (3, 40)),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_far_apart_give_the_same_bits(name: str, device: torch.device) -> None:
    run, size, vector = CASES[name]
    rows, vectors = (
        [torch.randn(s, device=device, dtype=torch.float16) for _ in range(n)] for s, n in ((size, 4), (vector, 3))
    )
    far = far_apart(rows)
    assert all(t.stride(0) * 2 > 2**31 and torch.equal(t, x) for t, x in zip(far, rows, strict=True))
    found = run(far, vectors)
    assert all(map(torch.equal, found, run([x.clone() for x in rows], vectors)))
