"""`autotune export`: the files of all four targets read back, LiteGen's blocks by its own loop, what is not said, refusals.

pytest tests/autotune/test_export.py; no torch.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from vchitect_fast.autotune.export import add_arguments, export, run
from vchitect_fast.autotune.formats import TARGETS, litegen
from vchitect_fast.errors import UserError
from vchitect_fast.offload.policy import from_selective_ratio, litegen_recomputed
from vchitect_fast.plan import OFFLOAD, RECOMPUTE, Plan, PlanEntry, Policy, Prediction, ShardSpec

KEEP, AGAIN = Policy.keep(), Policy.recompute()
MOVED = replace(AGAIN, block_input=OFFLOAD)
HEADS = ShardSpec("tokens", spatial="heads")
FRAMES = ShardSpec("frames", temporal="tokens")
PREDICTED = Prediction(1.0, {"forward_s": 1.0}, 1.0, {}, "made up")
MESH = {"dp_replicate": 2, "dp_shard": 2, "sp": 4}


def entry(policy: tuple[Policy, ...], shape: str = "16x512x384", **others: Any) -> PlanEntry:
    values: dict[str, Any] = {"microbatch": 2, "accumulation": 3, "shard": HEADS, **others}
    return PlanEntry(shape, policy, predicted=PREDICTED, **values)


def plan(*entries: PlanEntry, mesh: dict[str, int] | None = None, **others: Any) -> Plan:
    values = {"fsdp_group": "global", "mesh": MESH if mesh is None else mesh, **others}
    return Plan("model", "device", "some GPU", "bfloat16", 333, entries, **values)


def read(made: Plan, target: str) -> Any:
    """The one file's values, through the text."""
    (file,) = export(made, target)
    if target != "torchtitan":
        return yaml.safe_load(file.text)
    lines = [line for line in file.text.splitlines() if not line.startswith("#")]
    return dict(line.partition(" ")[::2] for line in lines)


def test_litegen_reads_back_as_planned() -> None:
    made = plan(entry((MOVED,) * 4))
    assert read(made, "litegen") == {
        "sp_size": 4,
        "zero_degree": 3,
        "group_zero": True,
        "selective_ratio": 0.0,
        "ac_offload": True,
        "precision": "bf16",
        "grad_precision": "fp32",
        "global_batch_size": 2 * 3 * 4,
    }


@pytest.mark.parametrize(
    ("mesh", "zero_degree", "group_zero", "said"),
    [
        ({"dp_replicate": 1, "dp_shard": 1, "sp": 1}, 0, False, "with zero_degree 0 cast"),
        ({"dp_replicate": 8, "dp_shard": 1, "sp": 1}, 0, False, "with zero_degree 0 cast"),
        ({"dp_replicate": 1, "dp_shard": 4, "sp": 2}, 3, False, None),
        ({"dp_replicate": 2, "dp_shard": 2, "sp": 4}, 3, True, "on nodes of 8 devices only"),
    ],
)
def test_litegen_shards_over_all_or_over_a_node(
    mesh: dict[str, int], zero_degree: int, group_zero: bool, said: str | None
) -> None:
    one = litegen(made := plan(entry((KEEP,) * 4), mesh=mesh), made.entries[0])
    assert (one.values["zero_degree"], one.values["group_zero"]) == (zero_degree, group_zero)
    found = [sentence for sentence in one.unsaid if "devices only" in sentence or "zero_degree 0" in sentence]
    assert len(found) == (said is not None) and all(str(said) in sentence for sentence in found)


@pytest.mark.parametrize("num_blocks", [2, 7, 10, 24])
def test_litegen_recomputes_as_many_blocks_as_the_plan_wherever_they_lie(num_blocks: int) -> None:
    for num_again in range(num_blocks + 1):
        made = plan(entry((AGAIN,) * num_again + (KEEP,) * (num_blocks - num_again)))
        one = litegen(made, made.entries[0])
        theirs = litegen_recomputed(one.values["selective_ratio"], num_blocks)
        assert len(theirs) == num_again
        moved = any(sentence.startswith("which blocks") for sentence in one.unsaid)
        assert moved == (theirs != set(range(num_again)))


