"""train obeys a Plan that offloads or parks: the same weights bit by bit, and a Plan whose pool is too small is refused.

pytest tests/offload/test_train_offload.py; real clips, the nano model.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from offloading import NANO, TEXT_TOKENS, assert_same, loss_of, make_inputs, make_model, work_of
from torch import Tensor

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
from vchitect_fast.step import Step
from vchitect_fast.train import build_saving

pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")
PREDICTED = Prediction(1.0, {}, 1.0, {}, "made up for a test")


def plan_of(path: Path, policy: Policy, *, dtype: str = "float32", parked: tuple[str, ...] = (), **fields: int) -> Path:
    entry = PlanEntry("4x32x16", (policy,) * NANO.num_layers, 2, 2, PREDICTED, **fields)
    Plan(NANO.fingerprint(), this_device().fingerprint(), "this machine", dtype, 16, (entry,), parked=parked).save(path)
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


@pytest.mark.parametrize(("depth", "num_late"), [(0, 2), (1, 0), (2, 0)])
def test_the_first_bytes_are_on_their_way_before_a_block_asks_for_them(depth: int, num_late: int) -> None:
    """Blocks 0 and 1 moved, 2 to 4 keep everything: backward passes these first."""
    config = replace(NANO, num_layers=5)
    model, inputs = make_model(config=config), make_inputs(work_of(config=config))
    policies = (Policy(block_input="offload"),) * 2 + (Policy.keep(),) * 3
    plan = Plan(
        config.fingerprint(), "", "", "float32", TEXT_TOKENS, (PlanEntry("4x32x32", policies, 2, 1, PREDICTED),)
    )
    saving = model.saving = build_saving(plan, config, torch.device("cpu"))
    obey(model, plan.entries[0], ALONE)
    saving.depth = depth
    loss_of(model, inputs).backward()
    assert (saving.orders.num_late, saving.orders.num_ahead) == (num_late, 2 - num_late)


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


@pytest.mark.parametrize(("parked", "dtype"), [(("optimizer", "average"), "float32"), (("optimizer",), "bfloat16")])
def test_parked_states_train_to_the_same_bits_and_are_away_in_forward_and_backward(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, parked: tuple[str, ...], dtype: str
) -> None:
    """Through validation, samples, a checkpoint and a resume; with offloaded activations beside them."""
    folder, policy = run_file.parent, Policy("offload", "offload", "recompute", "keep", "recompute")
    kept, away = (
        plan_of(folder / f"{n}.json", policy, dtype=dtype, parked=p) for n, p in (("kept", ()), ("away", parked))
    )
    options = ["validate_every=2", "save_every=2", "sample_every=4"]
    assert main(["train", str(run_file), f"out={folder / 'kept'}", f"plan={kept}", "steps=4", *options]) == 0

    seen: list[tuple[dict[str, int], dict[str, int]]] = []  # bytes by part, in host memory and on the device
    microbatch = Step._microbatch

    def watched(self: Step, *args: Any) -> Tensor:
        loss, moments = microbatch(self, *args), [t for n, t in self.optimizer.state().items() if n[:5] != "step."]
        parts = {"optimizer": moments, "average": list(self.ema.average.values())}
        on_device = {name: sum(t.untyped_storage().nbytes() for t in tensors) for name, tensors in parts.items()}
        seen.append((self.states.parked_bytes(), on_device))
        return loss

    monkeypatch.setattr(Step, "_microbatch", watched)
    for steps in (2, 4):
        assert main(["train", str(run_file), f"out={folder / 'away'}", f"plan={away}", f"steps={steps}", *options]) == 0
    whole = {"optimizer": 8 * NANO.num_parameters(), "average": 4 * NANO.num_parameters()}
    on_device = {name: 0 if name in parked else num_bytes for name, num_bytes in whole.items()}
    assert seen == [({name: whole[name] for name in parked}, on_device)] * 8  # two microbatches a step

    ends = [checkpoint.load_prefix(checkpoint.latest(folder / name), "") for name in ("kept", "away")]
    assert_same(*ends)
    for kind in ("step", "validation"):
        losses = [[event["loss"] for event in read_log(folder / name, kind)] for name in ("kept", "away")]
        assert losses[0] == losses[1]
    assert len(list((folder / "away" / "samples").glob("*.mp4"))) > 0
