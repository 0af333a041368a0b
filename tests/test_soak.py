"""The long runs, `make soak`: kills of training and of curation leave no trace, the quickstart reaches what the README says,
200 damaged videos are named or decode.

Run: pytest -m soak tests/test_soak.py (about twenty minutes on two cores)
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from curated import carphone, clips, copy, curate, quarantine
from damaged import decodes_cleanly, first_frames, flipped
from killed import kill_many
from real_video import bikes

from vchitect_fast import checkpoint
from vchitect_fast.architecture import preset
from vchitect_fast.cli import main
from vchitect_fast.config import TrainConfig
from vchitect_fast.curation.engines.local import WORKER_BYTES, LocalEngine
from vchitect_fast.machine import this_device
from vchitect_fast.manifest import Clip, write_manifest
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction
from vchitect_fast.quickstart import example_folder
from vchitect_fast.train import train

NUM_KILLS = 30
STEPS = 6000


@pytest.mark.soak
def test_thirty_kills_leave_no_trace(tmp_path: Path) -> None:
    config = preset("vchitect-nano")
    entry = PlanEntry(
        "4x32x16", (Policy.keep(),) * config.num_layers, 2, 1, Prediction(1.0, {}, 1.0, {}, "made up for a test")
    )
    plan = Plan(config.fingerprint(), this_device().fingerprint(), "this machine", "float32", 16, (entry,))
    plan.save(tmp_path / "plan.json")
    video = example_folder() / "bikes.mp4"
    write_manifest(
        [Clip(video, s, s + 0.6, 15, 640, 272, 25.0, f"at {s}") for s in (0.1, 1.4, 3.2, 5.6)], tmp_path / "clips.jsonl"
    )
    run = TrainConfig(
        manifest=str(tmp_path / "clips.jsonl"), plan=str(tmp_path / "plan.json"), out=str(tmp_path / "run"), model="vchitect-nano",
        cache=str(tmp_path / "cache"), steps=STEPS, validate_every=0, save_every=7,
    )  # fmt: skip
    run.save(tmp_path / "run.yaml")
    command = [sys.executable, "-P", "-m", "vchitect_fast.cli", "train", str(tmp_path / "run.yaml")]
    draw = random.Random(0)
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(4, 9))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed: give the test more steps"
        newest = checkpoint.latest(tmp_path / "run")
        if newest:
            checkpoint.read_state(newest)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    train(replace(run, out=str(tmp_path / "straight"), save_every=0))
    ends = [checkpoint.load_prefix(checkpoint.latest(tmp_path / name), "") for name in ("run", "straight")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.soak
def test_the_quickstart_learns_every_clip(tmp_path: Path) -> None:
    """Loss at fixed noise levels down by 10x, every sample at 20 dB or more against its clip."""
    assert main(["quickstart", "--out", str(tmp_path / "q")]) == 0
    figures = json.loads((tmp_path / "q" / "summary.json").read_text())
    assert figures["last_loss"] < figures["first_loss"] / 10
    assert min(figures["psnr_db"].values()) >= 20, figures["psnr_db"]


@pytest.mark.soak
def test_twenty_kills_of_a_curation_leave_no_trace(tmp_path: Path) -> None:
    """Ten drivers and ten workers, at random points; no clip twice, none lost, every table value the same."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(3):
        copy(bikes(), videos / f"bikes {number}.mp4", number)
        copy(bikes().with_name("bigbuckbunny.mp4"), videos / f"bunny {number}.mp4", number)
    for number in range(18):
        copy(carphone(), videos / f"carphone {number}.mp4", number)
    print("curations:", kill_many(videos, tmp_path, num_driver=10, num_worker=10, seed=1, most=5))


@pytest.mark.soak
def test_two_hundred_videos_with_flipped_bytes(tmp_path: Path) -> None:
    """Each is named with a reason, or every frame of its clips decodes in a decoder that complains."""
    (tmp_path / "videos").mkdir()
    originals = [
        bikes(), carphone(), carphone().with_name("carphone_distorted.mp4"),
        first_frames(bikes().with_name("bigbuckbunny.mp4"), tmp_path / "bunny.mp4", 60),
    ]  # fmt: skip
    paths = [flipped(originals[k % 4], tmp_path / "videos" / f"{k}.mp4", k) for k in range(200)]
    engine = LocalEngine(2)
    curate(tmp_path / "out", paths, overrides=("text=off", "signature=off"), engine=engine)
    peaks = [Path(f"/proc/{worker.process.pid}/status").read_text().split("VmHWM:")[1] for worker in engine._workers]
    engine.close()
    last: dict[str, int] = {}
    for row in clips(tmp_path / "out"):
        last[row["path"]] = max(last.get(row["path"], 0), row["last"])
    bad = {row["path"]: row["reason"] for row in quarantine(tmp_path / "out")}
    assert all(row["attempts"] == 1 for row in quarantine(tmp_path / "out")), (
        "a reason of the input, not a mistake of ours"
    )
    assert sorted([*last, *bad]) == sorted(map(str, paths))
    assert all(bad.values())
    assert all(decodes_cleanly(Path(path), frame + 1) for path, frame in last.items())
    assert all(int(peak.split()[0]) << 10 < WORKER_BYTES for peak in peaks)
    print(f"{len(bad)} in quarantine, {len(last)} curated; peak of a worker (KiB)", [peak.split()[0] for peak in peaks])