@pytest.mark.parametrize("num_blocks", [4, 10, 24])
def test_what_litegen_recomputes_under_a_ratio_comes_back_as_such_a_ratio(num_blocks: int) -> None:
    for percent in range(101):
        theirs = litegen_recomputed(percent / 100, num_blocks)
        policies = tuple(AGAIN if i in theirs else KEEP for i in range(num_blocks))
        one = litegen(made := plan(entry(policies)), made.entries[0])
        assert litegen_recomputed(one.values["selective_ratio"], num_blocks) == theirs
        assert not any(sentence.startswith("which blocks") for sentence in one.unsaid)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.2, 0.3, 1 / 3, 0.5, 0.7])
def test_policies_of_a_ratio_come_out_as_the_same_blocks(ratio: float) -> None:
    policies = from_selective_ratio(ratio, 24, "kept")
    one = litegen(made := plan(entry(policies)), made.entries[0])
    assert not any(sentence.startswith("which blocks") for sentence in one.unsaid)
    assert from_selective_ratio(one.values["selective_ratio"], 24, "kept") == policies


def test_a_block_by_activation_group_is_said_and_recomputed_whole() -> None:
    part = Policy(mlp_pre=RECOMPUTE)
    made = plan(entry((part, KEEP, part, part)))
    for target in TARGETS:
        (file,) = export(made, target)
        assert any(sentence.startswith("activation groups of blocks 0, 2-3") for sentence in file.unsaid), target
    assert litegen_recomputed(read(made, "litegen")["selective_ratio"], 4) == {0, 2, 3}
    assert "activation-checkpoint:full" in read(made, "torchtitan")


