"""Activation groups: how a block hands its tensors over by name, and how they are saved and put back while it is recomputed.

    with group("qkv"): ...        in the block: the outputs of the heavy ops that run here are the group's tensors
    expect("qkv")                 the group's share of what other ranks send
    Frame(save, restore)          of one block in one forward; `recording()` around its forward, `replaying()` around its
                                  recomputation: a saved output is put back instead of being computed again

Heavy are matrix products and attention, torch's or ours; attention's log-sum-exp goes to the group `stats`. Everything between
them (norms, modulation, rotary, GELU, gates, concatenations) is cheap and is always recomputed inside a Frame. A recomputed
forward that runs other heavy ops than the first is an error. Nothing here moves or counts bytes: `save` does.

What an exchange with other ranks brings belongs to a group too: where the group is kept or offloaded, no rank sends it again.
That follows from the Policy and the place in the block alone, never from sizes, so all ranks do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import local
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vchitect_fast.offload.engine import alias_of
from vchitect_fast.profiling.span import span

GROUPS = ("block_input", "qkv", "branch_out", "mlp_pre", "stats")
PRODUCTS = {"addmm", "mm", "bmm", "baddbmm", "convolution", "_scaled_mm"}
ATTENTION = (  # parts of names
    "scaled_dot_product", "_flash_attn_forward", "spatial_forward", "temporal_forward", "cross_forward",
)  # fmt: skip

_SPANS = {name: span(f"forward/.{name}") for name in GROUPS}
_scope = local()
_HOLE = object()  # where a tensor was


@contextmanager
def group(name: str, *, sent: bool = False) -> Iterator[None]:
    """Outputs of the heavy ops that run inside belong to `name`. Costs nothing where no Frame is at work.

    sent  the outputs only go into the next exchange with other ranks: what that brings is saved in their stead
    """
    assert name in GROUPS, name
    before = getattr(_scope, "name", None), getattr(_scope, "sent", False)
    _scope.name, _scope.sent = name, sent
    try:
        with _SPANS[name]:
            yield
    finally:
        _scope.name, _scope.sent = before


def _nothing(_: Sequence[Tensor]) -> None: ...


@dataclass(frozen=True)
class Arrival:
    """What becomes of the tensors that one exchange brings. Where no Frame is at work: nothing."""

    save: Callable[[Sequence[Tensor]], None] = _nothing  # to call when they are there
    put_back: Callable[[], list[Tensor]] | None = None  # they were saved: take them from here, nobody sends them again


def frame_at_work() -> bool:
    """Whether outputs are being saved, or put back, by their groups."""
    return getattr(_scope, "mode", None) is not None


def expect(name: str) -> Arrival:
    """At the start of an exchange whose outcome belongs to the group `name`."""
    assert name in GROUPS, name
    mode = getattr(_scope, "mode", None)
    return Arrival() if mode is None else mode.expect(name)


def is_heavy(op: Any, name: str) -> bool:
    """Worth saving instead of computing it again: an attention in `branch_out`, a product in the other groups."""
    return _is_attention(op) if name == "branch_out" else op._schema.name.rpartition("::")[2] in PRODUCTS


class Frame:
    """The heavy outputs of one block's forward, in order.

    save(group, tensor)  what to hold for it: anything, or None to compute it again; asked for every tensor of a heavy op
    restore(held)        the tensor of what `save` returned
    """

    def __init__(self, save: Callable[[str, Tensor], Any], restore: Callable[[Any], Tensor]) -> None:
        self._save, self._restore = save, restore
        self._ops: list[tuple[Any, str, tuple[Any, list[Any]] | Tensor | None]] = []
        self._arrivals: list[tuple[str, list[Any] | None]] = []  # of the exchanges, in order

    def recording(self) -> TorchDispatchMode:
        """Around the forward."""
        return _Recording(self)

    def replaying(self) -> TorchDispatchMode:
        """Around the recomputation; may be entered again (retain_graph)."""
        return _Replaying(self)

    def clear(self) -> None:
        """Let go of everything that was saved; replaying is an error from here on."""
        self._ops.clear()
        self._arrivals.clear()

    def record(self, op: Any, name: str, out: Any) -> None:
        """Save the outputs of an op that ran. All of them or none: half of them would not spare the op."""
        tensors = [item for item in _flat(out) if isinstance(item, Tensor) and item.numel()]
        held = []
        for tensor in tensors:
            is_output = (tensor.ndim, tensor.dtype) == (tensors[0].ndim, tensors[0].dtype)  # the log-sum-exp is neither
            held.append(self._save(name if is_output else "stats", alias_of(tensor)))
        shell = _mapped(out, iter([_HOLE] * len(tensors)))
        self._ops.append((op, name, None if any(item is None for item in held) else (shell, held)))

    def record_sent(self, op: Any, name: str, out: Tensor) -> None:
        """An op whose output only goes to other ranks: of it one number of storage is held, in its shape."""
        self._ops.append((op, name, out.new_empty(()).expand(out.shape)))

    def record_expected(self, name: str) -> int:
        """An exchange was started. Returns its place among the exchanges."""
        self._arrivals.append((name, None))
        return len(self._arrivals) - 1

    def record_arrived(self, place: int, tensors: Sequence[Tensor]) -> None:
        """Save what it brought: all of it or none."""
        name = self._arrivals[place][0]
        held = [self._save(name, alias_of(tensor)) for tensor in tensors]
        self._arrivals[place] = name, None if any(item is None for item in held) else held

    def arrived(self, place: int) -> list[Any] | None:
        """What was saved of the exchange at `place`; None where it is to be done again."""
        return self._arrivals[place][1] if place < len(self._arrivals) else None

    def replay(self, position: int, op: Any, name: str, compute: Callable[[], Any], *, needed: bool) -> Any:
        """The outputs of the op at `position`, put back or computed again; not needed: only their shape."""
        if position >= len(self._ops) or self._ops[position][:2] != (op, name):
            was = f"{self._ops[position][0]} in {self._ops[position][1]}" if position < len(self._ops) else "nothing"
            raise RuntimeError(
                f"the recomputed block runs {op} in {name} where its forward ran {was}; a block must run the same ops twice."
            )
        saved = self._ops[position][2]
        if isinstance(saved, Tensor):
            return compute() if needed else alias_of(saved)
        if saved is None:
            return compute()
        shell, held = saved
        return _mapped(shell, iter([alias_of(self._restore(item)) for item in held]))

    def replay_expected(self, place: int, name: str) -> Arrival:
        """What to do about the exchange at `place`: take what was saved, or let it happen again."""
        if place >= len(self._arrivals) or self._arrivals[place][0] != name:
            raise RuntimeError(
                f"the recomputed block starts an exchange for {name} where its forward did not; a block must run the same ops twice."
            )
        held = self.arrived(place)
        return Arrival() if held is None else Arrival(put_back=lambda: [alias_of(self._restore(item)) for item in held])


class _Mode(TorchDispatchMode):
    """Tells `expect` who is at work; a mode is inside the thread that entered it."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame
        self.before: list[_Mode | None] = []

    def __enter__(self) -> Any:
        self.before.append(getattr(_scope, "mode", None))
        _scope.mode = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _scope.mode = self.before.pop()
        super().__exit__(*error)


