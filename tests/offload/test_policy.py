"""Policies as pure functions: selective_ratio in both readings, what is never offloaded, bytes by group.

pytest tests/offload/test_policy.py; that the bytes are those of the running model: tests/offload/test_blocks.py.
"""

from __future__ import annotations

import pytest
from offloading import ALL, INPUT, NUM_BLOCKS, work_of

from vchitect_fast.architecture import preset
from vchitect_fast.errors import UserError
from vchitect_fast.offload.policy import (
    block_bytes,
    check_policy,
    effective,
    from_selective_ratio,
    offload_budget_bytes,
    spread,
    step_bytes,
)
from vchitect_fast.plan import Policy
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload


@pytest.mark.parametrize(
    ("ratio", "num_blocks", "chosen"),
    [
        (0, 4, []),
        (1, 4, [0, 1, 2, 3]),
        (0.5, 6, [0, 2, 4]),
        (0.2, 10, [2, 7]),
        (1 / 3, 6, [1, 4]),
        (0.25, 24, [1, 5, 9, 13, 17, 21]),
    ],
)
def test_a_fraction_chooses_blocks_evenly(ratio: float, num_blocks: int, chosen: list[int]) -> None:
    assert [i for i, item in enumerate(spread(ratio, num_blocks)) if item] == chosen


def test_the_two_readings_of_selective_ratio_are_each_others_complement() -> None:
    kept, recomputed = (from_selective_ratio(0.2, 10, reading) for reading in ("kept", "recomputed"))
    assert [i for i, policy in enumerate(kept) if policy == Policy.keep()] == [2, 7]
    assert [i for i, policy in enumerate(recomputed) if policy == Policy.recompute()] == [2, 7]


@pytest.mark.parametrize("num_blocks", [1, 2, 6, 24, 28, 48])
def test_kept_is_litegens_choice_at_every_percent(num_blocks: int) -> None:
    """Its rule counts the blocks that it checkpoints, in floats: the next one when index x share reaches the next half."""
    for percent in range(101):
        share, theirs = 1 - percent / 100, []
        for index in range(1, num_blocks + 1):
            if index * share >= len(theirs) + 0.5:
                theirs.append(index - 1)
        ours = from_selective_ratio(percent / 100, num_blocks, "kept")
        assert [i for i, policy in enumerate(ours) if policy == Policy.recompute()] == theirs, percent


@pytest.mark.parametrize(
    ("ratio", "reading", "message"),
    [
        (1.5, "kept", "fraction from 0 to 1, got 1.5"),
        (-0.1, "kept", "got -0.1"),
        (0.5, "saved", "reading of selective_ratio 'saved'"),
    ],
)
def test_rejected_ratios(ratio: float, reading: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_selective_ratio(ratio, 4, reading)


def test_the_last_blocks_keep_what_they_were_to_offload() -> None:
    assert effective([ALL, INPUT, INPUT]) == (ALL, INPUT, Policy.recompute())
    assert effective([ALL, ALL, ALL], keep_last=2) == (ALL, Policy.keep(), Policy.keep())
    assert effective([ALL, ALL], keep_last=0) == (ALL, ALL)


@pytest.mark.parametrize("stats", ["keep", "offload"])
def test_outputs_of_one_op_go_one_way(stats: str) -> None:
    check_policy(Policy(branch_out="keep", stats=stats), 0)
    with pytest.raises(UserError, match="block 7: branch_out and stats .* set stats like branch_out"):
        check_policy(Policy(branch_out="recompute", stats=stats), 7)


def test_block_inputs_of_the_2b_model_at_the_longest_shape_are_84_gib() -> None:
    """The issue's own figure: 24 block inputs at 144x1920x1088 in bf16."""
    work = Workload(preset("vchitect-2b"), VideoShape.parse("144x1920x1088")[0], 1, 333)
    inputs = [item for item in step_bytes(work, [INPUT] * 24, "bfloat16", keep_last=0) if item.group == "block_input"]
    assert sum(item.num_bytes for item in inputs) / 2**30 == pytest.approx(84, rel=0.01)


def test_the_groups_are_those_of_the_design_in_units_of_rows_by_hidden() -> None:
    work = work_of()
    unit, visual, text = 4 * work.config.hidden_dim, work.visual_rows, work.text_rows
    found = {item.group: item.num_bytes for item in block_bytes(work, ALL, 0, "float32")}
    assert found["qkv"] == unit * (7 * visual + 3 * text)
    assert found["branch_out"] == unit * 3 * (visual + text)
    assert found["mlp_pre"] == unit * 4 * (visual + text)
    assert found["block_input"] == unit * (visual + work.batch * work.num_text_tokens)
    last = {item.group: item.num_bytes for item in block_bytes(work, ALL, NUM_BLOCKS - 1, "float32")}
    assert last["mlp_pre"] == unit * 4 * visual and last["block_input"] == unit * (visual + text)


def test_the_budget_counts_what_is_offloaded_in_whole_slots() -> None:
    work = work_of()
    assert offload_budget_bytes(work, [Policy.keep()] * NUM_BLOCKS, "float32") == 0
    assert offload_budget_bytes(work, [ALL] * NUM_BLOCKS, "float32") % 256 == 0
    one, both = (offload_budget_bytes(work, [ALL] * NUM_BLOCKS, "float32", keep_last=n) for n in (1, 0))
    assert 0 < one < both
