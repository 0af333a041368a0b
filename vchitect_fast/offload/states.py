"""Tensors that lie in host memory between their uses, through the same engine: AdamW's moments, an EMA.

    parked = Parked(engine, {"exp_avg": ..., "exp_avg_sq": ...})    they leave at once
    with parked.here(): optimizer.step()                            they come back for the block, and leave again
    states = States({"optimizer": ..., "average": ...}, device)     several parts of a run, as its Plan's `parked` names them
    with states.here("optimizer"): ...                              one of them; nothing happens to parts that are not parked

The tensors stay the same objects; while they are away they are empty, so that using one is a mismatch of shapes and never old
bytes. What two of them share moves once; an alias that is not among them would keep the memory. Of a DTensor give the local
shard, which it goes on using. Not done: hiding these copies behind compute, parking fp32 masters (gradients hang on them).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.offload.engine import Engine, Handle, current_stream
from vchitect_fast.offload.policy import pool_bytes


def park_budget_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The pool that the tensors need, each storage once and in whole slots."""
    sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors.values()}
    return pool_bytes(sizes.values())


class Parked:
    """Moves `tensors` out when it is made, and in and out around `here`. UserError of the engine when they do not fit.

    Views of a part of a storage are refused: the rest of the storage would go with them. Empty ones, a rank's share of a
    small parameter, have nothing to move.
    """

    def __init__(self, engine: Engine, tensors: Mapping[str, Tensor]) -> None:
        self.engine = engine
        for name, tensor in tensors.items():
            whole = tensor.untyped_storage().nbytes()
            if tensor.nbytes != whole:
                raise UserError(
                    f"cannot park {name}: expected a tensor that fills its storage, got {tensor.nbytes} of {whole} bytes; "
                    "park the tensor that it is a part of."
                )
        self._tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
        self._away: dict[str, Handle] = {}
        self._leave()

    @contextmanager
    def here(self) -> Iterator[None]:
        """The tensors are on the device inside the block; may be entered once at a time."""
        assert self._away or not self._tensors, "entered twice"
        self._return()
        try:
            yield
        finally:
            self._leave()

    def end(self) -> None:
        """Bring the tensors back for good."""
        if self._away:
            self._return()

    def _leave(self) -> None:
        away: dict[str, Handle] = {}
        try:
            for name, tensor in self._tensors.items():  # all copies start before the first is waited for
                away[name] = self.engine.offload(tensor, name).handle(tensor)
        except BaseException:
            away.clear()  # nothing was given up yet
            raise
        for name, handle in away.items():
            assert handle.entry.ticket is not None
            self.engine.mover.wait(handle.entry.ticket, current_stream(self.engine.device))
            with self.engine.lock:
                self.engine._drop(handle.entry)
            self._tensors[name].data = self._tensors[name].new_empty(0)
        self._away = away

    def _return(self) -> None:
        for handle in self._away.values():
            self.engine.fetch(handle.entry)
        for name, handle in self._away.items():
            self._tensors[name].data = self.engine.restore(handle)
        self._away = {}


class States:
    """Parts of a run's state that are parked, each by itself.

    parts   the tensors of every parked part, by the part's name and theirs
    device  where they are used

    Each part has a pool of its own, filled to the last slot whenever the part is away: what other parts do, or activations,
    which come in other sizes with every VideoShape, cannot break it up. UserError as Engine and Parked.
    """

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]], device: torch.device | str = "cpu") -> None:
        self.parts = {
            name: Parked(Engine(park_budget_bytes(tensors), device), tensors) for name, tensors in parts.items()
        }

    @contextmanager
    def here(self, *names: str) -> Iterator[None]:
        """These parts, or all, are on the device inside the block; those that are not parked always are."""
        with ExitStack() as stack:
            for name in names or self.parts:
                if name in self.parts:
                    stack.enter_context(self.parts[name].here())
            yield

    def parked_bytes(self) -> dict[str, int]:
        """What lies in host memory now, by part."""
        return {name: int(parked.engine.stats()["requested_bytes"]) for name, parked in self.parts.items()}
