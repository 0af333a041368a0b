"""What the ranks send each other for one block, and when: counted at torch's dispatcher, where every collective comes by.

pytest tests/parallel/test_sequence_traffic.py
"""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple
from itertools import product
from typing import Any

import pytest
from ranks import ranks
from sequence_cases import CONFIG, FRAMES, HEADS, ROWS, SPECS, Case

from vchitect_fast.errors import UserError
from vchitect_fast.offload.policy import block_bytes
from vchitect_fast.plan import Policy, ShardSpec
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

D, B, T, S, N, P = CONFIG.hidden_dim, 2, 4, 6, 4, 2
ALL = Policy("offload", "offload", "offload", "offload", "offload")
# volumes of [B, T, S + N, D] that a layer moves forward; DESIGN: at most 4 and 2
VOLUMES = {"frames": (1, 1), "tokens to heads": (3, 1), "tokens to frames": (1, 1)}
BLOCK = ["start", "wait", "attend", "start", "wait", "attend", "attend"]  # cut by tokens: spatial, then cross, temporal
HIDDEN = ["start", "attend", "wait", "attend", "attend", "start", "wait"]  # cut by frames: the first exchange is hidden
BACK = ["attend back", "attend back", "start", "wait", "attend back", "start", "wait"]
HIDDEN_BACK = ["start", "wait", "attend back", "attend back", "start", "attend back", "wait"]


def case_of(spec: ShardSpec, policy: Policy | None = None) -> Case:
    return Case(spec, B=B, T=T, h=4, w=6, N=N, policies=(policy,) * 3 if policy else ())


def logs(spec: ShardSpec, *policies: Policy | None, last: bool = False) -> list[list[dict[str, Any]]]:
    """Of each policy, by rank."""
    cases = [case_of(spec, policy) for policy in policies]
    by_rank = ranks(P).run("sequence_cases:events" + "_last" * last, cases)
    return [list(found) for found in zip(*by_rank, strict=True)]


def without(events: list[str], name: str) -> list[str]:
    return [event for event in events if event != name]


@pytest.mark.parametrize("name", SPECS)
def test_a_layer_moves_its_volumes_and_the_first_frames_text_once_and_nothing_else(name: str) -> None:
    """Sizes that divide, so the counts are exact: of each volume, (P - 1) / P leaves its rank."""
    [found] = logs(SPECS[name], None)
    volume, first_text = B * T * (S + N) * D * (P - 1) // P, B * N * D * (P - 1)
    sent = [sum(rank["sent"][i] for rank in found) for i in range(2)]
    there, back = VOLUMES[name]
    assert sent == [there * volume + first_text, back * volume]
    assert [sum(rank["sent back"][i] for rank in found) for i in range(2)] == sent[::-1]
    for rank in found:
        seen = {event for event in rank["forward"] + rank["backward"] if "c10d" in event}
        assert not seen, f"a collective that is not ours: {seen}"


