"""The pipeline: files -> sources -> signals -> clips -> scores, cheapest first, each stage only on what is left.

    probe    every file is read once                           a task a file
    scan     every video is decoded once                       a task a chunk
    clips    shots, events, and the scores that need no picture; then near-duplicates over the whole set
    judge    the stages that look at frames, on survivors      a task a batch of clips
    caption  the captioner, on what every other stage left     likewise, one at a time

What is in the store is not computed again. A task that fails is retried by the engine and then named in quarantine, and the
run goes on. It decides nothing about the outcome's files: that is outputs.py.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from vchitect_fast.curation import signals
from vchitect_fast.curation.duplicates import duplicates
from vchitect_fast.curation.engines import Engine, Outcome
from vchitect_fast.curation.found import CLIP_COLUMNS, QUARANTINE_COLUMNS, SOURCE_COLUMNS, Found
from vchitect_fast.curation.inputs import stamp_of
from vchitect_fast.curation.probe import Source
from vchitect_fast.curation.progress import Progress
from vchitect_fast.curation.settings import DUPLICATE, Settings, on_gpu
from vchitect_fast.curation.stage import ClipSpan, Scores, Stage
from vchitect_fast.curation.store import Store
from vchitect_fast.curation.tasks import Clips, ClipTask, Judged, JudgeTask, ProbeTask, ScanTask, batches

VERSION = 1  # of shots and stitching: raised whenever the same signals give other clips
BATCH = 16  # clips a judge task
BARREN = 2  # batches without a single caption, one after the other, after which the captioner is left alone
FLUSH_S = 5.0  # results older than this are on disk: what a kill of the driver can lose


class Pipeline:
    """One run over `paths` (files or URLs) in an open store."""

    def __init__(
        self, store: Store, settings: Settings, engine: Engine, progress: Progress, *, retry: bool = False
    ) -> None:
        """`retry` tries again what is in quarantine."""
        self._store, self._settings, self._engine, self._progress = store, settings, engine, progress
        self._found = Found()
        self._keys = settings.keys()
        shots = settings.shots
        self._transnet = shots.backend == "transnet"
        self._scan_key = digest(signals.VERSION, settings.shot_weights())
        stitch = asdict(settings.stitch) | {"device": "", "weights": settings.stitch_weights()}
        self._clip_key = digest(VERSION, self._scan_key, asdict(shots), stitch)
        if retry:
            store.forget("quarantine")
        rows = store.rows("quarantine", QUARANTINE_COLUMNS)
        # By the bytes of the file, where they were read: a file that was replaced is a new one.
        self._bad = {(row["video"] or row["path"], row["clip"], row["key"]): row for row in rows}

    def run(self, paths: Sequence[str]) -> Found:
        """Everything, in order."""
        self._probe(paths)
        self._scan_and_clip()
        self._load_scores(self._settings.stages)
        self._duplicates()
        self._judge("judge", self._settings.frame_stages)
        self._judge("caption", self._settings.caption_stages, num_workers=1)
        return self._found

    # Files -> sources

    def _probe(self, paths: Sequence[str]) -> None:
        rows = self._store.rows("sources", SOURCE_COLUMNS)
        known = {(row["path"], row["stamp"]): row for row in rows}
        todo: list[ProbeTask] = []
        for path in self._progress.over("files", paths):
            if not _is_utf8(path):  # neither Parquet nor JSON nor a page can hold such a name
                self._found.quarantine.append(dict.fromkeys(QUARANTINE_COLUMNS) | {
                    "path": path.encode("utf-8", "backslashreplace").decode(), "video": "", "stage": "probe", "key": "name",
                    "reason": "its name is not UTF-8; rename it", "attempts": 0,
                })  # fmt: skip
                continue
            stamp = stamp_of(path)
            if (path, stamp) in known:
                self._add_source(_source(known[path, stamp]))
            elif not self._is_bad(path, None, f"probe {stamp}"):
                todo.append(ProbeTask(path))
        fresh: list[dict[str, Any]] = []
        for outcome in self._work("probe", todo, len(todo), fresh, "sources", SOURCE_COLUMNS):
            if outcome.reason is not None:
                self._quarantine(outcome.task.path, "", None, "probe", f"probe {stamp_of(outcome.task.path)}", outcome)
            else:
                stamp, source = outcome.value
                fresh.append({**asdict(source), "stamp": stamp})
                self._add_source(source)

    def _add_source(self, source: Source) -> None:
        """The path that sorts first stands for all files with these bytes."""
        sources, copies = self._found.sources, self._found.copies.setdefault(source.video, [])
        other = sources.get(source.video)
        if other is None or source.path < other.path:
            sources[source.video] = source
        if other is not None:
            copies.append(max(source.path, other.path))

    # Sources -> signals -> clips

    def _scan_and_clip(self) -> None:
        stages = self._settings.signal_stages
        lacking = self._known_clips()
        # What a video's clips need: another way to cut, or another stage, is worth another try.
        clips_key = digest(self._clip_key, *(self._keys[stage.name] for stage in stages))
        todo = [
            s
            for s in self._found.sources.values()
            if s.video not in self._found.clips
            if not self._is_bad(s.path, None, self._scan_key, s.video)
            if not self._is_bad(s.path, None, clips_key, s.video)
        ]
        missing = [
            ScanTask(source, chunk, self._transnet)
            for source in todo
            for chunk in range(len(source.chunks))
            if not self._store.signals_path(self._scan_key, source.video, chunk).exists()
        ]
        failed: set[str] = set()
        seconds = sum(_chunk_seconds(task) for task in missing)
        for outcome in self._work("scan", missing, seconds, measure=_chunk_seconds, unit="video-s"):
            source = outcome.task.source
            if outcome.reason is not None and source.video not in failed:
                failed.add(source.video)
                self._quarantine(source.path, source.video, None, "scan", self._scan_key, outcome)
            elif outcome.reason is None:
                path = self._store.signals_path(self._scan_key, source.video, outcome.task.chunk)
                self._store.write_signals(path, outcome.value)
        ready = [source for source in todo if source.video not in failed]
        fresh: list[dict[str, Any]] = []
        tasks = self._clip_tasks(ready, lambda source: lacking.get(source.video, stages))
        for outcome in self._work("clips", tasks, len(ready), fresh, f"clips/{self._clip_key}", CLIP_COLUMNS):
            source = outcome.task.source
            if outcome.reason is not None:
                self._quarantine(source.path, source.video, None, "clips", clips_key, outcome)
                continue
            found: Clips = outcome.value
            for stage in outcome.task.stages:
                rows = [
                    {"clip": s.id, **scores} for s, scores in zip(found.spans, found.scores[stage.name], strict=True)
                ]
                self._append_scores(stage, rows)
            if source.video not in lacking:
                fresh += _clip_rows(source, found)
            self._found.clips[source.video] = list(zip(found.spans, found.num_shots, found.similarity, strict=True))

    def _known_clips(self) -> dict[str, tuple[Stage, ...]]:
        """Videos whose clips are in the store, each with the signal stages that have not judged all of them.

        Those that lack nothing are added to what was found.
        """
        by_video: dict[str, list[dict[str, Any]]] = {}
        for row in self._store.rows(f"clips/{self._clip_key}", CLIP_COLUMNS):
            if row["video"] in self._found.sources:
                by_video.setdefault(row["video"], []).append(row)
        judged = {
            stage: {row["clip"] for row in self._store.rows(self._table(stage), {"clip": str})}
            for stage in self._settings.signal_stages
        }
        lacking: dict[str, tuple[Stage, ...]] = {}
        for video, rows in by_video.items():
            rows = sorted((row for row in rows if row["clip"]), key=lambda row: row["first"])
            lacking[video] = tuple(
                stage for stage, clips in judged.items() if not clips.issuperset(row["clip"] for row in rows)
            )
            if not lacking[video]:
                source = self._found.sources[video]
                self._found.clips[video] = [(_span(source, row), row["num_shots"], row["similarity"]) for row in rows]
        return lacking

    def _clip_tasks(
        self, sources: Iterable[Source], stages_for: Callable[[Source], tuple[Stage, ...]]
    ) -> Iterator[ClipTask]:
        for source in sources:
            parts = tuple(
                self._store.read_signals(self._store.signals_path(self._scan_key, source.video, chunk))
                for chunk in range(len(source.chunks))
            )
            yield ClipTask(source, parts, self._settings.shots, self._settings.stitch, stages_for(source))

    # Clips -> scores

    def _load_scores(self, stages: Iterable[Stage]) -> None:
        """What the store has of the clips at hand."""
        for span in self._found.spans():
            self._found.scores.setdefault(span.id, {})
        for stage in stages:
            for row in self._store.rows(self._table(stage), {"clip": str, **stage.columns}):
                if row["clip"] in self._found.scores:
                    self._found.scores[row.pop("clip")][stage.name] = row

    def _survivors(self, stages: Sequence[Stage]) -> list[ClipSpan]:
        """Clips that the rules of these stages, and of duplicates where they are known, keep."""
        names = {stage.name for stage in stages} | {DUPLICATE.stage}
        rules = [rule for rule in (*self._settings.rules, DUPLICATE) if rule.stage in names]
        left = []
        for span in self._found.spans():
            scores = self._found.scores[span.id]
            if all(rule.keeps(scores[rule.stage].get(rule.score)) for rule in rules if rule.stage in scores) and all(
                stage.name in scores for stage in stages
            ):
                left.append(span)
        return left

    def _duplicates(self) -> None:
        if "signature" not in self._keys:
            return
        scores = self._found.scores
        left = self._survivors(self._settings.signal_stages)
        twins = duplicates((span, scores[span.id]["signature"]["bits"]) for span in left)
        for span in left:
            scores[span.id][DUPLICATE.stage] = {"unique": span.id not in twins, "of": twins.get(span.id)}

    def _judge(self, name: str, stages: tuple[Stage, ...], num_workers: int | None = None) -> None:
        if not stages:
            return
        captions = name == "caption"
        before = [*self._settings.signal_stages, *(self._settings.frame_stages if captions else ())]
        key = digest(*(self._keys[stage.name] for stage in stages))
        scores = self._found.scores
        todo = [
            span
            for span in self._survivors(before)
            # A server that failed may be well again: captions are asked for anew by every run.
            if self._undecided(scores[span.id], stages)
            and (captions or not self._is_bad(span.path, span.id, key, _video_of(span)))
        ]
        size = max(BATCH, *(getattr(stage, "concurrency", 0) for stage in stages))
        tasks = [
            JudgeTask(batch, stages, self._settings.rules, {span.id: scores[span.id] for span in batch})
            for batch in batches(todo, stages, size)
        ]
        barren, left = 0, {span.id: span for span in todo}
        for outcome in self._work(
            name,
            tasks,
            len(todo),
            measure=lambda task: len(task.spans),
            unit="clips",
            num_workers=num_workers,
            gpu=on_gpu(stages),
        ):
            judged = outcome.value or Judged({}, {span.id: outcome.reason or "" for span in outcome.task.spans})
            for stage in stages:
                rows = [{"clip": clip, **new[stage.name]} for clip, new in judged.scores.items() if stage.name in new]
                self._append_scores(stage, rows)
            for clip, new in judged.scores.items():
                scores[clip].update(new)
            spans = [left.pop(span.id) for span in outcome.task.spans]
            for span in (span for span in spans if span.id in judged.failed):
                self._quarantine(span.path, _video_of(span), span.id, name, key, outcome, judged.failed[span.id])
            barren = barren + 1 if len(judged.failed) == len(spans) else 0
            if captions and barren == BARREN:
                for span in left.values():
                    self._quarantine(
                        span.path,
                        _video_of(span),
                        span.id,
                        name,
                        key,
                        outcome,
                        "not asked for: the captioner gave nothing any more",
                    )
                break

    def _undecided(self, scores: dict[str, Scores], stages: Sequence[Stage]) -> bool:
        """Whether a clip lacks a score that no rule of an earlier stage has made needless."""
        for stage in stages:
            if stage.name not in scores:
                return True
            if not all(r.keeps(scores[stage.name].get(r.score)) for r in self._settings.rules if r.stage == stage.name):
                return False
        return False

    # Tables

    def _work(
        self, name: str, tasks: Iterable[Any], total: float, rows: list[dict[str, Any]] | None = None, table: str = "",
        columns: dict[str, type] | None = None, *, measure: Any = None, unit: str = "", num_workers: int | None = None,
        gpu: bool = False,
    ) -> Iterator[Outcome]:  # fmt: skip
        """Outcomes of tasks with a progress bar; `rows` that the caller fills go to `table` every few seconds."""
        self._pending: dict[str, tuple[list[dict[str, Any]], dict[str, type]]] = {}
        if rows is not None and columns is not None:
            self._pending[table] = (rows, columns)
        flushed = time.monotonic()
        with self._progress.phase(name, total, unit) as advance:
            try:
                for outcome in self._engine.run(tasks, num_workers, gpu=gpu):
                    yield outcome
                    advance(measure(outcome.task) if measure else 1, outcome.cpu_s)
                    if time.monotonic() - flushed > FLUSH_S:
                        self._flush()
                        flushed = time.monotonic()
            finally:  # also when the caller stops asking, or is stopped
                self._flush()

    def _flush(self) -> None:
        # Scores before the clips that say "done": a kill between the two computes again and loses nothing.
        for table in sorted(self._pending, key=lambda name: not name.startswith("scores")):
            rows, columns = self._pending[table]
            self._store.append(table, rows, columns)
            rows.clear()

    def _append_scores(self, stage: Stage, rows: list[dict[str, Any]]) -> None:
        columns: dict[str, type] = {"clip": str, **stage.columns, "backend": str, "weights": str, "parameters": dict}
        pending, _ = self._pending.setdefault(self._table(stage), ([], columns))
        facts = {"backend": stage.backend, "weights": stage.weights, "parameters": stage.parameters()}
        pending += [{**row, **facts} for row in rows]

    def _table(self, stage: Stage) -> str:
        return f"scores/{stage.name}/{self._keys[stage.name]}"

    def _is_bad(self, path: str, clip: str | None, key: str, video: str = "") -> bool:
        """Whether this is in quarantine; it is then part of what was found."""
        row = self._bad.get((video or path, clip, key))
        if row:
            self._found.quarantine.append({**row, "path": path})
        return row is not None

    def _quarantine(
        self, path: str, video: str, clip: str | None, stage: str, key: str, outcome: Outcome, reason: str | None = None
    ) -> None:
        values = (path, video, clip, stage, key, reason or outcome.reason, outcome.attempts)
        row = dict(zip(QUARANTINE_COLUMNS, values, strict=True))
        self._found.quarantine.append(row)
        self._pending.setdefault("quarantine", ([], QUARANTINE_COLUMNS))[0].append(row)


def digest(*parts: Any) -> str:
    """16 hex digits over JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _video_of(span: ClipSpan) -> str:
    return span.id.split("-")[0]


def _source(row: dict[str, Any]) -> Source:
    return Source(
        **{name: row[name] for name in SOURCE_COLUMNS if name not in ("stamp", "chunks")}, chunks=tuple(row["chunks"])
    )


def _span(source: Source, row: dict[str, Any]) -> ClipSpan:
    frames = (row["first"], row["last"], row["start"], row["end"])
    return ClipSpan(row["clip"], source.path, *frames, source.width, source.height, source.fps)


def _clip_rows(source: Source, found: Clips) -> list[dict[str, Any]]:
    rows = [
        {"video": source.video, "clip": s.id, "first": s.first, "last": s.last, "start": s.start, "end": s.end,
         "num_shots": num_shots, "similarity": similarity}
        for s, num_shots, similarity in zip(found.spans, found.num_shots, found.similarity, strict=True)
    ]  # fmt: skip
    return rows or [{"video": source.video, "clip": None}]


def _chunk_seconds(task: ScanTask) -> float:
    edges = (*task.source.chunks, task.source.seconds)
    return max(0.0, edges[task.chunk + 1] - edges[task.chunk])
