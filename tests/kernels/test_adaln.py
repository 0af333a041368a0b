"""modulated_norm against its definition in fp64, forward and all gradients: odd widths, strides, a large mean.

pytest tests/kernels/test_adaln.py; interpreted where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_exact
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import ops

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 1, 2),  # one token
    (2, 7, 33),  # odd width, samples of less than a tile
    (2, 34, 12),  # more than one partial row a sample, the last one cut short
    (1, 5, 1536),  # the released width, no power of two
    pytest.param((1, 2, 4096), id="widest"),
    pytest.param((1, 51840, 1536), marks=pytest.mark.gpu, id="40x768x432"),
    pytest.param((1, 1_500_000, 1536), marks=pytest.mark.gpu, id="beyond-2^31-elements"),
]


def draw(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, mean: float = 1.0) -> list[Tensor]:
    """x, shift, scale, dy in the dtype."""
    B, _, D = shape
    generator = torch.Generator(device).manual_seed(1)
    sizes = (shape, (B, D), (B, D), shape)
    x, *rest = (torch.randn(size, generator=generator, device=device, dtype=dtype) for size in sizes)
    return [x + mean, *rest]


def run(impl: str, x: Tensor, shift: Tensor, scale: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, shift, scale)]
    y = ops.modulated_norm(*leaves, EPS, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_matches(given: list[Tensor]) -> None:
    actual, low = run("triton", *given), run("reference", *given)
    exact = run("reference", *(t.double() for t in given))
    _, L, D = given[0].shape
    for name, reduced, *values in zip(("y", "dx", "dshift", "dscale"), (D, D, L, L), actual, exact, low, strict=True):
        assert values[0].dtype == given[0].dtype
        assert_close_to_exact(*values, reduced=reduced, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    if shape[1] > 1_000_000:
        if dtype != torch.bfloat16:
            pytest.skip("the largest shape is compared in bfloat16 only")
        x, shift, scale, _ = draw(shape, dtype, device)
        y = ops.modulated_norm(x, shift, scale, EPS, impl="triton")
        tail = ops.modulated_norm(x[:, -8:], shift, scale, EPS, impl="triton")
        assert torch.equal(y[:, -8:], tail)
        return
    assert_matches(draw(shape, dtype, device))


def test_a_large_mean_costs_nothing(device: torch.device) -> None:
    assert_matches(draw((1, 64, 100), torch.float32, device, mean=1000.0))


def test_without_modulation_it_is_layer_norm(device: torch.device) -> None:
    x, _, _, _ = draw((2, 3, 50), torch.float32, device)
    zero = x.new_zeros(1, 50).expand(2, 50)
    y = ops.modulated_norm(x, zero, zero, EPS, impl="triton")
    exact = F.layer_norm(x.double(), (50,), eps=EPS)
    assert_close_to_exact(y, exact, F.layer_norm(x, (50,), eps=EPS), reduced=50)


def test_samples_do_not_mix(device: torch.device) -> None:
    given = draw((3, 9, 20), torch.float32, device)
    together = run("triton", *given)
    for b in range(3):
        alone = run("triton", *(t[b : b + 1] for t in given))
        assert all(torch.equal(a, t[b : b + 1]) for a, t in zip(alone, together, strict=True))


def test_strides_do_not_matter(device: torch.device) -> None:
    x, shift, scale, dy = draw((2, 6, 40), torch.float32, device)
    plain = run("triton", x, shift, scale, dy)
    chunks = torch.cat((shift, scale, shift), dim=-1).chunk(3, dim=-1)  # what the AdaLN linear gives
    wide = torch.zeros(2, 6, 100, device=device)
    wide[..., 30:70] = x
    for other in (wide[..., 30:70], x.transpose(0, 1).contiguous().transpose(0, 1)):
        got = run("triton", other, chunks[0], chunks[1], dy.transpose(0, 1).contiguous().transpose(0, 1))
        assert not other.is_contiguous() and all(map(torch.equal, plain, got))
    ones = torch.ones((), device=device).expand(2, 6, 40)  # what y.sum().backward() hands over
    expanded, full = (run("triton", x, shift, scale, g) for g in (ones, ones.contiguous()))
    assert all(map(torch.equal, expanded, full))


@pytest.mark.parametrize("over", ["dy", "residual", "neither"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_backward_adds_the_residuals_gradient_and_sums_it(
    dtype: torch.dtype, over: str, device: torch.device
) -> None:
    """dx may be written over either gradient; 34 rows are two programs a sample, the second one cut short."""
    from vchitect_fast.kernels.adaln import backward_into, forward_into

    x, shift, scale, dy = draw((2, 34, 12), dtype, device)
    residual = torch.randn_like(dy)
    y, (mean, rstd) = torch.empty_like(x), torch.empty(2, 2, 34, device=device)
    forward_into(x, shift, scale, EPS, y, mean, rstd)

    def expected(given: list[Tensor], residual: Tensor) -> list[Tensor]:
        _, dx, dshift, dscale = run("reference", *given)
        return [dx + residual, dshift, dscale, (dx + residual).sum(1)]

    given = [x, shift, scale, dy]
    exact, low = expected([t.double() for t in given], residual.double()), expected(given, residual)
    dx = {"dy": dy, "residual": residual, "neither": torch.empty_like(dy)}[over]
    sums = backward_into(dy, x, scale, mean, rstd, dx, residual).sum(2)
    for i, (actual, *others) in enumerate(zip((dx, *sums.to(dtype)), exact, low, strict=True)):
        assert_close_to_exact(actual, *others, reduced=34, name=str(i))


def test_is_deterministic(device: torch.device) -> None:
    given = draw((1, 34, 9), torch.float32, device)
    assert all(map(torch.equal, run("triton", *given), run("triton", *given)))


def test_saves_only_what_it_says(device: torch.device) -> None:
    x, shift, scale, _ = (t.requires_grad_() for t in draw((2, 5, 16), torch.float16, device))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ops.modulated_norm(x, shift, scale, EPS, impl="triton")
    new = [t for t in saved if t.data_ptr() not in (x.data_ptr(), scale.data_ptr())]
    assert len(saved) == 4 and [(t.dtype, tuple(t.shape)) for t in new] == [(torch.float32, (2, 5))] * 2


def test_op_keeps_torchs_rules(device: torch.device) -> None:
    x, shift, scale, dy = draw((2, 3, 6), torch.float32, device)
    statistics = torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device)
    checks = ("test_schema", "test_faketensor")
    namespace = torch.ops.vchitect_fast
    torch.library.opcheck(namespace.modulated_norm_forward.default, (x, shift, scale, EPS), test_utils=checks)
    given = (dy, x, scale, *statistics)
    torch.library.opcheck(namespace.modulated_norm_backward.default, given, test_utils=checks)


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(3, 4)}, "expected x of shape [any, any, any], got [3, 4]"),
    ({"x": torch.zeros(2, 0, 4)}, "at least one element"),
    ({"x": torch.zeros(2, 4, 3).mT}, "expected x with a contiguous last dim"),
    ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, "expected float32, bfloat16 or float16, got int32"),
    ({"x": torch.zeros(2, 3, 4097)}, "expected hidden dim of at most 4096 (one tile holds whole rows), got 4097"),
    ({"shift": torch.zeros(1, 4)}, "expected shift of shape [2, 4], got [1, 4]"),
    ({"scale": torch.zeros(2, 4).bfloat16()}, "expected scale in float32, got bfloat16"),
]


@pytest.mark.parametrize(("wrong", "message"), REJECTED, ids=lambda value: value if isinstance(value, str) else "")
def test_rejects(wrong: dict[str, Tensor], message: str, device: torch.device) -> None:
    given = {"x": torch.zeros(2, 3, 4), "shift": torch.zeros(2, 4), "scale": torch.zeros(2, 4)} | wrong
    with pytest.raises(UserError) as caught:
        ops.modulated_norm(*(t.to(device) for t in given.values()), EPS, impl="triton")
    assert message in str(caught.value)
