"""The ranks that the tests of parallel/ run on: they answer, they fail with their rank and traceback, they come back.

pytest tests/parallel/test_ranks.py
"""

from __future__ import annotations

import pytest
import ranks as harness
from ranks import RankError, ranks


def test_ranks_answer_in_order_and_stay() -> None:
    first = ranks(2).run("ranks_calls:add_up", 10)
    second = ranks(2).run("ranks_calls:add_up", 20)
    assert [total for _, _, total in first] == [21.0, 21.0]
    assert [total for _, _, total in second] == [41.0, 41.0]
    assert [rank for rank, _, _ in first] == [0, 1]
    assert [pid for _, pid, _ in first] == [pid for _, pid, _ in second]


def test_an_exception_on_every_rank_is_raised_and_the_ranks_stay() -> None:
    before = ranks(2).run("ranks_calls:add_up", 0)
    with pytest.raises(
        RankError, match=r"rank [01] of 2 \(failed: \[0, 1\]\)(.|\n)*in fail_on(.|\n)*ValueError: on purpose"
    ):
        ranks(2).run("ranks_calls:fail_on", [0, 1])
    assert ranks(2).run("ranks_calls:add_up", 0) == before


def test_a_rank_that_fails_alone_or_dies_is_named_and_the_others_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "GRACE_S", 0.2)
    own = harness.Ranks(2)
    with pytest.raises(RankError, match=r"rank 1 of 2 \(failed: \[1\]\)(.|\n)*on purpose"):
        own.run("ranks_calls:fail_on", [1])
    with pytest.raises(RankError, match="rank 1 of 2 .*ended without an answer"):
        own.run("ranks_calls:die", 1)
    own.stop()


def test_ranks_that_hang_are_killed() -> None:
    own = harness.Ranks(1)
    assert own.run("ranks_calls:add_up", 1)[0][2] == 1.0
    with pytest.raises(RankError, match=r"ranks \[0\] of 1 did not answer within 0.2 s"):
        own.run("ranks_calls:sleep", timeout_s=0.2)
    assert own._starter is None
