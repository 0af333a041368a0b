"""vchitect-fast curate: videos -> shots -> a manifest of clips. The first stage of curation.

One row a shot, with exact times and sizes; captions come from --caption or a text file beside the video and are empty
otherwise. It scores nothing and filters by length only. It never replaces a manifest that captions or scores have been
written into.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Any

from vchitect_fast.curation.shots import Shot, Source, find_shots, probe
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import COLUMNS, SUFFIXES, Clip, read_manifest, read_rows, write_manifest

if TYPE_CHECKING:
    from rich.progress import Progress

PROGRESS_AFTER_S = 2.0

EPILOG = """\
captions:
  a file VIDEO.txt beside VIDEO.mp4 holds one line for all its shots, or one line a shot (all that the table lists);
  --caption is for videos without one. A caption can also be written into the manifest afterwards.

example:
  vchitect-fast curate holiday.mp4 --out clips/manifest.jsonl --caption "a walk along the beach"
"""


@dataclass(frozen=True)
class Found:
    """A shot of a video, its caption, and whether it is long enough to keep."""

    source: Source
    number: int  # of the shot, counted from 1
    shot: Shot
    caption: str
    kept: bool

    @property
    def clip(self) -> Clip:
        """The manifest's row."""
        source, shot = self.source, self.shot
        return Clip(
            source.path.resolve(), shot.start, shot.end, shot.num_frames, source.width, source.height, source.fps, self.caption
        )  # fmt: skip


def curate(videos: list[Path], out: Path, *, caption: str = "", min_seconds: float = 1.0) -> list[Found]:
    """Find the shots of all videos and write those of at least `min_seconds` as the manifest `out`.

    Returns every shot, the dropped ones too. Raises UserError, before anything is written, for a video or a caption file
    that cannot be used, when no shot is long enough, and when `out` holds other clips with captions or scores.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"a manifest ends in {', '.join(SUFFIXES)}, got {out}; choose one of these.")
    if not (math.isfinite(min_seconds) and min_seconds >= 0):
        raise UserError(f"--min-seconds must be 0 or more, got {min_seconds}; the default is 1.0.")
    sources = [probe(video) for video in videos]
    found: list[Found] = []
    with _progress(sources) as progress:
        for source in sources:
            task = progress.add_task(source.path.name, total=source.num_packets)
            shots = find_shots(source, partial(progress.advance, task))
            captions = _captions(source.path, len(shots), caption)
            for number, (shot, text) in enumerate(zip(shots, captions, strict=True), 1):
                found.append(Found(source, number, shot, text, shot.seconds >= min_seconds))
    clips = [item.clip for item in found if item.kept]
    if not clips:
        longest = max((item.shot.seconds for item in found), default=0.0)
        raise UserError(
            f"no shot of {len(found)} lasts {min_seconds:g} s, the longest has {longest:.2f} s; lower --min-seconds."
        )
    if out.exists() and read_manifest(out) != clips and any(_has_work(row) for row in read_rows(out)):
        raise UserError(f"{out} exists with other clips, captions or scores; move it away, or choose another --out.")
    write_manifest(clips, out)
    return found


def _has_work(row: dict[str, Any]) -> bool:
    """Whether a manifest's row holds what curating again would lose."""
    return bool(row["caption"] or row.keys() - COLUMNS.keys())


def _captions(video: Path, num_shots: int, default: str) -> list[str]:
    """One caption a shot: from the text file beside the video, else `default` for all."""
    beside = video.with_suffix(".txt")
    if not beside.is_file():
        return [default] * num_shots
    try:
        lines = [line.strip() for line in beside.read_text(encoding="utf-8").strip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the captions {beside} ({error}); write UTF-8 text.") from None
    if len(lines) not in (1, num_shots):
        raise UserError(
            f"{beside} must have 1 line or {num_shots}, one a shot of {video.name}, got {len(lines)}; correct it."
        )
    return lines * num_shots if len(lines) == 1 else lines


@contextmanager
def _progress(sources: list[Source]) -> Iterator[Progress]:
    """A bar of decoded frames on stderr that appears once the work has lasted two seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("shots of {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    timer = Timer(PROGRESS_AFTER_S, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield progress
    finally:
        timer.cancel()
        timer.join()
        if progress.live.is_started:
            progress.stop()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast curate`."""
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO", help="video files")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write: .jsonl, .parquet or .csv")
    parser.add_argument("--caption", default="", metavar="TEXT", help="caption of every shot (default: empty)")
    parser.add_argument(
        "--min-seconds", type=float, default=1.0, metavar="S", help="drop shorter shots, in seconds (default: 1.0)"
    )
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Curate, then print the table of shots."""
    from rich.console import Console

    found = curate(args.videos, args.out, caption=args.caption, min_seconds=args.min_seconds)
    headings = ("video", "shot", "seconds", "frames", "size", "fps", "caption")
    rows = [
        (
            item.source.path.name, str(item.number), f"{item.shot.start:.2f}-{item.shot.end:.2f}", str(item.shot.num_frames),
            f"{item.source.width}x{item.source.height}", f"{item.source.fps:g}",
            (item.caption or "-") if item.kept else f"dropped: shorter than {args.min_seconds:g} s",
        )
        for item in found
    ]  # fmt: skip
    # Aligned text, not a table: a narrow terminal cuts the captions only.
    console = Console(highlight=False, soft_wrap=True)
    widths = [max(map(len, cells)) for cells in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        console.print(line[: console.width] if console.is_terminal else line, markup=False)
    num_kept = sum(item.kept for item in found)
    console.print(f"{num_kept} clips of {len(found)} shots -> {args.out}", highlight=False)
    if any(item.kept and not item.caption for item in found):
        console.print(
            f"Some captions are empty. Write them into the caption column of {args.out}, or one a line into a .txt of the "
            "video's name beside it and curate again.", highlight=False,
        )  # fmt: skip
    return 0
