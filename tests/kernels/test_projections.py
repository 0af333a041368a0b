"""The merged projections against one linear each in fp64; the outputs are views, and slices of one buffer are not copied.

pytest tests/kernels/test_projections.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_exact
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vchitect_fast.errors import UserError
from vchitect_fast.kernels.projections import in_one_buffer, project

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # leading dims of x, D, D_out, how many linears
    ((1,), 1, 1, 1),
    ((2, 3), 5, 7, 3),
    ((2, 4, 9), 24, 24, 7),
    pytest.param(((1, 40, 1296), 1536, 1536, 7), marks=pytest.mark.gpu, id="40x768x432"),
]


class Ops(TorchDispatchMode):
    """Names of the torch ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def draw(shape: tuple[tuple[int, ...], int, int, int], dtype: torch.dtype, device: torch.device) -> list[list[Tensor]]:
    """[x], weights, biases, gradients."""
    leading, D, D_out, num = shape
    generator = torch.Generator(device).manual_seed(1)
    sizes = [[(*leading, D)], [(D_out, D)] * num, [(D_out,)] * num, [(*leading, D_out)] * num]
    return [[torch.randn(size, generator=generator, device=device).to(dtype) for size in row] for row in sizes]


def run(given: list[list[Tensor]], *, merged: bool) -> list[Tensor]:
    """The outputs, then the gradients of x, weights and biases."""
    [x], weights, biases = ([t.detach().requires_grad_() for t in row] for row in given[:3])
    ys = project(x, weights, biases) if merged else [F.linear(x, *pair) for pair in zip(weights, biases, strict=True)]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [x, *weights, *biases], given[3])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_single_linears(shape: Any, dtype: torch.dtype, device: torch.device) -> None:
    given = draw(shape, dtype, device)
    actual, low = (run(given, merged=merged) for merged in (True, False))
    exact = run([[t.double() for t in row] for row in given], merged=False)
    num, num_rows = shape[3], given[0][0][..., 0].numel()
    for i, values in enumerate(zip(actual, exact, low, strict=True)):
        assert values[0].dtype == dtype
        assert_close_to_exact(
            *values, reduced=shape[1] if i < num else num * shape[2] if i == num else num_rows, name=str(i)
        )


def test_outputs_are_views_of_one_buffer(device: torch.device) -> None:
    [x], weights, biases, _ = draw(((2, 3), 8, 8, 7), torch.float32, device)
    ys = [y.unflatten(-1, (2, 4)) for y in project(x, weights, biases)]
    assert {y.untyped_storage().data_ptr() for y in ys} == {ys[0].untyped_storage().data_ptr()}
    assert all(y.shape == (2, 3, 2, 4) and y.stride() == (3 * 56, 56, 4, 1) for y in ys)
    assert [y.storage_offset() for y in ys] == [8 * i for i in range(7)]


def test_gradients_in_one_buffer_are_read_in_place(device: torch.device) -> None:
    [x], weights, biases, dys = draw(((6,), 8, 4, 3), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, *weights, *biases)]
    together = torch.stack(dys, dim=1)
    found = []
    for gradients in (dys, list(together.unbind(1))):
        ys = project(x, weights, biases)
        with Ops() as ops:
            found.append((torch.autograd.grad(ys, leaves, gradients), ops.names))
    (apart, copied), (sliced, in_place) = found
    assert copied.count("cat") == 2 and in_place.count("cat") == 1  # the one left lays out the weights
    assert not {"clone", "copy_", "zeros", "add"} & set(in_place)
    assert all(map(torch.equal, apart, sliced))


def test_in_one_buffer_takes_nothing_else() -> None:
    buffer = torch.arange(24.0).view(4, 6)
    a, b, c = buffer.split(2, dim=1)
    joined = in_one_buffer((a, b, c))
    assert joined is not None and torch.equal(joined, buffer) and joined.data_ptr() == buffer.data_ptr()
    for parts in ((b, a, c), (a, c, b), (a, a, a), (a, b, c.clone()), (a[:, :1], b[:, :1], c[:, :1]), (buffer, buffer)):
        assert in_one_buffer(parts) is None
    some = in_one_buffer((b, c))
    assert some is not None and torch.equal(some, buffer[:, 2:])


def test_an_output_nobody_used_gives_zero_gradients(device: torch.device) -> None:
    [x], weights, biases, dys = draw(((6,), 8, 4, 3), torch.float32, device)
    weights = [w.requires_grad_() for w in weights]
    gradients = torch.autograd.grad(project(x, weights, biases)[1], weights, dys[1])
    assert [bool(g.any()) for g in gradients] == [False, True, False]


def test_fp32_parameters_of_low_rows(device: torch.device) -> None:
    given = draw(((2, 5), 8, 4, 3), torch.float32, device)
    given[0], given[3] = ([t.bfloat16() for t in row] for row in (given[0], given[3]))
    actual = run(given, merged=True)
    assert [t.dtype for t in actual] == [torch.bfloat16] * 4 + [torch.float32] * 6


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"biases": [torch.zeros(3)]}, "expected a bias for each weight, got 2 weights and 1 biases"),
    ({"weights": [torch.zeros(3, 4), torch.zeros(2, 4)]}, "expected weight 1 of shape [3, 4], got [2, 4]"),
    ({"weights": [torch.zeros(3, 5), torch.zeros(3, 5)]}, "expected weight 0 of shape [3, 4], got [3, 5]"),
    ({"biases": [torch.zeros(3), torch.zeros(3).half()]}, "expected bias 1 in float32, got float16"),
    ({"x": torch.zeros(4, 2).T}, "expected x with a contiguous last dim"),
    ({"x": torch.zeros(0, 4)}, "at least one element"),
]


@pytest.mark.parametrize(("wrong", "message"), REJECTED, ids=lambda value: value if isinstance(value, str) else "")
def test_rejects(wrong: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(2, 4), "weights": [torch.zeros(3, 4)] * 2, "biases": [torch.zeros(3)] * 2} | wrong
    with pytest.raises(UserError) as caught:
        project(given["x"], given["weights"], given["biases"])
    assert message in str(caught.value)
