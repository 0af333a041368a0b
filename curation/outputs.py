"""What a curation leaves for people, training and the reports: the verdict on every clip, with the reason.

    clips.parquet       a row a clip: where it is, kept or dropped by which stage and why, every score as "stage.score"
    manifest.parquet    the clips kept, as training reads them (manifest.py), with the same scores
    sources.parquet     a row a video;  quarantine.parquet  what could not be used and why
    stages.json         the cascade: backend, weights, parameters, rules;  cutting.json  the same of shots and stitching
    runs.jsonl          what each run did and how fast

All of it is made anew by every run from the tables in state/ and is not meant to be edited; a rule that changes only changes
this. It computes no score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vchitect_fast.curation.caption_beside import captions_beside
from vchitect_fast.curation.duplicates import NAME as DUPLICATE_STAGE
from vchitect_fast.curation.found import QUARANTINE_COLUMNS, Found
from vchitect_fast.curation.pipeline import VERSION, digest
from vchitect_fast.curation.progress import Progress
from vchitect_fast.curation.settings import DUPLICATE, Settings
from vchitect_fast.curation.stage import ClipSpan, Scores
from vchitect_fast.curation.store import write_table
from vchitect_fast.files import write_text
from vchitect_fast.manifest import write_manifest

QUARANTINE = "quarantine"  # as `dropped_by` of a clip that a stage could not judge
NAMES: dict[str, type] = {
    "clip": str, "video": str, "path": str, "first": int, "last": int, "start": float, "end": float, "num_frames": int,
    "width": int, "height": int, "fps": float, "num_shots": int, "similarity": float, "caption": str, "kept": bool,
    "dropped_by": str, "reason": str,
}  # fmt: skip
DUPLICATE_COLUMNS: dict[str, type] = {"unique": bool, "of": str}


@dataclass(frozen=True)
class Summary:
    """How a run ended, in counts, hours and seconds."""

    num_videos: int
    num_copies: int  # files with the same bytes as another
    num_quarantined: int
    num_clips: int
    num_kept: int
    hours: float  # of clips
    hours_kept: float
    dropped: dict[str, int]  # by stage, in cascade order
    wall_s: float
    cpu_s: float
    scanned_s: float  # video seconds decoded in this run
    scan_cpu_s: float  # processor seconds of that


def write_outputs(
    folder: Path, found: Found, settings: Settings, progress: Progress, *, caption: str, wall_s: float
) -> Summary:
    """Write every file above; UserError when a caption file does not fit its video or the disk refuses."""
    columns = {**NAMES, **_score_columns(settings)}
    rows = clip_rows(found, settings, caption)
    write_table(folder / "clips.parquet", rows, columns)
    write_table(folder / "quarantine.parquet", found.quarantine, QUARANTINE_COLUMNS)
    kinds: dict[str, type] = {
        "path": str, "video": str, "num_bytes": int, "width": int, "height": int, "fps": float, "num_frames": int,
        "seconds": float, "codec": str, "pixel_format": str, "copies": list,
    }  # fmt: skip
    sources = [
        {**asdict(source), "num_frames": source.num_packets, "copies": found.copies[source.video]}
        for source in found.sources.values()
    ]
    write_table(folder / "sources.parquet", sources, kinds)
    write_text(folder / "stages.json", json.dumps(cascade(settings), indent=1) + "\n")
    write_text(folder / "cutting.json", json.dumps(cutting(settings), indent=1) + "\n")
    kept = [row for row in rows if row["kept"]]
    if kept:
        hidden = ("kept", "dropped_by", "reason")
        write_manifest(
            [{n: _plain(row.get(n), kind) for n, kind in columns.items() if n not in hidden} for row in kept],
            folder / "manifest.parquet",
        )
    else:
        (folder / "manifest.parquet").unlink(missing_ok=True)
    summary = _summary(found, rows, settings, progress, wall_s)
    phases, log = [asdict(phase) for phase in progress.phases], folder / "runs.jsonl"
    line = json.dumps({"ended": datetime.now(UTC).isoformat(), **asdict(summary), "phases": phases})
    before = log.read_text(encoding="utf-8") if log.exists() else ""
    write_text(log, f"{before}{line}\n")  # anew, so that a full disk leaves no half line
    return summary


def clip_rows(found: Found, settings: Settings, caption: str) -> list[dict[str, Any]]:
    """Every clip with its verdict, video by video in the order of their paths."""
    unusable = {row["clip"]: f"{row['stage']}: {row['reason']}" for row in found.quarantine if row["clip"]}
    rows = []
    for video, source in sorted(found.sources.items(), key=lambda item: item[1].path):
        clips = found.clips.get(video, [])
        captions = captions_beside(source.path, len(clips), caption)
        for (span, num_shots, similarity), text in zip(clips, captions, strict=True):
            scores = found.scores[span.id]
            dropped_by, reason = verdict(span, scores, settings, unusable)
            rows.append(
                {
                    **{name: getattr(span, name) for name in NAMES if hasattr(span, name)},
                    "clip": span.id, "video": video, "num_shots": num_shots, "similarity": similarity,
                    "caption": scores.get("caption", {}).get("caption") or text,
                    "kept": dropped_by is None, "dropped_by": dropped_by, "reason": reason,
                    **{f"{stage}.{score}": value for stage, several in scores.items() for score, value in several.items()},
                }
            )  # fmt: skip
    return rows


def verdict(
    span: ClipSpan, scores: Mapping[str, Scores], settings: Settings, unusable: Mapping[str, str]
) -> tuple[str | None, str | None]:
    """(None, None) for a clip that stays, else the stage that dropped it and why, in cascade order."""
    for name in cascade_order(settings):
        rules = [rule for rule in (*settings.rules, DUPLICATE) if rule.stage == name]
        if name not in scores:
            if span.id in unusable:
                return QUARANTINE, unusable[span.id]
            continue
        for rule in rules:
            got = scores[name].get(rule.score)
            if not rule.keeps(got):
                if name == DUPLICATE_STAGE:
                    return name, f"near-duplicate of {scores[name]['of']}"
                return name, f"{rule}, got {got:.4g}" if isinstance(got, float) else f"{rule}, got {json.dumps(got)}"
    return None, None


def cascade_order(settings: Settings) -> list[str]:
    """Names of the stages in the order in which they drop clips; duplicates are found between signals and frames."""
    return [stage["name"] for stage in cascade(settings)]


def cascade(settings: Settings) -> list[dict[str, Any]]:
    """What stages.json holds."""
    keys, facts = settings.keys(), []
    for stage in (*settings.signal_stages, None, *settings.frame_stages, *settings.caption_stages):
        if stage is not None:
            facts.append(
                {
                    "name": stage.name, "backend": stage.backend, "version": stage.version, "weights": stage.weights,
                    "parameters": stage.parameters(), "key": keys[stage.name], "main": stage.main,
                    "rules": {r.score: str(r).split(" ", 1)[1] for r in settings.rules if r.stage == stage.name},
                    "columns": {name: kind.__name__ for name, kind in stage.columns.items()},
                }
            )  # fmt: skip
        elif "signature" in keys:
            facts.append(
                {
                    "name": DUPLICATE_STAGE, "backend": "layout-hash", "version": 1, "weights": "", "parameters": {},
                    "key": keys["signature"], "main": "unique", "rules": {"unique": "== true"},
                    "columns": {name: kind.__name__ for name, kind in DUPLICATE_COLUMNS.items()},
                }
            )  # fmt: skip
    return facts


def cutting(settings: Settings) -> list[dict[str, Any]]:
    """What cutting.json holds: how videos became clips, in the form of stages.json."""
    weights = {"shots": settings.shot_weights(), "stitch": settings.stitch_weights()}
    facts = []
    for name, part in (("shots", settings.shots), ("stitch", settings.stitch)):
        parameters = {key: value for key, value in asdict(part).items() if key not in ("backend", "weights", "device")}
        facts.append(
            {
                "name": name, "backend": part.backend, "version": VERSION, "weights": weights[name], "parameters": parameters,
                "key": digest(part.backend, weights[name], parameters), "main": "", "rules": {}, "columns": {},
            }
        )  # fmt: skip
    return facts


def _score_columns(settings: Settings) -> dict[str, type]:
    columns = {f"{s.name}.{score}": kind for s in settings.stages for score, kind in s.columns.items()}
    return columns | {f"{DUPLICATE_STAGE}.{score}": kind for score, kind in DUPLICATE_COLUMNS.items()}


def _plain(value: Any, kind: type) -> Any:
    """As a manifest holds it: lists as JSON text, so that a column has one type."""
    return json.dumps(value) if kind in (list, dict) and value is not None else value


def _summary(
    found: Found, rows: Sequence[Mapping[str, Any]], settings: Settings, progress: Progress, wall_s: float
) -> Summary:
    order = [*cascade_order(settings), QUARANTINE]
    by_stage = {name: sum(row["dropped_by"] == name for row in rows) for name in order}
    scan = [phase for phase in progress.phases if phase.name == "scan"]
    return Summary(
        num_videos=len(found.sources),
        num_copies=sum(len(paths) for paths in found.copies.values()),
        num_quarantined=len(found.quarantine),
        num_clips=len(rows),
        num_kept=sum(row["kept"] for row in rows),
        hours=sum(row["end"] - row["start"] for row in rows) / 3600,
        hours_kept=sum(row["end"] - row["start"] for row in rows if row["kept"]) / 3600,
        dropped={name: count for name, count in by_stage.items() if count},
        wall_s=wall_s,
        cpu_s=sum(phase.cpu_s for phase in progress.phases),
        scanned_s=sum(phase.amount for phase in scan),
        scan_cpu_s=sum(phase.cpu_s for phase in scan),
    )
