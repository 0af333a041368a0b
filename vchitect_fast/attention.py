"""The three attention branches of a block, one public function each.

    spatial   every frame attends within itself: S visual + N text tokens
    temporal  every token position attends over the T frames, rotary on the frame index
    cross     all T (S+N) tokens attend to the first frame's N text tokens of their own sample

Scale 1/sqrt(C), no mask, no dropout. Source: model_spec, "Attention". `backend` names who computes: "sdpa" is torch's
scaled_dot_product_attention, "math" the written-out softmax that defines the answer. An explicit choice never falls back.

Letters: B batch, T frames, J = S + N joint tokens, N text tokens, H heads, C head dim.
"""

from __future__ import annotations

from torch import Tensor

from vchitect_fast.errors import unknown_name
from vchitect_fast.kernels.reference import cross_joint, rotary_tables, rotate, spatial_joint, temporal_joint

__all__ = ["cross_attention", "rotary_tables", "rotate", "spatial_attention", "temporal_attention"]


def spatial_attention(q_BTJHC: Tensor, k_BTJHC: Tensor, v_BTJHC: Tensor, *, backend: str = "sdpa") -> Tensor:
    """Full attention within each frame. Returns [B, T, J, H, C] in the dtype of q."""
    return spatial_joint(q_BTJHC, k_BTJHC, v_BTJHC, math=_is_math(backend))


def temporal_attention(
    q_BTJHC: Tensor, k_BTJHC: Tensor, v_BTJHC: Tensor, *, rope_scaling_factor: float = 1.0, backend: str = "sdpa"
) -> Tensor:
    """Attention over the frames at each position, rotary on q and k. Returns [B, T, J, H, C] in the dtype of q."""
    return temporal_joint(q_BTJHC, k_BTJHC, v_BTJHC, rope_scaling_factor=rope_scaling_factor, math=_is_math(backend))


def cross_attention(q_BTJHC: Tensor, k_BNHC: Tensor, v_BNHC: Tensor, *, backend: str = "sdpa") -> Tensor:
    """All tokens of a sample attend to its first frame's text. Returns [B, T, J, H, C] in the dtype of q."""
    return cross_joint(q_BTJHC, k_BNHC, v_BNHC, math=_is_math(backend))


def _is_math(backend: str) -> bool:
    if backend not in ("sdpa", "math"):
        raise unknown_name("attention backend", backend, ("sdpa", "math"))
    return backend == "math"
