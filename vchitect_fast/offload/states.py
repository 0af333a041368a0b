"""Tensors that lie in host memory between their uses, through the same engine: AdamW's moments, an EMA.

    parked = Parked(engine, {"exp_avg": ..., "exp_avg_sq": ...})    they leave at once
    with parked.here(): ...                                         they come back for the block, and leave again
    parked.in_turn([["exp_avg"], ["exp_avg_sq"]], work)             work(0), work(1): the next come and the last leave meanwhile
    states = States({"optimizer": ..., "average": ...}, device)     several parts of a run, as its Plan's `parked` names them
    with states.here("optimizer"): ...                              one of them; nothing happens to parts that are not parked
    optimizer.step(..., in_turn=states.in_turn("optimizer"))        its update, a few of its moments at a time

The tensors stay the same objects; while they are away they are empty, so that using one is a mismatch of shapes and never old
bytes. What two of them share moves once; an alias that is not among them would keep the memory. Of a DTensor give the local
shard, which it goes on using. In turn both directions of the link are busy at once, and little of a part is on the device.
Not done: starting during backward, parking fp32 masters (gradients hang on them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.offload.engine import Engine, Handle, current_stream
from vchitect_fast.offload.policy import CHUNK_BYTES, pool_bytes

InTurn = Callable[[Sequence[Sequence[str]], Callable[[int], None]], None]


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

    def in_turn(self, groups: Sequence[Sequence[str]], work: Callable[[int], None]) -> None:
        """`work(i)` for every group of names, whose tensors are on the device then; together they are all, in their order.

        Consecutive tensors have consecutive slots, so a group that returns finds the very place that it left. Only a pool
        of several chunks could put it elsewhere, and in the end break up: there all come at once.
        """
        several = [[name for name in names if name in self._tensors] for names in groups]
        assert [name for names in several for name in names] == list(self._tensors), "groups of other tensors"
        if self.engine.mover.stats()["budget_bytes"] > CHUNK_BYTES:
            with self.here():
                for place in range(len(several)):
                    work(place)
            return
        leaving: dict[str, Handle] = {}
        try:
            for place, names in enumerate(several):
                self._fetch(names)
                self._come(names)
                if place + 1 < len(several):
                    self._fetch(several[place + 1])
                try:
                    work(place)
                finally:
                    self._gone(leaving)  # after this group's work, beside which they left
                    leaving = {}
                    leaving = self._start(names)
        finally:
            self._gone(leaving)

    def end(self) -> None:
        """Bring the tensors back for good."""
        if self._away:
            self._return()

    def _leave(self) -> None:
        self._gone(self._start(list(self._tensors)))

    def _return(self) -> None:
        names = list(self._tensors)
        self._fetch(names)
        self._come(names)

    def _start(self, names: Sequence[str]) -> dict[str, Handle]:
        """All copies start before the first is waited for; where one cannot, nothing was given up yet."""
        return {name: self.engine.offload(self._tensors[name], name).handle(self._tensors[name]) for name in names}

    def _gone(self, leaving: Mapping[str, Handle]) -> None:
        """Their copies are waited for, then their memory is given up."""
        for name, handle in leaving.items():
            assert handle.entry.ticket is not None
            self.engine.mover.wait(handle.entry.ticket, current_stream(self.engine.device))
            with self.engine.lock:
                self.engine._drop(handle.entry)
            self._tensors[name].data = self._tensors[name].new_empty(0)
            self._away[name] = handle

    def _fetch(self, names: Sequence[str]) -> None:
        for name in names:
            self.engine.fetch(self._away[name].entry)

    def _come(self, names: Sequence[str]) -> None:
        for name in names:
            self._tensors[name].data = self.engine.restore(self._away.pop(name))


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

    def in_turn(self, part: str) -> InTurn | None:
        """Parked.in_turn of this part; None where it is not parked."""
        return self.parts[part].in_turn if part in self.parts else None

    def parked_bytes(self) -> dict[str, int]:
        """What lies in host memory now, by part."""
        return {name: int(parked.engine.stats()["requested_bytes"]) for name, parked in self.parts.items()}
