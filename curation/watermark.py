"""Watermarks: LAION's EfficientNet-B3 classifier on the first, the middle and the last frame of a clip.

A clip is watermarked when any of the three frames is. The weights come from a local file (nothing is downloaded), and every
tensor must be one of the original's; there is no stand-in without them: what a plain rule could find, text.py reads.

github.com/LAION-AI/LAION-5B-WatermarkDetection: both sides to 256 pixels whatever the aspect, ImageNet's mean and std,
softmax whose index 0 is "watermark", 1 "clear".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from vchitect_fast.curation.clip_model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    in_chunks,
    match_tensors,
    normalised,
    pick_device,
    read_tensors,
    weight_file,
)  # fmt: skip
from vchitect_fast.curation.stage import ClipSpan, Sample, Scores, Stage, Want, weights_hash
from vchitect_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 256  # pixels a side


@dataclass(frozen=True)
class Watermark(Stage):
    """Probability of a watermark by LAION's detector.

    model    watermark_model_v1.pt (a state dict, bare or under "weights"), or a folder that holds it alone
    device   "auto", "cpu", "cuda", "cuda:N"
    """

    model: str = field(metadata={"key": False})  # its hash is in the key
    device: str = field(default="auto", metadata={"key": False})

    name = "watermark"
    backend = "laion-efficientnet-b3"
    version = 1
    cost = 400
    columns = {"probability": float, "probabilities": list, "watermarked": bool}  # noqa: RUF012
    main = "probability"
    rules = {"watermarked": "== false"}  # noqa: RUF012
    extra = "models"

    def wants(self, span: ClipSpan) -> list[Want]:
        """First, middle and last frame as they are: the original resizes the pixels of the picture."""
        return [Want(time) for time in span.ends()]

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """probabilities: one a frame; probability: the largest; watermarked: whether in any it exceeds that of "clear"."""
        if not samples:
            return []
        model = load_watermark_model(self.model, pick_device(self.device))
        frames = [frame for sample in samples for frame in sample.frames]
        rated = in_chunks(lambda part: model(part).softmax(1), watermark_pixels(frames), pick_device(self.device))
        scores: list[Scores] = []
        for sample in samples:
            own, rated = rated[: len(sample.frames)], rated[len(sample.frames) :]
            scores.append(
                {
                    "probability": float(own[:, 0].max()),
                    "probabilities": own[:, 0].tolist(),
                    "watermarked": bool((own[:, 0] > own[:, 1]).any()),
                }
            )
        return scores

    def check(self) -> None:
        """Reads the model once and lets go of it; UserError where it does not fit."""
        pick_device(self.device)
        load_watermark_model.__wrapped__(self.model, "cpu")

    @property
    def weights(self) -> str:
        """Hash of the file."""
        return weights_hash(weight_file(self.model))


@lru_cache(maxsize=2)
def load_watermark_model(place: str, device: str = "cpu") -> Any:
    """The classifier [n,3,256,256] -> logits [n,2], once a process; UserError where a tensor is missing or unknown."""
    file = weight_file(place)
    tensors = read_tensors(file, inside="weights")
    try:
        import timm
    except ImportError:
        raise UserError(
            "the watermark stage needs timm (it builds EfficientNet-B3); pip install 'vchitect-fast[models]'."
        ) from None
    from torch import nn

    # The original asks for efficientnet_b3a, today's alias of this name.
    model = timm.create_model("efficientnet_b3", pretrained=False, num_classes=2)
    model.classifier = nn.Sequential(
        nn.Linear(1536, 625), nn.ReLU(), nn.Dropout(0.3), nn.Linear(625, 256), nn.ReLU(), nn.Linear(256, 2)
    )
    match_tensors(file, tensors, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    model.load_state_dict(tensors, strict=True)
    return model.float().eval().to(device)


def watermark_pixels(frames: Sequence[np.ndarray]) -> Tensor:
    """fp32 [n,3,256,256] of uint8 RGB frames, as torchvision's Resize((256, 256)), ToTensor and Normalize give it."""
    from PIL import Image

    resized = [np.asarray(Image.fromarray(f).resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for f in frames]
    return normalised(resized, IMAGENET_MEAN, IMAGENET_STD)
