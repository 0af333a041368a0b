"""train obeys a Plan that offloads: the same weights bit by bit, and a Plan whose pool is too small is refused.

pytest tests/offload/test_train_offload.py; real clips, the nano model.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from offloading import NANO, TEXT_TOKENS, loss_of, make_inputs, make_model, work_of

from vchitect_fast import checkpoint
from vchitect_fast.cli import main
from vchitect_fast.config import TrainConfig
from vchitect_fast.machine import this_device
from vchitect_fast.manifest import Clip, write_manifest
from vchitect_fast.metrics import read_log
from vchitect_fast.parallel.apply import obey
from vchitect_fast.parallel.mesh import ALONE
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction
from vchitect_fast.quickstart import example_folder
from vchitect_fast.train import build_saving

pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")
PREDICTED = Prediction(1.0, {}, 1.0, {}, "made up for a test")


def plan_of(path: Path, policy: Policy, **fields: int) -> Path:
    entry = PlanEntry("4x32x16", (policy,) * NANO.num_layers, 2, 2, PREDICTED, **fields)
    Plan(NANO.fingerprint(), this_device().fingerprint(), "this machine", "float32", 16, (entry,)).save(path)
    return path


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """run.yaml of three steps of two microbatches."""
    video = example_folder() / "bikes.mp4"
    write_manifest(
        [Clip(video, s, s + 0.6, 15, 640, 272, 25.0, f"at {s}") for s in (0.1, 1.4)], tmp_path / "clips.jsonl"
    )
    config = TrainConfig(
        manifest=str(tmp_path / "clips.jsonl"), plan=str(plan_of(tmp_path / "plan.json", Policy.keep())), out="",
        model="vchitect-nano", cache=str(tmp_path / "cache"), steps=3, validate_every=0, save_every=3, learning_rate=1e-2,
    )  # fmt: skip
    config.save(tmp_path / "run.yaml")
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(
    "policy",
    [
        Policy("offload", "offload", "recompute", "keep", "recompute"),
        Policy("offload", "recompute", "recompute", "recompute", "recompute"),
    ],
    ids=["groups", "block input"],
)
def test_a_plan_that_offloads_trains_to_the_same_weights(run_file: Path, policy: Policy) -> None:
    folder = run_file.parent
    plan_of(folder / "offload.json", policy)
    ends = []
    for name, plan in (("kept", "plan.json"), ("moved", "offload.json")):
        assert main(["train", str(run_file), f"out={folder / name}", f"plan={folder / plan}"]) == 0
        ends.append(checkpoint.load_prefix(checkpoint.latest(folder / name), ""))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_each_shape_fetches_as_far_ahead_as_its_entry_says() -> None:
    """When backward first asks for moved bytes, those of so many blocks more are on their way."""
    config = replace(NANO, num_layers=5)
    model, inputs = make_model(config=config), make_inputs(work_of(config=config))
    policies = (Policy(block_input="offload"),) * config.num_layers
    entries = [PlanEntry("4x32x32", policies, 2, 1, PREDICTED, prefetch_depth=depth) for depth in (1, 3)]
    plan = Plan(config.fingerprint(), "", "", "float32", TEXT_TOKENS, tuple(entries))
    saving = model.saving = build_saving(plan, config, torch.device("cpu"))
    assert saving.engine is not None
    fetch, restore, order = saving.engine.fetch, saving.engine.restore, list[str]()
    saving.engine.fetch = lambda entry: order.append(entry.label) or fetch(entry)
    saving.engine.restore = lambda handle: order.append("restore") or restore(handle)
    for entry in entries:
        order.clear()
        obey(model, entry, ALONE)
        loss_of(model, inputs).backward()
        ahead = {label.split()[-1] for label in order[: order.index("restore")]}
        assert ahead == {str(3 - back) for back in range(1 + entry.prefetch_depth)}  # block 4 is the last and stays


def test_a_plan_in_chunks_trains_to_nearly_the_same_loss(run_file: Path) -> None:
    folder, ends = run_file.parent, []
    recompute = Policy("offload", "recompute", "recompute", "recompute", "recompute")
    plan_of(folder / "chunks.json", recompute, num_chunks=2)
    for name, plan in (("whole", "plan.json"), ("chunks", "chunks.json")):
        assert main(["train", str(run_file), f"out={folder / name}", f"plan={folder / plan}"]) == 0
        ends.append([event["loss"] for event in read_log(folder / name, "step")])
    # before the first update the two differ by the order of sums over 2 x 4 x 16 x 2 x 4 latents only
    assert ends[0][0] == pytest.approx(ends[1][0], rel=torch.finfo(torch.float32).eps * math.sqrt(1024))
    assert len(ends[0]) == len(ends[1]) == 3


def test_a_plan_whose_offload_bytes_are_too_few_is_refused(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(run_file.parent / "small.json", Policy(qkv="offload"), offload_bytes=4096)
    assert json.loads(plan.read_text())["entries"][0]["offload_bytes"] == 4096
    assert main(["train", str(run_file), f"out={run_file.parent / 'run'}", f"plan={plan}"]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    # 16 visual rows x 7 and 128 text rows x 3, 16 wide, in fp32
    assert "offloads 31744 bytes a microbatch and its offload_bytes is 4096; set it to 0" in printed
