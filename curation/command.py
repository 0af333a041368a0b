"""vchitect-fast curate: raw videos -> a curation folder: clips, scores, verdicts with reasons, a manifest, a report.

    curate VIDEO...      cut, judge, write DIR; again to go on where it stopped
    curate report DIR    only the page;   what-if DIR   other rules, nothing computed;   compare A B   two folders
    curate export DIR    clips as files or as WebDataset shards

A file that cannot be used is named and the run goes on. Exit code 1 when no clip stays.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vchitect_fast.errors import UserError
from vchitect_fast.manifest import SUFFIXES

if TYPE_CHECKING:
    from vchitect_fast.curation.engines import Engine

EPILOG = """\
instead of a video, a verb; each has its own --help:
  what-if DIR   other rules on stored scores     compare DIR DIR   two sets side by side     report DIR   the page anew
  export DIR    clips as files or shards         index TAR...      a manifest of shards made elsewhere

settings (YAML, --config, or --set): a section a stage, `off` switches it off
  shots:  {backend: adaptive|transnet, adaptive_threshold: 3.0, min_content_val: 21.0, min_scene_frames: 15, gradual: true}
  stitch: {backend: layout|clip|viclip|none, weights: FOLDER, similarity: 0.6, max_seconds: 60}
  static: {difference: 0.9}    motion: {backend: dis}  or  {backend: raft, model: FILE}    aesthetic_proxy    looks
  aesthetics: {clip: FOLDER, head: FILE}    watermark: {model: FILE}    text: {backend: rapidocr|easyocr, num_frames: 8}
  caption: {backend: openai, url: URL, model: NAME}  or  {backend: transformers, model: FOLDER}
  rules:  {static.share: "< 0.3", aesthetics.score: ">= 5", motion.dynamic: off}

captions without a captioner:
  a file VIDEO.txt beside VIDEO.mp4 holds one line for all its clips, or one line a clip; --caption is for the others

examples:
  vchitect-fast curate holiday.mp4 --out curated --caption "a walk along the beach"
  vchitect-fast curate /data/raw --out curated --set 'rules.static.share=< 0.5' --set text=off
  vchitect-fast curate what-if curated --static "<0.1"
  vchitect-fast curate export curated --to shards --form shards
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast curate`."""
    parser.add_argument(
        "videos", nargs="+", metavar="VIDEO", help="video files, folders (at any depth), or fsspec URLs"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="curation folder; made, or gone on with")
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="settings (default: everything that needs no weights)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="one setting, over --config; repeatable",
    )
    parser.add_argument("--caption", default="", metavar="TEXT", help="caption of clips without one (default: empty)")
    parser.add_argument("--min-seconds", type=float, metavar="S", help="rule length.seconds >= S (default: 1)")
    parser.add_argument("--jobs", type=int, metavar="N", help="worker processes (default: one a core, 1.5 GiB each)")
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="who runs the work (default: local)"
    )
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="cluster to join, for --engine ray (default: one on this machine)"
    )
    parser.add_argument("--retry", action="store_true", help="try again what earlier runs put into quarantine")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="record what the workers do, for `profile analyse DIR` (default: off)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Curate, then print the summary."""
    from vchitect_fast.curation.inputs import find_videos
    from vchitect_fast.curation.outputs import Summary, write_outputs
    from vchitect_fast.curation.pipeline import Pipeline
    from vchitect_fast.curation.progress import Progress
    from vchitect_fast.curation.report import write_report
    from vchitect_fast.curation.settings import load
    from vchitect_fast.curation.store import Store

    began = time.perf_counter()
    overrides = [*args.set]
    if args.min_seconds is not None:
        overrides.append(f"rules.length.seconds=>= {args.min_seconds}")
    settings = load(args.config, overrides)
    if args.out.suffix in SUFFIXES or args.out.is_file():
        raise UserError(f"--out is a folder, got {args.out}; the manifest will be {args.out.stem}/manifest.parquet.")
    paths = find_videos(args.videos)
    settings.check()
    progress, engine = Progress(quiet=args.json), _recorded(_engine(args), args.profile)
    with closing(engine), Store(args.out) as store:
        found = Pipeline(store, settings, engine, progress, retry=args.retry).run(paths)
        wall_s = time.perf_counter() - began
        summary: Summary = write_outputs(args.out, found, settings, progress, caption=args.caption, wall_s=wall_s)
        page = write_report(args.out) if summary.num_clips else None
    if args.json:
        print(json.dumps({**asdict(summary), "quarantine": found.quarantine, "report": str(page) if page else None}))
    else:
        from vchitect_fast.curation.console import print_summary

        print_summary(args.out, summary, found.quarantine)
        if args.profile:
            print(f"traces   {args.profile}  (vchitect-fast profile analyse {args.profile} --report FILE)")
    return 0 if summary.num_kept else 1


def _engine(args: argparse.Namespace) -> Engine:
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be 1 or more, got {args.jobs}; leave it out for one a core.")
    if args.engine == "ray":
        from vchitect_fast.curation.engines.ray import RayEngine

        return RayEngine(args.ray_address, args.jobs)
    if args.ray_address:
        raise UserError(f"--ray-address {args.ray_address} needs --engine ray; add it.")
    from vchitect_fast.curation.engines.local import LocalEngine

    return LocalEngine(args.jobs)


def _recorded(engine: Engine, folder: Path | None) -> Engine:
    """The engine itself unless somebody wants its spans: the user, or Nsight Systems around this process."""
    from vchitect_fast.curation.engines.recorded import UNDER_NSYS, RecordedEngine

    return RecordedEngine(engine, folder) if folder or UNDER_NSYS in os.environ else engine


def _report(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vchitect-fast curate report", description="Write DIR/report.html anew.",
        epilog="example:\n  vchitect-fast curate report curated", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", metavar="DIR", help="a curation folder")
    from vchitect_fast.curation.report import write_report

    print(write_report(parser.parse_args(words).folder))
    return 0


def _what_if(words: list[str]) -> int:
    from vchitect_fast.curation.what_if import run_what_if

    return run_what_if(words)


def _compare(words: list[str]) -> int:
    from vchitect_fast.curation.compare import run_compare

    return run_compare(words)


def _export(words: list[str]) -> int:
    from vchitect_fast.curation.export import run_export

    return run_export(words)


def _index(words: list[str]) -> int:
    from vchitect_fast.curation.shards import run_index

    return run_index(words)


# What cli.py gives the rest of the line to when it is the first word after the command.
SUBCOMMANDS: dict[str, Callable[[list[str]], int]] = {
    "report": _report, "what-if": _what_if, "compare": _compare, "export": _export, "index": _index,
}  # fmt: skip
