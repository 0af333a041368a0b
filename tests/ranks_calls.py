"""What tests/parallel/test_ranks.py asks of its ranks."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


def add_up(number: int) -> tuple[int, int, float]:
    """Rank, process and the sum of number + rank over the ranks."""
    total = torch.tensor(float(number + dist.get_rank()))
    dist.all_reduce(total)
    return dist.get_rank(), os.getpid(), float(total)


def fail_on(failing: list[int]) -> None:
    """ValueError on these ranks; the others wait for them in a collective."""
    if dist.get_rank() in failing:
        raise ValueError("on purpose")
    dist.all_reduce(torch.zeros(1))


def die(rank: int) -> None:
    """One rank is gone without a word, the others wait for it."""
    if dist.get_rank() == rank:
        os._exit(3)
    dist.all_reduce(torch.zeros(1))


def sleep() -> None:
    """For longer than anybody waits."""
    time.sleep(60)
