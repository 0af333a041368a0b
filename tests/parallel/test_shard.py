"""Sharded training is the training of one process: losses, gradients, norms, masters, states and averages of three steps.

pytest tests/parallel/test_shard.py; what the ranks do is in shard_cases.py
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import shard_cases
import torch
from close import assert_close_to_exact
from offloading import ALL, INPUT, NANO, work_of
from ranks import ranks
from torch import Tensor, nn

from vchitect_fast.autotune.memory import GATHERED, parked_bytes, states_bytes
from vchitect_fast.errors import UserError
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.parallel.mesh import ALONE
from vchitect_fast.parallel.shard import global_norm, reduce_gradients, repeated_blocks, shard, shard_frozen
from vchitect_fast.plan import Policy

KEEP, RECOMPUTE = Policy.keep(), Policy.recompute()
MIXED = Policy("keep", "offload", "recompute", "keep", "recompute")
TOLERANCE = 1e-10  # of the largest element of a tensor; fp64 rounds at 1e-16

# dp_replicate x dp_shard x sp, samples a microbatch, microbatches a step, and more
CASES: list[tuple[tuple[int, int, int], int, int, dict[str, Any]]] = [
    ((1, 2, 1), 1, 2, {}),
    ((1, 1, 2), 2, 2, {"policy": (RECOMPUTE, KEEP)}),
    ((2, 1, 1), 1, 2, {"fsdp_group": "none"}),
    ((1, 2, 1), 2, 1, {"policy": (ALL, MIXED)}),
    ((1, 3, 1), 1, 1, {}),  # no size of the model is a multiple of 3
    ((2, 2, 1), 1, 2, {"keep_gathered": True}),
    ((2, 1, 2), 2, 1, {"policy": (INPUT, RECOMPUTE)}),
    ((1, 2, 2), 1, 2, {"policy": (MIXED, ALL), "keep_gathered": True}),
    ((1, 2, 1), 1, 2, {"kernels": "reference"}),  # hand-written blocks: the same answer to rounding
    ((1, 2, 2), 1, 2, {"kernels": "reference", "policy": (MIXED, ALL)}),
    ((1, 2, 1), 1, 2, {"num_chunks": 2, "policy": (RECOMPUTE, INPUT)}),
]


@cache
def alone(B: int, accumulation: int, dtype: str = "float64", compute_dtype: str = "float64") -> dict[str, Any]:
    """One process without torch.distributed, all Policies keep."""
    case = {"B": B, "accumulation": accumulation, "dtype": dtype, "compute_dtype": compute_dtype}
    return shard_cases.train(ALONE, case)


def assert_equal_to_rounding(found: dict[str, Tensor], expected: dict[str, Tensor], zero: float = 0.0) -> None:
    """zero: what counts as rounding in a tensor of nothing else, such as the gradient of a bias before a softmax."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).abs().max()
        assert error <= TOLERANCE * tensor.abs().max() + zero, f"{name}: {error:.1e}, largest {tensor.abs().max():.1e}"


@pytest.mark.parametrize(("mesh", "B", "accumulation", "more"), CASES)
def test_three_steps_are_those_of_one_process(
    mesh: tuple[int, int, int], B: int, accumulation: int, more: dict[str, Any]
) -> None:
    case = {"mesh": mesh, "B": B, "accumulation": accumulation, **more}
    found = ranks(mesh[0] * mesh[1] * mesh[2]).run("shard_cases:train_on", case)[0]
    expected = alone(B, accumulation * mesh[0] * mesh[1])
    for kind in ("losses", "norms"):
        assert found[kind] == pytest.approx(expected[kind], rel=TOLERANCE, abs=0), kind
    assert all(norm > shard_cases.CLIP for norm in found["norms"])  # all three were clipped
    for kind in ("gradients", "masters", "state", "average"):
        assert_equal_to_rounding(found[kind], expected[kind], zero=1e-17)


