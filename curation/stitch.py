"""Event stitching: neighbouring shots that show the same event become one clip. Then clips too long are cut evenly.

Two shots belong to one event when the embeddings of the last 8 frames of the first and the first 8 frames of the second have
a cosine above the threshold (the paper: ViCLIP, 0.6). Panda-70M's 0.6 is a distance and means something else (cosine 0.82).
The default embedding is `layout`, a description of colour and motion without weights, under its own name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vchitect_fast.curation.probe import Source
from vchitect_fast.curation.shots import Shot
from vchitect_fast.curation.signals import LAYOUT, Signals
from vchitect_fast.curation.stage import ClipSpan, Want
from vchitect_fast.errors import UserError, unknown_name

BACKENDS = ("layout", "clip", "viclip", "none")


@dataclass(frozen=True)
class StitchSettings:
    """Parameters of event stitching.

    backend      "layout", "clip", "viclip", or "none": every shot is a clip
    weights      folder of the model, for "clip" and "viclip"
    similarity   least cosine of one event
    max_seconds  longer clips are cut into equal parts (s)
    device       "auto", "cpu", "cuda"; not part of the key
    """

    backend: str = "layout"
    weights: str = ""
    similarity: float = 0.6
    max_seconds: float = 60.0
    device: str = field(default="auto", metadata={"key": False})

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise unknown_name("stitch.backend", self.backend, BACKENDS)
        if self.backend in ("clip", "viclip") and not self.weights:
            raise UserError(f"stitch.backend={self.backend} needs stitch.weights, got none; give the model's folder.")
        if not self.max_seconds > 0:
            raise UserError(f"stitch.max_seconds must be above 0, got {self.max_seconds}; the default is 60.")


@dataclass(frozen=True)
class Event:
    """A clip in the making: its frames, the shots it was stitched from, and the likeness to the shot before it."""

    shot: Shot
    num_shots: int
    similarity: float | None


Embed = Callable[[int, int], np.ndarray]  # frames first..last -> unit vector


def stitch(shots: list[Shot], embed: Embed | None, num_frames: int, settings: StitchSettings) -> list[Event]:
    """Shots, in order, joined into events; `embed` describes a run of at most `num_frames` frames (None: nothing joins)."""
    events: list[Event] = []
    for number, shot in enumerate(shots):
        similarity = None
        if events and embed is not None:
            before = shots[number - 1]
            tail = embed(max(before.first, before.last - num_frames + 1), before.last)
            head = embed(shot.first, min(shot.last, shot.first + num_frames - 1))
            similarity = float(tail @ head)
        if similarity is not None and similarity > settings.similarity:
            joined = events[-1]
            whole = Shot(joined.shot.first, shot.last, joined.shot.start, shot.end)
            events[-1] = Event(whole, joined.num_shots + 1, joined.similarity)
        else:
            events.append(Event(shot, 1, similarity))
    return events


def cut_long(events: list[Event], times: np.ndarray, max_seconds: float) -> list[Event]:
    """Events longer than `max_seconds` in parts, none longer than that unless it is one frame; of equal numbers of frames where that is possible."""
    found: list[Event] = []
    for event in events:
        needed = max(1, int(np.ceil(event.shot.seconds / max_seconds - 1e-9)))
        for num_parts in (needed, needed + 1):  # one more where whole frames do not fit
            parts = _parts(event.shot, times, num_parts) if num_parts <= event.shot.num_frames else []
            if parts and max(part.seconds for part in parts) <= max_seconds + 1e-9:
                break
        else:
            parts = _full_parts(event.shot, times, max_seconds)
        found += [Event(part, event.num_shots, event.similarity) for part in parts]
    return found


def _parts(shot: Shot, times: np.ndarray, num_parts: int) -> list[Shot]:
    edges = np.linspace(shot.first, shot.last + 1, num_parts + 1).round().astype(int)
    return [
        Shot(int(a), int(b) - 1, float(times[a]), float(times[b]) if b <= shot.last else shot.end)
        for a, b in itertools.pairwise(edges)
    ]


def _full_parts(shot: Shot, times: np.ndarray, max_seconds: float) -> list[Shot]:
    """One part after the other as long as allowed: for frames shown for very different times."""
    ends = np.append(times[shot.first + 1 : shot.last + 1], shot.end)
    parts, first = [], shot.first
    while first <= shot.last:
        stop = shot.first + int(np.searchsorted(ends, times[first] + max_seconds + 1e-9, "right"))
        stop = max(stop, first + 1)
        parts.append(Shot(first, stop - 1, float(times[first]), float(ends[stop - 1 - shot.first])))
        first = stop
    return parts


def spans_of(source: Source, events: list[Event]) -> list[ClipSpan]:
    """The clips of a video, in order."""
    return [
        ClipSpan(
            f"{source.video}-{event.shot.first}-{event.shot.last}", source.path, event.shot.first, event.shot.last,
            event.shot.start, event.shot.end, source.width, source.height, source.fps,
        )
        for event in events
    ]  # fmt: skip


def embedding_of(source: Source, signals: Signals, settings: StitchSettings) -> tuple[Embed | None, int]:
    """How runs of frames of this video are described, and how many frames a run has."""
    if settings.backend == "none":
        return None, 0
    from vchitect_fast.curation.embedding import ClipEmbedding, LayoutEmbedding, ViclipEmbedding

    if settings.backend == "layout":
        layout = LayoutEmbedding()
        pictures = signals.layout.reshape(-1, LAYOUT, LAYOUT, 3)
        return (lambda first, last: layout.embed(list(pictures[first : last + 1]))), layout.num_frames
    from vchitect_fast.curation.frames import clip_frames

    model = {"clip": ClipEmbedding, "viclip": ViclipEmbedding}[settings.backend](settings.weights, settings.device)

    def embed(first: int, last: int) -> np.ndarray:
        times = signals.time
        end = float(times[last + 1]) if last + 1 < len(times) else float(times[last]) + 1 / source.fps
        span = ClipSpan("", source.path, first, last, float(times[first]), end, source.width, source.height, source.fps)
        half = 0.25 / source.fps
        return model.embed(
            clip_frames(span, [Want(float(t) + half, model.short_side) for t in times[first : last + 1]])
        )

    return embed, model.num_frames
