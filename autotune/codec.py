"""FLOPs, parameters and bytes of encoding video with SD3's AutoencoderKL, by formula from its architecture.

A convolution of k x k over [h, w] costs 2 k^2 c_in c_out h w FLOPs; the one attention, in the middle at an eighth of the
size, 4 c L^2 of its L = h w / 64 cells. Norms and activations are no FLOPs here, as they are none in torch's counter:
tests/autotune/test_codec.py counts the same with it. Frames are independent. A rate is no business of this file
(`Cluster.codec_flops`), and so are the decoder, a convolution's workspace, and score matrices of an attention that is
not fused. Layer 0 only, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vchitect_fast.shapes import CODEC_FACTOR, LATENT_CHANNELS, VideoShape

# SD3-medium's vae/config.json: block_out_channels, layers_per_block; no quantization convolution, 32 norm groups.
CHANNELS = (128, 256, 512, 512)
NUM_RESNETS = 2  # a block
LIVE = 5  # [128, H, W] tensors at once at the end of the second resnet: its block's input, its own, branch, sum, result


@dataclass(frozen=True)
class Convolution:
    """One convolution of the encoder, its output `scale` times smaller than the frame each way."""

    kernel: int
    fan_in: int
    fan_out: int
    scale: int

    def flops(self, width: int, height: int) -> int:
        """FLOPs on one frame."""
        cells = (width // self.scale) * (height // self.scale)
        return 2 * self.kernel**2 * self.fan_in * self.fan_out * cells

    @property
    def num_parameters(self) -> int:
        """With its bias."""
        return (self.kernel**2 * self.fan_in + 1) * self.fan_out


def encode_flops(shape: VideoShape) -> int:
    """FLOPs of encoding one sample of `shape`, all its frames."""
    cells = shape.latent_height * shape.latent_width
    attention = 4 * CHANNELS[-1] * cells**2
    convolutions = sum(convolution.flops(shape.width, shape.height) for convolution in encoder())
    return shape.num_frames * (convolutions + attention)


def encoder_parameters() -> int:
    """Parameters of the encoder: convolutions, projections, and a scale and shift of every group norm."""
    norms = [c for fan_in, fan_out in _resnets() for c in (fan_in, fan_out)] + [CHANNELS[-1]] * 2  # attention, output
    return sum(convolution.num_parameters for convolution in encoder()) + 2 * sum(norms)


def encode_bytes(shape: VideoShape, mini_batch: int, element_bytes: int) -> int:
    """Bytes of activations at the fullest moment of encoding `mini_batch` frames at once, without gradients.

    That is in the first block, at full size and 128 channels; the frames themselves are counted.
    """
    frames = min(mini_batch, shape.num_frames)
    return frames * element_bytes * (LIVE * CHANNELS[0] + 3) * shape.width * shape.height


def encoder() -> Iterator[Convolution]:
    """Every convolution in order; the attention's four projections are convolutions of one cell."""
    yield Convolution(3, 3, CHANNELS[0], 1)
    scale, resnets = 1, iter(_resnets())
    for index, channels in enumerate(CHANNELS):
        for _ in range(NUM_RESNETS):
            yield from _resnet(*next(resnets), scale)
        if index < len(CHANNELS) - 1:
            scale *= 2
            yield Convolution(3, channels, channels, scale)
    assert scale == CODEC_FACTOR
    last = CHANNELS[-1]
    yield from _resnet(last, last, scale)
    yield from [Convolution(1, last, last, scale)] * 4
    yield from _resnet(last, last, scale)
    yield Convolution(3, last, 2 * LATENT_CHANNELS, scale)  # mean and log-variance


def _resnets() -> list[tuple[int, int]]:
    """Channels in and out of each resnet: two a block, two in the middle."""
    found, fan_in = [], CHANNELS[0]
    for fan_out in CHANNELS:
        found += [(fan_in, fan_out)] + [(fan_out, fan_out)] * (NUM_RESNETS - 1)
        fan_in = fan_out
    return found + [(fan_in, fan_in)] * 2


def _resnet(fan_in: int, fan_out: int, scale: int) -> Iterator[Convolution]:
    yield Convolution(3, fan_in, fan_out, scale)
    yield Convolution(3, fan_out, fan_out, scale)
    if fan_in != fan_out:
        yield Convolution(1, fan_in, fan_out, scale)
