"""The steps of a hand-written block whose linears compute in fp8, forward and backward: all else is as in 16 bits.

    merged projections, branch sum, both of the MLP     y = x W^T, dx = d W, dW = d^T x over rounded rows (kernels/fp8.py)
    modulation, attention, norms, gates, biases         untouched, and what is saved for backward too
    fp8_steps_of("triton")      kernels and torch's scaled GEMM: a GPU from sm_89 on, parameters in bf16
    fp8_steps_of("reference")   the rounded values multiplied in fp32 (fp64 for fp64): the definition, on any device
On a CPU either says what fp8 does to a training, and nothing of its speed. A weight is rounded at each call, forward and
backward: kept, it would cost half of its bytes a block. A gated product rounds gate x W, so its gradient is of that weight.

Who writes fp8: both norms, GELU and its backward on the kernels; attention's outputs, other gradients and weights by the quantiser that stands
alone, one more pass over its rows. A kernel rounds once, from fp32; the definition rounds what 16 bits left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import reference
from vchitect_fast.kernels._check import is_reference
from vchitect_fast.kernels.fp8 import Quantised, product
from vchitect_fast.model.steps import PRODUCTS, Operand, Steps, steps_of

FIRST_CAPABILITY = (8, 9)  # of the GPUs whose tensor cores know e4m3
MULTIPLE = 16  # of the columns that the scaled GEMM takes


def check_device(device: torch.device, dtype: torch.dtype, hidden_dim: int) -> None:
    """UserError where linears cannot compute in fp8; on a CPU they are emulated, in any dtype."""
    if hidden_dim % MULTIPLE:
        raise UserError(
            f"fp8 linears: expected a hidden dim that {MULTIPLE} divides, got {hidden_dim}; compute this model without fp8."
        )
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < FIRST_CAPABILITY:
        raise UserError(
            "fp8 linears: expected a GPU from sm_89 on, got sm_{}{}; compute without fp8 here.".format(*capability)
        )
    if device.type == "cuda" and dtype != torch.bfloat16:
        raise UserError(
            f"fp8 linears: expected bfloat16 on a GPU, got {dtype}; plan with bfloat16, or compute without fp8."
        )


@cache
def fp8_steps_of(impl: str) -> Steps:
    """The table of "triton" or "reference"; UserError for another name."""
    if is_reference(impl):
        return Fp8(steps_of(impl), reference.quantised_rows, reference.turned, exact_product).table()
    from vchitect_fast.kernels import block_steps, fp8_rows  # Triton is imported where it is first asked for

    return Fp8(steps_of(impl), fp8_rows.launch_rows, fp8_rows.launch_turn, product, block_steps).table()


@dataclass(frozen=True)
class Fp8:
    """The steps that differ, of the four functions that round and multiply; their arguments are those of steps.py."""

    steps: Steps
    rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    product: Callable[..., Tensor]
    fused: Any = None  # norm_fp8, residual_norm_fp8, gelu_fp8, gelu_backward_fp8 of kernels/block_steps.py

    def table(self) -> Steps:
        """These in the place of those of `steps`."""
        names = ("check", "norm", "residual_norm", "gelu", "gelu_backward", *PRODUCTS)
        return replace(self.steps, **{name: getattr(self, name) for name in names})

    def check(self, x_BTSD: Tensor, c_BTND: Tensor, num_heads: int) -> None:
        """The steps' own, and check_device."""
        self.steps.check(x_BTSD, c_BTND, num_heads)
        check_device(x_BTSD.device, x_BTSD.dtype, x_BTSD.shape[-1])

    def norm(self, *args: Any) -> tuple[Quantised, Tensor, Tensor]:
        """Its rows leave it rounded, by the kernel itself where there is one; statistics as they are."""
        if self.fused:
            q, scale, mean, rstd = self.fused.norm_fp8(*args)
            return Quantised(q, scale, args[0].dtype), mean, rstd
        n, mean, rstd = self.steps.norm(*args)
        return self.operand(n), mean, rstd

    def residual_norm(self, *args: Any) -> tuple[Quantised, Tensor, Tensor]:
        """As norm."""
        if self.fused:
            q, scale, mean, rstd = self.fused.residual_norm_fp8(*args)
            return Quantised(q, scale, args[0].dtype), mean, rstd
        n, mean, rstd = self.steps.residual_norm(*args)
        return self.operand(n), mean, rstd

    def gelu(self, pre_RK: Tensor, bias_K: Tensor) -> Quantised:
        """As norm."""
        if self.fused:
            q, scale = self.fused.gelu_fp8(pre_RK, bias_K)
            return Quantised(q, scale, pre_RK.dtype)
        return self.operand(self.steps.gelu(pre_RK, bias_K))

    def gelu_backward(self, dh_RK: Tensor, pre_RK: Tensor, bias_K: Tensor) -> tuple[Tensor, Quantised]:
        """dbias, and dpre rounded, likewise."""
        if self.fused:
            dbias, q, scale = self.fused.gelu_backward_fp8(dh_RK, pre_RK, bias_K)
            return dbias, Quantised(q, scale, dh_RK.dtype)
        dbias, dpre = self.steps.gelu_backward(dh_RK, pre_RK, bias_K)
        return dbias, self.operand(dpre)

    def operand(self, x: Operand) -> Quantised:
        """Its rows rounded, each by a scale of its own."""
        assert isinstance(x, Tensor), "the steps below round nothing"
        return Quantised(*self.rows(x.flatten(0, -2)), x.dtype).view(x.shape)

    def linear(self, x: Quantised, weight_DK: Quantised, bias_D: Tensor | None = None) -> Tensor:
        """x W^T + b in the dtype of the rows that x stands for."""
        y = self.product(_flat(x), weight_DK, bias_N=bias_D)
        return y.view(*x.shape[:-1], y.shape[-1])

    def input_gradient(self, d: Quantised, weight_DK: Quantised, out: Tensor) -> None:
        """Write d W; the weight is turned first, its scales then belong to other rows."""
        self.product(_flat(d), self._turned(weight_DK), out_MN=out.view(-1, out.shape[-1]))

    def weight_gradient(self, d: Quantised, parts: Sequence[Quantised], out_DK: Tensor) -> None:
        """Write d^T x, part by part."""
        turned = self._turned(d)
        for x, out in zip(parts, out_DK.split([x.shape[-1] for x in parts], dim=1), strict=True):
            out.copy_(
                self.product(turned, self._turned(x))
            )  # a weight's bytes: the GEMM writes no columns of a larger one

    def _turned(self, x: Quantised) -> Quantised:
        flat = _flat(x)
        return Quantised(*self.turn(flat.q, flat.scale), x.dtype)


def _flat(x: Quantised) -> Quantised:
    return x.view((x.scale.numel(), x.shape[-1]))


def exact_product(a: Quantised, b: Quantised, *, bias_N: Tensor | None = None, out_MN: Tensor | None = None) -> Tensor:
    """kernels/fp8.py's product of the same values, summed in fp32 or, for fp64, in fp64."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    values = [x.q.to(dtype) * x.scale.to(dtype)[:, None] for x in (a, b)]
    y = values[0] @ values[1].T
    y = (y if bias_N is None else y + bias_N).to(a.dtype)
    return y if out_MN is None else out_MN.copy_(y)