@pytest.mark.parametrize("name", SPECS)
def test_the_last_block_leaves_the_text_rows_that_nobody_needs(name: str) -> None:
    [found] = logs(SPECS[name], None, last=True)
    visual, text, first_text = (B * T * rows * D * (P - 1) // P for rows in (S, N, N * P / T))
    there = {
        "frames": visual,  # a position attends to itself: no text
        "tokens to heads": 3 * visual + 2 * text,  # k and v of the text, not q
        "tokens to frames": visual + text,
    }[name]
    sent = [sum(rank["sent"][i] for rank in found) for i in range(2)]
    assert sent == [there + first_text, visual]
    assert [sum(rank["sent back"][i] for rank in found) for i in range(2)] == sent[::-1]


@pytest.mark.parametrize("name", SPECS)
def test_two_exchanges_forward_and_two_backward_hidden_where_frames_are_cut(name: str) -> None:
    """On the frames axis the spatial attention runs between start and wait, in forward and in backward."""
    [found] = logs(SPECS[name], None)
    for rank in found:
        assert without(rank["forward"], "product") == (HIDDEN if name == "frames" else BLOCK)
        assert without(rank["backward"], "product") == (HIDDEN_BACK if name == "frames" else BACK)


@pytest.mark.parametrize("name", SPECS)
def test_a_group_that_is_kept_or_offloaded_is_not_exchanged_again(name: str) -> None:
    """Recomputation repeats the exchange of exactly the groups that it recomputes, on all ranks, and its products."""
    actions = ("keep", "offload", "recompute")
    policies = [Policy("keep", qkv, out, "recompute", out) for qkv, out in product(actions, actions)]
    found = dict(zip(policies, logs(SPECS[name], *policies), strict=True))
    for policy, by_rank in found.items():
        again = [policy.qkv, policy.branch_out].count("recompute")
        for rank in by_rank:
            events = rank["backward"]
            assert events == by_rank[0]["backward"]  # in step
            assert events.count("start") == events.count("wait") == 2 + again, policy
            assert events.count("attend") == (3 if policy.branch_out == "recompute" else 0)
    num_products = {astuple(policy): by_rank[0]["backward"].count("product") for policy, by_rank in found.items()}
    num_qkv = 10 + (2 if name == "tokens to heads" else 5)  # the first text's k, v; of resharded rows also text q, k, v
    for out in actions:
        kept, offloaded, recomputed = (num_products["keep", qkv, out, "recompute", out] for qkv in actions)
        assert recomputed - kept == recomputed - offloaded == num_qkv


@pytest.mark.parametrize("last", [False, True], ids=["inner", "last"])
@pytest.mark.parametrize(
    ("num_ranks", "sizes"),
    [(4, {"B": 1, "T": 3, "N": 5}), (4, {"B": 2, "T": 9, "N": 7}), (2, {"B": 1, "T": 1, "N": 3})],
    ids=["a frame a rank", "uneven", "an image"],
)  # fmt: skip
def test_what_a_block_saves_is_what_came_and_not_what_was_sent(
    num_ranks: int, sizes: dict[str, int], last: bool
) -> None:
    """Of q, k, v that go to heads the ones that came are saved, the ones sent are not. The first rank has most of everything."""
    policies = [Policy.keep(), ALL, Policy("keep", "offload", "recompute", "keep", "recompute")]
    cases = [
        Case(spec, h=4, w=6, policies=(policy,) * 3, **sizes) for spec, policy in product(SPECS.values(), policies)
    ]
    by_rank = ranks(num_ranks).run("sequence_cases:events" + "_last" * last, cases)
    shape, block = VideoShape(sizes["T"], 6 * 8, 4 * 8), CONFIG.num_layers - 1 if last else 1  # 8 pixels a latent cell
    for number, case in enumerate(cases):
        work = Workload(CONFIG, shape, case.B, case.N, num_ranks, case.spec.axis)
        predicted = block_bytes(work, case.policies[0], block, "float32", shard=case.spec)
        expected = Counter({(item.group, item.action): item.num_bytes for item in predicted})
        found = [{key[1:]: n for key, n in rank[number]["bytes"].items()} for rank in by_rank]
        assert found[0] == expected and expected.total() > 0, case
        if case.policies[0] != Policy.keep():
            assert all(Counter(others) <= expected for others in found[1:]), case


@pytest.mark.parametrize("policy", [None, Policy.recompute(), ALL], ids=["keep", "recompute", "offload"])
def test_a_forward_whose_graph_is_thrown_away_leaves_nothing(policy: Policy | None) -> None:
    """No cycle: neither a flight nor a slot waits for the garbage collector, also where a rank's share is empty."""
    for spec in SPECS.values():
        case = Case(spec, T=1, policies=(policy or Policy("keep", "offload", "keep", "keep", "keep"),) * 3)
        assert ranks(P).run("sequence_cases:forgotten", case) == [(0, 0)] * P


@pytest.mark.parametrize(
    ("num_ranks", "change", "fragment"),
    [
        (2, {"spec": ShardSpec()}, "axis frames or tokens for a group of 2 ranks, got batch"),
        (8, {"spec": HEADS}, 'at most 6 ranks, one a head, to reshard the spatial branch to heads, got 8; use spatial="frames"'),
        (2, {"spec": FRAMES}, "must be frames {} of 3 on rank {} of 2, got 3 frames; cut them with parallel.collectives.share"),
        (2, {"spec": ROWS}, "must be frames {} of 3 on rank {} of 2, got 3 frames"),
        (2, {"spec": FRAMES, "num_frames": 0}, "a video of at least 1 frame, got 0"),
        (2, {"spec": FRAMES, "before": ("set_chunks", 2)}, "got 2 chunks and kernels None"),
        (2, {"spec": HEADS, "before": ("set_kernels", "reference")}, "got 1 chunks and kernels 'reference'"),
        (2, {"spec": FRAMES, "after": ("set_chunks", 2)}, "got 2 chunks and kernels None"),
        (2, {"spec": FRAMES, "after": ("set_kernels", "reference")}, "got 1 chunks and kernels 'reference'"),
    ],
)  # fmt: skip
def test_what_is_refused(num_ranks: int, change: dict[str, Any], fragment: str) -> None:
    for rank, said in enumerate(ranks(num_ranks).run("sequence_cases:refused", [change])):
        assert len(said) == 1
        assert fragment.format(("0 to 2", "2 to 3")[rank % 2], rank) in said[0]


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"axis": "frame"}, "unknown sharding axis 'frame'; did you mean 'frames'?"),
        ({"axis": "frames"}, "temporal branch of a ShardSpec of axis frames to reshard to tokens, got 'none'"),
        ({"axis": "frames", "spatial": "heads", "temporal": "tokens"}, "spatial branch of a ShardSpec of axis frames"),
        ({"axis": "tokens"}, "reshard to heads or frames, got 'none'"),
        ({"axis": "tokens", "spatial": "heads", "cross": "heads"}, "cross branch of a ShardSpec of axis tokens"),
        ({"spatial": "heads"}, "spatial branch of a ShardSpec of axis batch to reshard to none"),
    ],
)
def test_a_spec_that_nothing_obeys_is_refused(fields: dict[str, str], fragment: str) -> None:
    with pytest.raises(UserError) as error:
        ShardSpec(**fields)
    assert fragment in str(error.value)
