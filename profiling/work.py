"""Work: what the device did, piece by piece, and on whose behalf: the kernel, its class, the op and the span behind it.

On a GPU a piece is a kernel, a copy or a memory set, and leads back over its correlation to the call that launched it: the
innermost op and span open in that thread at that moment are its own. In a trace without a GPU the threads are the device
and a piece is what an op does itself, without the ops inside it; time in a span of a collective or a copy that no op
explains counts as that (a thread that waits for gloo). Where no op at all was recorded (curation's workers, NVTX ranges
alone), spans of our kinds stand for the work that was done in them.

Spans of backward: autograd runs a node outside the forward's span, but node and forward op share a sequence number, so work
of a node whose op ran in forward/spatial is named backward/spatial. Work launched in a thread without spans belongs to the
span that the main thread is in. Letters: W pieces of work.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vchitect_fast.profiling.facts import CLASSES, COLLECTIVE, COPY, NO_SPAN, OTHER, STREAMS
from vchitect_fast.profiling.kernel_class import class_of
from vchitect_fast.profiling.kinds import KINDS, kind_of
from vchitect_fast.profiling.nesting import Innermost, innermost
from vchitect_fast.profiling.trace import ON_DEVICE, Kind, Trace

COMMUNICATION = ("gloo:", "nccl", "mpi:", "ucc:")  # ranges that torch.distributed and NCCL open themselves: no spans
COPY_OUT, COPY_IN, COPY_WITHIN = (STREAMS.index(name) for name in ("copy_out", "copy_in", "copy_within"))


@dataclass(frozen=True, eq=False)
class Work:
    """Sorted by start. Indices point into the trace's events, -1 for none."""

    start: np.ndarray  # float64 [W], us
    end: np.ndarray  # float64 [W]
    event: np.ndarray  # int64 [W], the kernel, copy or op
    launch: np.ndarray  # int64 [W], the call or the op that launched it; itself without a GPU
    lane: np.ndarray  # int32 [W], the thread in which it was asked for; -1 unknown
    moment: np.ndarray  # float64 [W], us, when it was asked for
    op: np.ndarray  # int64 [W], the innermost op behind it
    span: np.ndarray  # int32 [W], index into span_names
    kernel_class: np.ndarray  # int8 [W], index into CLASSES
    stream: np.ndarray  # int8 [W], index into STREAMS; -1 for compute
    span_names: tuple[str, ...]  # the first is NO_SPAN
    spans: np.ndarray = field(repr=False)  # int64, the events that are spans of the program
    main_lane: int  # the thread that the spans of steps are in

    def __len__(self) -> int:
        return len(self.start)


def find_work(trace: Trace) -> Work:
    """The work of a trace, which has at least one event; without kernels and ops there is none."""
    talk = np.array([name.startswith(COMMUNICATION) for name in trace.names], dtype=bool)
    is_span = (trace.kind == Kind.SPAN) & ~talk[trace.name]
    spans = np.flatnonzero(is_span)
    threads = _Threads(trace, spans)
    if trace.has_device:
        event = trace.where(*ON_DEVICE)
        start, end = trace.start_us[event], trace.end_us[event]
        launch = _launches(trace, event)
        launch = np.where(launch >= 0, launch, _external_op(trace, event))
    else:
        start, end, event = _own_time(trace, is_span, threads)
        launch = event
    order = np.argsort(start, kind="stable")
    start, end, event, launch = start[order], end[order], event[order], launch[order]
    known = launch >= 0
    # Without a GPU the moment lies inside the piece: its first edge may be the end of a neighbour.
    moment = np.where(known, trace.start_us[launch] if trace.has_device else (start + end) / 2, start)
    lane = np.where(known, trace.lane[launch], -1)
    op = threads.op_at(lane, moment)
    op = op if trace.has_device else event
    span, span_names = _name_spans(trace, threads, lane, moment)
    classes, streams = _classes(trace, event, op, span, span_names)
    return Work(start, end, event, launch, lane, moment, op, span, classes, streams, span_names, spans, threads.main)


def _launches(trace: Trace, event: np.ndarray) -> np.ndarray:
    """The call into the driver behind each event of a device; -1 where the trace has none."""
    calls = trace.where(Kind.RUNTIME)
    calls = calls[trace.correlation[calls] >= 0]
    found = _first_with(trace.correlation[calls], trace.correlation[event])
    return np.where(found >= 0, calls[np.maximum(found, 0)] if len(calls) else -1, -1)


