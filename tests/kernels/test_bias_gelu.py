"""bias_gelu against its definition in fp64, forward and both gradients, at odd sizes and strides.

pytest tests/kernels/test_bias_gelu.py; interpreted where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_close_to_exact
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 1, 1),  # one value
    (2, 3, 5),  # less than a tile
    (2, 35, 515),  # more than a tile either way, odd; more than one partial row
    pytest.param((2, 20000, 6144), marks=pytest.mark.gpu, id="40x432x240"),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, bias, dy in the dtype; x reaches +-12, where the gate is 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(shape, generator=generator)
    bias, dy = torch.randn(shape[-1], generator=generator), torch.randn(shape, generator=generator)
    return [t.to(dtype).to(device) for t in (x, bias, dy)]


def run(impl: str, x: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = ops.bias_gelu(x, bias, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, (x, bias), dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    given = draw(shape, dtype, device)
    actual, low = run("triton", *given), run("reference", *given)
    exact = run("reference", *(t.double() for t in given))
    num_rows = given[0].numel() // shape[-1]
    for name, reduced, *values in zip(("y", "dx", "dbias"), (1, 1, num_rows), actual, exact, low, strict=True):
        assert values[0].dtype == dtype
        assert_close_to_exact(*values, reduced=reduced, name=name)


def test_strides_do_not_matter(device: torch.device) -> None:
    x, bias, dy = draw((2, 6, 40), torch.float32, device)
    wide = torch.zeros(2, 6, 100, device=device)
    wide[..., 30:70] = x
    plain = run("triton", x, bias, dy)
    for other in (wide[..., 30:70], x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not other.is_contiguous() and all(map(torch.equal, plain, run("triton", other, bias, dy)))
    ones = torch.ones((), device=device).expand(2, 6, 40)  # what y.sum().backward() hands over
    assert all(map(torch.equal, run("triton", x, bias, ones), run("triton", x, bias, ones.contiguous())))


def test_is_deterministic(device: torch.device) -> None:
    given = draw((1, 70, 9), torch.float32, device)
    assert all(map(torch.equal, run("triton", *given), run("triton", *given)))


def test_far_out_is_finite(device: torch.device) -> None:
    x = torch.tensor([[-1e4, -60.0, 0.0, 60.0, 1e4]], device=device)
    y, dx, _ = run("triton", x, torch.zeros(5, device=device), torch.ones_like(x))
    assert y.tolist() == [[0, 0, 0, 60, 1e4]] and dx.tolist() == [[0, 0, 0.5, 1, 1]]


def test_op_keeps_torchs_rules(device: torch.device) -> None:
    x, bias, dy = draw((1, 4, 6), torch.float32, device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vchitect_fast.bias_gelu_forward.default, (x[0], bias), test_utils=checks)
    torch.library.opcheck(torch.ops.vchitect_fast.bias_gelu_backward.default, (dy[0], x[0], bias), test_utils=checks)


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"bias": torch.zeros(5)}, "expected bias of shape [4], got [5]"),
    ({"bias": torch.zeros(4, dtype=torch.float16)}, "expected bias in float32, got float16"),
    ({"x": torch.zeros(3, 4, dtype=torch.float64)}, "expected float32, bfloat16 or float16, got float64"),
    ({"x": torch.zeros(4, 3).T}, "contiguous last dim, got strides [1, 3]"),
    ({"x": torch.zeros(0, 4)}, "at least one element in every dim, got [0, 4]"),
    ({"bias": torch.zeros(4, device="meta")}, "expected bias on"),
    ({"impl": "tritn"}, "unknown impl 'tritn'; did you mean 'triton'?"),
]


@pytest.mark.parametrize(("wrong", "message"), REJECTED, ids=lambda value: value if isinstance(value, str) else "")
def test_rejects(wrong: dict[str, Any], message: str, device: torch.device) -> None:
    given = {"x": torch.zeros(3, 4), "bias": torch.zeros(4), "impl": "triton"} | wrong
    moved = {k: v.to(device) if isinstance(v, Tensor) and not v.is_meta else v for k, v in given.items()}
    with pytest.raises(UserError) as caught:
        ops.bias_gelu(moved["x"], moved["bias"], impl=moved["impl"])
    assert message in str(caught.value)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match='impl="triton" needs CUDA tensors, got cpu; pass impl="reference"'):
        ops.bias_gelu(torch.zeros(2, 3), torch.zeros(3), impl="triton")


def test_second_derivatives_are_refused_and_not_wrong(device: torch.device) -> None:
    x, bias = (torch.ones(size, device=device, requires_grad=True) for size in ((2, 3), (3,)))
    [dx] = torch.autograd.grad(ops.bias_gelu(x, bias, impl="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_reference_needs_no_kernel() -> None:
    x, bias = torch.randn(3, 4), torch.randn(4)
    assert torch.equal(ops.bias_gelu(x, bias, impl="reference"), reference.bias_gelu(x, bias))
