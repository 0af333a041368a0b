"""Spans: what reaches the sinks, what a span costs when it is off (calls counted, not timed), compile, NVTX, the train loop.

Run: pytest tests/profiling/test_span.py
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ranks import ranks
from torch.utils.checkpoint import checkpoint

from vchitect_fast.errors import UserError
from vchitect_fast.profiling.kinds import KINDS
from vchitect_fast.profiling.span import DOMAIN, NvtxSink, TorchSink, recording, span, tell


class Notes:
    """A sink that writes down what it is told, with the thread."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.parts: dict[str, Any] = {}
        self.threads: set[int] = set()

    def enter(self, name: str) -> None:
        self.seen.append(("enter", name))
        self.threads.add(threading.get_ident())

    def leave(self, name: str) -> None:
        self.seen.append(("leave", name))

    def told(self, parts: dict[str, Any]) -> None:
        self.parts |= parts

    @property
    def names(self) -> list[str]:
        return [name for what, name in self.seen if what == "enter"]


@contextmanager
def counted_calls(names: list[str]) -> Iterator[None]:
    """Python functions that are called inside, by name."""

    def note(frame: Any, event: str, _arg: object) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def test_names_nest_and_reach_every_sink_in_order() -> None:
    first, second = Notes(), Notes()
    with recording(first, second):
        tell(model=1)
        with span("step", 12), span("forward/model"), span("forward/spatial"):
            pass
        span("optimizer/step")(lambda: None)()
    assert first.seen == second.seen
    assert first.names == ["step/12", "forward/model", "forward/spatial", "optimizer/step"]
    assert [name for what, name in first.seen if what == "leave"] == [
        "forward/spatial", "forward/model", "step/12", "optimizer/step",
    ]  # fmt: skip
    assert first.parts == {"model": 1}
    with span("forward/model"):
        tell(model=2)
    assert len(first.seen) == 8 and first.parts == {"model": 1}


def test_a_decorated_function_keeps_its_answer_and_its_name() -> None:
    @span("forward/double")
    def double(x: int, *, plus: int = 0) -> int:
        """Twice."""
        return 2 * x + plus

    notes = Notes()
    with recording(notes):
        assert double(3, plus=1) == 7
    assert (double.__name__, double.__doc__, notes.names) == ("double", "Twice.", ["forward/double"])


@pytest.mark.parametrize("index", [None, 7])
def test_off_a_span_costs_three_calls(index: int | None) -> None:
    name = "step" if index else "forward/spatial"
    with recording(Notes()), span(name):  # the first makes the name; and a recording that is over costs nothing
        pass
    calls: list[str] = []
    with counted_calls(calls):
        for _ in range(10):
            with span(name, index):
                pass
    assert calls[:30] == ["span", "__enter__", "__exit__"] * 10
    assert "span" not in calls[30:]  # what follows is the end of the count


def test_recording_that_begins_or_ends_inside_a_span_loses_only_that_span() -> None:
    notes = Notes()
    outer = span("forward/outer")
    with outer:
        scope = recording(notes)
        scope.__enter__()
        with span("forward/inner"):
            pass
    with span("forward/late"):
        scope.__exit__(None, None, None)
    assert notes.seen == [
        ("enter", "forward/inner"), ("leave", "forward/inner"), ("enter", "forward/late"), ("leave", "forward/late"),
    ]  # fmt: skip


def test_an_error_closes_the_spans_it_passes_through() -> None:
    notes = Notes()
    with recording(notes):
        with pytest.raises(ZeroDivisionError), span("step", 1), span("forward/model"):
            1 / 0  # noqa: B018
        with span("step", 2):
            pass
    assert notes.seen[2:] == [
        ("leave", "forward/model"), ("leave", "step/1"), ("enter", "step/2"), ("leave", "step/2"),
    ]  # fmt: skip


def test_a_sink_may_end_the_run_and_the_others_are_left_first() -> None:
    class Enough(Exception):
        pass

    class Stops(Notes):
        def leave(self, name: str) -> None:
            super().leave(name)
            if name == "step/1":
                raise Enough

    stops, notes = Stops(), Notes()
    with recording(notes, stops), pytest.raises(Enough), span("step", 1), span("forward/model"):
        pass
    assert notes.seen == stops.seen and notes.seen[-1] == ("leave", "step/1")


