"""vchitect-fast curate export: the kept clips of a curation folder as files of their own, or as WebDataset shards.

    --form clips    TO/clips/KEY.mp4 and TO/manifest.parquet
    --form shards   TO/clips-000000.tar, ... and TO/index.parquet (shards.py)

Both tables are manifests that `vchitect-fast train` reads; they keep the captions and every score, and name where each clip
came from. Clips are cut by cut.py, several at a time, each in an ffmpeg process of its own; sound is left out, since nothing
here trains on it. Stopped at any point, the same command goes on. A clip that cannot be cut is named with its reason and
the exit code is 1: nothing is left out in silence, and nothing is judged here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vchitect_fast.curation import shards
from vchitect_fast.curation.cut import MODES, Cut, Span, cut, read_back
from vchitect_fast.curation.encoders import Encoder, choose
from vchitect_fast.curation.frames import BadVideo
from vchitect_fast.curation.places import Destination, Sources, is_url
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import SUFFIXES, read_rows, write_manifest

VERSION = 1  # raised whenever the same row gives another file: clips of an older export are cut again
FORMS = ("clips", "shards")
MANIFEST = "manifest.parquet"
CUT_FOLDER = {"clips": "clips", "shards": ".cut"}
JUDGEMENT = ("kept", "dropped_by", "reason")  # columns of a curation folder that say nothing of a clip that was kept
AHEAD = 4  # clips a worker that may wait, cut, for an earlier one

EPILOG = """\
modes:
  exact  decodes and encodes again: exactly the clip's frames, H.264 or VP9 with 8 bits, even sides, a key frame a second
  copy   keeps the packets: from the first key frame within the clip on, so some frames of its beginning are missing; a clip
         that would lose more than half is cut exactly, and the column export.why says so

example:
  vchitect-fast curate export curated --to dataset --form shards
