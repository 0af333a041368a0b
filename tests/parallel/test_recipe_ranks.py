"""A recipe on two ranks under torchrun: its stages join the ranks anew, each with a mesh of its own, and hand over in shards.

pytest tests/parallel/test_recipe_ranks.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from recipes import edited, plan_of, write_recipe
from test_train import final

from vchitect_fast.metrics import read_log
from vchitect_fast.plan import Plan, ShardSpec

RATE = 1e-30
ADAM = 10.0  # an update of AdamW is at most 1 / sqrt(1 - beta2) rates (Kingma and Ba 2015, section 2.1), beta2 = 0.99


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Plans are for a device of one thread, as the ranks are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_two_ranks(recipe: Path) -> str:
    """What `torchrun --nproc-per-node=2 -m vchitect_fast.train RECIPE` prints; it must end well."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [sys.executable, "-P", *launcher, "-m", "vchitect_fast.train", str(recipe)],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.soak
def test_stages_of_other_meshes_hand_over_weights_and_moments(tmp_path: Path) -> None:
    """Parameters in shards by dp_shard, then by sp: at a rate of next to nothing the second stage has the first one's bits."""
    path = write_recipe(tmp_path)
    edited(path, None, stages=yaml.safe_load(path.read_text())["stages"][:2])
    edited(path, 0, batch=4, steps=3, mesh={"dp_shard": 2})
    edited(path, 1, steps=2, mesh={"sp": 2}, learning_rate=RATE, weight_decay=0.0)
    one = {"dp_replicate": 1, "dp_shard": 1, "sp": 1}
    plan_of(tmp_path / "image.json", "1x32x16", mesh=one | {"dp_shard": 2}, fsdp_group="global")
    plan = Plan.load(plan_of(tmp_path / "short.json", "4x32x16", mesh=one | {"sp": 2}, fsdp_group="global"))
    frames = replace(plan.entries[0], shard=ShardSpec("frames", temporal="tokens"))
    replace(plan, entries=(frames,)).save(tmp_path / "short.json")

    assert on_two_ranks(path).count("stage 2 of 2: short") == 1, "one rank speaks"
    image, short = (tmp_path / "out" / name for name in ("01-image", "02-short"))
    assert [len(read_log(folder, "step")) for folder in (image, short)] == [3, 2]
    records = [json.loads((folder / "stage.json").read_text()) for folder in (image, short)]
    assert [(record["num_ranks"], record["step"]) for record in records] == [(2, 3), (2, 2)]
    assert records[0]["shapes"]["1x32x16"]["num_samples"] == 12
    assert records[1]["shapes"]["4x32x16"]["num_samples"] == 4
    before, after = final(image), final(short)
    assert before.keys() == after.keys()
    weights = [name for name in before if name.startswith("model.")]
    moved = max(float((before[name] - after[name]).abs().max()) for name in weights)
    assert moved <= 2 * RATE * ADAM  # seen only where a weight is still 0
    step = "optimizer.step.proj_out.weight"
    assert after[step].item() == before[step].item() + 2 == 5