def test_gathered_in_bf16_and_reduced_in_fp32_it_errs_no_more_than_a_bf16_model_with_fp32_masters() -> None:
    case = {"mesh": (1, 2, 1), "B": 1, "accumulation": 2, "dtype": "float32", "compute_dtype": "bfloat16"}
    found = ranks(2).run("shard_cases:train_on", case)[0]
    reference, exact = alone(1, 4, "float32", "bfloat16"), alone(1, 4)
    names = [name for name, gradient in exact["gradients"].items() if gradient.abs().max() > 1e-6]
    assert len(names) > 50
    for name in names:
        tensors = [each["gradients"][name] for each in (found, exact, reference)]
        assert tensors[0].dtype == torch.float32
        assert_close_to_exact(*tensors, reduced=4, name=name)
    assert all(tensor.dtype == torch.float32 for kind in ("masters", "average") for tensor in found[kind].values())
    assert found["norms"][0] == pytest.approx(reference["norms"][0], rel=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("policy", [(KEEP, KEEP), (ALL, MIXED)])
def test_parameters_are_gathered_no_more_than_needed_and_never_left_gathered(policy: tuple[Policy, ...]) -> None:
    """Root and blocks once for forward and once for backward; reduced once a step."""
    for found in ranks(2).run("shard_cases:gathered_while", policy, False):
        assert found["gathers"] == [6, 6]
        assert found["reductions"] == [0, 3]
        assert found["after_forward"] == [0, 0]
        assert found["after_backward"] == [0, 0]


def test_parameters_may_stay_gathered_between_microbatches() -> None:
    for found in ranks(2).run("shard_cases:gathered_while", (RECOMPUTE, RECOMPUTE), True):
        assert found["gathers"] == [6, 3]  # the second only for backward, after forward gave them up
        assert found["reductions"] == [0, 3]
        assert found["after_backward"] == [3, 0]


@pytest.mark.parametrize(
    ("prefetch", "forward", "backward"),
    [(0, [2, 3, 4, 5], [7, 8, 9, 10]), (1, [3, 4, 5, 5], [7, 8, 9, 10]), (2, [4, 5, 5, 5], [8, 9, 10, 10])],
)
def test_parameters_are_on_their_way_before_their_block_starts(
    prefetch: int, forward: list[int], backward: list[int]
) -> None:
    """Root and four blocks. Forward: the root's, the block's own and `prefetch` more. Backward hooks run before the block's
    own gather, so that what is counted then was fetched ahead; FSDP2 itself fetches one there."""
    for found in ranks(2).run("shard_cases:gathers_so_far", prefetch):
        assert found == forward + backward


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_planner_counts_the_first_ranks_bytes(num_shards: int) -> None:
    """No rank holds more; no size of the model is a multiple of 3."""
    found = ranks(num_shards).run("shard_cases:bytes_held", num_shards)
    most = {part: max(rank[part] for rank in found) for part in found[0]}
    assert most == found[0]
    work = work_of("3x32x32", batch=1)
    parked = parked_bytes(work, ("optimizer", "average"), num_shards=num_shards)
    assert parked == {name: most[name] for name in parked} == {name: most[f"parked {name}"] for name in parked}
    beside = GATHERED * 4 * NANO.num_block_parameters() if num_shards > 1 else 0
    beside += NANO.pos_embed_max_size**2 * NANO.hidden_dim * 4
    states = states_bytes(work, "float32", num_shards=num_shards)
    assert states - beside == most["masters"] + most["optimizer"] + most["average"]
    d = NANO.hidden_dim  # the last block's to_add_out_temporal gets no gradient; the planner counts it
    without = 4 * -(-d // num_shards) * (d + 1)
    assert most["gradients"] + without == most["masters"] == 4 * NANO.num_parameters(num_shards)


def test_the_average_stands_in_for_sharded_masters_and_leaves() -> None:
    for found in ranks(2).run("shard_cases:average_standing_in"):
        assert found["inside"] == pytest.approx(found["average_alone"], rel=TOLERANCE)
        assert found["inside"] != pytest.approx(found["outside"], rel=1e-3)
        assert found["restored"]


def test_a_frozen_model_is_sharded_and_answers_as_before() -> None:
    for found in ranks(2).run("shard_cases:frozen"):
        assert found == {"same": True, "same_encoded": True, "sharded": True, "trainable": 0}


def test_alone_nothing_changes() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    shard(net, list(net), ALONE)
    shard_frozen(net, ALONE)
    reduce_gradients(net, now=False)
    assert type(net) is nn.Sequential and not any(p.requires_grad for p in net.parameters())


def test_repeated_blocks_are_the_longest_part() -> None:
    net = nn.ModuleDict({"small": nn.ModuleList([nn.Linear(1, 1)]), "big": nn.ModuleList([nn.Linear(9, 9)] * 2)})
    assert repeated_blocks(net) == list(net["big"].children()) * 2  # the same layer twice is one child
    assert repeated_blocks(nn.Linear(1, 1)) == []


def test_the_norm_without_shards_is_torchs() -> None:
    gradients = [torch.randn(5, 3), torch.randn(7)]
    assert torch.equal(global_norm(gradients), nn.utils.get_total_norm(gradients))
    assert global_norm([]) == 0


def test_sharded_parameters_in_low_precision_are_refused() -> None:
    for said in ranks(2).run("shard_cases:low_precision"):
        with pytest.raises(UserError, match="must be fp32, weight is torch.bfloat16; shard the fp32 model"):
            raise UserError(said)
    assert (
        MasterAdamW(nn.Linear(2, 2).double(), weight_decay=0.0, betas=(0.0, 0.0)).masters["weight"].dtype
        == torch.float64
    )