"""


@dataclass(frozen=True)
class Job:
    """A clip to export."""

    key: str  # file name without ending
    clip: str  # the clip's id
    row: dict[str, Any]
    path: str  # of the video: absolute, or a URL
    stamp: str  # hash of what decides the file's frames
    row_stamp: str  # hash of that and of everything else in the row

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return self.row["end"] - self.row["start"]


@dataclass
class Exported:
    """What an export came to."""

    manifest: str
    num_clips: int
    num_reused: int
    num_exact: int
    num_copied: int
    encoder: str
    seconds: float  # of video exported, also earlier
    elapsed_s: float
    why_exact: dict[str, int]  # why clips to copy were cut exactly -> clips
    failed: list[dict[str, str]]  # clip, path, reason


def export(
    source: str | Path, to: str, *, form: str = "clips", mode: str = "exact", encoder: str | None = None, jobs: int | None = None,
    max_shard_gib: float = 1.0, max_shard_clips: int = 1000,
) -> Exported:  # fmt: skip
    """Export the kept clips of a curation folder, or of a manifest, to a folder or fsspec URL.

    Raises UserError when the source has nothing to export, no encoder works, or `to` cannot be written or holds shards of
    other clips. A clip that cannot be cut is in the result's `failed`.
    """
    began = time.monotonic()
    if (jobs is not None and jobs < 1) or max_shard_clips < 1 or not max_shard_gib > 0:
        raise UserError(
            f"--jobs, --max-shard-clips and --max-shard-gib must be above 0, got {jobs}, {max_shard_clips}, {max_shard_gib}."
        )
    todo = jobs_of(Path(source), mode)
    chosen = choose(encoder)
    destination = Destination(to)
    with destination.alone(), tempfile.TemporaryDirectory(prefix="vchitect-fast-videos-") as downloads:
        rows: dict[str, dict[str, Any]] = {}
        writer = None
        if form == "shards":
            done, number = shards.finished(destination)
            rows = _known(done, todo, to)
            writer = shards.ShardWriter(destination, number, round(max_shard_gib * 2**30), max_shard_clips)
        num_reused = len(rows)
        left = [job for job in todo if job.key not in rows]
        cutter = Cutter(destination, Sources((job.path for job in left), Path(downloads)), form, mode, chosen, encoder)
        failed = []
        for job, result in cutter.run(left, jobs or len(os.sched_getaffinity(0))):
            if isinstance(result, str):
                failed.append({"clip": job.clip, "path": job.path, "reason": result})
                continue
            rows[job.key] = row_of(job, result)
            if writer:
                writer.add(job.key, destination.work / CUT_FOLDER[form] / f"{job.key}.mp4", rows[job.key])
        if writer:
            writer.finish()
            shutil.rmtree(destination.work / CUT_FOLDER[form], ignore_errors=True)
            rows |= {row["path"].rpartition("/")[2].removesuffix(".mp4"): row for row in writer.rows}
        name = shards.INDEX if form == "shards" else MANIFEST
        # In the table's order, however the export was interrupted: training draws clips by their position.
        found = [rows[job.key] for job in todo if job.key in rows]
        if found:
            write_manifest(shards.in_one_type(found), destination.work / name)
            destination.publish(name)
    modes = Counter(row["export.mode"] for row in found)
    return Exported(
        f"{destination.to}/{name}", len(found), num_reused + len(cutter.reused), modes["exact"], modes["copy"], chosen.name,
        sum(row["end"] for row in found), time.monotonic() - began,
        dict(Counter(row["export.why"] for row in found if row["export.why"])), failed,
    )  # fmt: skip


class Cutter:
    """Cuts clips several at a time and hands them out in order."""

    def __init__(
        self, destination: Destination, sources: Sources, form: str, mode: str, encoder: Encoder, asked: str | None
    ) -> None:
        self._destination, self._sources, self._folder, self._mode = destination, sources, CUT_FOLDER[form], mode
        self._encoder, self._asked, self._published = encoder, asked, form == "clips"
        self.reused: set[str] = set()  # keys of clips that an earlier export left

    def run(self, todo: Sequence[Job], workers: int) -> Iterator[tuple[Job, Cut | str]]:
        """(job, what was written, or the reason why nothing was), in order."""
        cores = len(os.sched_getaffinity(0))
        workers = max(1, min(workers, len(todo)))
        threads = max(1, cores // workers)
        waiting: deque[tuple[Job, Future[Cut | str]]] = deque()
        rest = iter(todo)
        # Threads: decoding and encoding happen in an ffmpeg process each.
        with _progress(todo) as advance, ThreadPoolExecutor(workers, thread_name_prefix="export") as pool:
            try:
                while True:
                    while len(waiting) < AHEAD * workers and (job := next(rest, None)):
                        waiting.append((job, pool.submit(self._one, job, threads)))
                    if not waiting:
                        return
                    job, future = waiting.popleft()
                    result = future.result()
                    advance(job.seconds)
                    yield job, result
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, job: Job, threads: int) -> Cut | str:
        name = f"{self._folder}/{job.key}.mp4"
        if found := self._already(name, job.stamp):
            self.reused.add(job.key)
            return found
        row = job.row
        try:
            with self._sources.local(job.path) as path:
                span = Span(path, row["start"], row["end"], row["num_frames"], row["fps"])
                result = cut(span, self._destination.work / name, self._mode, self._encoder, job.stamp, threads)
        except BadVideo as error:
            return str(error)
        except OSError as error:
            raise UserError(
                f"cannot write {self._destination.work / name} ({error.strerror}); free some space and export again."
            ) from None
        if self._published:
            self._destination.publish(name)
        return result

    def _already(self, name: str, stamp: str) -> Cut | None:
        """What an earlier export left there, whole and of the same frames; by the encoder that is asked for, if one is."""
        if self._published and not self._destination.exists(name):
            return None
        if self._published:
            with self._destination.open(name) as file:
                found = read_back(file, stamp)
        else:
            found = read_back(str(self._destination.work / name), stamp)
        return found if found and self._asked in (None, found.encoder or self._asked) else None


def jobs_of(source: Path, mode: str) -> list[Job]:
    """The kept clips of a folder's clips.parquet, or of a manifest (where all without a column "kept" count), in order."""
    table = source if source.suffix in SUFFIXES else source / "clips.parquet"
    rows = [row for row in read_rows(table) if row.get("kept", True)]
    if not rows:
        raise UserError(f"{table} keeps no clip; loosen the rules with `vchitect-fast curate`, then export.")
    jobs: dict[str, Job] = {}
    for number, row in enumerate(rows, 1):
        path = row["path"] if is_url(row["path"]) else str((table.resolve().parent / row["path"]).absolute())
        clip = str(row.get("clip") or _id_of(path, row))
        decides = [VERSION, clip, row["start"], row["end"], row["num_frames"], mode]
        stamp = _hash(decides)
        job = Job(key_of(clip), clip, row, path, stamp, _hash([stamp, shards.plain(row)]))
        if job.key in jobs:
            raise UserError(
                f"kept row {number} of {table} is clip {clip!r} for the second time; remove one of the two."
            )
        jobs[job.key] = job
    return list(jobs.values())


def row_of(job: Job, written: Cut) -> dict[str, Any]:
    """The manifest's row of an exported clip: the clip's own row, with the sizes and times of what was written."""
    row = {name: value for name, value in job.row.items() if name not in JUDGEMENT}
    row |= {
        "path": f"{CUT_FOLDER['clips']}/{job.key}.mp4", "start": 0.0, "end": written.end, "num_frames": written.num_frames,
        "width": written.width, "height": written.height, "fps": written.fps, "clip": job.clip, "source.path": job.path,
        "source.start": written.begin, "source.end": round(written.begin + written.end, 9), "export.mode": written.mode,
        "export.encoder": written.encoder, "export.why": written.why, "export.key": job.row_stamp,
    }  # fmt: skip
    if isinstance(row.get("first"), int) and "last" in row:
        row["first"] += written.skipped
        row["last"] = row["first"] + written.num_frames - 1
    return shards.plain(row)


