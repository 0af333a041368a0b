"""The mesh: what launchers say, which sizes are refused, who stands where, and that an error of one rank is everybody's.

pytest tests/parallel/test_mesh.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import mesh_calls
import pytest
import torch.distributed as dist
from ranks import ranks

from vchitect_fast.errors import UserError
from vchitect_fast.parallel.mesh import ALONE, Launch, Mesh, check_sizes, launched, nearest_meshes, read_launch

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "7", "SLURM_JOB_ID": "31234",
    "SLURM_STEP_ID": "2", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "gpu-[003-004]",
}  # fmt: skip


def sizes(dp_replicate: int, dp_shard: int, sp: int) -> dict[str, int]:
    return {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "sp": sp}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, None),
        (TORCHRUN, Launch(5, 8, 1, 4)),
        (SRUN, Launch(5, 7, 1, 3, ("gpu-003", 31236))),
        ({**SRUN, **TORCHRUN}, Launch(5, 8, 1, 4)),  # torchrun on each node, started by srun
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, None),  # the batch script itself
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2,4(x2)", "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "a[7,9]-ib,b"},
            Launch(5, 7, 1, 4, ("a7-ib", 31236)),
        ),
        ({**SRUN, "SLURM_STEP_NODELIST": "one,two", "MASTER_PORT": "77"}, Launch(5, 7, 1, 3, ("one", 77))),
        ({**SRUN, "MASTER_ADDR": "10.0.0.1"}, Launch(5, 7, 1, 3, ("10.0.0.1", 31236))),
    ],
)
def test_what_the_launcher_says(environ: dict[str, str], launch: Launch | None) -> None:
    assert read_launch(environ) == launch


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({**TORCHRUN, "LOCAL_RANK": ""}, "expected a number in LOCAL_RANK, got ''; start with torchrun, or with srun"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "expected a number in LOCAL_RANK"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "7"}, "expected the tasks of 2 or more nodes .* got '7'"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "expected node names in SLURM_STEP_NODELIST, got ''; set MASTER_ADDR"),
    ],
)
def test_half_an_environment_is_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_launch(environ)


@pytest.mark.parametrize(
    ("mesh", "world_size", "said"),
    [
        (sizes(1, 2, 4), 4, r"is for 8 ranks, here are 4; start 8, or plan one of .* of 4 ranks: .*1 x .*1 x sp 4; "),
        (sizes(1, 1, 8), 1, r"for 8 ranks, here is 1; .* of 1 rank: dp_replicate 1 x dp_shard 1 x sp 1\.$"),
        (sizes(1, 1, 1), 2, "is for 1 rank, here are 2; start 1, or"),
        ({"dp": 2, "sp": 1}, 2, "expected a mesh of dp_replicate, dp_shard, sp, .*got {'dp': 2, 'sp': 1}"),
        (sizes(0, 2, 1), 2, "from 1 up, got {'dp_replicate': 0"),
        ({**sizes(1, 1, 1), "sp": True}, 1, "whole number"),
    ],
)
def test_wrong_sizes_are_refused_with_the_nearest_right_ones(mesh: dict[str, int], world_size: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_sizes(mesh, world_size)


def test_nearest_meshes_have_the_right_product() -> None:
    found = nearest_meshes(sizes(2, 4, 4), 24, count=100)
    assert (
        len(found) == len({tuple(mesh.values()) for mesh in found}) == 40 - 10
    )  # 24 = 2^3 x 3: 10 x 3 ordered factorings
    assert all(mesh["dp_replicate"] * mesh["dp_shard"] * mesh["sp"] == 24 for mesh in found)
    assert found[0] in (sizes(2, 3, 4), sizes(2, 4, 3), sizes(1, 6, 4))  # a factor of 4 / 3 away


def test_one_process_without_a_launcher_has_no_torch_distributed() -> None:
    with launched(sizes(1, 1, 1), environ={}) as mesh:
        assert not dist.is_initialized()
        assert (mesh.world_size, mesh.num_dp, mesh.dp_rank, mesh.sp_rank, mesh.is_first) == (1, 1, 0, 0, True)
        assert mesh.axes is mesh.sp_group is mesh.fsdp is mesh.host_group is None
    with pytest.raises(UserError, match="for 2 ranks, here is 1"), launched(sizes(1, 2, 1), environ={}):
        pass


def test_the_table_and_the_equation() -> None:
    mesh = Mesh(sizes(1, 2, 4), local_world_size=4)
    assert mesh.table().splitlines() == [
        "8 ranks on 2 nodes: dp_replicate 1 x dp_shard 2 x sp 4",
        "ranks  dp_replicate  dp_shard  sp   node",
        "0-3    0             0         0-3  0",
        "4-7    0             1         0-3  1",
    ]
    assert mesh.equation(3, 5) == "samples a step 30 = microbatch 3 x accumulation 5 x dp_replicate 1 x dp_shard 2"
    assert ALONE.table().splitlines()[0] == "1 rank on 1 node: dp_replicate 1 x dp_shard 1 x sp 1"


def test_the_table_says_when_sp_groups_cross_nodes_and_stays_short() -> None:
    lines = Mesh(sizes(4, 16, 8), local_world_size=4).table().splitlines()
    assert lines[2] == "0-7      0             0         0-7  0-1"
    assert lines[-2:] == [
        "... and 48 more sp groups",
        "sp groups of 8 lie across nodes of 4 ranks: every block exchanges activations between nodes; an sp that divides 4 "
        "stays inside.",
    ]
    assert len(lines) == 20


def test_who_stands_where_on_eight_ranks() -> None:
    found = ranks(8).run("mesh_calls:place", sizes(2, 2, 2), "global")
    assert [(rank["dp"], rank["sp"]) for rank in found] == [(i // 2, i % 2) for i in range(8)]
    assert [rank["sp_group"] for rank in found] == [[i // 2 * 2, i // 2 * 2 + 1] for i in range(8)]
    assert [rank["sharded_over"] for rank in found] == [[0, 1, 2, 3]] * 4 + [[4, 5, 6, 7]] * 4
    assert all(rank["world"] == list(range(8)) for rank in found)


@pytest.mark.parametrize(
    ("mesh", "group", "per_node", "said"),
    [
        (sizes(1, 2, 1), "none", None, r"shards no parameters \(fsdp_group none\) and has dp_shard 2 and sp 1"),
        (sizes(1, 1, 2), "none", None, "use fsdp_group node or global"),
        (sizes(1, 2, 1), "node", 1, "dp_shard 2 x sp 1 = 2 ranks of one node, which has 1; .*fsdp_group global"),
        (sizes(1, 2, 1), "nodes", None, "unknown fsdp_group 'nodes'; did you mean 'node'"),
        (sizes(1, 2, 2), "global", None, "is for 4 ranks, here are 2"),
    ],
)
def test_a_group_that_the_sizes_cannot_have_is_refused(
    mesh: dict[str, int], group: str, per_node: int | None, said: str
) -> None:
    for found in ranks(2).run("mesh_calls:refused", mesh, group, per_node):
        with pytest.raises(UserError, match=said):
            raise UserError(found)


def test_ranks_agree_on_results_and_on_errors() -> None:
    zero, one = ranks(2).run("mesh_calls:agree")
    for rank, found in enumerate((zero, one)):
        assert (found["first"], found["all"], found["alone"]) == (10, rank + 10, rank)
        assert found["first_fails"] == "UserError: mend this."
        assert found["one_fails"] == "UserError: mend that."
        assert found["in_step"] == "still"
    assert zero["one_breaks"] == "RuntimeError: rank 1 failed: KeyError: 'x'"
    assert one["one_breaks"] == "KeyError: 'x'"


@pytest.mark.soak
def test_under_torchrun_the_mesh_is_said_and_a_lost_rank_ends_all_with_its_name() -> None:
    began = time.monotonic()
    tests = Path(mesh_calls.__file__).parent
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*command, str(tests / "mesh_calls.py")], capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )  # fmt: skip
    assert ended.stdout.splitlines() == [
        "2 ranks",
        "2 ranks on 1 node: dp_replicate 1 x dp_shard 1 x sp 2",
        "ranks  dp_replicate  dp_shard  sp   node",
        "0-1    0             0         0-1  0",
        "samples a step 4 = microbatch 1 x accumulation 4 x dp_replicate 1 x dp_shard 1",
    ]
    assert ended.returncode != 0 and time.monotonic() - began < 60
    assert "Signal 9 (SIGKILL)" in ended.stderr and "local_rank: 1" in ended.stderr.replace("(", "").replace(")", ""), (
        ended.stderr
    )