def _external_op(trace: Trace, event: np.ndarray) -> np.ndarray:
    """The op with the same external id, where the trace has no calls into the driver; -1 without."""
    ops = trace.where(Kind.OP)
    ops = ops[trace.external[ops] >= 0]
    found = _first_with(trace.external[ops], trace.external[event])
    return np.where(found >= 0, ops[np.maximum(found, 0)] if len(ops) else -1, -1)


def _first_with(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The first index of each wanted key in keys, -1 for none and for the key -1."""
    if not len(keys):
        return np.full(len(wanted), -1, dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    place = np.searchsorted(keys[order], wanted, side="left")
    hit = order[np.minimum(place, len(keys) - 1)]
    return np.where((keys[hit] == wanted) & (wanted >= 0), hit, -1)


def _own_time(trace: Trace, is_span: np.ndarray, threads: _Threads) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, end, event) of what each op, or span that stands for work, does itself; cut where a span begins or ends."""
    kinds = {"collective", "copy_out", "copy_in"}
    if trace.spans_only:
        kinds = KINDS.keys() - {"step"}
    stands = np.array([kind_of(name) in kinds for name in trace.names], dtype=bool)
    works = (trace.kind == Kind.OP) | ((trace.kind == Kind.SPAN) & (~is_span | stands[trace.name]))
    parts = [(np.empty(0), np.empty(0), np.empty(0, dtype=np.int64))]
    for lane in np.unique(trace.lane[works]).tolist():
        event = np.flatnonzero(works & (trace.lane == lane))
        own = innermost(trace.start_us[event], trace.end_us[event])
        spans = [threads.spans[which][1].edge for which in {lane, threads.main} if which in threads.spans]
        start, end, owner = own.cut(np.concatenate(spans)).stretches() if spans else own.stretches()
        parts.append((start, end, event[owner]))
    start, end, event = (np.concatenate(column) for column in zip(*parts, strict=True))
    return start, end, event


class _Threads:
    """The ops, backward nodes and spans of each CPU thread, by moment."""

    def __init__(self, trace: Trace, spans: np.ndarray) -> None:
        self.trace = trace
        self.ops = self._by_lane(trace.where(Kind.OP))
        nodes = np.flatnonzero((trace.kind == Kind.OP) & (trace.backward == 1) & (trace.sequence >= 0))
        self.nodes = self._by_lane(nodes)
        self.spans = self._by_lane(spans)
        steps = spans[[step_number(trace.names[name]) is not None for name in trace.name[spans]]]
        lanes = trace.lane[steps if len(steps) else spans if len(spans) else trace.where(Kind.OP)]
        self.main = int(np.bincount(lanes).argmax()) if len(lanes) else -1

    def _by_lane(self, events: np.ndarray) -> dict[int, tuple[np.ndarray, Innermost]]:
        found = {}
        for lane in np.unique(self.trace.lane[events]).tolist():
            own = events[self.trace.lane[events] == lane]
            found[lane] = (own, innermost(self.trace.start_us[own], self.trace.end_us[own]))
        return found

    def op_at(self, lane: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """The innermost op of a thread at a moment: event indices, -1 for none."""
        return self._at(self.ops, lane, moment)

    def node_at(self, lane: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """The innermost node of autograd's."""
        return self._at(self.nodes, lane, moment)

    def span_at(self, lane: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """The innermost span."""
        return self._at(self.spans, lane, moment)

    @staticmethod
    def _at(
        threads: dict[int, tuple[np.ndarray, Innermost]], lane: np.ndarray, moment: np.ndarray
    ) -> np.ndarray:  # fmt: skip
        found = np.full(len(moment), -1, dtype=np.int64)
        for which, (events, stretches) in threads.items():
            here = np.flatnonzero(lane == which)
            place = stretches.at(moment[here])
            found[here] = np.where(place >= 0, events[np.maximum(place, 0)], -1)
        return found


def step_number(name: str) -> int | None:
    """12 of "step/12" and of torch's "ProfilerStep#12"; None for any other name."""
    for prefix in ("step/", "ProfilerStep#"):
        if name.startswith(prefix) and name[len(prefix) :].isdecimal():
            return int(name[len(prefix) :])
    return None


def _name_spans(
    trace: Trace, threads: _Threads, lane: np.ndarray, moment: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:  # fmt: skip
    """The span of each piece, as an index into the names returned."""
    own = threads.span_at(lane, moment)
    span = np.where(own >= 0, own, threads.span_at(np.where(lane >= 0, threads.main, -1), moment))
    # Spans by their names' numbers: those of the trace, none, and those that backward takes from forward.
    num_names = len(trace.names)
    texts = [NO_SPAN if step_number(name) is not None else name for name in trace.names]
    texts += [NO_SPAN, *(f"backward/{name.partition('/')[2]}" for name in trace.names)]
    found = np.where(span >= 0, trace.name[span], num_names)
    # Recomputation and collectives inside backward have spans that say more than their node does.
    vague = np.array([kind_of(text) in ("", "backward") for text in texts], dtype=bool)[found]
    node = np.where(vague, threads.node_at(lane, moment), -1)
    forward_name = _forward_names(trace, threads, np.where(node >= 0, trace.sequence[node], -1))
    found = np.where(forward_name >= 0, num_names + 1 + forward_name, found)
    used, inverse = np.unique(found, return_inverse=True)
    labels = {NO_SPAN: 0}
    numbers = [labels.setdefault(texts[name], len(labels)) for name in used.tolist()]
    return np.array(numbers, dtype=np.int32)[inverse], tuple(labels)


def _forward_names(trace: Trace, threads: _Threads, sequence: np.ndarray) -> np.ndarray:
    """The name's number of the forward span in which each autograd node was made; -1 where there is none."""
    ops = np.flatnonzero((trace.kind == Kind.OP) & (trace.backward == 0) & (trace.sequence >= 0))
    # Numbers count by thread; those of autograd's own threads belong to recomputed ops, whose nodes never run.
    ops = ops[trace.lane[ops] == threads.main][::-1]
    span = threads.span_at(trace.lane[ops], trace.start_us[ops])
    is_forward = np.array([kind_of(name) == "forward" for name in trace.names], dtype=bool)
    # Backwards in time: of the ops with one number the last is the one that made the node and used it up.
    made = _first_with(trace.sequence[ops], sequence)
    if not len(ops):
        return np.full(len(sequence), -1, dtype=np.int64)
    behind = np.where(made >= 0, span[made], -1)
    name = trace.name[behind]
    return np.where((behind >= 0) & is_forward[name], name, -1)


def _classes(
    trace: Trace, event: np.ndarray, op: np.ndarray, span: np.ndarray, span_names: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Class and stream of each piece; a copy's stream by its direction, without a GPU by its span."""
    num_names = len(trace.names) + 1
    behind = np.where(op >= 0, trace.name[op], num_names - 1)
    pairs, inverse = np.unique(trace.name[event].astype(np.int64) * num_names + behind, return_inverse=True)
    texts = [*trace.names, ""]
    named = [(texts[pair // num_names], texts[pair % num_names]) for pair in pairs.tolist()]
    classes = np.array([CLASSES.index(class_of(*pair)) for pair in named], dtype=np.int8)[inverse]
    if trace.has_device:
        kind, way = trace.kind[event], np.array([_direction(name) for name in trace.names])[trace.name[event]]
        copies = (kind == Kind.COPY) | (kind == Kind.FILL)
    else:
        moves = {"copy_out": COPY_OUT, "copy_in": COPY_IN}
        way = np.array([moves.get(kind_of(name), COPY_WITHIN) for name in span_names])[span]
        copies = (way != COPY_WITHIN) & (classes != CLASSES.index(COLLECTIVE))
        ours = (trace.kind[event] == Kind.SPAN) & (classes != CLASSES.index(COLLECTIVE))
        classes[ours] = CLASSES.index(OTHER)  # a span's name is no kernel's
    classes[copies] = CLASSES.index(COPY)
    talks = np.where(classes == CLASSES.index(COLLECTIVE), STREAMS.index("collective"), -1)
    return classes, np.where(copies, way, talks).astype(np.int8)


def _direction(name: str) -> int:
    for mark, stream in (("DtoH", COPY_OUT), ("HtoD", COPY_IN)):
        if mark in name:
            return stream
    return COPY_WITHIN
