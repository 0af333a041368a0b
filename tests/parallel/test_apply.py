"""The recipe: our model by its Plan, with sequence parallelism, shards and Policies at once, and a model that is not ours.

pytest tests/parallel/test_apply.py; what the ranks do is in apply_cases.py
"""

from __future__ import annotations

from functools import cache
from typing import Any

import apply_cases
import pytest
import torch
from offloading import ALL, INPUT
from ranks import ranks
from resume_cases import plan_of_ranks

from vchitect_fast.errors import UserError
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.parallel.apply import parallelize_blocks
from vchitect_fast.parallel.mesh import ALONE
from vchitect_fast.plan import Plan, Policy, ShardSpec

TOLERANCE = 1e-10
FRAMES = ShardSpec("frames", temporal="tokens")
HEADS = ShardSpec("tokens", spatial="heads")
ROWS = ShardSpec("tokens", spatial="frames")
KEEP, RECOMPUTE = Policy.keep(), Policy.recompute()
MIXED = Policy("keep", "offload", "recompute", "keep", "recompute")

# dp_replicate x dp_shard x sp, how the sequence is cut, the Policy of both blocks, microbatches
CASES: list[tuple[tuple[int, int, int], ShardSpec, tuple[Policy, Policy], int]] = [
    ((1, 1, 2), FRAMES, (KEEP, KEEP), 2),
    ((1, 1, 2), HEADS, (ALL, MIXED), 1),
    ((1, 2, 2), FRAMES, (RECOMPUTE, MIXED), 2),
    ((2, 1, 2), ROWS, (INPUT, KEEP), 1),
    ((1, 2, 1), ShardSpec(), (MIXED, RECOMPUTE), 1),
    ((1, 2, 3), FRAMES, (ALL, RECOMPUTE), 1),
    ((2, 2, 2), ROWS, (MIXED, INPUT), 1),
]


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for kind in {"losses", "norms"} & expected.keys():
        assert found[kind] == pytest.approx(expected[kind], rel=TOLERANCE, abs=0), kind
    for kind in {"gradients", "masters"} & expected.keys():
        assert found[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            error = (found[kind][name] - tensor).abs().max()
            assert error <= TOLERANCE * tensor.abs().max() + 1e-16, f"{kind} of {name}: {error:.1e}"


@cache
def alone(samples: int) -> dict[str, Any]:
    return apply_cases.train(plan_of_ranks((1, 1, 1), ShardSpec(), accumulation=samples), ALONE)


@pytest.mark.parametrize(("sizes", "spec", "policy", "accumulation"), CASES)
def test_three_steps_of_the_plan_are_those_of_one_process(
    sizes: tuple[int, int, int], spec: ShardSpec, policy: tuple[Policy, Policy], accumulation: int
) -> None:
    plan = plan_of_ranks(sizes, spec, policy, accumulation=accumulation)
    found = ranks(sizes[0] * sizes[1] * sizes[2]).run("apply_cases:train_on", plan)[0]
    assert_same_training(found, alone(sizes[0] * sizes[1] * accumulation))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (plan_of_ranks((1, 1, 2), ShardSpec()), "cuts the sequence by batch over sp 2; an sp above 1 needs frames or"),
        (plan_of_ranks((1, 2, 1), FRAMES), "cuts the sequence by frames over sp 1"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: Plan, said: str) -> None:
    for found in ranks(2).run("apply_cases:refused", plan):
        assert said in found


def test_a_plan_for_other_ranks_is_refused() -> None:
    with pytest.raises(UserError, match=r"is for the mesh \{.*'sp': 2\}, the ranks make \{.*'sp': 1\}"):
        apply_cases.train(plan_of_ranks((1, 1, 2), FRAMES), ALONE)


@cache
def foreign_alone() -> dict[str, Any]:
    return apply_cases.train_foreign(None, None, ALONE)


ACTIONS = [None, ("recompute", "keep", "recompute"), ("offload", "recompute", "offload")]


@pytest.mark.parametrize("actions", ACTIONS)
def test_a_model_that_is_not_ours_trains_in_shards_as_in_one_process(actions: tuple[str, ...] | None) -> None:
    expected = foreign_alone()
    for found in ranks(2).run("apply_cases:train_foreign_on", actions):
        assert_same_training(found, expected)
        assert bool(found["moved"]) == bool(actions and "offload" in actions)
        assert 256 * 1024 * 8 not in found["moved"]  # gathered parameters stay FSDP2's, trained or not


def test_actions_work_in_one_process_too() -> None:
    assert_same_training(apply_cases.train_foreign(ACTIONS[2], None, ALONE), foreign_alone())


def test_a_model_that_is_not_ours_computes_in_bf16_on_fp32_masters() -> None:
    expected = foreign_alone()
    for found in ranks(2).run("apply_cases:train_foreign_on", ("recompute",) * 3, "bfloat16"):
        assert found["dtypes"] == {"torch.bfloat16"}
        assert all(master.dtype == torch.float32 for master in found["masters"].values())
        assert found["losses"] == pytest.approx(expected["losses"], rel=4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(
    ("actions", "saving", "said"),
    [
        (("keep",), None, "expected an action for each of 3 blocks, got 1"),
        (("keep", "drop", "keep"), None, "unknown action of block 1 'drop'"),
        (("keep", "keep", "offload"), None, "block 2 is to be offloaded and there is no engine"),
        (("offload", "keep", "keep"), Saving(), "block 0 is to be offloaded and there is no engine"),
    ],
)
def test_actions_that_cannot_be_taken_are_refused(actions: tuple[str, ...], saving: Saving | None, said: str) -> None:
    model = apply_cases.Foreign()
    with pytest.raises(UserError, match=said):
        parallelize_blocks(model, list(model.layers), ALONE, actions=actions, saving=saving)
