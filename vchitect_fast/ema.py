"""Exponential moving average of the master weights, in fp32.

    average <- d average + (1 - d) weight,   d = min(decay, (1 + k) / (10 + k)) at update k

The warm-up of d lets short runs forget their random start. An average that was carried over from another run has none
to forget: d is `decay` at once. Samples, validation and exports use the average. Each rank averages its own shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vchitect_fast.offload.policy import turns
from vchitect_fast.parallel.shard import local_shard

if TYPE_CHECKING:
    from vchitect_fast.offload.states import InTurn


class EMA:
    """`average` holds one fp32 tensor a name, updated in place."""

    def __init__(self, masters: dict[str, Tensor], decay: float, *, warm_up: bool = True) -> None:
        self.decay, self.warm_up = decay, warm_up
        self._masters = masters
        self.average = {name: tensor.detach().clone() for name, tensor in masters.items()}

    @torch.no_grad()
    def update(self, step: int, in_turn: InTurn | None = None) -> None:
        """After optimizer step number `step`, counted from 0; `in_turn` as in MasterAdamW.step."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay
        sizes = {name: local_shard(master).nbytes for name, master in self._masters.items()}
        groups = turns(sizes) if in_turn else [list(sizes)]

        def blend(place: int) -> None:
            averages, masters = ([local_shard(x[n]) for n in groups[place]] for x in (self.average, self._masters))
            torch._foreach_lerp_(averages, masters, 1 - decay)

        in_turn(groups, blend) if in_turn else blend(0)

    @contextmanager
    def standing_in(self, swapped: Callable[[], None] = lambda: None) -> Iterator[None]:
        """The model runs on the average inside the block: it changes places with the masters, and back.

        swapped  called after each exchange: MasterAdamW.copy_masters of a model that has its masters beside it

        For sharded models, which cannot be called with other parameters. Do not step or save inside.
        """
        self._swap()
        swapped()
        try:
            yield
        finally:
            self._swap()
            swapped()

    @torch.no_grad()
    def _swap(self) -> None:
        for name in self.average:
            average, master = local_shard(self.average[name]), local_shard(self._masters[name])
            held = master.clone()  # one tensor more at a time, not a model
            master.copy_(average)
            average.copy_(held)
