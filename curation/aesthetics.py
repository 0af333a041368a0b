"""Aesthetics of a clip: LAION's linear head on CLIP ViT-L/14, and a proxy from plain pixel statistics.

`aesthetics` needs both models from local files and scores about 1 to 10. `aesthetic_proxy` needs none, has a name of its own
and scores 0 to 1, so that nobody mistakes it for the model; it knows nothing of composition or content. Neither drops a clip
on its own: the paper gives no threshold (Open-Sora calls 5.5 fair, 6.5 high, and keeps from 5).

Head: github.com/christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.pth (five linear layers,
nothing between them). Colourfulness: Hasler and Suesstrunk, Measuring colourfulness in natural images, 2003.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from vchitect_fast.curation.clip_model import (
    clip_files,
    load_clip,
    match_tensors,
    pick_device,
    read_tensors,
    weight_file,
)  # fmt: skip
from vchitect_fast.curation.stage import ClipSpan, Sample, Scores, Stage, Want, weights_hash
from vchitect_fast.errors import UserError

CLIP_DIM = 768
# Layers 1, 3 and 5 are dropouts, which do nothing when scoring.
HEAD_LAYERS = {0: (1024, CLIP_DIM), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
PROXY_SHORT_SIDE = 256  # pixels; sharpness is meant at this size
PROXY_SHARPNESS = 100.0  # variance of the Laplacian, grey levels squared, that gives one half
PROXY_COLOURFULNESS = 109.0  # "extremely colourful" in Hasler and Suesstrunk's table
PROXY_CONTRAST = 64.0  # standard deviation in grey levels; 73.6 is that of evenly used grey


@dataclass(frozen=True)
class Aesthetics(Stage):
    """LAION's aesthetic score of the first, the middle and the last frame: mean and min.

    clip     folder of CLIP ViT-L/14 in Hugging Face layout (clip_model.load_clip)
    head     sac+logos+ava1-l14-linearMSE.pth, or a folder that holds it alone
    device   "auto", "cpu", "cuda", "cuda:N"
    """

    clip: str = field(metadata={"key": False})  # where the weights lie decides nothing; their hash is in the key
    head: str = field(metadata={"key": False})
    device: str = field(default="auto", metadata={"key": False})

    name = "aesthetics"
    backend = "clip-vit-l14-laion-linear"
    version = 1
    cost = 3000
    columns = {"score": float, "min": float}  # noqa: RUF012
    main = "score"
    extra = "models"

    def wants(self, span: ClipSpan) -> list[Want]:
        """First, middle and last frame as they are: CLIP's own resize wants the pixels of the video."""
        return [Want(time) for time in span.ends()]

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """Scores about 1 to 10 (the head does not bound them)."""
        if not samples:
            return []
        tower = load_clip(self.clip, pick_device(self.device))
        direction, bias = load_head(self.head)
        frames = [frame for sample in samples for frame in sample.frames]
        rated = (tower.image_embeddings(frames).astype(np.float64) @ direction + bias).tolist()
        scores: list[Scores] = []
        for sample in samples:
            own, rated = rated[: len(sample.frames)], rated[len(sample.frames) :]
            scores.append({"score": sum(own) / len(own), "min": min(own)})
        return scores

    def check(self) -> None:
        """Reads both models once and lets go of them; UserError where one does not fit."""
        pick_device(self.device)
        load_head(self.head)
        dim = load_clip.__wrapped__(self.clip).dim
        if dim != CLIP_DIM:
            raise UserError(
                f"LAION's head reads {CLIP_DIM} numbers a picture (CLIP ViT-L/14), got {dim} from {self.clip}; "
                "give the folder of openai/clip-vit-large-patch14."
            )

    @property
    def weights(self) -> str:
        """Hash of CLIP's config and weights and of the head."""
        return weights_hash(*clip_files(self.clip), weight_file(self.head))


@lru_cache(maxsize=2)
def load_head(place: str) -> tuple[np.ndarray, float]:
    """(fp64 [768], bias): LAION's five linear layers as the one that they are; UserError where a tensor does not fit."""
    file = weight_file(place)
    tensors = read_tensors(file)
    expected: dict[str, tuple[int, ...]] = {}
    for number, shape in HEAD_LAYERS.items():
        expected |= {f"layers.{number}.weight": shape, f"layers.{number}.bias": shape[:1]}
    match_tensors(file, tensors, expected)
    direction, bias = np.ones((1, 1)), np.zeros(1)
    for number in reversed(HEAD_LAYERS):  # from the output down: y = direction (W x + b) + bias
        bias = bias + direction @ tensors[f"layers.{number}.bias"].double().numpy()
        direction = direction @ tensors[f"layers.{number}.weight"].double().numpy()
    return direction[0], float(bias[0])


@dataclass(frozen=True)
class AestheticProxy(Stage):
    """Mean of four plain measures, each 0 to 1, over the first, the middle and the last frame. No model, no taste.

    sharpness       v / (v + 100), v the variance of the 3x3 Laplacian of grey
    colourfulness   Hasler and Suesstrunk's measure / 109, at most 1
    exposure        1 - |mean grey / 127.5 - 1|: 1 at middle grey, 0 at black and white
    contrast        standard deviation of grey / 64, at most 1
    """

    name = "aesthetic_proxy"
    backend = "pixel-statistics"
    version = 1
    cost = 10
    columns = {  # noqa: RUF012
        "score": float, "sharpness": float, "colourfulness": float, "exposure": float, "contrast": float
    }  # fmt: skip
    main = "score"

    def wants(self, span: ClipSpan) -> list[Want]:
        """First, middle and last frame at a short side of 256 pixels; smaller ones are not enlarged."""
        return [Want(time, PROXY_SHORT_SIDE) for time in span.ends()]

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """Every measure as its mean over the frames; score is the mean of the four."""
        scores: list[Scores] = []
        for sample in samples:
            sharpness, colourfulness, exposure, contrast = np.mean([measures(f) for f in sample.frames], 0).tolist()
            scores.append(
                {
                    "score": (sharpness + colourfulness + exposure + contrast) / 4,
                    "sharpness": sharpness,
                    "colourfulness": colourfulness,
                    "exposure": exposure,
                    "contrast": contrast,
                }
            )
        return scores


def measures(frame: np.ndarray) -> tuple[float, float, float, float]:
    """Sharpness, colourfulness, exposure and contrast, each 0 to 1, of a uint8 RGB frame [H,W,3]."""
    rgb = frame.astype(np.float64)
    grey = rgb @ (0.299, 0.587, 0.114)
    edged = np.pad(grey, 1, mode="reflect") if min(grey.shape) > 1 else np.pad(grey, 1, mode="edge")
    around = edged[:-2, 1:-1] + edged[2:, 1:-1] + edged[1:-1, :-2] + edged[1:-1, 2:]
    sharp = float((around - 4 * grey).var())
    red_green, yellow_blue = rgb[..., 0] - rgb[..., 1], (rgb[..., 0] + rgb[..., 1]) / 2 - rgb[..., 2]
    spread = np.hypot(red_green.std(), yellow_blue.std())
    colourful = float(spread + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean()))
    return (
        sharp / (sharp + PROXY_SHARPNESS),
        min(1.0, colourful / PROXY_COLOURFULNESS),
        1 - abs(float(grey.mean()) / 127.5 - 1),
        min(1.0, float(grey.std()) / PROXY_CONTRAST),
    )