class _Recording(_Mode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(_scope, "name", None)
        if name and is_heavy(func, name):
            if _scope.sent:
                self.frame.record_sent(func, name, out)
            else:
                self.frame.record(func, name, out)
        return out

    def expect(self, name: str) -> Arrival:
        position = self.frame.record_expected(name)
        return Arrival(save=lambda tensors: self.frame.record_arrived(position, tensors))


class _Replaying(_Mode):
    def __init__(self, frame: Frame) -> None:
        super().__init__(frame)
        self.position = self.num_expected = 0

    def __enter__(self) -> Any:
        self.position = self.num_expected = 0  # entered again when the graph is retained
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(_scope, "name", None)
        if not name or not is_heavy(func, name):
            return func(*args, **(kwargs or {}))
        self.position += 1
        compute = partial(func, *args, **(kwargs or {}))
        needed = not _scope.sent or self.frame.arrived(self.num_expected) is None
        return self.frame.replay(self.position - 1, func, name, compute, needed=needed)

    def expect(self, name: str) -> Arrival:
        self.num_expected += 1
        return self.frame.replay_expected(self.num_expected - 1, name)


def _is_attention(op: Any) -> bool:
    return any(part in op._schema.name for part in ATTENTION)


def _flat(out: Any) -> list[Any]:
    return [item for part in out for item in _flat(part)] if isinstance(out, tuple | list) else [out]


def _mapped(out: Any, values: Iterator[Any]) -> Any:
    """`out` with its non-empty tensors, or the holes where they were, replaced one after the other; the rest stays."""
    if isinstance(out, tuple | list):
        return type(out)([_mapped(item, values) for item in out])
    if isinstance(out, Tensor) and not out.numel():
        return alias_of(out)  # not the op's own: that one gets a grad_fn, and the graph holds the Frame
    return next(values) if out is _HOLE or isinstance(out, Tensor) else out
