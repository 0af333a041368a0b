"""The ops of a block by name, and who computes them: impl="triton" (the kernels) or "reference" (plain torch).

An explicit choice never falls back. Triton is imported where it is first asked for: the reference runs where it is missing.
A function here has the arguments of its definition in reference.py, and then `impl`.
"""

from __future__ import annotations

from torch import Tensor

from vchitect_fast.kernels import reference
from vchitect_fast.kernels._check import is_reference


def bias_gelu(x: Tensor, bias_D: Tensor, *, impl: str) -> Tensor:
    """GELU (tanh) of x + bias, x [..., D]."""
    if is_reference(impl):
        return reference.bias_gelu(x, bias_D)
    from vchitect_fast.kernels.bias_gelu import bias_gelu as kernel

    return kernel(x, bias_D)
