"""Tasks: the units of work that engines run in any process of any machine. They read videos and return values; no state.

    ProbeTask   a file       -> Source
    ScanTask    a chunk      -> its signals, as bytes
    ClipTask    a video      -> its clips, and the scores of the stages that read signals
    JudgeTask   some clips   -> the scores of the stages that look at frames, each stage only on what the rules left, and
                                the clips that gave none, with the reason

A task that fails for reasons in its input raises BadVideo, and trying again is no use. `split` cuts a task that failed
otherwise into smaller ones, so that one bad clip does not take its neighbours along.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vchitect_fast.curation.frames import BadVideo, bounded_memory, clip_frames
from vchitect_fast.curation.probe import Source, file_stamp, probe
from vchitect_fast.curation.rules import Rule
from vchitect_fast.curation.shots import ShotSettings, find_shots
from vchitect_fast.curation.signals import Signals, scan, whole
from vchitect_fast.curation.stage import ClipSpan, Sample, Scores, Stage
from vchitect_fast.curation.stitch import StitchSettings, cut_long, embedding_of, spans_of, stitch
from vchitect_fast.profiling.span import span as stretch  # a span is a ClipSpan here

FRAME_BYTES = 256 << 20  # of decoded frames that one batch of clips may hold


@dataclass(frozen=True)
class ProbeTask:
    """What a file is; returns (stamp, Source). The stamp is taken first: a file that grows meanwhile is probed again."""

    path: str

    def run(self) -> tuple[str, Source]:
        """Raises BadVideo."""
        try:
            stamp = str(file_stamp(self.path))
            # Reading a pipe or a device could wait, or go on, for ever.
            if "://" not in self.path and not stat.S_ISREG(os.stat(self.path).st_mode):
                raise BadVideo("it is no file but a folder, a pipe or a device")
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise BadVideo(f"cannot read the file ({getattr(error, 'strerror', None) or error})") from None
        with bounded_memory(), stretch("curate/probe"):
            return stamp, probe(self.path)

    def split(self) -> list[Any]:
        """A file is the smallest unit."""
        return []


@dataclass(frozen=True)
class ScanTask:
    """One decode of a chunk; returns the Parquet bytes of its Signals."""

    source: Source
    chunk: int
    transnet: bool

    def run(self) -> bytes:
        """Raises BadVideo."""
        detector = None
        if self.transnet:
            from vchitect_fast.curation.transnet import TransNet

            detector = TransNet()
        with bounded_memory():
            return scan(self.source, self.chunk, transnet=detector).to_bytes()

    def split(self) -> list[Any]:
        """A chunk is the smallest unit."""
        return []


@dataclass(frozen=True)
class Clips:
    """The clips of a video, with how each came about and its scores by stage."""

    spans: list[ClipSpan]
    num_shots: list[int]
    similarity: list[float | None]
    scores: dict[str, list[Scores]]


@dataclass(frozen=True)
class ClipTask:
    """Shots, events, clips of a video, and what its signals say of each clip."""

    source: Source
    signals: tuple[bytes, ...] = field(repr=False)  # of every chunk
    shots: ShotSettings
    stitching: StitchSettings
    stages: tuple[Stage, ...]  # SignalStages

    def run(self) -> Clips:
        """Raises BadVideo when too few frames decoded."""
        signals = whole(self.source, [Signals.from_bytes(part) for part in self.signals])
        with stretch("curate/shots"):
            shots = find_shots(signals, self.source.fps, self.shots)
        with stretch("curate/stitch"):
            embed, num_frames = embedding_of(self.source, signals, self.stitching)
            events = cut_long(
                stitch(shots, embed, num_frames, self.stitching), signals.time, self.stitching.max_seconds
            )
        spans = spans_of(self.source, events)
        samples = [Sample(span, [], {}, signals[span.first : span.last + 1]) for span in spans]
        scores = {}
        for stage in self.stages:
            with stretch(f"curate/{stage.name}"):
                scores[stage.name] = stage.score(samples)
        return Clips(spans, [e.num_shots for e in events], [e.similarity for e in events], scores)

    def split(self) -> list[Any]:
        """A video is the smallest unit here."""
        return []


@dataclass(frozen=True)
class Judged:
    """What a JudgeTask found out that was not known."""

    scores: dict[str, dict[str, Scores]]  # by clip and stage
    failed: dict[str, str]  # clip -> why it has no more


@dataclass(frozen=True)
class JudgeTask:
    """Frame stages on clips, cheapest first; the frames that all of them want of a clip are decoded once.

    `known` has the scores that exist already, by clip and stage; those are not computed again, and the rules apply to them
    too.
    """

    spans: tuple[ClipSpan, ...]
    stages: tuple[Stage, ...]
    rules: tuple[Rule, ...]
    known: Mapping[str, Mapping[str, Scores]]

    def run(self) -> Judged:
        """Raises what a stage raises. A clip whose frames do not decode, or for which a stage has an error, is `failed`."""
        new: dict[str, dict[str, Scores]] = {span.id: {} for span in self.spans}
        failed: dict[str, str] = {}
        frames: dict[str, dict[str, list[np.ndarray]]] = {}
        for span in self.spans:
            try:
                frames[span.id] = self._frames(span)
            except BadVideo as error:
                failed[span.id] = str(error)
        for stage in self.stages:
            left = [span for span in self.spans if span.id not in failed and self._reaches(stage, span, new[span.id])]
            todo = [span for span in left if stage.name not in self.known[span.id]]
            samples = [
                Sample(span, frames[span.id][stage.name], {n: {**self.known[span.id], **new[span.id]}.get(n, {}) for n in stage.reads})
                for span in todo
            ]  # fmt: skip
            with stretch(f"curate/{stage.name}"):
                results = stage.results(samples) if samples else []
            for span, result in zip(todo, results, strict=True):
                if isinstance(result, Exception):
                    failed[span.id] = f"{type(result).__name__}: {result}"
                else:
                    new[span.id][stage.name] = result
        return Judged(new, failed)

    def _reaches(self, stage: Stage, span: ClipSpan, new: Mapping[str, Scores]) -> bool:
        """Whether the rules of the stages before this one keep the clip."""
        scores = {**self.known[span.id], **new}
        before = [other.name for other in self.stages[: self.stages.index(stage)]]
        return all(rule.keeps(scores[rule.stage].get(rule.score)) for rule in self.rules if rule.stage in before)

    def _frames(self, span: ClipSpan) -> dict[str, list[np.ndarray]]:
        """Stage name -> its frames, all from one decode."""
        wants = {s.name: s.wants(span) for s in self.stages if s.name not in self.known[span.id]}
        with bounded_memory():
            pictures = iter(clip_frames(span, [want for several in wants.values() for want in several]))
        return {name: [next(pictures) for _ in several] for name, several in wants.items()}

    def split(self) -> list[Any]:
        """One task a clip."""
        if len(self.spans) == 1:
            return []
        return [JudgeTask((span,), self.stages, self.rules, {span.id: self.known[span.id]}) for span in self.spans]


def batches(spans: Sequence[ClipSpan], stages: Sequence[Stage], size: int) -> list[tuple[ClipSpan, ...]]:
    """Clips in order, at most `size` together and no more frames than FRAME_BYTES (a single clip may exceed it)."""
    found: list[list[ClipSpan]] = []
    held = 0
    for span in spans:
        need = sum(_bytes(span, want.short_side) for stage in stages for want in stage.wants(span))
        if found and len(found[-1]) < size and held + need <= FRAME_BYTES:
            found[-1].append(span)
            held += need
        else:
            found.append([span])
            held = need
    return [tuple(batch) for batch in found]


def _bytes(span: ClipSpan, short_side: int | None) -> int:
    scale = min(1.0, (short_side or span.height) / min(span.width, span.height)) if short_side else 1.0
    return int(3 * span.width * span.height * scale * scale)