def test_torchtitan_flags_read_back_with_the_subcommand_last() -> None:
    made = plan(entry((AGAIN,) * 4))
    flags = read(made, "torchtitan")
    degrees = [
        int(flags[f"--parallelism.{name}_degree"]) for name in ("data_parallel_replicate", "data_parallel_shard")
    ]
    assert [*degrees, int(flags["--parallelism.context_parallel_degree"])] == [2, 2, 4]
    tokens = 16 * (512 // 16) * (384 // 16) + 333
    assert int(flags["--training.num_tokens_per_microbatch_per_dp_rank"]) == 2 * tokens
    assert int(flags["--training.num_tokens_per_train_step"]) == 2 * tokens * 3 * 4
    assert list(flags)[-1] == "activation-checkpoint:full"
    assert list(read(plan(entry((KEEP,) * 4)), "torchtitan"))[-1] == "activation-checkpoint:none"


@pytest.mark.parametrize(
    "mesh", [MESH, {"dp_replicate": 1, "dp_shard": 8, "sp": 1}, {"dp_replicate": 1, "dp_shard": 1, "sp": 1}]
)
def test_fastvideo_shards_over_the_ranks_of_sp_too(mesh: dict[str, int]) -> None:
    made = plan(entry((KEEP,) * 4, "16x512x384"), mesh=mesh)
    told = read(made, "fastvideo")["training"]
    ranks = told["distributed"]
    assert ranks["hsdp_replicate_dim"] * ranks["hsdp_shard_dim"] == ranks["num_gpus"] == math.prod(mesh.values())
    assert (ranks["sp_size"], ranks["tp_size"]) == (mesh["sp"], 1)
    assert told["loop"]["gradient_accumulation_steps"] == 3 and told["data"]["train_batch_size"] == 2
    assert (told["data"]["num_frames"], told["data"]["num_width"], told["data"]["num_height"]) == (16, 512, 384)
    assert told["model"]["enable_gradient_checkpointing_type"] is None


def test_automodel_counts_data_parallel_ranks_without_those_of_sp() -> None:
    told = read(plan(entry((AGAIN,) * 4)), "automodel")
    assert told["fsdp"] == {
        "tp_size": 1, "cp_size": 4, "pp_size": 1, "dp_replicate_size": 2, "dp_size": 4, "activation_checkpointing": True,
    }  # fmt: skip
    assert told["step_scheduler"] == {"global_batch_size": 24, "local_batch_size": 2}
    assert told["model"] == {"torch_dtype": "float32", "compute_dtype": "bfloat16"}


def test_automodel_has_replicas_alone_as_ddp_and_refuses_them_with_sp() -> None:
    told = read(plan(entry((AGAIN,) * 4), mesh={"dp_replicate": 4, "dp_shard": 1, "sp": 1}), "automodel")
    assert told["ddp"] == {"activation_checkpointing": True} and "fsdp" not in told
    with pytest.raises(UserError, match="dp_shard above 1 beside dp_replicate 4 and sp 2"):
        export(plan(entry((AGAIN,) * 4), mesh={"dp_replicate": 4, "dp_shard": 1, "sp": 2}), "automodel")


@pytest.mark.parametrize(
    ("changed", "targets", "sentence"),
    [
        ({"shard": FRAMES}, TARGETS, "sp cuts frames"),
        ({"shard": ShardSpec("tokens", spatial="frames")}, TARGETS, "sp cuts tokens, exchanged to frames"),
        ({"shard": HEADS}, ["torchtitan"], "sp cuts tokens, exchanged to heads"),
        ({"num_chunks": 4}, TARGETS, "num_chunks 4"),
        ({"attention": dict.fromkeys(("spatial", "temporal", "cross"), "triton")}, TARGETS, "attention backends"),
        ({"vae_mini_batch": 4}, ["litegen"], "micro_batch_size=4"),
        ({"policy": (MOVED,) * 4, "prefetch_depth": 2}, ["litegen"], "prefetch_depth 2"),
        ({"policy": (MOVED,) * 4, "offload_bytes": 2**31}, ["torchtitan", "fastvideo", "automodel"], "2.00 GiB"),
        ({"policy": (MOVED, AGAIN, AGAIN, KEEP)}, ["litegen"], "ac_offload moves those of every recomputed block"),
        ({"policy": (AGAIN, KEEP, KEEP, KEEP)}, ["torchtitan", "fastvideo", "automodel"], "3 of 4 blocks kept (blocks 1-3)"),
        ({"accumulation": 3}, ["litegen"], "LiteGen accumulates nothing, its loader gives 6"),
    ],
)  # fmt: skip
def test_what_a_target_cannot_be_told_is_on_top_of_its_file(
    changed: dict[str, Any], targets: list[str], sentence: str
) -> None:
    made = plan(replace(entry((KEEP,) * 4, accumulation=1), **changed))
    for target in TARGETS:
        (file,) = export(made, target)
        assert any(sentence in said for said in file.unsaid) == (target in targets), target
        header = " ".join(line.removeprefix("#").strip() for line in file.text.splitlines() if line.startswith("#"))
        assert all(said in header for said in file.unsaid)


def test_states_in_host_memory_are_said() -> None:
    made = plan(entry((KEEP,) * 4), parked=("optimizer",))
    assert all(any("optimizer in host memory" in said for said in export(made, name)[0].unsaid) for name in TARGETS)


def test_shapes_with_one_answer_share_a_file_and_others_get_their_own(tmp_path: Path) -> None:
    short, long = entry((KEEP,) * 4), entry((KEEP,) * 4, "32x512x384")
    (file,) = export(plan(short, long), "litegen", tmp_path / "all.yaml")
    assert file.shapes == ("16x512x384", "32x512x384") and file.path.name == "all.yaml"
    files = export(plan(short, replace(long, policy=(AGAIN,) * 4)), "litegen", tmp_path / "all.yaml")
    assert [item.path.name for item in files] == ["all-16x512x384.yaml", "all-32x512x384.yaml"]
    assert [yaml.safe_load(item.text)["selective_ratio"] for item in files] == [1.0, 0.0]


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", default="plan.json")
    parser.add_argument("--json", action="store_true")
    add_arguments(parser)
    return parser.parse_args(words)


def test_the_verb_writes_and_says_and_overwrites_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan(entry((MOVED,) * 4, shard=FRAMES)).save("plan.json")
    assert run(arguments("--format", "litegen")) == 0
    printed = capsys.readouterr().out
    assert "wrote litegen.yaml for 16x512x384" in printed and "sp cuts frames" in printed
    assert run(arguments("--format", "litegen", "--json")) == 0  # over its own
    (row,) = json.loads(capsys.readouterr().out)
    assert row["path"] == "litegen.yaml" and any("sp cuts frames" in said for said in row["unsaid"])
    Path("mine.yaml").write_text("sp_size: 1\n")
    with pytest.raises(UserError, match="not made by this command"):
        run(arguments("--format", "litegen", "--to", "mine.yaml"))
    assert Path("mine.yaml").read_text() == "sp_size: 1\n"


def test_mistakes() -> None:
    with pytest.raises(UserError, match="which format to export to is missing"):
        run(arguments())
    with pytest.raises(UserError, match="did you mean 'litegen'"):
        export(plan(entry((KEEP,) * 4)), "liteegn")
