"""A curation folder as the pipeline leaves it, for the tests of what reads one: real clips, real scores, a real cascade.

Clips: the six shots of bikes.mp4, and thirds of bigbuckbunny.mp4 and of the two carphones; fifteen in all. Scores are computed
from their frames by a few lines of numpy here (they are no stage of ours: only the files' layout matters). Captions are made
up. Which clip is dropped, by what and why, follows from the scores by Rule.keeps in plain Python, never by SQL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from real_video import bikes, bikes_clips

from vchitect_fast.curation.frames import clip_frames
from vchitect_fast.curation.rules import Rule
from vchitect_fast.curation.stage import ClipSpan, Want

Row = dict[str, Any]

STAGES: list[Row] = [
    {
        "name": "static", "backend": "numpy", "version": 1, "weights": "", "parameters": {"threshold": 0.9},
        "key": "00000000000000a1", "main": "share", "rules": {"share": "< 0.3"},
        "columns": {"share": "float", "difference": "float"},
    },
    {
        "name": "tone", "backend": "numpy", "version": 2, "weights": "", "parameters": {"num_frames": 3},
        "key": "00000000000000a2", "main": "mean", "rules": {"mean": "> 80", "is_dark": "== false"},
        "columns": {"mean": "float", "is_dark": "bool", "each": "list"},
    },
    {
        "name": "aesthetics_proxy", "backend": "sharpness", "version": 1, "weights": "", "parameters": {"short_side": 72},
        "key": "00000000000000a3", "main": "score", "rules": {"score": "> 9"}, "columns": {"score": "float"},
    },
    {
        "name": "captions", "backend": "made up", "version": 1, "weights": "0123456789abcdef", "parameters": {},
        "key": "00000000000000a4", "main": "num_words", "rules": {}, "columns": {"text": "str", "num_words": "int"},
    },
]  # fmt: skip
TYPES = {
    "float": pyarrow.float64(), "int": pyarrow.int64(), "bool": pyarrow.bool_(), "str": pyarrow.string(),
    "list": pyarrow.list_(pyarrow.float64()),
}  # fmt: skip
BASE = pyarrow.schema(
    [(name, pyarrow.string()) for name in ("clip", "video", "path", "caption", "dropped_by", "reason")]
    + [(name, pyarrow.int64()) for name in ("first", "last", "num_frames", "width", "height")]
    + [(name, pyarrow.float64()) for name in ("start", "end", "fps")]
    + [("kept", pyarrow.bool_())]
)
CAPTIONS = (
    "A cyclist rides\nalong a street.",
    "",
    'Two people, "talking" & waving.',
    "الدراجة \u202eتسير",
    "A fat rabbit.",
)


@cache
def spans() -> tuple[ClipSpan, ...]:
    """The fifteen clips."""
    found = [("bikes", str(bikes()), round(25 * c.start), round(25 * c.end) - 1, 640, 272, 25.0) for c in bikes_clips()]
    for name, num, width, height, fps in (
        ("bigbuckbunny", 132, 1280, 720, 25.0), ("carphone_pristine", 120, 176, 144, 30.0), ("carphone_distorted", 120, 176, 144, 30.0),
    ):  # fmt: skip
        path, third = str(bikes().with_name(f"{name}.mp4")), num // 3
        found += [(name, path, k * third, (k + 1) * third - 1, width, height, fps) for k in range(3)]
    return tuple(
        ClipSpan(f"{name}-{first}-{last}", path, first, last, first / fps, (last + 1) / fps, width, height, fps)
        for name, path, first, last, width, height, fps in found
    )


@cache
def scores(span: ClipSpan) -> dict[str, Any]:
    """All scores of a clip by "stage.score", from its frames at short side 72."""
    frames = clip_frames(span, [Want(span.start + (k + 0.5) / span.fps, 72) for k in range(span.num_frames)])
    grey = np.stack([frame @ np.array([0.299, 0.587, 0.114]) for frame in frames])
    differences = np.abs(np.diff(grey, axis=0)).mean((1, 2))
    each = [float(grey[k].mean()) for k in (0, len(grey) // 2, -1)]
    sharpness = float(np.abs(np.diff(grey[len(grey) // 2], axis=1)).mean())
    caption = CAPTIONS[(span.first + span.num_frames) % len(CAPTIONS)]
    return {
        "static.share": float((differences < 0.9).mean()), "static.difference": float(differences.mean()),
        "tone.mean": float(np.mean(each)), "tone.is_dark": float(np.mean(each)) < 90, "tone.each": each,
        "aesthetics_proxy.score": sharpness, "captions.text": caption, "captions.num_words": len(caption.split()),
    }  # fmt: skip


def judge(all_scores: dict[str, Any], stages: Iterable[Row]) -> tuple[dict[str, Any], str | None, str | None]:
    """The scores that a cascade would have computed, and what dropped the clip, and why."""
    known: dict[str, Any] = {}
    for stage in stages:
        known |= {f"{stage['name']}.{score}": all_scores[f"{stage['name']}.{score}"] for score in stage["columns"]}
        for score, text in stage["rules"].items():
            rule = Rule.parse(stage["name"], score, text)
            if not rule.keeps(value := known[f"{stage['name']}.{score}"]):
                return known, stage["name"], f"{rule}, got {value}"
    return known, None, None


def clip_rows(stages: list[Row] = STAGES, paths: dict[str, str] | None = None) -> list[Row]:
    """Rows of clips.parquet; `paths` puts other paths in the place of a video's, by its name."""
    rows = []
    for span in spans():
        known, dropped_by, reason = judge(scores(span), stages)
        video = span.id.split("-")[0]
        rows.append(
            {
                "clip": span.id, "video": video, "path": (paths or {}).get(video, span.path), "first": span.first,
                "last": span.last, "start": span.start, "end": span.end, "num_frames": span.num_frames, "width": span.width,
                "height": span.height, "fps": span.fps, "caption": known.get("captions.text", ""),
                "kept": dropped_by is None, "dropped_by": dropped_by, "reason": reason, **known,
            }
        )  # fmt: skip
    return rows


def write_folder(
    folder: Path, rows: list[Row] | None = None, stages: list[Row] = STAGES, quarantine: list[Row] | None = None
) -> Path:
    """Write the four files of a curation folder; without `quarantine` there is no such file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = clip_rows(stages) if rows is None else rows
    schema = BASE
    for stage in stages:
        for score, kind in stage["columns"].items():
            schema = schema.append(pyarrow.field(f"{stage['name']}.{score}", TYPES[kind]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / "clips.parquet")
    (folder / "stages.json").write_text(json.dumps(stages))
    videos = {row["video"]: row for row in rows}
    sources = [
        {
            "video": video, "path": row["path"], "num_bytes": 1000, "width": row["width"], "height": row["height"],
            "fps": row["fps"], "num_frames": row["last"] + 1, "seconds": row["end"], "codec": "h264",
        }
        for video, row in videos.items()
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(sources), folder / "sources.parquet")
    if quarantine is not None:
        columns = ("video", "path", "clip", "stage", "reason")
        table = pyarrow.table(
            {name: pyarrow.array([q.get(name) for q in quarantine], pyarrow.string()) for name in columns}
        )
        attempts = pyarrow.array([q.get("attempts", 1) for q in quarantine], pyarrow.int64())
        pyarrow.parquet.write_table(table.append_column("attempts", attempts), folder / "quarantine.parquet")
    return folder
