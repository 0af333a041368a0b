"""`vchitect-fast memory explain`: predicted is measured byte for byte, the table and the picture say so, mistakes are named.

pytest tests/offload/test_memory_explain.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from offloading import ALL, NANO
from ranks import ranks
from sequence_cases import FRAMES, HEADS, ROWS

from vchitect_fast.architecture import preset
from vchitect_fast.cli import main
from vchitect_fast.machine import this_device
from vchitect_fast.plan import PARKABLE, Plan, PlanEntry, Policy, Prediction

pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")
MIXED = (ALL, Policy("keep", "recompute", "keep", "offload", "offload"))


def plan_of(folder: Path, model: str, shape: str, policies: tuple[Policy, ...], **fields: Any) -> Path:
    config, device = preset(model), this_device()
    entry = PlanEntry(shape, policies, 2, 1, Prediction(1.0, {}, 1.0, {}, "made up for a test"))
    path = folder / "plan.json"
    plan = Plan(
        config.fingerprint(), device.fingerprint(), device.name, "float32", 5, (entry,),
        device_threads=device.num_threads, **fields,
    )  # fmt: skip
    plan.save(path)
    return path


@pytest.mark.parametrize("policies", [MIXED, (Policy.recompute(), Policy.keep())], ids=["mixed", "whole"])
def test_every_group_of_every_block_is_predicted_exactly(
    policies: tuple[Policy, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(tmp_path, "vchitect-nano", "4x32x32", policies)
    assert main(["memory", "explain", "--plan", str(plan), "--model", "vchitect-nano", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    saved = [row for row in found["rows"] if row["action"] != "recompute"]
    assert saved and all(row["predicted_bytes"] == row["measured_bytes"] > 0 for row in saved)
    again = [row for row in found["rows"] if row["action"] == "recompute"]
    assert again and all(row["measured_bytes"] is None for row in again)
    for action in ("keep", "offload"):
        assert found["totals"][action]["predicted_bytes"] == found["totals"][action]["measured_bytes"]
    if policies == MIXED:
        # the last block keeps its mlp_pre and stats, which it was to offload, and the first is fetched ahead only by itself
        assert {row["action"] for row in found["rows"] if row["block"] == 1} == {"keep", "recompute"}
        assert found["engine"]["high_water_bytes"] == found["engine"]["budget_bytes"] > 0


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, picture = plan_of(tmp_path, "vchitect-nano", "4x32x32", MIXED), tmp_path / "memory.svg"
    command = ["memory", "explain", "--plan", str(plan), "--model", "vchitect-nano", "--picture", str(picture)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for words in ("block_input", "moved", "kept", "not saved", "+0 B", "recomputed: predicted", "pool:", "wrote"):
        assert words in printed
    drawn = picture.read_text()
    assert drawn.startswith("<?xml") and "<svg" in drawn
    assert main([*command[:-1], str(tmp_path / "memory.png"), "--no-run"]) == 0
    assert "not measured" in capsys.readouterr().out
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_2b_model_is_explained_without_running_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = (Policy("offload", "recompute", "recompute", "recompute", "recompute"),) * 24
    plan = plan_of(tmp_path, "vchitect-2b", "40x768x432", policies)
    assert main(["memory", "explain", "--plan", str(plan), "--model", "vchitect-2b", "--no-run"]) == 0
    printed = capsys.readouterr().out
    assert "1 to 22" in printed and "not measured" in printed
    assert main(["memory", "explain", "--plan", str(plan), "--model", "vchitect-2b", "--no-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engine"] is None


def test_parked_states_stand_beside_the_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the byte, in the table and as bars of their own; the blocks' bytes are the same as without."""
    found = {}
    for parked in ((), ("optimizer", "average")):
        plan = plan_of(tmp_path, "vchitect-nano", "4x32x32", MIXED, parked=parked)
        assert main(["memory", "explain", "--plan", str(plan), "--model", "vchitect-nano", "--json"]) == 0
        found[parked] = json.loads(capsys.readouterr().out)
    assert found[()]["parked"] == []
    assert found[parked]["rows"] == found[()]["rows"]
    number = NANO.num_parameters()
    sizes = {row["name"]: (row["predicted_bytes"], row["measured_bytes"]) for row in found[parked]["parked"]}
    assert sizes == {"optimizer": (8 * number,) * 2, "average": (4 * number,) * 2}
    picture = tmp_path / "memory.svg"
    command = ["memory", "explain", "--plan", str(plan), "--model", "vchitect-nano", "--picture", str(picture)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    [optimizer] = [line.split() for line in lines if "optimizer" in line]
    assert optimizer[:3] == ["state", "optimizer", "parked"] and optimizer[-2:] == ["+0", "B"]
    assert any(line.startswith("parked: predicted") for line in lines)
    assert "MiB of a block or of a parked state, predicted" in picture.read_text()


def test_on_ranks_the_first_one_is_predicted_exactly(tmp_path: Path) -> None:
    """Shares of the sequence, what exchanges bring, and shards of the parked states, uneven all of them."""
    config = replace(NANO, num_layers=4, num_attention_heads=3, caption_projection_dim=24)
    moves, keeps = (
        (ALL, MIXED[1], Policy.keep(), ALL),
        (Policy.keep(), Policy.recompute(), Policy.keep(), Policy.keep()),
    )
    plan = Plan.load(
        plan_of(
            tmp_path,
            "vchitect-nano",
            "4x32x48",
            moves,
            mesh={"dp_replicate": 1, "dp_shard": 1, "sp": 3},
            fsdp_group="global",
        )
    )
    plans = [
        replace(plan, parked=parked, entries=(replace(plan.entries[0], shard=shard, policy=policy),))
        for shard, policy, parked in ((FRAMES, moves, ()), (HEADS, moves, PARKABLE), (ROWS, keeps, PARKABLE))
    ]
    first = ranks(3).run("train_calls:explained", plans, config)[0]
    for plan, found in zip(plans, first, strict=True):
        [entry] = plan.entries
        rows = [*found["rows"], *found["parked"]]
        assert len({row["block"] for row in found["rows"]}) == config.num_layers
        wrong = [
            r for r in rows if r.get("action") != "recompute" and not r["predicted_bytes"] == r["measured_bytes"] > 0
        ]
        assert not wrong, (entry.shard, wrong)
        engine = found["engine"]
        if entry.policy == moves:
            assert engine["high_water_bytes"] == engine["budget_bytes"] > 0
        parked = {row["name"]: row["measured_bytes"] for row in found["parked"]}
        assert parked.keys() == set(plan.parked)
        if parked:  # 64 rows make 22, 22 and 20
            assert parked["optimizer"] == 2 * parked["average"] > 8 * config.num_parameters() // 3


def test_one_process_measures_no_plan_for_many_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"dp_replicate": 1, "dp_shard": 2, "sp": 2}
    path = plan_of(tmp_path, "vchitect-nano", "4x32x32", MIXED, mesh=sizes, fsdp_group="global", parked=("average",))
    plan = Plan.load(path)
    replace(plan, entries=(replace(plan.entries[0], shard=FRAMES),)).save(path)
    command = ["memory", "explain", "--plan", str(path), "--model", "vchitect-nano"]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "for 4 ranks and one process cannot run its part alone; add --no-run" in said
    assert "torchrun --nproc-per-node=4 -m vchitect_fast.cli memory explain" in said
    assert main([*command, "--no-run"]) == 0
    assert "4x32x32, 2 samples, float32, the first of 4 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vchitect-tiny"], "is for model .* name its model"),
        (["--model", "vchitect-nano", "--shape", "8x32x32"], "has no entry for 8x32x32"),
        (["--model", "vchitect-nano", "--picture", "memory.pdf"], "ends in .svg or .png, got memory.pdf"),
        (["--model", "vchitect-nano", "--plan", "nowhere.json"], "cannot read the Plan nowhere.json"),
    ],
)
def test_mistakes(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path, "vchitect-nano", "4x32x32", MIXED)
    assert main(["memory", "explain", "--plan", str(plan), *options]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)


def test_a_step_that_does_not_fit_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(tmp_path, "vchitect-nano", "4x32x32", (Policy.keep(),) * NANO.num_layers)
    monkeypatch.setattr("vchitect_fast.memory.available_memory_bytes", lambda: 1000)
    assert main(["memory", "explain", "--plan", str(plan), "--model", "vchitect-nano"]) == 2
    assert "add --no-run to predict only" in capsys.readouterr().err
