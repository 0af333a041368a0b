"""What enters the blocks: latents cut into tokens with a position grid, timestep and pooled text as one vector.

Source: model_spec, "Forward". The position grid is 2-D sin-cos, centre-cropped, so one checkpoint serves every size up to
M x M tokens; there is no position over frames here (the temporal branch has its rotary).

Letters: B batch, T frames, S visual tokens a frame, D hidden, c latent channels, h w latent rows and columns, p patch,
M side of the grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vchitect_fast.errors import UserError

TIMESTEP_CHANNELS = 256


def position_grid(hidden_dim: int, grid_size: int, base_size: int) -> Tensor:
    """The M x M sin-cos grid as [1, M*M, D] in fp32, row-major; the first D/2 channels code the column, the rest the row.

    position = index / (M / base_size), so that base_size tokens span the range that the base image was trained on.
    """
    position = torch.arange(grid_size, dtype=torch.float64) / (grid_size / base_size)
    quarter = hidden_dim // 4
    frequency = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.outer(position, frequency)
    code = torch.cat((angle.sin(), angle.cos()), dim=1)  # [M, D/2]
    column = code[None, :, :].expand(grid_size, -1, -1)
    row = code[:, None, :].expand(-1, grid_size, -1)
    return torch.cat((column, row), dim=-1).reshape(1, grid_size * grid_size, hidden_dim).float()


class PatchEmbed(nn.Module):
    """Latents [B*T, c, h, w] -> tokens [B*T, S, D]."""

    def __init__(self, patch_size: int, in_channels: int, hidden_dim: int, grid_size: int, sample_size: int) -> None:
        super().__init__()
        self.patch_size, self.grid_size = patch_size, grid_size
        self.proj = nn.Conv2d(in_channels, hidden_dim, kernel_size=patch_size, stride=patch_size)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", position_grid(hidden_dim, grid_size, sample_size // patch_size))

    def forward(self, latents: Tensor) -> Tensor:
        """Raises UserError where the patch does not divide the latents or they exceed the grid."""
        grid = self.grid(*latents.shape[-2:])
        return self.proj(latents).flatten(2).transpose(1, 2) + grid.to(latents.dtype)

    def patches(self, latents: Tensor) -> Tensor:
        """[B*T, c, h, w] -> [B*T, S, c*p*p]: the numbers of each token, before `project`. Raises as `forward`."""
        self.num_tokens(*latents.shape[-2:])
        p = self.patch_size
        cut = latents.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))  # [B*T, c, rows, p, columns, p]
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def project(self, patches: Tensor, height: int, width: int, tokens: slice) -> Tensor:
        """Some tokens' patches [..., c*p*p] of latents of this size -> [..., D], with the positions of those tokens."""
        weight = self.proj.weight.flatten(1)
        positions = self.grid(height, width)[:, tokens].to(patches.dtype)
        return F.linear(patches, weight, self.proj.get_parameter("bias")) + positions

    def num_tokens(self, height: int, width: int) -> int:
        """S of latents of this size. Raises as `forward`."""
        rows, columns = self._rows_columns(height, width)
        return rows * columns

    def grid(self, height: int, width: int) -> Tensor:
        """[1, S, D], the centre of the M x M grid, for latents of this size. Raises as `forward`."""
        rows, columns = self._rows_columns(height, width)
        M = self.grid_size
        top, left = (M - rows) // 2, (M - columns) // 2
        return self.pos_embed.view(M, M, -1)[top : top + rows, left : left + columns].reshape(1, rows * columns, -1)

    def _rows_columns(self, height: int, width: int) -> tuple[int, int]:
        p, M = self.patch_size, self.grid_size
        if height % p or width % p:
            raise UserError(
                f"latents must be divisible by the patch size {p}, got {height} x {width}; "
                f"use a video size that is a multiple of {8 * p} pixels."
            )
        rows, columns = height // p, width // p
        if rows > M or columns > M:
            raise UserError(
                f"latents of {rows} x {columns} tokens exceed the position grid of {M} x {M}; "
                "use a smaller video or a checkpoint with a larger pos_embed_max_size."
            )
        return rows, columns


def timestep_code(timestep_B: Tensor) -> Tensor:
    """[B] in [0, 1000] -> [B, 256] fp32: [cos, sin](t * exp(-ln 10000 * i / 128))."""
    half = TIMESTEP_CHANNELS // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep_B.device) / half)
    angle = timestep_B.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class MLPEmbed(nn.Module):
    """Linear, SiLU, Linear; the released names linear_1, linear_2."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, hidden_dim)
        self.linear_2 = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_dim] -> [B, D]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    """timestep [B] and pooled text [B, P] -> temb [B, D]."""

    def __init__(self, pooled_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = MLPEmbed(TIMESTEP_CHANNELS, hidden_dim)
        self.text_embedder = MLPEmbed(pooled_dim, hidden_dim)

    def forward(self, timestep_B: Tensor, pooled_BP: Tensor) -> Tensor:
        """In the dtype of pooled."""
        return self.timestep_embedder(timestep_code(timestep_B).to(pooled_BP.dtype)) + self.text_embedder(pooled_BP)
