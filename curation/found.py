"""What a curation knows of its videos, between the pipeline that finds it out and the outputs that write it down.

Also the columns of the tables in which the store keeps it. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vchitect_fast.curation.probe import Source
from vchitect_fast.curation.stage import ClipSpan, Scores

SOURCE_COLUMNS: dict[str, type] = {
    "path": str, "stamp": str, "video": str, "num_bytes": int, "width": int, "height": int, "fps": float,
    "num_packets": int, "seconds": float, "codec": str, "pixel_format": str, "chunks": list,
}  # fmt: skip
CLIP_COLUMNS: dict[str, type] = {
    "video": str, "clip": str, "first": int, "last": int, "start": float, "end": float, "num_shots": int, "similarity": float,
}  # fmt: skip
QUARANTINE_COLUMNS: dict[str, type] = {
    "path": str, "video": str, "clip": str, "stage": str, "key": str, "reason": str, "attempts": int,
}  # fmt: skip


@dataclass
class Found:
    """All that a curation knows of its videos: what outputs.py writes down."""

    sources: dict[str, Source] = field(default_factory=dict)  # video id -> the first file with these bytes
    copies: dict[str, list[str]] = field(default_factory=dict)  # video id -> other files with the same bytes
    clips: dict[str, list[tuple[ClipSpan, int, float | None]]] = field(
        default_factory=dict
    )  # video -> span, shots, likeness
    scores: dict[str, dict[str, Scores]] = field(default_factory=dict)  # clip id -> stage -> scores
    quarantine: list[dict[str, Any]] = field(default_factory=list)

    def spans(self) -> Iterator[ClipSpan]:
        """Every clip, video by video."""
        for clips in self.clips.values():
            yield from (span for span, _, _ in clips)
