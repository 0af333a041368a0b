"""The simulation of streams: steps whose answer can be worked out by hand, and that time is accounted for to the last second.

pytest tests/autotune/test_streams.py
"""

from __future__ import annotations

import random

import pytest

from vchitect_fast.autotune.streams import COMPUTE, EXCHANGE, GATHER, IN, OUT, STREAMS, Contention, Task, simulate

FREE = Contention()


def test_a_stream_runs_in_order_and_waits_for_others() -> None:
    line = simulate(
        [Task("a", COMPUTE, 2), Task("send", OUT, 3, (0,)), Task("b", COMPUTE, 1), Task("c", COMPUTE, 1, (1,))], FREE
    )
    assert [(task.start_s, task.end_s) for task in line.tasks] == [(0, 2), (2, 5), (2, 3), (5, 6)]
    assert line.total_s == 6
    assert line.exposed == {"out": 2}  # compute waits from 3 to 5
    assert line.busy_s("out") == 3
    assert line.hidden("out") == pytest.approx(1 / 3)


def test_a_copy_behind_compute_is_hidden() -> None:
    line = simulate([Task("a", COMPUTE, 2), Task("send", OUT, 3, (0,)), Task("b", COMPUTE, 4)], FREE)
    assert (line.total_s, line.exposed, line.hidden("out")) == (6, {}, 1)


def test_copies_both_ways_share_the_link() -> None:
    """Out at half speed, in at a third: the shorter is done at 4, then 1 is left of the other's 3, alone."""
    line = simulate([Task("out", OUT, 2), Task("in", IN, 7 / 3)], Contention(both_out=2, both_in=3))
    assert [task.end_s for task in line.tasks] == pytest.approx([4, 5])


def test_compute_is_slower_beside_a_copy_and_the_loss_is_the_copys() -> None:
    line = simulate([Task("a", COMPUTE, 10), Task("out", OUT, 4)], Contention(copy=1.25))
    assert line.total_s == pytest.approx(10.8)  # 4 s in which 3.2 s of work were done
    assert line.exposed_s("out") == pytest.approx(0.8)


def test_both_kinds_of_neighbours_slow_compute_down() -> None:
    line = simulate(
        [Task("a", COMPUTE, 1), Task("out", OUT, 6), Task("send", EXCHANGE, 6)], Contention(copy=2, collective=3)
    )
    assert line.tasks[0].end_s == pytest.approx(6)
    assert line.exposed["out"] == line.exposed["exchange"]


def test_collectives_of_two_streams_share_the_links() -> None:
    line = simulate([Task("send", EXCHANGE, 1), Task("collect", GATHER, 1)], Contention(both_collectives=2))
    assert line.total_s == 2


def test_waiting_is_counted_for_the_stream_at_work_now() -> None:
    """compute waits for the copy back, which waits for the copy out."""
    tasks = [Task("out", OUT, 3), Task("in", IN, 2, (0,)), Task("use", COMPUTE, 1, (1,))]
    assert simulate(tasks, FREE).exposed == {"out": 3, "in": 2}


def test_tasks_without_length_do_not_stop_it() -> None:
    tasks = [Task("a", COMPUTE, 0), Task("b", EXCHANGE, 0, (0,)), Task("c", COMPUTE, 0, (1,)), Task("d", OUT, 0, (2,))]
    line = simulate(tasks, FREE)
    assert (len(line.tasks), line.total_s) == (4, 0)


def test_nothing_is_a_timeline_too() -> None:
    assert simulate([], FREE).total_s == 0


@pytest.mark.parametrize("seed", range(20))
def test_every_second_is_compute_or_somebodys(seed: int) -> None:
    """Whole = compute tasks alone + exposed of all streams, whatever waits for what and slows what down."""
    draw = random.Random(seed)
    tasks = [
        Task(str(i), draw.randrange(len(STREAMS)), draw.random(), tuple(draw.sample(range(i), min(i, 2))))
        for i in range(60)
    ]
    slower = Contention(*(1 + draw.random() for _ in range(5)))
    line = simulate(tasks, slower)
    computed = sum(task.seconds for task in tasks if task.stream == COMPUTE)
    assert line.total_s == pytest.approx(computed + sum(line.exposed.values()))
    for i, task in enumerate(tasks):
        done = line.tasks[i]
        assert done.end_s - done.start_s >= task.seconds * (1 - 1e-9)
        assert all(line.tasks[before].end_s <= done.start_s for before in task.after)
