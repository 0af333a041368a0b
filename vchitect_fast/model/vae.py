"""Latent codecs: video [B,T,3,H,W] in [-1,1] <-> latents [B,T,16,H/8,W/8], every frame by itself.

`SD3Codec` wraps the AutoencoderKL of SD3 from a folder; `DCTCodec` is a fixed transform with the same geometry that
needs no weights, for the quickstart and for tests. `load_codec` gives the one that was asked for: a folder that is
absent or incomplete is an error and never turns into "dct". Nothing here is trained, nothing here is downloaded.

B batch, T frames, c = 16 latent channels, H x W pixels, h x w = H/8 x W/8 latent cells.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.model.frozen import fingerprint, load_frozen
from vchitect_fast.shapes import CODEC_FACTOR, LATENT_CHANNELS


class Codec(Protocol):
    """What training, sampling and the latent cache need of a codec."""

    @property
    def name(self) -> str:
        """ "dct" or "sd3"."""

    @property
    def fingerprint(self) -> str:
        """Changes when the same video would give other latents; the key of the latent cache."""

    def encode(self, video_BTCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Video, any floating dtype, [-1,1], [B,T,3,H,W], H and W multiples of 8 -> latents fp32 [B,T,16,H/8,W/8].

        A codec with a posterior returns its mode, or with `generator` a sample; one without ignores `generator`.
        The result lies on the codec's device and carries no gradient. Raises UserError on another shape or dtype.
        """

    def decode(self, latents_BTchw: Tensor) -> Tensor:
        """Latents, any floating dtype, [B,T,16,h,w] -> video fp32 [B,T,3,8h,8w], clamped to [-1,1]; no gradient.

        Raises UserError on another shape or dtype.
        """


def load_codec(spec: str, *, device: torch.device | str = "cpu", mini_batch: int = 8) -> Codec:
    """The codec that `spec` names.

    spec        "dct", or a folder with the weights of SD3's AutoencoderKL in diffusers' layout (config.json and
                diffusion_pytorch_model.safetensors), or the folder above it (whose `vae/` is taken)
    mini_batch  frames that go through AutoencoderKL at a time; bounds its memory; "dct" has no use for it

    Raises UserError when the folder is absent, incomplete or of another geometry, or when diffusers is not installed.
    """
    if spec == "dct":
        return DCTCodec(device=device)
    return SD3Codec(Path(spec).expanduser(), device=device, mini_batch=mini_batch)


# The color axes: gray, blue-yellow, red-green, the principal axes that natural RGB is close to. Against the luma and
# chroma of BT.601 made orthonormal (rows by Gram-Schmidt), at the best choice of 16 coefficients each, they
# reconstruct bikes.mp4 3.9 dB and bigbuckbunny.mp4 2.3 dB better (24 frames each at full size).
_GRAY_BLUE_RED = ((1.0, 1.0, 1.0), (-1.0, -1.0, 2.0), (1.0, -1.0, 0.0))

# How many of the 16 channels each color axis gets, lowest frequencies first. PSNR in dB of 24 frames, before clamping,
# (bikes.mp4 640x272, 256x128, 128x64; bigbuckbunny.mp4 1280x720, 256x144, 128x72; carphone_pristine.mp4 176x144,
# 88x72):
#   12+3+1: 35.4 30.1 26.8  35.1 27.9 26.6  28.2 25.8   mean 29.5, at most 0.6 behind the best choice of each column
#   14+1+1: 36.0 30.7 27.3  35.2 27.3 25.6  28.3 26.2   mean 29.6, at most 1.0 behind
#   13+2+1: 35.8 30.5 27.1  35.0 27.4 25.9  28.2 26.0   mean 29.5, at most 0.8 behind
#   10+3+3: 34.8 29.7 26.3  34.9 27.7 26.5  27.9 25.4   mean 29.1, at most 1.2 behind
_NUM_KEPT = (12, 3, 1)

# (vertical, horizontal) frequencies in JPEG's zig-zag order, as many as the longest run above.
_ZIG_ZAG = ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0), (4, 0), (3, 1))

# Root mean square of the kept coefficients on the columns above: 1.63 1.61 1.57, 1.79 1.76 1.73, 1.96 1.93; so latents
# come out with a root mean square of 0.90 to 1.12. There is no shift: a gray video of value 0 has latents of 0, and
# only the three lowest coefficients have a notable mean (before scaling -3.0 gray on bikes.mp4, whose mean pixel is
# -0.22; -2.0 gray and -1.5 blue-yellow on bigbuckbunny.mp4, -0.14).
_COEFFICIENT_RMS = 1.75


