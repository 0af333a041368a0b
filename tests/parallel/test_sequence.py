"""A forward and backward that is cut over ranks equals one process: losses, every gradient, every way to cut, every Policy.

pytest tests/parallel/test_sequence.py
"""

from __future__ import annotations

import itertools

import pytest
from ranks import ranks
from sequence_cases import FRAMES, HEADS, ROWS, SPECS, Case

from vchitect_fast.model import Branches
from vchitect_fast.plan import Policy

TOLERANCE = 1e-10  # of the largest number of a gradient, in fp64
ACTIONS = ("keep", "recompute", "offload")
MIXES = [
    Policy(block_input, qkv, branch_out, mlp_pre, branch_out)
    for block_input in ("keep", "offload")
    for qkv, branch_out, mlp_pre in itertools.product(ACTIONS, repeat=3)
]
MIXED = (Policy("offload", "keep", "recompute", "offload", "recompute"), Policy.keep(), Policy.recompute())


def assert_equal(num_ranks: int, cases: list[Case]) -> None:
    worst = ranks(num_ranks).run("sequence_cases:equal", cases)[0]
    assert len(worst) == len(cases)
    for case, (error, name) in zip(cases, worst, strict=True):
        assert error < TOLERANCE, (num_ranks, case, name, error)


@pytest.mark.parametrize(
    ("num_ranks", "sizes"), [(1, [(2, 3)]), (2, [(1, 3), (2, 1), (2, 4)]), (3, [(2, 1), (2, 4)])], ids=["1", "2", "3"]
)
def test_every_cut_equals_one_process(num_ranks: int, sizes: list[tuple[int, int]]) -> None:
    """S = 6 and N = 5; sizes are B and T: one sample and two, several frames, and an image, with ranks without a frame."""
    assert_equal(num_ranks, [Case(spec, B=B, T=T) for spec in SPECS.values() for B, T in sizes])


def test_four_ranks_with_nine_tokens_and_with_a_text_of_333() -> None:
    cases = [Case(spec, B=2, T=5, h=6, w=6) for spec in SPECS.values()]
    assert_equal(4, [*cases, Case(HEADS, T=2, N=333, policies=MIXED)])


def test_as_many_ranks_as_heads() -> None:
    """Ranks without frames, or without text tokens."""
    assert_equal(6, [Case(FRAMES, B=2, T=4, policies=MIXED), Case(HEADS, B=2, T=4, policies=MIXED), Case(ROWS, T=7)])


def test_eight_ranks_most_of_them_without_a_share() -> None:
    """T = 3, S = 6 and N = 5 over 8 ranks: shares of frames, of visual tokens and of text tokens are empty somewhere."""
    assert_equal(8, [Case(FRAMES, policies=MIXED), Case(ROWS, B=2, policies=MIXED)])


@pytest.mark.parametrize(
    "branches", [Branches(spatial=False), Branches(temporal=False), Branches(cross=False)], ids=str
)
def test_a_branch_that_is_off_sends_nothing_and_the_rest_is_right(branches: Branches) -> None:
    assert_equal(2, [Case(spec, branches=branches) for spec in SPECS.values()])


@pytest.mark.parametrize("name", SPECS)
def test_every_policy_gives_the_same(name: str) -> None:
    """All 54 mixes, three blocks a case; images too, so that a rank has nothing to save."""
    chosen = [tuple(MIXES[(start + step) % 54] for step in (0, 18, 36)) for start in range(18)]
    assert {policy for three in chosen for policy in three} == set(MIXES)
    cases = [Case(SPECS[name], B=1 + i % 2, T=1 if i % 6 == 5 else 3, policies=three) for i, three in enumerate(chosen)]
    assert_equal(2, cases)


def test_fp32_errs_as_one_process_does() -> None:
    cases = [
        Case(spec, B=2, T=T, policies=policies) for spec in SPECS.values() for T, policies in ((3, ()), (5, MIXED))
    ]
    num_held = ranks(3).run("sequence_cases:close_in_fp32", cases)[0]
    assert num_held > 100 * len(cases)  # tensors held to the rule: the losses and all gradients


def test_the_velocity_of_a_ranks_frames_without_gradients() -> None:
    """As a sampler asks for it, a Policy set or not."""
    cases = [
        Case(spec, B=2, T=T, policies=policies) for spec in SPECS.values() for T, policies in ((1, ()), (4, MIXED))
    ]
    for errors in ranks(2).run("sequence_cases:without_gradients", cases):
        assert len(errors) == len(cases) and max(errors) < TOLERANCE