def test_threads_do_not_mix() -> None:
    notes = Notes()
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with span("copy_out/block"):
            inside.set()
            done.wait(10)

    with recording(notes):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        with span("forward/model"):
            pass
        done.set()
        thread.join()
    assert notes.seen == [
        ("enter", "copy_out/block"), ("enter", "forward/model"), ("leave", "forward/model"), ("leave", "copy_out/block"),
    ]  # fmt: skip
    assert len(notes.threads) == 2


def test_an_unknown_kind_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="its kind must be one of step, data"):
        span("fwd/model")


def test_a_forward_inside_backward_is_a_recomputation() -> None:
    @span("forward/block")
    def block(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    notes = Notes()
    x = torch.ones(2, requires_grad=True)
    with recording(notes):
        with span("forward/model"):
            y = checkpoint(block, x, use_reentrant=False)
        with span("backward/model"):
            y.sum().backward()
        with span("forward/model"):
            block(x)
    assert notes.names == [
        "forward/model", "forward/block", "backward/model", "recompute/block", "forward/model", "forward/block",
    ]  # fmt: skip


def test_compiled_whole_the_span_vanishes_and_the_graph_does_not_split() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        with span("forward/spatial"):
            y = x.sin()
        return 2 * y

    notes, x = Notes(), torch.ones(3)
    expected = 2 * x.sin()
    assert torch.equal(compiled(x), expected)
    with recording(notes), span("forward/model"):
        assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x), expected)
    assert notes.names == ["forward/model"]


def test_the_profiler_sees_the_spans_by_name() -> None:
    with torch.profiler.profile() as profiler, recording(TorchSink()):
        with span("step", 3), span("forward/spatial"):
            torch.ones(4).sin()
    found = {event.name: event for event in profiler.events()}
    assert found["forward/spatial"].time_range.start >= found["step/3"].time_range.start
    assert found["forward/spatial"].time_range.end <= found["step/3"].time_range.end
    assert found["aten::sin"].time_range.start >= found["forward/spatial"].time_range.start


def test_nvtx_gets_a_domain_a_colour_and_a_category(monkeypatch: pytest.MonkeyPatch) -> None:
    class Domain:
        def __init__(self, name: str) -> None:
            self.name, self.calls = name, []

        def get_event_attributes(self, **attributes: Any) -> dict[str, Any]:
            return attributes

        def push_range(self, attributes: dict[str, Any]) -> None:
            self.calls.append(attributes)

        def pop_range(self) -> None:
            self.calls.append(None)

    made: list[Domain] = []
    fake = type(sys)("nvtx")
    fake.get_domain = lambda name: made.append(Domain(name)) or made[-1]
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    with recording(NvtxSink()), span("forward/spatial"):
        pass
    [domain] = made
    assert domain.name == DOMAIN
    assert domain.calls == [
        {"message": "forward/spatial", "color": KINDS["forward"], "category": "forward"}, None,
    ]  # fmt: skip


def test_the_real_nvtx_package_takes_our_calls() -> None:
    pytest.importorskip("nvtx", reason="needs the package nvtx (extra profile)")
    with recording(NvtxSink()), span("step", 1), span("forward/spatial"):
        pass


def test_without_the_package_nvtx_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(UserError, match=r"pip install 'vchitect-fast\[profile\]'"):
        NvtxSink()


def test_every_kind_has_its_own_colour() -> None:
    assert len(set(KINDS.values())) == len(KINDS)


def test_the_offload_engine_names_its_copies() -> None:
    from vchitect_fast.offload.engine import Engine

    pytest.importorskip("vchitect_fast._C", reason="needs the C++ module")
    engine, notes = Engine(2**20), Notes()
    with recording(notes):
        tensor = torch.arange(4096.0)
        entry = engine.offload(tensor, "a tensor")
        handle = entry.handle(tensor)
        engine.settle()
        del tensor
        engine.fetch(entry)
        assert torch.equal(engine.restore(handle), torch.arange(4096.0))
    assert notes.names[0] == "copy_out/start" and notes.names[-2:] == ["copy_in/start", "copy_in/wait"]
    assert set(notes.names) <= {"copy_out/start", "copy_out/wait", "copy_in/start", "copy_in/wait"}


def test_a_part_is_named_after_the_span_around_it() -> None:
    notes = Notes()
    with recording(notes):
        with span("forward/model"), span("forward/spatial"), span("forward/.qkv"):
            pass
        with span("forward/.qkv"):
            pass
    assert notes.names == ["forward/model", "forward/spatial", "forward/spatial.qkv", "forward/qkv"]


def test_an_exchange_between_ranks_is_a_collective_there_and_back() -> None:
    assert ranks(2).run("span_cases:exchanged") == [["collective/start", "collective/wait"] * 2] * 2
