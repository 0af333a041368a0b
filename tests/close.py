"""The only tolerance in the project: an op may err as much as the same arithmetic in its own precision must.

exact       the reference in fp64 on the same (low-precision) inputs
reference   plain torch in the low precision
Required, with c = eps(output dtype) + eps(fp32) sqrt(K) and K the length of the longest reduction:
    mean|actual - exact| <= 1.5 mean|reference - exact| + c mean|exact|
    max|actual - exact|  <= 2   max|reference - exact|  + c max|exact|
Source: attention-gym's data-derived error budgets; flash-attention's factor of 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assert_close_to_exact(
    actual: Tensor, exact: Tensor, reference: Tensor, *, reduced: int, name: str = "output"
) -> None:
    """Fail with the worst element, both errors and the budget unless `actual` keeps to the rule above."""
    assert actual.shape == exact.shape == reference.shape, f"{name}: {actual.shape}, {exact.shape}, {reference.shape}"
    assert exact.dtype == torch.float64, f"{name}: exact must be fp64, got {exact.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    c = torch.finfo(actual.dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(reduced)
    error, ref_error = (actual.double() - exact).abs(), (reference.double() - exact).abs()
    budgets = {
        "mean": (error.mean(), 1.5 * ref_error.mean() + c * exact.abs().mean()),
        "max": (error.max(), 2 * ref_error.max() + c * exact.abs().max()),
    }
    for kind, (found, budget) in budgets.items():
        worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        assert found <= budget, (
            f"{name}: {kind} error {found:.3e} exceeds {budget:.3e} (reference errs {getattr(ref_error, kind)():.3e}); "
            f"worst at {worst}: {actual.flatten()[error.argmax()]} instead of {exact.flatten()[error.argmax()]}"
        )


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact| in the 2-norm, in fp64."""
    exact = exact.detach().double()
    return float((actual.detach().double() - exact).norm() / exact.norm())
