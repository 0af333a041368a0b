"""Training with the hand-written block gives the loss curve of the plain one, within what another order of sums does.

pytest -m soak tests/test_loss_curve.py; real clips, the nano model, train itself from the command line. The references are plain
runs of the same draws whose sums have another order: attention written out instead of fused, and blocks in two chunks, whose
weight gradients are added up in two parts. On a CPU the hand-written block runs on the steps of plain torch; on a GPU on the
kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vchitect_fast.architecture import preset
from vchitect_fast.cli import main
from vchitect_fast.config import TrainConfig
from vchitect_fast.machine import this_device
from vchitect_fast.manifest import Clip, write_manifest
from vchitect_fast.metrics import read_log
from vchitect_fast.model import transformer
from vchitect_fast.plan import BRANCHES, Plan, PlanEntry, Policy, Prediction
from vchitect_fast.quickstart import example_folder

STEPS = 40
MODEL = preset("vchitect-nano")
KERNELS = {"cpu": "reference", "cuda": "triton"}


def losses(folder: Path, name: str, dtype: str, **fields: Any) -> torch.Tensor:
    """Of every step; `fields` of the Plan's entry."""
    device = this_device()
    entry = PlanEntry(
        "4x32x16",
        (Policy.keep(),) * MODEL.num_layers,
        microbatch=2,
        accumulation=2,
        predicted=Prediction(1.0, {}, 1.0, {}, "made up"),
        **fields,
    )
    Plan(MODEL.fingerprint(), device.fingerprint(), "this machine", dtype, 16, (entry,)).save(folder / f"{name}.json")
    clips = [Clip(example_folder() / "bikes.mp4", s, s + 0.6, 15, 640, 272, 25.0, f"at {s}") for s in (0.1, 1.4, 2.0)]
    write_manifest(clips, folder / "clips.jsonl")
    config = TrainConfig(
        manifest=str(folder / "clips.jsonl"), plan=str(folder / f"{name}.json"), out=str(folder / name),
        model="vchitect-nano", cache=str(folder / "cache"), steps=STEPS, validate_every=0, save_every=STEPS,
        learning_rate=1e-2,
    )  # fmt: skip
    config.save(folder / f"{name}.yaml")
    assert main(["train", str(folder / f"{name}.yaml")]) == 0
    return torch.tensor([event["loss"] for event in read_log(folder / name, "step")], dtype=torch.float64)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_curve_is_the_plain_blocks(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = losses(tmp_path, "plain", dtype)
    written_out = dict.fromkeys(BRANCHES, "math")
    others = [
        losses(tmp_path, "written_out", dtype, attention=written_out),
        losses(tmp_path, "chunks", dtype, num_chunks=2),
    ]
    calls, run = [], transformer.handwritten_block
    monkeypatch.setattr(transformer, "DEFAULT_KERNELS", KERNELS)
    monkeypatch.setattr(transformer, "handwritten_block", lambda *args, **how: calls.append(1) or run(*args, **how))
    by_hand = losses(tmp_path, "by_hand", dtype)
    noise = torch.stack([(other - plain).abs() for other in others])
    error = (by_hand - plain).abs()
    assert noise.max() > 0
    assert len(calls) >= STEPS * 2 * MODEL.num_layers
    assert plain[-5:].mean() < plain[:5].mean()  # something was learnt
    assert error.max() <= 2 * noise.max()
    assert error.mean() <= 2 * noise.mean(dim=1).max()