def key_of(clip: str) -> str:
    """A file name for a clip's id: letters, digits, "-" and "_" only, since ids can hold what a path or a tar gives meaning."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}", clip):
        return clip
    return f"{re.sub(r'[^A-Za-z0-9_]+', '_', clip)[:60]}-{hashlib.sha256(clip.encode()).hexdigest()[:12]}"


def _id_of(path: str, row: dict[str, Any]) -> str:
    """An id for a row of a manifest that has none: another one when the video's file changes."""
    try:
        stat = os.stat(path)
        facts = [stat.st_size, stat.st_mtime_ns]
    except OSError:  # a URL, a member of a tar, or missing, which cutting will say
        facts = []
    return f"{Path(path).stem[:40]}-{_hash([path, facts, row['start'], row['end']])}"


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _known(done: list[dict[str, Any]], todo: list[Job], to: str) -> dict[str, dict[str, Any]]:
    """The rows of finished shards by key; UserError when a shard holds a clip that is not to be there, or not so."""
    wanted = {job.key: job for job in todo}
    rows = {}
    for row in done:
        key = row["path"].rpartition("/")[2].removesuffix(".mp4")
        if key not in wanted or wanted[key].row_stamp != row.get("export.key"):
            what = "another row or mode of it" if key in wanted else "not among those kept now"
            raise UserError(
                f"{to} holds shards of another export (clip {row.get('clip', key)!r} in {row['path']}: {what}); choose another --to."
            )
        rows[key] = row
    return rows


@contextmanager
def _progress(todo: Sequence[Job]) -> Iterator[Any]:
    """A bar in video-seconds with their rate and the remaining time, on a terminal; calls take seconds done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("exporting {task.fields[num]} clips"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    began, seconds = time.monotonic(), 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=sum(job.seconds for job in todo), num=len(todo), rate="")

        def advance(done: float) -> None:
            nonlocal seconds
            seconds += done
            progress.update(
                task, advance=done, rate=f"{seconds / (time.monotonic() - began + 1e-9):.1f} video-s a second"
            )

        yield advance


def run_export(words: list[str]) -> int:
    """`vchitect-fast curate export ...`: 0, or 1 when a clip could not be exported."""
    parser = argparse.ArgumentParser(
        prog="vchitect-fast curate export",
        description="Cut the kept clips into files of their own or into WebDataset shards, without sound.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("source", metavar="DIR", help="curation folder, or a manifest")
    parser.add_argument("--to", required=True, metavar="TO", help="folder or fsspec URL (s3://bucket/folder)")
    parser.add_argument("--form", choices=FORMS, default="clips", help="files, or tars with an index (default: clips)")
    parser.add_argument("--mode", choices=MODES, default="exact", help="see below (default: exact)")
    parser.add_argument("--encoder", metavar="NAME", help="ffmpeg's, used or refused (default: the first that works)")
    parser.add_argument("--jobs", type=int, metavar="N", help="clips at a time (default: one a core)")
    parser.add_argument(
        "--max-shard-gib", type=float, default=1.0, metavar="GIB", help="size of a tar, in GiB (default: 1)"
    )
    parser.add_argument("--max-shard-clips", type=int, default=1000, metavar="N", help="clips in a tar (default: 1000)")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    args = parser.parse_args(words)
    result = export(
        args.source, args.to, form=args.form, mode=args.mode, encoder=args.encoder, jobs=args.jobs,
        max_shard_gib=args.max_shard_gib, max_shard_clips=args.max_shard_clips,
    )  # fmt: skip
    for item in result.failed:
        print(f"failed: clip {item['clip']!r} of {item['path']!r}: {item['reason']}", file=sys.stderr)
    if args.json:
        print(json.dumps(vars(result)))
    else:
        print(summary(result))
    return 1 if result.failed else 0


def summary(result: Exported) -> str:
    """What was exported, in a few lines."""
    lines = [
        f"{result.num_clips} clips, {result.seconds:.1f} s of video, without sound -> {result.manifest}"
        if result.num_clips
        else "no clip was exported",
        f"{result.num_exact} cut exactly by {result.encoder}, {result.num_copied} copied; {result.num_reused} of them were there; "
        f"{result.elapsed_s:.1f} s",
    ]
    lines += [f"cut exactly instead of copied: {num} clips, {why}" for why, num in result.why_exact.items()]
    lines += [f"{len(result.failed)} clips failed"] if result.failed else []
    return "\n".join(lines)
