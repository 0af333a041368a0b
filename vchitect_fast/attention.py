"""The three attention branches of a block, one public function each.

    spatial   every frame attends within itself: S visual + N text tokens
    temporal  every token position attends over the T frames, rotary on the frame index
    cross     all T (S+N) tokens attend to the first frame's N text tokens of their own sample

Scale 1/sqrt(C), no mask, no dropout. Source: model_spec, "Attention". `backend` names who computes: "sdpa" is torch's
scaled_dot_product_attention, "math" the written-out softmax that defines the answer. An explicit choice never falls back.

Letters: B batch, T frames, J = S + N joint tokens, N text tokens, H heads, C head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vchitect_fast.errors import unknown_name

ROTARY_BASE = 1e6


def spatial_attention(q_BTJHC: Tensor, k_BTJHC: Tensor, v_BTJHC: Tensor, *, backend: str = "sdpa") -> Tensor:
    """Full attention within each frame. Returns [B, T, J, H, C] in the dtype of q."""
    B, T = q_BTJHC.shape[:2]
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q_BTJHC, k_BTJHC, v_BTJHC))
    return _attend(q, k, v, backend).transpose(1, 2).unflatten(0, (B, T))


def temporal_attention(
    q_BTJHC: Tensor, k_BTJHC: Tensor, v_BTJHC: Tensor, *, rope_scaling_factor: float = 1.0, backend: str = "sdpa"
) -> Tensor:
    """Attention over the frames at each position, rotary on q and k. Returns [B, T, J, H, C] in the dtype of q."""
    B, T, J = q_BTJHC.shape[:3]
    cos_TC2, sin_TC2 = rotary_tables(T, q_BTJHC.shape[-1], rope_scaling_factor, q_BTJHC.device)
    q = rotate(q_BTJHC, cos_TC2, sin_TC2)
    k = rotate(k_BTJHC, cos_TC2, sin_TC2)
    q, k, v = (x.permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (q, k, v_BTJHC))  # [B*J, H, T, C]
    return _attend(q, k, v, backend).unflatten(0, (B, J)).permute(0, 3, 1, 2, 4)


def cross_attention(q_BTJHC: Tensor, k_BNHC: Tensor, v_BNHC: Tensor, *, backend: str = "sdpa") -> Tensor:
    """All tokens of a sample attend to its first frame's text. Returns [B, T, J, H, C] in the dtype of q."""
    T, J = q_BTJHC.shape[1:3]
    q = q_BTJHC.flatten(1, 2).transpose(1, 2)
    out = _attend(q, k_BNHC.transpose(1, 2), v_BNHC.transpose(1, 2), backend)
    return out.transpose(1, 2).unflatten(1, (T, J))


def rotary_tables(num_frames: int, head_dim: int, scaling_factor: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [T, C/2] in fp32 of the angles (t / scaling_factor) * 1e6^(-2i/C)."""
    frequency = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    frame = torch.arange(num_frames, device=device, dtype=torch.float32) / scaling_factor
    angle = torch.outer(frame, frequency)
    return angle.cos(), angle.sin()


def rotate(x_BTJHC: Tensor, cos_TC2: Tensor, sin_TC2: Tensor) -> Tensor:
    """Rotate the interleaved pairs (2i, 2i+1) of the last dim by the frame's angles; at least fp32 inside."""
    wide = x_BTJHC.to(torch.promote_types(x_BTJHC.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TC2[:, None, None, :], sin_TC2[:, None, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x_BTJHC.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """[..., H, L, C] x [..., H, M, C] -> [..., H, L, C]."""
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    if backend == "math":
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        return scores.softmax(dim=-1) @ v
    raise unknown_name("attention backend", backend, ("sdpa", "math"))
