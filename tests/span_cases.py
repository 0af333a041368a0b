"""What test_span.py runs on many ranks: the spans of an exchange, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from vchitect_fast.parallel.collectives import Axis, Part, exchange
from vchitect_fast.profiling.span import recording


class Names:
    """A sink that keeps the names of spans that begin."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def enter(self, name: str) -> None:
        self.seen.append(name)

    def leave(self, name: str) -> None:
        pass

    def told(self, parts: dict[str, Any]) -> None:
        pass


def exchanged() -> list[str]:
    """Frames against tokens and back."""
    names = Names()
    mine = torch.ones(2, 4, requires_grad=True)  # 2 of 4 frames, all 4 tokens
    with recording(names):
        (out,) = exchange([Part(Axis(1, (4,)), Axis(0, (4,)))], [mine], dist.group.WORLD)
        out.sum().backward()
    return names.seen
