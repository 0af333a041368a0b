"""Whose memory is whose: addresses of weights, optimizer, averages and gradients, seen while a profile is recorded.

The trace knows addresses and times only; this says which of them hold what lives longer than a step. `memory.py` puts the
two together. It looks at tensors and keeps none alive. Without torch's allocator behind it (the offload engine's pool) a
byte is not in the trace either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

Row = tuple[int, int, str, str]  # address, bytes of the storage, owner, name


class Owners:
    """Collects rows: `hold` once before the first recorded step, `see_gradients` in every step before the optimizer."""

    def __init__(self) -> None:
        self._parts: dict[str, Any] = {}
        self._held: list[Row] = []
        self._gradients: list[list[Row]] = []

    def told(self, parts: dict[str, Any]) -> None:
        """Objects of the run: model (a Module), optimizer (MasterAdamW), ema (EMA); others are passed over."""
        self._parts |= parts

    def hold(self) -> None:
        """What is there before the first step. A tensor that two own counts for the first: weights, optimizer, average."""
        found: dict[int, Row] = {}
        for owner, named in self._named():
            for name, tensor in named:
                row = _row(owner, name, tensor)
                if row[0]:
                    found.setdefault(row[0], row)
        self._held = list(found.values())

    def see_gradients(self) -> None:
        """The gradients of one step, of the model and of the masters."""
        rows = []
        for prefix, named in (("", self._weights()), ("master of ", self._masters())):
            for name, tensor in named:
                if tensor.grad is not None:
                    rows.append(_row("gradients", prefix + name, tensor.grad))
        self._gradients.append(rows)

    def to_json(self) -> dict[str, Any]:
        """{"held": rows, "gradients": a list of rows a step}."""
        return {"held": self._held, "gradients": self._gradients}

    def _named(self) -> Iterable[tuple[str, Iterable[tuple[str, Tensor]]]]:
        model, optimizer, ema = (self._parts.get(name) for name in ("model", "optimizer", "ema"))
        yield "weights", self._weights()
        yield "weights", model.named_buffers() if model is not None else ()
        yield "optimizer", self._masters()
        yield "optimizer", optimizer.state().items() if optimizer is not None else ()
        yield "average", ema.average.items() if ema is not None else ()

    def _weights(self) -> Iterable[tuple[str, Tensor]]:
        model = self._parts.get("model")
        return model.named_parameters() if model is not None else ()

    def _masters(self) -> Iterable[tuple[str, Tensor]]:
        optimizer = self._parts.get("optimizer")
        return optimizer.masters.items() if optimizer is not None else ()


def _row(owner: str, name: str, tensor: Tensor) -> Row:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # DTensor
    storage = local.untyped_storage()
    return storage.data_ptr(), storage.nbytes(), owner, name
