"""Shares and exchanges: nothing is lost, doubled or padded, whatever the sizes; the gradient goes the same way back.

pytest tests/parallel/test_collectives.py
"""

from __future__ import annotations

import pytest
import torch
from ranks import ranks

from vchitect_fast.parallel.collectives import Axis, Part, route, share

SIZES = [(3, 6, 5), (4, 4, 2), (1, 6, 5), (7, 1, 0), (1, 1, 1), (2, 0, 0)]  # T, S, N


def test_shares_are_contiguous_balanced_and_complete() -> None:
    for size in range(40):
        for num_ranks in range(1, 12):
            shares = [share(size, num_ranks, rank) for rank in range(num_ranks)]
            assert [i for part in shares for i in range(part.start, part.stop)] == list(range(size))
            lengths = [part.stop - part.start for part in shares]
            assert lengths == sorted(lengths, reverse=True)
            assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_an_exchange_gives_every_rank_its_part_and_its_gradient_goes_back(num_ranks: int, dtype: str) -> None:
    """Two tensors in one exchange, two segments in an axis; sizes that do not divide, images, empty shares, nothing at all."""
    for right in ranks(num_ranks).run("collectives_cases:moved", SIZES, dtype):
        assert right == [True] * (4 * len(SIZES))


def test_a_segment_that_stays_is_zero_and_has_no_gradient() -> None:
    assert ranks(3).run("collectives_cases:unsent", 4, 5, 2) == [[True, True]] * 3


def test_what_all_get_brings_back_the_sum_rounded_once() -> None:
    """In bfloat16 too: three summands are added in fp32, so the sum is the exact one rounded."""
    for right, summed, exact in ranks(3).run("collectives_cases:gathered", 5, "bfloat16"):
        assert right and torch.equal(summed, exact)
    for right, summed, exact in ranks(3).run("collectives_cases:gathered", 2, "float64"):  # one rank has none of it
        assert right and (summed - exact).norm() <= torch.finfo(torch.float64).eps * 3 * exact.norm()


def test_exchanges_may_overlap_and_gradients_add_up() -> None:
    assert ranks(2).run("collectives_cases:two_at_once") == [[True] * 4] * 2


def test_both_ends_of_a_route_agree_on_every_number() -> None:
    """What p sends to q is what q expects of p, for every pair, and together it is all there is."""
    parts = (Part(Axis(2, (7, 5)), Axis(1, (4,))), Part(None, Axis(1, (3,))))
    for num_ranks in (1, 2, 5, 9):
        shapes = [
            tuple(torch.Size((2, len(range(n)[share(n, num_ranks, rank)]), 12, 3)) for n in (4, 3))
            for rank in range(num_ranks)
        ]
        routes = [route(parts, shapes[rank], num_ranks, rank) for rank in range(num_ranks)]
        for p in range(num_ranks):
            for q in range(num_ranks):
                assert routes[p].send_sizes[q] == routes[q].receive_sizes[p]
        sent = sum(sum(way.send_sizes) for way in routes)
        assert sent == 2 * 12 * 3 * (4 + 3 * num_ranks)
