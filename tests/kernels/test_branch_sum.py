"""The merged branch sum against the chained linears in fp64, with the gradients of the rows and of the six parameters.

pytest tests/kernels/test_branch_sum.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_close_to_exact, relative_error
from torch import Tensor, nn

from vchitect_fast.errors import UserError
from vchitect_fast.kernels.branch_sum import branch_sum

NAMES = ("y", "drows", "dWo", "dbo", "dWc", "dbc", "dWt", "dbt")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1),
    (5, 7),
    (130, 48),
    pytest.param((65152, 1536), marks=pytest.mark.gpu, id="40x768x432"),
]


def draw(
    R: int, D: int, dtype: torch.dtype, device: torch.device, parameters: torch.dtype | None = None
) -> list[Tensor]:
    """Rows, Wo, bo, Wc, bc, Wt, bt, dy; weights of the size that keeps the variance."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    own = parameters or dtype
    linears = [t for _ in range(3) for t in (normal(D, D, dtype=own) / D**0.5, normal(D, dtype=own))]
    return [normal(R, 3 * D, dtype=dtype), *linears, normal(R, D, dtype=dtype)]


def run(given: list[Tensor], *, chained: bool, is_image: bool = False) -> list[Tensor]:
    *leaves, dy = (t.detach().requires_grad_() for t in given)
    rows, Wo, bo, Wc, bc, Wt, bt = leaves
    y = branch_sum(rows, (Wo, bo), (Wc, bc), (Wt, bt), spatial_weight=1.1, is_image=is_image, chained=chained)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.detach())]


@pytest.mark.parametrize("is_image", [False, True], ids=["video", "image"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_chained_form(
    shape: tuple[int, int], dtype: torch.dtype, is_image: bool, device: torch.device
) -> None:
    R, D = shape
    given = draw(R, D, dtype, device)
    actual, low = (run(given, chained=chained, is_image=is_image) for chained in (False, True))
    exact = run([t.double() for t in given], chained=True, is_image=is_image)
    for name, *values in zip(NAMES, actual, exact, low, strict=True):
        assert values[0].dtype == dtype
        assert_close_to_exact(*values, reduced=3 * D if name in ("y", "drows") else R, name=name)


@pytest.mark.parametrize("is_image", [False, True], ids=["video", "image"])
def test_the_two_forms_are_one_function(is_image: bool, device: torch.device) -> None:
    given = draw(11, 8, torch.float64, device)
    merged, chained = (run(given, chained=chained, is_image=is_image) for chained in (False, True))
    for a, b in zip(merged, chained, strict=True):
        assert relative_error(a, b) < 1e-14 if b.any() else not a.any()


def test_chained_is_the_modules_of_the_block(device: torch.device) -> None:
    D = 6
    out, context, temporal = (nn.Linear(D, D, device=device) for _ in range(3))
    rows = torch.randn(4, 3 * D, device=device)
    expected = out(1.1 * rows[:, :D] + context(rows[:, D : 2 * D])) + temporal(rows[:, 2 * D :])
    linears = [(m.weight, m.bias) for m in (out, context, temporal)]
    assert torch.equal(branch_sum(rows, *linears, spatial_weight=1.1, is_image=False, chained=True), expected)


@pytest.mark.parametrize("chained", [False, True])
def test_an_image_reads_no_temporal_column(chained: bool, device: torch.device) -> None:
    given = draw(5, 4, torch.float32, device)
    given[0][:, 8:] = float("nan")  # a buffer that nobody wrote
    *others, dWt, dbt = run(given, chained=chained, is_image=True)
    assert all(t.isfinite().all() for t in others) and not others[1][:, 8:].any()
    assert dWt.shape == (4, 4) and not dWt.any() and dbt.shape == (4,) and not dbt.any()


def test_fp32_parameters_of_low_rows(device: torch.device) -> None:
    given = draw(40, 16, torch.bfloat16, device, parameters=torch.float32)
    actual, low = (run(given, chained=chained) for chained in (False, True))
    exact = run([t.double() for t in given], chained=True)
    assert [t.dtype for t in actual] == [torch.bfloat16] * 2 + [torch.float32] * 6
    for name, a, e, r in zip(NAMES[:2], actual, exact, low, strict=False):
        assert_close_to_exact(a, e, r, reduced=48, name=name)
    # The parameters' gradients come from rows in bfloat16: they owe what a product in bfloat16 owes.
    for name, a, e, r in zip(NAMES[2:], actual[2:], exact[2:], low[2:], strict=True):
        assert_close_to_exact(a.bfloat16(), e, r.bfloat16(), reduced=40, name=name)


def test_strides_do_not_matter(device: torch.device) -> None:
    given = draw(6, 8, torch.float32, device)
    wide = torch.zeros(6, 40, device=device)
    wide[:, 8:32] = given[0]
    for actual, expected in zip(
        run([wide[:, 8:32], *given[1:]], chained=False), run(given, chained=False), strict=True
    ):
        assert torch.equal(actual, expected)


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"rows": torch.zeros(5, 11)}, "expected rows of shape [any, 9], got [5, 11]"),
    ({"rows": torch.zeros(5, 12, dtype=torch.int64)}, "expected float rows [R, 3 D], got [5, 12] int64"),
    ({"rows": torch.zeros(12, 5).T}, "expected rows with a contiguous last dim"),
    ({"rows": torch.zeros(0, 12)}, "at least one element"),
    ({"out": (torch.zeros(4, 5), torch.zeros(4))}, "expected out weight of shape [4, 4], got [4, 5]"),
    ({"temporal": (torch.zeros(4, 4).half(), torch.zeros(4))}, "expected temporal weight in float32, got float16"),
    ({"context": (torch.zeros(4, 4), torch.zeros(1))}, "expected context bias of shape [4], got [1]"),
]


@pytest.mark.parametrize(("wrong", "message"), REJECTED, ids=lambda value: value if isinstance(value, str) else "")
def test_rejects(wrong: dict[str, Any], message: str) -> None:
    linear = (torch.zeros(4, 4), torch.zeros(4))
    given = {"rows": torch.zeros(5, 12), "out": linear, "context": linear, "temporal": linear} | wrong
    with pytest.raises(UserError) as caught:
        branch_sum(*given.values(), spatial_weight=1.1, is_image=False)
    assert message in str(caught.value)
