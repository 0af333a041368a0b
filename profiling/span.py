"""Spans: what a stretch of a run is called, the same in Nsight Systems, in PyTorch's traces and in our reports.

    with span("forward/spatial"): ...        a context manager, or a decorator: @span("optimizer/step")
    with span("step", 12): ...               numbered: step/12
    with span("forward/.qkv"): ...           a part of the span around it: forward/spatial.qkv inside forward/spatial
    tell(model=model, optimizer=optimizer)   once a run: whose memory is whose
    with recording(TorchSink(), NvtxSink()): from here on spans reach the sinks; without it they do nothing

A name is "kind/what", its kind one of KINDS. Off, a span costs three calls that do next to nothing. In a region that
torch.compile captures, spans vanish: they would split the graph. A forward span that opens inside a backward is a
recomputation and is recorded as recompute/..., whoever wrote the checkpoint. Backward has no spans a branch: autograd's
nodes carry the sequence numbers of their forward ops, and the analysis leads them back (no hook, no cost). It loads no
torch, so curation's workers have spans too; without torch nothing compiles and nothing runs backward. It refuses a kind
that is not in the table, and NVTX without its package.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

from vchitect_fast.errors import UserError
from vchitect_fast.profiling.kinds import KINDS

DOMAIN = "vchitect_fast"  # of NVTX; csrc/copier_cuda.cu uses the default domain
P = ParamSpec("P")
R = TypeVar("R")


class Sink(Protocol):
    """Where spans go while recording. Called in the thread of the span."""

    def enter(self, name: str) -> None:
        """A span begins."""

    def leave(self, name: str) -> None:
        """It ends; spans of a thread end in the reverse order of their beginnings."""

    def told(self, parts: dict[str, Any]) -> None:
        """What a run said with `tell`."""


_sinks: tuple[Sink, ...] = ()
_torch: Any = None  # the module, where the program had loaded it when the recording began
_open: dict[int, list[tuple[Span, str, list[Sink]]]] = {}  # thread -> its open spans, absent when there are none
_known: dict[str, Span] = {}


class Span:
    """A named stretch; one object serves every thread and every nesting. Made by `span`."""

    __slots__ = ("kind", "name")

    def __init__(self, name: str) -> None:
        self.kind, self.name = name.partition("/")[0], name
        assert self.kind in KINDS, f"span {name!r}: its kind must be one of {', '.join(KINDS)}"

    def __enter__(self) -> None:
        if _sinks and not (_torch and _torch.compiler.is_compiling()):
            _begin(self)

    def __exit__(self, _kind: object, _error: object, _traceback: object) -> None:
        if (_sinks or _open) and not (_torch and _torch.compiler.is_compiling()):
            _end(self)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """As a decorator: every call is a span."""

        @wraps(function)
        def spanned(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return spanned


def span(name: str, index: int | None = None) -> Span:
    """The span "kind/what", or "kind/index" with an index; AssertionError for a kind that is not in KINDS."""
    if index is not None and _sinks:
        return Span(f"{name}/{index}")
    if name in _known:
        return _known[name]
    return _made(name)


def tell(**parts: Any) -> None:
    """Hand the objects of a run (model, optimizer, ema) to what records it; nothing happens when nothing does."""
    for sink in _sinks:
        sink.told(parts)


@contextmanager
def recording(*sinks: Sink) -> Iterator[None]:
    """Spans reach `sinks`, entered in this order and left in the reverse. One recording at a time, for all threads."""
    global _sinks, _torch
    assert sinks and not _sinks, "expected sinks, and no recording at work"
    _sinks, _torch = sinks, sys.modules.get("torch")
    try:
        yield
    finally:
        _sinks = ()


class TorchSink:
    """torch.profiler's record_function: a range in PyTorch's traces, seen only while a profiler runs."""

    def __init__(self) -> None:
        from torch.profiler import record_function

        self._range, self._local = record_function, threading.local()

    def enter(self, name: str) -> None:
        """Open the range."""
        scope = self._range(name)
        scope.__enter__()
        self._stack().append(scope)

    def leave(self, name: str) -> None:
        """Close it."""
        self._stack().pop().__exit__(None, None, None)

    def told(self, parts: dict[str, Any]) -> None:
        """Nothing to do."""

    def _stack(self) -> list[Any]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[Any] = self._local.stack
        return stack


class NvtxSink:
    """NVTX ranges in the domain `vchitect_fast`, coloured and categorised by kind; UserError without the package nvtx."""

    def __init__(self) -> None:
        try:
            import nvtx
        except ImportError:
            raise UserError("NVTX ranges need the package nvtx; pip install 'vchitect-fast[profile]'.") from None
        self._domain = nvtx.get_domain(DOMAIN)
        self._attributes: dict[str, Any] = {}

    def enter(self, name: str) -> None:
        """Push the range."""
        kind = name.partition("/")[0]
        if kind == "step":  # a name a step: not kept
            attributes = self._domain.get_event_attributes(message=name, color=KINDS[kind], category=kind)
        elif (attributes := self._attributes.get(name)) is None:
            attributes = self._domain.get_event_attributes(message=name, color=KINDS[kind], category=kind)
            self._attributes[name] = attributes
        self._domain.push_range(attributes)

    def leave(self, name: str) -> None:
        """Pop it."""
        self._domain.pop_range()

    def told(self, parts: dict[str, Any]) -> None:
        """Nothing to do."""


def _made(name: str) -> Span:
    found = _known[name] = Span(name)
    return found


def _begin(made: Span) -> None:
    name, stack = made.name, _open.get(threading.get_ident())
    kind, _, what = name.partition("/")
    if what.startswith("."):
        around = stack[-1][1].partition("/")[2] if stack else ""
        name = f"{kind}/{around}{what}" if around else f"{kind}/{what[1:]}"
    # Autograd numbers the backward that a thread is in; torch's own checkpoint asks the same.
    if made.kind == "forward" and _torch and _torch._C._current_graph_task_id() != -1:
        name = f"recompute/{name.partition('/')[2]}"
    entered: list[Sink] = []
    for sink in _sinks:
        sink.enter(name)
        entered.append(sink)
    _open.setdefault(threading.get_ident(), []).append((made, name, entered))


def _end(made: Span) -> None:
    stack = _open.get(thread := threading.get_ident())
    if not stack or stack[-1][0] is not made:  # it began before the recording
        return
    _, name, entered = stack.pop()
    if not stack:
        del _open[thread]
    while entered:
        sink = entered.pop()
        try:
            sink.leave(name)
        except BaseException:  # the others are left first: a sink may end the run with an exception of its own
            while entered:
                entered.pop().leave(name)
            raise
