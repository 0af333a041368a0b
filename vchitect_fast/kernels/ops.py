"""The ops of a block by name, and who computes them: impl="triton" (the kernels) or "reference" (plain torch).

An explicit choice never falls back. Triton is imported where it is first asked for: the reference runs where it is missing.
A function here has the arguments of its definition in reference.py, and then `impl`.
"""

from __future__ import annotations

from torch import Tensor

from vchitect_fast.kernels import reference
from vchitect_fast.kernels._check import is_reference


def modulated_norm(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, *, impl: str) -> Tensor:
    """LayerNorm without affine, then y (1 + scale) + shift; x [B, L, D], shift and scale [B, D]."""
    if is_reference(impl):
        return reference.modulated_norm(x_BLD, shift_BD, scale_BD, eps)
    from vchitect_fast.kernels.adaln import modulated_norm as kernel

    return kernel(x_BLD, shift_BD, scale_BD, eps)


def gated_residual(x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor, *, impl: str) -> Tensor:
    """x + gate * branch; x and branch [B, L, D], gate [B, D]."""
    if is_reference(impl):
        return reference.gated_residual(x_BLD, branch_BLD, gate_BD)
    from vchitect_fast.kernels.gated_residual import gated_residual as kernel

    return kernel(x_BLD, branch_BLD, gate_BD)


def gated_residual_norm(
    x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, *, impl: str
) -> tuple[Tensor, Tensor]:
    """y = x + gate * branch, and modulated_norm of y."""
    if is_reference(impl):
        y_BLD = reference.gated_residual(x_BLD, branch_BLD, gate_BD)
        return y_BLD, reference.modulated_norm(y_BLD, shift_BD, scale_BD, eps)
    from vchitect_fast.kernels.gated_residual import gated_residual_norm as kernel

    return kernel(x_BLD, branch_BLD, gate_BD, shift_BD, scale_BD, eps)


def bias_gelu(x: Tensor, bias_D: Tensor, *, impl: str) -> Tensor:
    """GELU (tanh) of x + bias, x [..., D]."""
    if is_reference(impl):
        return reference.bias_gelu(x, bias_D)
    from vchitect_fast.kernels.bias_gelu import bias_gelu as kernel

    return kernel(x, bias_D)


def cross_attention(
    q_BTSHC: Tensor, text_q_BTNHC: Tensor, k_BNHC: Tensor, v_BNHC: Tensor, *, impl: str
) -> tuple[Tensor, Tensor]:
    """All tokens of a sample attend to its first frame's text; returns the visual and the text rows."""
    if is_reference(impl):
        return reference.cross_attention(q_BTSHC, text_q_BTNHC, k_BNHC, v_BNHC)
    from vchitect_fast.kernels.cross import cross_attention as kernel

    return kernel(q_BTSHC, text_q_BTNHC, k_BNHC, v_BNHC)


def temporal_attention(
    visual: reference.QKV, text: reference.QKV, *, rope_scaling_factor: float = 1.0, impl: str
) -> tuple[Tensor, Tensor]:
    """Attention over the T frames at each position, rotary on q and k; returns the visual and the text rows."""
    if is_reference(impl):
        return reference.temporal_attention(visual, text, rope_scaling_factor=rope_scaling_factor)
    from vchitect_fast.kernels.temporal import temporal_attention as kernel

    return kernel(visual, text, rope_scaling_factor=rope_scaling_factor)


def spatial_attention(visual: reference.QKV, text: reference.QKV, *, impl: str) -> tuple[Tensor, Tensor]:
    """Full attention within each frame over two sources, each its q, k, v; returns the visual and the text rows."""
    if is_reference(impl):
        return reference.spatial_attention(visual, text)
    from vchitect_fast.kernels.spatial import spatial_attention as kernel

    return kernel(visual, text)
