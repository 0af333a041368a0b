"""What the ranks send each other, counted, and how long a link would keep them waiting for it.

    with Watch() as watch: forward(); backward()         every all-to-all of torch.distributed comes by
    watch.sent_bytes, watch.num_messages                 facts
    exposed_s(watch.events, link)                        arithmetic: what a Link of so many bytes a second leaves exposed

The ranks of one machine share its memory and its cores, so no wall clock here says anything about a link. Instead the time
that this thread itself computes is noted at each start and each wait, and `exposed_s` replays them: a transfer begins when it
is started and the link is free, takes latency + bytes / bandwidth, and what of it is not over at its wait is exposed. So the
compute is measured, the link is simulated, and ranks are taken to be in step. Collectives other than all-to-all are refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from vchitect_fast.cluster import Link


@dataclass(frozen=True)
class Event:
    """One end of a transfer, in the order of the program."""

    transfer: int
    at_s: float  # on the clock that runs while this rank computes
    num_bytes: int | None = None  # of a start: the larger of what leaves and what comes; None: a wait


def exposed_s(events: Sequence[Event], link: Link) -> float:
    """Seconds that this rank would wait for the link: one transfer at a time, both directions at once."""
    waited_s, free_s = 0.0, 0.0
    over_s: dict[int, float] = {}
    for event in events:
        now_s = event.at_s + waited_s
        if event.num_bytes is not None:
            free_s = max(now_s, free_s) + link.latency_s + event.num_bytes / link.bytes_per_s
            over_s[event.transfer] = free_s
        else:
            waited_s += max(0.0, over_s[event.transfer] - now_s)
    return waited_s


class Watch:
    """Stands in for dist.all_to_all_single while it is entered: counts, notes the times, and sends as ever.

    clock   seconds that this thread has computed; its CPU time, so that neither other processes nor a wait count
    silent  nothing is sent and nothing comes: for the time of the compute alone, where values do not matter
    """

    def __init__(self, clock: Callable[[], float] = time.thread_time, *, silent: bool = False) -> None:
        self.clock, self.silent = clock, silent
        self.events: list[Event] = []
        self.sent_bytes = 0  # to other ranks
        self.num_collectives = 0
        self.num_messages = 0  # to other ranks, empty ones left out
        self._began_s = 0.0
        self._real: Any = None

    def __enter__(self) -> Watch:
        self._real = dist.all_to_all_single
        dist.all_to_all_single = self._start  # type: ignore[assignment]
        self._began_s = self.clock()
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_to_all_single = self._real

    def now_s(self) -> float:
        """Seconds computed since the start."""
        return self.clock() - self._began_s

    def _start(
        self, output: Tensor, input: Tensor, receive_sizes: list[int], send_sizes: list[int], *,
        group: dist.ProcessGroup, async_op: bool,
    ) -> _Wait:  # fmt: skip
        rank, itemsize = group.rank(), input.element_size()
        sent = (sum(send_sizes) - send_sizes[rank]) * itemsize
        received = (sum(receive_sizes) - receive_sizes[rank]) * itemsize
        self.sent_bytes += sent
        self.num_messages += sum(size > 0 for other, size in enumerate(send_sizes) if other != rank)
        assert async_op, "parallel/collectives.py starts and waits"
        transfer = self.num_collectives
        self.num_collectives += 1
        self.events.append(Event(transfer, self.now_s(), max(sent, received)))
        work = None if self.silent else self._real(output, input, receive_sizes, send_sizes, group=group, async_op=True)
        return _Wait(self, transfer, work)


class _Wait:
    """What an asynchronous collective returns."""

    def __init__(self, watch: Watch, transfer: int, work: Any) -> None:
        self._watch, self._transfer, self._work = watch, transfer, work

    def wait(self) -> None:
        self._watch.events.append(Event(self._transfer, self._watch.now_s()))
        if self._work is not None:
            self._work.wait()
