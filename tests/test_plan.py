"""The Plan: read back as written, refused when its inputs were edited or when it was made for something else.

pytest tests/test_plan.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vchitect_fast.cluster import Device
from vchitect_fast.errors import UserError
from vchitect_fast.plan import Comparison, Plan, PlanEntry, Policy, Prediction, ShardSpec
from vchitect_fast.shapes import VideoShape

PREDICTED = Prediction(
    step_s=1.25, step_parts_s={"forward_s": 0.3, "backward_s": 0.6, "recompute_s": 0.25, "optimizer_s": 0.1},
    peak_gib=2.5, peak_parts_gib={"weights": 1.0, "activations": 1.5}, confidence="10 %, from 3 sizes",
)  # fmt: skip

# No field at its default, so that a field that is not written or not read shows.
ENTRY = PlanEntry(
    shape="8x96x64", policy=(Policy.keep(), Policy.recompute(), Policy(qkv="offload")), microbatch=3, accumulation=2,
    predicted=PREDICTED, shard=ShardSpec("tokens", spatial="heads"), offload_bytes=12345, prefetch_depth=3,
    num_chunks=4, vae_mini_batch=5, attention={"spatial": "math", "temporal": "sdpa", "cross": "math"},
    runners_up=({"choice": "keep all", "step_s": 1.5, "peak_gib": 3.0, "why": "0.5 GiB too large"},),
)  # fmt: skip
PLAN = Plan(
    model="0123456789ab", device="ba9876543210", device_name="made-up CPU", compute_dtype="bfloat16", num_text_tokens=77,
    entries=(ENTRY, replace(ENTRY, shape="1x128x128")), peak_flops=1.5e11, mesh={"dp_replicate": 2, "dp_shard": 4, "sp": 8},
    fsdp_group="node", parked=("average", "optimizer"), device_threads=2, device_gib=16,
    limit_bytes=14 * 2**30,
)  # fmt: skip


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_from_before_there_was_parking_a_depth_or_a_limit_is_read(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")

    def age(plan: dict[str, Any]) -> None:
        del (
            plan["parked"],
            plan["limit_bytes"],
            plan["entries"][0]["prefetch_depth"],
            plan["entries"][1]["prefetch_depth"],
        )

    edit(tmp_path / "plan.json", age)
    entries = tuple(replace(entry, prefetch_depth=1) for entry in PLAN.entries)
    assert Plan.load(tmp_path / "plan.json") == replace(PLAN, parked=(), entries=entries, limit_bytes=None)


def test_the_digest_follows_every_input_and_nothing_else() -> None:
    changed = [
        replace(PLAN, model="other"),
        replace(PLAN, device="other"),
        replace(PLAN, compute_dtype="float32"),
        replace(PLAN, num_text_tokens=78),
        replace(PLAN, entries=PLAN.entries[:1]),
        replace(PLAN, entries=PLAN.entries[::-1]),
        replace(PLAN, entries=(replace(ENTRY, shape="8x64x96"), PLAN.entries[1])),
    ]
    assert len({plan.digest() for plan in [PLAN, *changed]}) == len(changed) + 1
    decision = replace(PLAN, entries=(replace(ENTRY, microbatch=1), PLAN.entries[1]))
    assert decision.digest() == PLAN.digest()  # an answer may be tried by hand, the question may not be changed


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(model="other"),
        lambda plan: plan.update(num_text_tokens=78),
        lambda plan: plan["entries"][0].update(shape="8x64x96"),
        lambda plan: plan["entries"].pop(),
        lambda plan: plan.update(hash="0" * 16),
        lambda plan: plan.pop("hash"),
    ],
)
def test_edited_inputs_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    edit(path, change)
    with pytest.raises(UserError, match="were edited"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: plan.update(schema_version=2), "expected a Plan of schema 1, got 2"),
        (lambda plan: plan.pop("schema_version"), "expected a Plan of schema 1, got None"),
        (lambda plan: plan.pop("entries"), "is not a Plan"),
        (lambda plan: plan.update(entries=["8x96x64"]), "is not a Plan"),
        (lambda plan: plan.update(colour="red"), "is not a Plan .*colour"),
        (lambda plan: plan["entries"][0].pop("microbatch"), "is not a Plan .*microbatch"),
        (lambda plan: plan["entries"][0]["policy"][0].update(qkv="forget"), "unknown policy of qkv 'forget'"),
        (
            lambda plan: plan["entries"][0].update(microbatch=0),
            "microbatch of the Plan's 8x96x64 must be .* got 0; plan it",
        ),
        (lambda plan: plan["entries"][0].update(accumulation=1.5), "accumulation of .* got 1.5"),
        (lambda plan: plan["entries"][0].update(num_chunks=-1), "num_chunks of .* got -1"),
        (lambda plan: plan["entries"][0].update(prefetch_depth=0), "prefetch_depth of .* got 0"),
        (lambda plan: plan.update(limit_bytes=0.9), "limit_bytes of a Plan .* got 0.9"),
        (lambda plan: plan.update(parked=["averages"]), "unknown parked state of a Plan 'averages'; .*'average'"),
        (
            lambda plan: plan.update(parked=["average", "average"]),
            "each parked state of a Plan once, got average, average",
        ),
        (lambda plan: plan.update(parked="average"), "is not a Plan .*parked must be a list of names, got 'average'"),
        (
            lambda plan: plan["entries"][1].update(vae_mini_batch=True),
            "vae_mini_batch of the Plan's 1x128x128 .* got True",
        ),
        (
            lambda plan: plan["entries"][0].update(attention={"spatial": "sdpa"}),
            "attention of .* spatial, temporal, cross",
        ),
        (lambda plan: plan["entries"][0]["attention"].update(time="sdpa"), "attention of .* spatial, temporal, cross"),
        (lambda plan: plan["entries"][0].update(attention="sdpa"), "attention of .* got 'sdpa'"),
    ],
)
def test_a_file_that_is_not_a_plan_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    edit(path, change)
    with pytest.raises(UserError, match=said):
        Plan.load(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b'{"schema_version": 1', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "expected a Plan of schema 1, got None"),
    ],
)
def test_a_file_that_is_not_json_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        Plan.load(tmp_path / "plan.json")
    assert str(tmp_path / "plan.json") in str(caught.value)
    assert "--out" not in str(caught.value)  # the file is somebody's


def test_an_absent_plan_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file.*vchitect-fast autotune --out"):
        Plan.load(tmp_path / "plan.json")


def test_a_folder_is_not_proposed_as_the_place_of_a_plan(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the Plan .*Is a directory") as caught:
        Plan.load(tmp_path)
    assert "--out" not in str(caught.value)


@pytest.mark.parametrize("content", ["# my readme", "", "[1]", '{"schema_version": 1, "device": {}}'])
def test_only_a_plan_is_overwritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine"
    path.write_text(content)
    with pytest.raises(UserError, match="is there and is not a Plan, it is left as it was; choose another --out"):
        PLAN.save(path)
    assert path.read_text() == content
    with pytest.raises(UserError, match="is not a Plan"):
        PLAN.save(tmp_path)
    PLAN.save(tmp_path / "plan.json")
    edit(tmp_path / "plan.json", lambda plan: plan.update(schema_version=0))  # of an older version of ours
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN


def test_what_differs_of_the_device_is_said() -> None:
    made_for = Device("made-up CPU", "cpu", 16 * 2**30, num_threads=2)
    plan = replace(PLAN, device=made_for.fingerprint())
    plan.check(model=PLAN.model, device=made_for)

    def refused(plan: Plan, device: Device) -> str:
        with pytest.raises(UserError) as caught:
            plan.check(model=PLAN.model, device=device)
        return str(caught.value)

    start = "this Plan is for device 'made-up CPU' with 16 GiB and 2 threads, this is "
    again = "run `vchitect-fast autotune` on this machine."
    one_thread = replace(made_for, num_threads=1)
    assert refused(plan, one_thread) == (
        f"{start}'made-up CPU' with 16 GiB and 1 thread; set OMP_NUM_THREADS=2, or {again}"
    )
    assert refused(plan, replace(one_thread, name="other")) == f"{start}'other' with 16 GiB and 1 thread; {again}"
    assert (
        refused(plan, replace(made_for, memory_bytes=2**33))
        == f"{start}'made-up CPU' with 8 GiB and 2 threads; {again}"
    )
    assert one_thread.fingerprint() in refused(replace(plan, device_threads=None), one_thread)  # of an older Plan


def test_another_model_or_device_is_refused_and_named() -> None:
    PLAN.check(model=PLAN.model, device=PLAN.device)
    with pytest.raises(UserError, match="for model 0123456789ab, the run has model other;"):
        PLAN.check(model="other", device=PLAN.device)
    with pytest.raises(UserError, match=r"for device 'made-up CPU' \(ba9876543210\), this is other;"):
        PLAN.check(model=PLAN.model, device="other")


def test_entries_are_found_by_shape() -> None:
    assert PLAN.entry(VideoShape(1, 128, 128)) is PLAN.entries[1]
    assert PLAN.entries[1].video_shape == VideoShape(1, 128, 128)
    with pytest.raises(UserError, match="no entry for 8x64x96, only 8x96x64, 1x128x128; .*--shapes 8x64x96"):
        PLAN.entry(VideoShape(8, 64, 96))


def test_an_entry_counts_its_recomputed_blocks() -> None:
    assert ENTRY.num_recomputed == 1
    assert replace(ENTRY, policy=(Policy.recompute(), Policy(mlp_pre="recompute"))).num_recomputed == 2


@pytest.mark.parametrize("group", ["block_input", "qkv", "branch_out", "mlp_pre", "stats"])
def test_a_policy_knows_its_actions(group: str) -> None:
    with pytest.raises(UserError, match=f"unknown policy of {group} 'recompote'; did you mean 'recompute'"):
        Policy(**{group: "recompote"})
    assert getattr(Policy(**{group: "offload"}), group) == "offload"


def test_the_input_of_a_block_cannot_be_recomputed() -> None:
    with pytest.raises(UserError, match="keep or offload it"):
        Policy(block_input="recompute")
    assert Policy.recompute().block_input == "keep"


def test_a_prediction_is_set_against_what_was_measured() -> None:
    measured = {"step_s": 1.0, "backward_s": 1.0, "optimizer_s": 0.0, "peak_gib": 5.0, "data_s": 9.0}
    found = {item.name: item for item in PREDICTED.against(measured)}
    assert found.keys() == {"step_s", "backward_s", "optimizer_s", "peak_gib"}  # forward_s was not measured
    assert found["backward_s"].predicted == 0.6 + 0.25  # recomputation happens inside the measured backward
    assert found["step_s"] == Comparison("step_s", predicted=1.25, measured=1.0)
    assert found["step_s"].error == 0.25
    assert found["peak_gib"].error == -0.5
    assert found["optimizer_s"].error is None
    assert "recompute_s" in PREDICTED.step_parts_s  # the prediction itself is untouched
