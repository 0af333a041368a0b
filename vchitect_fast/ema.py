"""Exponential moving average of the master weights, in fp32.

    average <- d average + (1 - d) weight,   d = min(decay, (1 + k) / (10 + k)) at update k

The warm-up of d lets short runs forget their random start. An average that was carried over from another run has none
to forget: d is `decay` at once. Samples, validation and exports use the average.
"""

from __future__ import annotations

import torch
from torch import Tensor


class EMA:
    """`average` holds one fp32 tensor a name, updated in place."""

    def __init__(self, masters: dict[str, Tensor], decay: float, *, warm_up: bool = True) -> None:
        self.decay, self.warm_up = decay, warm_up
        self._masters = masters
        self.average = {name: tensor.detach().clone() for name, tensor in masters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay
        torch._foreach_lerp_(list(self.average.values()), list(self._masters.values()), 1 - decay)
