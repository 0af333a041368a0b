"""Simulates the streams of a step: in-order queues of tasks that wait for each other and slow each other down.

    compute   what the model computes               out, in    copies to host memory and back
    exchange  all-to-alls of sequence parallelism   gather     parameters gathered, gradients reduced

A task starts when its stream has done the one before it and everything in `after` is done. While it runs it advances at a
rate that depends on what else runs (Contention); so a copy behind a product costs what the machine says it costs, and no
more. Time in which compute waits is `exposed`, counted for the stream that it waits for. No tensors, no model: seconds and
names only. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

STREAMS = ("compute", "out", "in", "exchange", "gather")
COMPUTE, OUT, IN, EXCHANGE, GATHER = range(len(STREAMS))
COPIES, COLLECTIVES = (OUT, IN), (EXCHANGE, GATHER)


class Task(NamedTuple):  # thousands are made: a tuple costs a third of a frozen dataclass
    """One piece of work; `after` are places in the list of tasks, all before its own."""

    name: str
    stream: int  # index into STREAMS
    seconds: float  # alone
    after: tuple[int, ...] = ()
    block: int | None = None


class Done(NamedTuple):
    """A task as it ran."""

    name: str
    stream: str
    start_s: float
    end_s: float
    block: int | None = None


@dataclass(frozen=True)
class Contention:
    """What running together costs; 1.0 is nothing."""

    copy: float = 1.0  # compute takes so many times as long while a copy runs
    collective: float = 1.0  # and while a collective runs
    both_out: float = 1.0  # a copy out takes so many times as long while one comes back
    both_in: float = 1.0  # a copy in, while one goes out
    both_collectives: float = 1.0  # a collective, while one of the other stream uses the same links


@dataclass(frozen=True)
class Timeline:
    """A simulated stretch of a step."""

    tasks: tuple[Done, ...]
    exposed: dict[str, float] = field(default_factory=dict)  # stream -> seconds; also what it slows compute down by
    memory: tuple[tuple[float, int], ...] = ()  # (second, bytes on the device), in order of time

    @property
    def total_s(self) -> float:
        """Until the last task ends."""
        return max((task.end_s for task in self.tasks), default=0.0)

    def busy_s(self, stream: str) -> float:
        """Seconds in which the stream has a task; tasks of one stream never overlap."""
        return sum(task.end_s - task.start_s for task in self.tasks if task.stream == stream)

    def exposed_s(self, stream: str) -> float:
        """Seconds that the step is longer because of this stream."""
        return self.exposed.get(stream, 0.0)

    def hidden(self, stream: str) -> float:
        """Fraction of the stream's busy time behind compute; 1 where it had nothing to do."""
        busy = self.busy_s(stream)
        return max(0.0, 1 - self.exposed_s(stream) / busy) if busy else 1.0


def simulate(tasks: Sequence[Task], contention: Contention) -> Timeline:
    """Run the tasks, each stream in the order of the list.

    The exposed seconds of all streams and the seconds of the compute tasks add up to the whole.
    """
    number = len(tasks)
    queues: list[list[int]] = [[] for _ in STREAMS]
    for place, task in enumerate(tasks):
        queues[task.stream].append(place)
    heads, running = [0] * len(STREAMS), [-1] * len(STREAMS)
    left = [task.seconds for task in tasks]
    least = [1e-12 * seconds for seconds in left]  # what rounding may leave of a task that is done
    starts, ends, exposed = [0.0] * number, [-1.0] * number, [0.0] * len(STREAMS)
    slowed: dict[int, list[float]] = {}  # by the set of streams that run
    present = [(stream, queue) for stream, queue in enumerate(queues) if queue]
    waits = [task.after for task in tasks]
    now = 0.0
    while True:
        active, which = [], 0
        for stream, queue in present:
            if running[stream] < 0 and heads[stream] < len(queue):
                first = queue[heads[stream]]
                for before in waits[first]:
                    if ends[before] < 0:
                        break
                else:  # a task of no length is done at once, and what waits for it may start at the same moment
                    running[stream], starts[first] = first, now
            if running[stream] >= 0:
                active.append(stream)
                which |= 1 << stream
        if not active:
            break
        if which not in slowed:
            slowed[which] = _slowed(running, contention)
        slow = slowed[which]
        step = min([left[running[stream]] * slow[stream] for stream in active])
        if step > 0 and (running[COMPUTE] < 0 or slow[COMPUTE] > 1):  # else nothing is exposed
            _account(tasks, running, queues[COMPUTE], heads[COMPUTE], ends, slow[COMPUTE], step, exposed)
        now += step
        for stream in active:
            done = running[stream]
            left[done] -= step / slow[stream]
            if left[done] <= least[done]:
                ends[done], running[stream] = now, -1
                heads[stream] += 1
    assert all(end >= 0 for end in ends), "a task waits for one that comes after it in the same stream"
    ran = (Done(t.name, STREAMS[t.stream], starts[i], ends[i], t.block) for i, t in enumerate(tasks))
    return Timeline(tuple(ran), {name: exposed[i] for i, name in enumerate(STREAMS) if exposed[i] > 0})


def _slowed(running: list[int], contention: Contention) -> list[float]:
    """How many times as long the task of each stream takes now."""
    out, back = running[OUT] >= 0, running[IN] >= 0
    exchange, gather = running[EXCHANGE] >= 0, running[GATHER] >= 0
    compute = (contention.copy if out or back else 1.0) * (contention.collective if exchange or gather else 1.0)
    both_out, both_in = (contention.both_out, contention.both_in) if out and back else (1.0, 1.0)
    collective = contention.both_collectives if exchange and gather else 1.0
    return [compute, both_out, both_in, collective, collective]


def _account(
    tasks: Sequence[Task], running: list[int], queue: list[int], head: int, ends: list[float], slow: float,
    step: float, exposed: list[float],
) -> None:  # fmt: skip
    """Add `step` seconds to the stream that compute waits for, or that slows it down."""
    if running[COMPUTE] < 0:
        exposed[_waited_for(tasks, running, queue[head] if head < len(queue) else None, ends)] += step
        return
    lost = step * (1 - 1 / slow)
    others = [stream for stream in COPIES + COLLECTIVES if running[stream] >= 0]
    for stream in others if lost > 0 else ():
        exposed[stream] += lost / len(others)


def _waited_for(tasks: Sequence[Task], running: list[int], task: int | None, ends: list[float]) -> int:
    """The stream that now works towards `task`; without one, what is still running."""
    while task is not None:
        before = next((i for i in tasks[task].after if ends[i] < 0), None)
        if before is None or before in running:
            stream = tasks[task if before is None else before].stream
            return stream
        if running[tasks[before].stream] >= 0:
            return tasks[before].stream
        task = before
    return next(stream for stream in range(len(STREAMS)) if running[stream] >= 0)