class DCTCodec:
    """Block cosine transform: color rotation, 8x8 DCT-II, keep 16 of the 192 coefficients of a block, divide by 1.75.

    With W [16, 192] the kept rows (W W^T = 1) and x a block of 3 x 8 x 8 pixels: z = W x / 1.75, decode = 1.75 W^T z.
    - encode(decode(z)) = z and decode(encode(.)) is the orthogonal projection onto 16 dimensions, as long as no pixel
      leaves [-1,1]; where one does, the clamp of decode comes on top (it only brings the video closer to a real one).
    - Two latents whose mean squared difference is m decode to pixels whose mean squared difference is
      m * 1.75^2 * 16/192, before the clamp: m = 0.01 is 32.0 dB PSNR (peak to peak 2).

    fp32, no autocast, matmuls only: bitwise the same on every run of one machine. Cost: 2 x 192 x 16 FLOPs a block.
    """

    name = "dct"
    latent_mse_to_pixel_mse = _COEFFICIENT_RMS**2 * LATENT_CHANNELS / (3 * CODEC_FACTOR**2)  # 0.255

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        self._rows = _dct_rows().to(device=device, dtype=torch.float32)
        kept = "+".join(str(count) for count in _NUM_KEPT)
        self.fingerprint = f"dct-1-{kept}-rms{_COEFFICIENT_RMS}"  # the first number counts changes of the color axes

    @torch.no_grad()
    def encode(self, video_BTCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See Codec.encode; there is no posterior, `generator` is not used."""
        _check_video(video_BTCHW)
        with torch.autocast(self._rows.device.type, enabled=False):
            blocks = F.pixel_unshuffle(video_BTCHW.to(self._rows).flatten(0, 1), CODEC_FACTOR)
            latents = torch.einsum("kp,nphw->nkhw", self._rows, blocks) / _COEFFICIENT_RMS
        return latents.unflatten(0, video_BTCHW.shape[:2])

    @torch.no_grad()
    def decode(self, latents_BTchw: Tensor) -> Tensor:
        """See Codec.decode."""
        _check_latents(latents_BTchw)
        with torch.autocast(self._rows.device.type, enabled=False):
            latents = latents_BTchw.to(self._rows).flatten(0, 1) * _COEFFICIENT_RMS
            blocks = torch.einsum("kp,nkhw->nphw", self._rows, latents)
        video = F.pixel_shuffle(blocks, CODEC_FACTOR).clamp_(-1, 1)
        return video.unflatten(0, latents_BTchw.shape[:2])


class SD3Codec:
    """SD3's AutoencoderKL: z = (encoder(x) - shift_factor) * scaling_factor, both factors from its config.json.

    Runs in the weights' own dtype, `mini_batch` frames at a time, which changes nothing but the memory it takes.
    `load_codec` documents the arguments and the errors.
    """

    name = "sd3"

    def __init__(self, folder: Path, *, device: torch.device | str = "cpu", mini_batch: int = 8) -> None:
        if mini_batch < 1:
            raise UserError(f"mini_batch must be at least 1 frame, got {mini_batch}; 8 is the default.")
        folder = _find_vae(folder)
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise UserError(
                f"the codec in {folder} needs diffusers, which does not import ({error}); "
                f"run pip install 'vchitect-fast[sd3]'."
            ) from error
        # Without accelerate, which nothing here needs, diffusers warns unless low_cpu_mem_usage is off.
        options: dict[str, Any] = {"dtype_option": "torch_dtype", "low_cpu_mem_usage": False}
        vae: Any = load_frozen(AutoencoderKL, folder, stem="diffusion_pytorch_model", **options)
        _check_geometry(folder, vae.config)
        self._vae = vae.to(device)
        self._config_json = (folder / "config.json").read_bytes()
        self._mini_batch = mini_batch
        self._scale: float = vae.config.scaling_factor
        self._shift: float = vae.config.shift_factor or 0.0

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights and config.json; not of mini_batch."""
        return "sd3-" + fingerprint({"vae": self._vae}, [self._config_json])

    @torch.no_grad()
    def encode(self, video_BTCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See Codec.encode."""
        _check_video(video_BTCHW)
        frames = video_BTCHW.flatten(0, 1)
        means, deviations = [], []
        with torch.autocast(self._vae.device.type, enabled=False):
            for some in frames.split(self._mini_batch):
                posterior = self._vae.encode(some.to(device=self._vae.device, dtype=self._vae.dtype)).latent_dist
                means.append(posterior.mode().float())
                deviations.append(posterior.std.float() if generator is not None else None)
        latents = torch.cat(means)
        if generator is not None:
            # Drawn at once, so that the sample does not depend on mini_batch.
            noise = torch.randn(latents.shape, generator=generator, device=generator.device)
            latents += torch.cat([std for std in deviations if std is not None]) * noise.to(latents.device)
        return ((latents - self._shift) * self._scale).unflatten(0, video_BTCHW.shape[:2])

    @torch.no_grad()
    def decode(self, latents_BTchw: Tensor) -> Tensor:
        """See Codec.decode."""
        _check_latents(latents_BTchw)
        frames = latents_BTchw.flatten(0, 1)
        decoded = []
        with torch.autocast(self._vae.device.type, enabled=False):
            for some in frames.split(self._mini_batch):
                some = some.to(device=self._vae.device, dtype=torch.float32) / self._scale + self._shift
                decoded.append(self._vae.decode(some.to(self._vae.dtype)).sample.float().clamp_(-1, 1))
        return torch.cat(decoded).unflatten(0, latents_BTchw.shape[:2])


def _dct_rows() -> Tensor:
    """W [16, 192] fp64, orthonormal rows; columns in pixel_unshuffle's order (color, row, column)."""
    color = torch.tensor(_GRAY_BLUE_RED, dtype=torch.float64)
    color /= color.norm(dim=1, keepdim=True)
    step = torch.arange(CODEC_FACTOR, dtype=torch.float64)
    cosine = torch.cos(math.pi * (2 * step[None] + 1) * step[:, None] / (2 * CODEC_FACTOR))  # [frequency, pixel]
    cosine *= math.sqrt(2 / CODEC_FACTOR)
    cosine[0] /= math.sqrt(2)
    rows = [
        torch.einsum("c,y,x->cyx", color[axis], cosine[vertical], cosine[horizontal]).flatten()
        for axis, num_kept in enumerate(_NUM_KEPT)
        for vertical, horizontal in _ZIG_ZAG[:num_kept]
    ]
    return torch.stack(rows)


def _find_vae(folder: Path) -> Path:
    """`folder` itself when it holds a config.json, else its `vae/`."""
    if not folder.is_dir():
        raise UserError(
            f"a codec is 'dct' or a folder with SD3's AutoencoderKL, got {str(folder)!r}, which is no folder."
        )
    if (folder / "config.json").is_file():
        return folder
    if not (folder / "vae" / "config.json").is_file():
        raise UserError(
            f"{folder} holds no AutoencoderKL: neither config.json nor vae/config.json is there; "
            f"point the codec to the `vae` folder of an SD3 checkpoint, or ask for 'dct'."
        )
    return folder / "vae"


def _check_geometry(folder: Path, config: Any) -> None:
    factor = 2 ** (len(config.block_out_channels) - 1)
    got = (config.latent_channels, factor, config.in_channels, config.out_channels)
    if got != (LATENT_CHANNELS, CODEC_FACTOR, 3, 3):
        raise UserError(
            f"the codec must make {LATENT_CHANNELS} channels {CODEC_FACTOR} times smaller out of RGB, {folder} makes "
            f"{got[0]} channels {got[1]} times smaller out of {got[2]} (back to {got[3]}); use SD3's vae."
        )


def _check_video(video_BTCHW: Tensor) -> None:
    shape = tuple(video_BTCHW.shape)
    if not video_BTCHW.is_floating_point():
        raise UserError(f"a video must be floats in [-1,1], got {video_BTCHW.dtype}; convert uint8 by x / 127.5 - 1.")
    if len(shape) != 5 or shape[2] != 3 or 0 in shape:
        raise UserError(f"a video must be [B,T,3,H,W] with at least one frame, got {list(shape)}; permute it first.")
    if shape[3] % CODEC_FACTOR or shape[4] % CODEC_FACTOR:
        raise UserError(
            f"H and W must be multiples of {CODEC_FACTOR}, got {shape[3]}x{shape[4]}; resize or crop first."
        )


def _check_latents(latents_BTchw: Tensor) -> None:
    shape = tuple(latents_BTchw.shape)
    if not latents_BTchw.is_floating_point():
        raise UserError(f"latents must be floats, got {latents_BTchw.dtype}; convert them first.")
    if len(shape) != 5 or shape[2] != LATENT_CHANNELS or 0 in shape:
        raise UserError(
            f"latents must be [B,T,{LATENT_CHANNELS},h,w] with at least one frame, got {list(shape)}; permute first."
        )
