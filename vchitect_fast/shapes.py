"""VideoShape: how many frames of which size, and how many tokens that makes.

Written "frames x width x height" as in the paper's tables: 32x512x384. Every size is in pixels and a multiple of 16
(the codec divides by 8, the patch by 2); `VideoShape.parse` rounds to the nearest multiple, ties up, and says so.
An image is a video of one frame. Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vchitect_fast.errors import UserError

CODEC_FACTOR = 8  # pixels a latent cell, each way (SD3's AutoencoderKL)
LATENT_CHANNELS = 16
SIZE_MULTIPLE = 16  # codec factor x patch size


def round_size(pixels: int) -> int:
    """The nearest positive multiple of 16, ties up (1080 -> 1088)."""
    return max(SIZE_MULTIPLE, (pixels + SIZE_MULTIPLE // 2) // SIZE_MULTIPLE * SIZE_MULTIPLE)


@dataclass(frozen=True, order=True)
class VideoShape:
    """Frames x width x height, sizes in pixels.

    Raises UserError unless every field is positive and width and height are multiples of 16.
    """

    num_frames: int
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.width < 1 or self.height < 1:
            raise UserError(
                f"a VideoShape needs positive frames x width x height, got {self}; write it like 32x512x384."
            )
        if self.width % SIZE_MULTIPLE or self.height % SIZE_MULTIPLE:
            near = f"{self.num_frames}x{round_size(self.width)}x{round_size(self.height)}"
            raise UserError(
                f"width and height must be multiples of {SIZE_MULTIPLE}, got {self}; the nearest is {near}."
            )

    @classmethod
    def parse(cls, text: str) -> tuple[VideoShape, str]:
        """Read "FxWxH"; returns the shape and a sentence if a size had to be rounded, else an empty string."""
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip().lower())
        if not found:
            raise UserError(f"a shape is frames x width x height like 32x512x384, got {text!r}.")
        frames, width, height = (int(part) for part in found.groups())
        if min(frames, width, height) < 1:
            raise UserError(f"a shape needs positive frames x width x height, got {text!r}; write it like 32x512x384.")
        shape = cls(frames, round_size(width), round_size(height))
        asked = f"{frames}x{width}x{height}"
        note = "" if str(shape) == asked else f"{asked} rounded to {shape}: sizes are multiples of {SIZE_MULTIPLE}."
        return shape, note

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.width}x{self.height}"

    @property
    def latent_height(self) -> int:
        """Latent rows h."""
        return self.height // CODEC_FACTOR

    @property
    def latent_width(self) -> int:
        """Latent columns w."""
        return self.width // CODEC_FACTOR

    def tokens_per_frame(self, patch_size: int = 2) -> int:
        """S: visual tokens a frame, (h/p)(w/p)."""
        return (self.latent_height // patch_size) * (self.latent_width // patch_size)

    def num_visual_tokens(self, patch_size: int = 2) -> int:
        """T x S."""
        return self.num_frames * self.tokens_per_frame(patch_size)
