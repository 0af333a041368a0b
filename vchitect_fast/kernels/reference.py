"""Every op in plain torch: the definition of what the kernels compute. Eager, any device, any float dtype, autograd.

The kernels are held against this in fp64 (tests/close.py); the model runs on it where there is no GPU. No kernel imports it.
Sources: model_spec, "Block" and "Attention".

Letters: B batch, T frames, S visual tokens a frame, N text tokens, J = S + N, L rows of one sample, D hidden, H heads,
C head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROTARY_BASE = 1e6
QKV = tuple[Tensor, Tensor, Tensor]  # q, k, v of one source, [B, T, S or N, H, C] each


def modulated_norm(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine, then y (1 + scale) + shift; shift and scale per sample."""
    normed = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps)
    return normed * (1 + scale_BD[:, None]) + shift_BD[:, None]


def gated_residual(x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """x + gate * branch; gate per sample."""
    return x_BLD + gate_BD[:, None] * branch_BLD


def bias_gelu(x: Tensor, bias_D: Tensor) -> Tensor:
    """GELU (tanh) of x + bias."""
    return F.gelu(x + bias_D, approximate="tanh")


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


def spatial_joint(q_BTJHC: Tensor, k_BTJHC: Tensor, v_BTJHC: Tensor, *, math: bool = False) -> Tensor:
    """Full attention within each frame; [B, T, J, H, C]."""
    B, T = q_BTJHC.shape[:2]
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q_BTJHC, k_BTJHC, v_BTJHC))
    return attend(q, k, v, math=math).transpose(1, 2).unflatten(0, (B, T))


def temporal_joint(
    q_BTJHC: Tensor, k_BTJHC: Tensor, v_BTJHC: Tensor, *, rope_scaling_factor: float = 1.0, math: bool = False
) -> Tensor:
    """Attention over the T frames at each position, rotary on q and k; [B, T, J, H, C]."""
    B, T, J, _, C = q_BTJHC.shape
    cos, sin = rotary_tables(T, C, rope_scaling_factor, q_BTJHC.device)
    turned = (rotate(q_BTJHC, cos, sin), rotate(k_BTJHC, cos, sin), v_BTJHC)
    q, k, v = (x.permute(0, 2, 3, 1, 4).flatten(0, 1) for x in turned)  # [B*J, H, T, C]
    return attend(q, k, v, math=math).unflatten(0, (B, J)).permute(0, 3, 1, 2, 4)


def cross_joint(q_BTJHC: Tensor, k_BNHC: Tensor, v_BNHC: Tensor, *, math: bool = False) -> Tensor:
    """All tokens of a sample attend to its first frame's text; [B, T, J, H, C]."""
    T, J = q_BTJHC.shape[1:3]
    q = q_BTJHC.flatten(1, 2).transpose(1, 2)
    out = attend(q, k_BNHC.transpose(1, 2), v_BNHC.transpose(1, 2), math=math)
    return out.transpose(1, 2).unflatten(1, (T, J))


def spatial_attention(visual: QKV, text: QKV, *, math: bool = False) -> tuple[Tensor, Tensor]:
    """`spatial_joint` over two sources; returns the visual rows [B, T, S, H, C] and the text rows [B, T, N, H, C]."""
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(visual, text, strict=True))
    return split(spatial_joint(q, k, v, math=math), visual[0].shape[2])


def temporal_attention(
    visual: QKV, text: QKV, *, rope_scaling_factor: float = 1.0, math: bool = False
) -> tuple[Tensor, Tensor]:
    """`temporal_joint` over two sources; returns as spatial_attention."""
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(visual, text, strict=True))
    out = temporal_joint(q, k, v, rope_scaling_factor=rope_scaling_factor, math=math)
    return split(out, visual[0].shape[2])


def cross_attention(
    q_BTSHC: Tensor, text_q_BTNHC: Tensor, k_BNHC: Tensor, v_BNHC: Tensor, *, math: bool = False
) -> tuple[Tensor, Tensor]:
    """`cross_joint` with queries of two sources; returns as spatial_attention."""
    q = torch.cat((q_BTSHC, text_q_BTNHC), dim=2)
    return split(cross_joint(q, k_BNHC, v_BNHC, math=math), q_BTSHC.shape[2])


def split(joint: Tensor, num_visual: int) -> tuple[Tensor, Tensor]:
    """[B, T, S + N, ...] into its visual and text rows (views)."""
    return joint[:, :, :num_visual], joint[:, :, num_visual:]


def attend(q: Tensor, k: Tensor, v: Tensor, *, math: bool) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over [..., H, L, C]; `math` writes the softmax out, else torch's SDPA computes it."""
    if not math:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ v


def quantised_rows(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """q [R, K] in e4m3 and scale [R] in fp32, x = q scale: the least power of two, 2^-126 at least, with |q| <= 448.

    A scale of a power of two adds no rounding. Rows of zeros are zeros; a row that is not finite has the scale NaN.
    """
    largest = x_RK.abs().amax(1).float()
    mantissa, exponent = torch.frexp(largest)  # in [0.5, 1), and 448 is 0.875 x 2^9
    power = torch.where(largest > 0, exponent - 9 + (mantissa > 0.875), -126).clamp(min=-126)
    scale = torch.where(largest.isfinite(), torch.ldexp(torch.ones_like(largest), power), torch.nan)
    return (x_RK / scale[:, None]).to(torch.float8_e4m3fn), scale


def turned(q_RK: Tensor, scale_R: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose [K, R up to a multiple of 16, zeros there] with one scale [1], the largest: q scale / S, rounded."""
    S = scale_R.amax(0, keepdim=True)
    values = (q_RK.float() * (scale_R / S)[:, None]).T
    return F.pad(values, (0, -len(scale_R) % 16)).to(torch.float8_e4m3fn), S
