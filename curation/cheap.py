"""The stages that read signals and no picture: length, static share, looks, motion by DIS optical flow, signature.

They cost nothing beside the decode that they share, so they come first in the cascade.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vchitect_fast.curation.motion_rule import COLUMNS, dynamic_degree
from vchitect_fast.curation.signals import LAYOUT, THUMB, Signals
from vchitect_fast.curation.signals import VERSION as SIGNALS
from vchitect_fast.curation.stage import ClipSpan, Sample, Scores, SignalStage


def _signals(sample: Sample) -> Signals:
    assert sample.signals is not None, "a SignalStage gets the clip's signals"
    return sample.signals


@dataclass(frozen=True)
class Length(SignalStage):
    """How long a clip is (s)."""

    name: ClassVar[str] = "length"
    backend: ClassVar[str] = "frames"
    version: ClassVar[int] = 1
    cost: ClassVar[float] = 0.0
    columns: ClassVar[Mapping[str, type]] = {"seconds": float}
    main: ClassVar[str] = "seconds"
    rules: ClassVar[Mapping[str, str]] = {"seconds": ">= 1"}

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """Seconds."""
        return [{"seconds": sample.span.seconds} for sample in samples]


@dataclass(frozen=True)
class Static(SignalStage):
    """The paper's static filter: a frame is static when its mean absolute grey difference to the one before is small.

    difference  below it a frame is static, 0..255 (paper: 0.9); clips with less than 30 % static frames stay
    """

    difference: float = 0.9
    name: ClassVar[str] = "static"
    backend: ClassVar[str] = "luma"
    version: ClassVar[int] = SIGNALS
    cost: ClassVar[float] = 0.1
    columns: ClassVar[Mapping[str, type]] = {"share": float}
    main: ClassVar[str] = "share"
    rules: ClassVar[Mapping[str, str]] = {"share": "< 0.3"}

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """Share of static frames, 0..1; 1 for a clip of one frame."""
        # The clip's first frame is compared with a frame outside of it, so it does not count.
        changes = [_signals(sample).luma_change[1:] for sample in samples]
        return [{"share": float((c < self.difference).mean()) if len(c) else 1.0} for c in changes]


@dataclass(frozen=True)
class Looks(SignalStage):
    """Plain facts of the picture, and two flags: near black and white, and a shaking camera.

    monochrome_below  mean saturation, 0..255
    shaky_above       mean change of the camera's shift from one sampled pair to the next, px at a short side of 128
    """

    monochrome_below: float = 10.0
    shaky_above: float = 2.0
    name: ClassVar[str] = "looks"
    backend: ClassVar[str] = "thumb"
    version: ClassVar[int] = SIGNALS
    cost: ClassVar[float] = 0.2
    columns: ClassVar[Mapping[str, type]] = {
        "brightness": float, "contrast": float, "saturation": float, "monochrome": bool, "shake": float, "shaky": bool,
    }  # fmt: skip
    main: ClassVar[str] = "brightness"

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """Means over the clip; shake is null for fewer than three sampled frames."""
        found: list[Scores] = []
        for sample in samples:
            signals = _signals(sample)
            pairs = _pairs_inside(signals, sample.span)
            shift = np.stack([signals.shift_x[pairs], signals.shift_y[pairs]], 1)
            shake = float(np.linalg.norm(np.diff(shift, axis=0), axis=1).mean()) if len(shift) > 1 else None
            saturation = float(signals.saturation.mean())
            found.append(
                {
                    "brightness": float(signals.brightness.mean()),
                    "contrast": float(signals.contrast.mean()),
                    "saturation": saturation,
                    "monochrome": saturation < self.monochrome_below,
                    "shake": shake,
                    "shaky": shake is not None and shake > self.shaky_above,
                }
            )
        return found


@dataclass(frozen=True)
class DisMotion(SignalStage):
    """VBench's dynamic degree on OpenCV's DIS optical flow instead of RAFT's; not calibrated against RAFT."""

    name: ClassVar[str] = "motion"
    backend: ClassVar[str] = "dis"
    version: ClassVar[int] = SIGNALS
    cost: ClassVar[float] = 0.3
    columns: ClassVar[Mapping[str, type]] = COLUMNS
    main: ClassVar[str] = "degree"
    rules: ClassVar[Mapping[str, str]] = {"dynamic": "== true"}

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """`dynamic_degree` of the pairs of sampled frames inside the clip."""
        found = []
        for sample in samples:
            signals = _signals(sample)
            flow = signals.flow[_pairs_inside(signals, sample.span)]
            found.append(dynamic_degree(flow, len(flow) + 1, THUMB))
        return found


def _pairs_inside(signals: Signals, span: ClipSpan) -> np.ndarray:
    """bool [n]: frames whose flow comes from a sampled frame that is in the clip too."""
    every_s = max(1, round(span.fps / 8)) / span.fps
    return ~np.isnan(signals.flow) & (signals.time - every_s >= span.start - 0.25 / span.fps)


@dataclass(frozen=True)
class Signature(SignalStage):
    """What near-duplicates are found by (duplicates.py): at five times, which of 8x8 cells are brighter than the median."""

    name: ClassVar[str] = "signature"
    backend: ClassVar[str] = "layout-hash"
    version: ClassVar[int] = SIGNALS
    cost: ClassVar[float] = 0.4
    columns: ClassVar[Mapping[str, type]] = {"bits": str}
    main: ClassVar[str] = "bits"

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """80 hex digits: 64 bits at each of five times."""
        found: list[Scores] = []
        for sample in samples:
            layout = _signals(sample).layout
            at = [int((k + 0.5) * len(layout) / 5) for k in range(5)]
            grey = layout[at].reshape(5, LAYOUT * LAYOUT, 3).astype(np.float32) @ [0.299, 0.587, 0.114]
            bits = grey > np.median(grey, axis=1, keepdims=True)
            found.append({"bits": np.packbits(bits).tobytes().hex()})
        return found
