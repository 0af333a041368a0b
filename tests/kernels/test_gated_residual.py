"""The gated residual, alone and with the norm behind it, against its definition in fp64, with all gradients.

pytest tests/kernels/test_gated_residual.py; interpreted where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_close_to_exact
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import ops

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("x", "branch", "gate", "shift", "scale")
SHAPES = [
    (1, 1, 2),  # one token
    (2, 7, 33),  # odd width, samples of less than a tile
    (2, 34, 12),  # more than one partial row a sample, the last one cut short
    (1, 3, 1536),  # the released width, no power of two
    pytest.param((1, 51840, 1536), marks=pytest.mark.gpu, id="40x768x432"),
]


def draw(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, branch, gate, shift, scale, dy, dn in the dtype."""
    B, _, D = shape
    generator = torch.Generator(device).manual_seed(1)
    sizes = (shape, shape, (B, D), (B, D), (B, D), shape, shape)
    return [torch.randn(size, generator=generator, device=device, dtype=dtype) for size in sizes]


def run(impl: str, norm: bool, x: Tensor, branch: Tensor, *rest: Tensor) -> list[Tensor]:
    """y, n (with the norm), then the gradients in the order of NAMES."""
    *vectors, dy, dn = rest
    leaves = [t.detach().requires_grad_() for t in (x, branch, *(vectors if norm else vectors[:1]))]
    if not norm:
        y = ops.gated_residual(*leaves, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    y, n = ops.gated_residual_norm(*leaves, EPS, impl=impl)
    return [y.detach(), n.detach(), *torch.autograd.grad((y, n), leaves, (dy, dn))]


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "alone"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape: tuple[int, int, int], dtype: torch.dtype, norm: bool, device: torch.device) -> None:
    given = draw(shape, dtype, device)
    actual, low = run("triton", norm, *given), run("reference", norm, *given)
    exact = run("reference", norm, *(t.double() for t in given))
    _, L, D = shape
    names = ["y", *(["n"] if norm else []), *(f"d{name}" for name in NAMES)][: len(actual)]
    for name, *values in zip(names, actual, exact, low, strict=True):
        assert values[0].dtype == dtype
        assert_close_to_exact(*values, reduced=L if name in ("dgate", "dshift", "dscale") else D, name=name)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "alone"])
def test_strides_do_not_matter(norm: bool, device: torch.device) -> None:
    given = draw((2, 6, 40), torch.float32, device)
    plain = run("triton", norm, *given)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim == 3 else t for t in given]
    turned[2:5] = torch.cat(given[2:5], dim=-1).chunk(3, dim=-1)  # what the AdaLN linear gives
    assert not any(t.is_contiguous() for t in turned)
    assert all(map(torch.equal, plain, run("triton", norm, *turned)))
    ones = torch.ones((), device=device).expand(2, 6, 40)  # what y.sum().backward() hands over
    expanded, full = (run("triton", norm, *given[:5], g, g) for g in (ones, ones.contiguous()))
    assert all(map(torch.equal, expanded, full))


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "alone"])
def test_is_deterministic(norm: bool, device: torch.device) -> None:
    given = draw((1, 34, 9), torch.float32, device)
    assert all(map(torch.equal, run("triton", norm, *given), run("triton", norm, *given)))


def test_gradient_of_one_output_alone(device: torch.device) -> None:
    given = draw((1, 5, 16), torch.float32, device)
    zero = torch.zeros_like(given[0])
    leaves = [t.detach().requires_grad_() for t in given[:5]]
    for output, grads in ((0, (given[5], zero)), (1, (zero, given[6]))):
        outputs = ops.gated_residual_norm(*leaves, EPS, impl="triton")
        got = torch.autograd.grad(outputs[output], leaves, given[5 + output])
        assert all(map(torch.equal, got, run("triton", True, *given[:5], *grads)[2:]))


def test_works_in_place(device: torch.device) -> None:
    """What a block does that owns its buffers: y over x, dx over dn, dbranch over branch."""
    from vchitect_fast.kernels import gated_residual as module

    given = draw((2, 9, 20), torch.float32, device)
    y, n, dx, dbranch, *sums = run("triton", True, *given)
    x, branch, gate, shift, scale, dy, dn = given
    mean, rstd, normed = x.new_empty(2, 9), x.new_empty(2, 9), torch.empty_like(x)
    module.forward_into(x, branch, gate, x, (shift, scale, EPS, normed, mean, rstd))
    got = module.backward_into(dy, branch, gate, branch, (dn, x, scale, mean, rstd, dn))
    assert all(map(torch.equal, (y, n, dx, dbranch, *sums), (x, normed, dn, branch, *got)))


def test_op_keeps_torchs_rules(device: torch.device) -> None:
    x, branch, gate, shift, scale, dy, dn = draw((2, 3, 6), torch.float32, device)
    mean, rstd = torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device)
    namespace = torch.ops.vchitect_fast
    for op, given in (
        (namespace.gated_residual_forward, (x, branch, gate)),
        (namespace.gated_residual_backward, (dy, branch, gate)),
        (namespace.gated_residual_norm_forward, (x, branch, gate, shift, scale, EPS)),
        (namespace.gated_residual_norm_backward, (dy, dn, x, branch, gate, scale, mean, rstd)),
    ):
        torch.library.opcheck(op.default, given, test_utils=("test_schema", "test_faketensor"))


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"branch": torch.zeros(2, 4, 4)}, "expected branch of shape [2, 3, 4], got [2, 4, 4]"),
    ({"branch": torch.zeros(2, 4, 3).mT}, "expected branch with a contiguous last dim"),
    ({"branch": torch.zeros(2, 3, 4).half()}, "expected branch in float32, got float16"),
    ({"x": torch.zeros(2, 3, 4).long()}, "expected float32, bfloat16 or float16, got int64"),
    ({"gate": torch.zeros(2, 1, 4)}, "expected gate of shape [2, 4], got [2, 1, 4]"),
    ({"scale": torch.zeros(2, 5)}, "expected scale of shape [2, 4], got [2, 5]"),
    ({"x": torch.zeros(2, 3, 5000)}, "expected hidden dim of at most 4096"),
]


@pytest.mark.parametrize(("wrong", "message"), REJECTED, ids=lambda value: value if isinstance(value, str) else "")
def test_rejects(wrong: dict[str, Tensor], message: str, device: torch.device) -> None:
    given = {name: torch.zeros((2, 3, 4) if name in ("x", "branch") else (2, 4)) for name in NAMES} | wrong
    given = {name: value.to(device) for name, value in given.items()}
    with pytest.raises(UserError) as caught:
        ops.gated_residual_norm(*given.values(), EPS, impl="triton")
    assert message in str(caught.value)
    if not {"shift", "scale"} & set(wrong):
        with pytest.raises(UserError, match="^gated_residual: "):
            ops.gated_residual(*list(given.values())[:3], impl="triton")
