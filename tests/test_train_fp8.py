"""train with fp8_linears: another loss curve than without and close to it, a change of it is said, misuse is refused.

pytest tests/test_train_fp8.py; real clips, the nano model, emulated on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vchitect_fast.architecture import preset
from vchitect_fast.cli import main
from vchitect_fast.config import TrainConfig
from vchitect_fast.machine import this_device
from vchitect_fast.manifest import Clip, write_manifest
from vchitect_fast.metrics import read_log
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction
from vchitect_fast.quickstart import example_folder

NANO = preset("vchitect-nano")
EPSILON = 2**-4  # of e4m3: what rounding can do to one value


def plan_of(path: Path, policy: Policy, **fields: int) -> Path:
    entry = PlanEntry("4x32x16", (policy,) * NANO.num_layers, 2, 1, Prediction(1.0, {}, 1.0, {}, "made up"), **fields)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    Plan(NANO.fingerprint(), this_device().fingerprint(), "this machine", dtype, 16, (entry,)).save(path)
    return path


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    clips = [Clip(example_folder() / "bikes.mp4", s, s + 0.6, 15, 640, 272, 25.0, f"at {s}") for s in (0.1, 1.4)]
    write_manifest(clips, tmp_path / "clips.jsonl")
    config = TrainConfig(
        manifest=str(tmp_path / "clips.jsonl"), plan=str(plan_of(tmp_path / "plan.json", Policy.keep())), out="",
        model="vchitect-nano", cache=str(tmp_path / "cache"), steps=4, validate_every=0, save_every=2, learning_rate=1e-2,
    )  # fmt: skip
    config.save(tmp_path / "run.yaml")
    return tmp_path / "run.yaml"


def test_it_trains_close_to_the_run_without_it(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for name in ("plain", "fp8"):
        out = run_file.parent / name
        assert main(["train", str(run_file), f"out={out}", f"fp8_linears={name == 'fp8'}".lower()]) == 0
        losses.append([event["loss"] for event in read_log(out, "step")])
    assert "fp8 in the blocks" in capsys.readouterr().out
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=EPSILON)
    # It may go on without, and says so.
    assert main(["train", str(run_file), f"out={run_file.parent / 'fp8'}", "steps=5"]) == 0
    assert "fp8_linears: True -> False, from here on" in capsys.readouterr().out


def test_a_plan_with_chunks_is_refused_before_the_data(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(run_file.parent / "chunks.json", Policy.recompute(), num_chunks=2)
    out = run_file.parent / "refused"
    assert main(["train", str(run_file), f"out={out}", f"plan={plan}", "fp8_linears=true"]) == 2
    assert "of blocks that are computed whole, the Plan has chunks" in capsys.readouterr().err
