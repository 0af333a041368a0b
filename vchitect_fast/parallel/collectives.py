"""One packed all-to-all that changes which tensor dim is cut over the ranks: sizes need not divide, nothing is padded.

    share(n, P, r)            the part of n things that rank r of P owns: contiguous, balanced, possibly empty
    Axis, Part                what one tensor of the exchange is cut along before it, and along which after it
    send(parts, tensors, group).receive()      start, then finish: what runs between them hides the exchange

Several tensors travel in one all_to_all_single: one copy packs them, one unpacks them. Backward is the same exchange the other
way, started where `receive` was and finished where `send` was, so it hides behind the same work. Every rank takes part in every
exchange, also with nothing to send, in the order of the program; that is all that keeps the ranks in step.
Refuses nothing: what comes in was checked where the user said it (sequence.py). No second derivatives.

Letters: P ranks, p and q one of them (sender, receiver).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vchitect_fast.offload.groups import Arrival, expect
from vchitect_fast.profiling.span import span

Index = tuple[slice, ...]  # of a tensor's first dims


def share(size: int, num_ranks: int, rank: int) -> slice:
    """The part of `size` things that `rank` owns: size // num_ranks of them, the first ranks one more where that leaves a rest."""
    each, rest = divmod(size, num_ranks)
    start = rank * each + min(rank, rest)
    return slice(start, start + each + (rank < rest))


def _length(part: slice) -> int:
    return int(part.stop - part.start)


@dataclass(frozen=True)
class Axis:
    """A tensor dim that is cut over the ranks. Its segments lie one after the other, and each is cut by itself."""

    dim: int
    segments: tuple[int, ...]  # whole sizes
    num_unsent: int = 0  # so many segments at the end nobody needs: they stay, and zeros stand for them

    def size(self, num_ranks: int, rank: int) -> int:
        """What one rank has of the dim."""
        return sum(_length(share(segment, num_ranks, rank)) for segment in self.segments)

    def pieces(self, num_ranks: int, rank: int) -> list[tuple[slice, slice]]:
        """What travels of a rank's part: where it lies in the whole dim and where in that part."""
        found, whole, local = [], 0, 0
        for segment in self.segments[: len(self.segments) - self.num_unsent]:
            own = share(segment, num_ranks, rank)
            found.append((slice(whole + own.start, whole + own.stop), slice(local, local + _length(own))))
            whole, local = whole + segment, local + _length(own)
        return found


@dataclass(frozen=True)
class Part:
    """How one tensor of an exchange is cut: along `gather` before it (then whole), along `scatter` after it (whole before).

    scatter None: every rank gets all that a rank has (an all-gather). gather None: what comes is summed, in fp32 at least.
    """

    scatter: Axis | None
    gather: Axis | None

    def back(self) -> Part:
        """The way of the gradient."""
        return Part(self.gather, self.scatter)

    def out_shape(self, shape: torch.Size, num_ranks: int, rank: int) -> torch.Size:
        """Of what `rank` has afterwards."""
        sizes = list(shape)
        if self.scatter:
            sizes[self.scatter.dim] = self.scatter.size(num_ranks, rank)
        if self.gather:
            sizes[self.gather.dim] = sum(self.gather.segments)
        return torch.Size(sizes)

    def pieces(self, num_ranks: int, sender: int, receiver: int) -> list[tuple[Index, Index]]:
        """What travels from one rank to another: where it lies in the sender's tensor and where in the receiver's."""
        everything = [(slice(None), slice(None))]
        cut = self.scatter.pieces(num_ranks, receiver) if self.scatter else everything
        joined = self.gather.pieces(num_ranks, sender) if self.gather else everything
        found = []
        for to_whole, to_local in cut:
            for from_whole, from_local in joined:
                source = self._index(to_whole, from_local)
                found.append((source, self._index(to_local, from_whole)))
        return found

    def _index(self, along_scatter: slice, along_gather: slice) -> Index:
        index = [slice(None)] * (1 + max(axis.dim for axis in (self.scatter, self.gather) if axis))
        if self.gather:
            index[self.gather.dim] = along_gather
        if self.scatter:
            index[self.scatter.dim] = along_scatter
        return tuple(index)


@dataclass(frozen=True)
class Route:
    """Where everything of one exchange lies, seen from one rank; the packed buffers hold it in this order."""

    sends: tuple[tuple[int, Index], ...]  # (part, where in its tensor), receiver by receiver
    send_sizes: tuple[int, ...]  # numbers to each receiver
    receives: tuple[tuple[int, Index], ...]  # (part, where in its outcome), sender by sender
    receive_sizes: tuple[int, ...]
    out_shapes: tuple[torch.Size, ...]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """[numbers] to send; the one copy."""
        packed, start = tensors[0].new_empty(sum(self.send_sizes)), 0
        for part, where in self.sends:
            piece = tensors[part][where]
            packed[start : start + piece.numel()].view(piece.shape).copy_(piece)
            start += piece.numel()
        return packed

    def unpack(self, parts: Sequence[Part], received: Tensor) -> tuple[Tensor, ...]:
        """The outcome of each part; the other copy."""
        outcomes, start = [], 0
        for part, shape in zip(parts, self.out_shapes, strict=True):
            if part.gather is None:
                outcomes.append(received.new_zeros(shape, dtype=torch.promote_types(received.dtype, torch.float32)))
            elif any(axis and axis.num_unsent for axis in (part.scatter, part.gather)):
                outcomes.append(received.new_zeros(shape))
            else:
                outcomes.append(received.new_empty(shape))
        for index, where in self.receives:
            target = outcomes[index][where]
            piece = received[start : start + target.numel()].view(target.shape)
            target.add_(piece) if parts[index].gather is None else target.copy_(piece)
            start += target.numel()
        return tuple(outcome.to(received.dtype) for outcome in outcomes)


@lru_cache(maxsize=1024)
def route(parts: tuple[Part, ...], shapes: tuple[torch.Size, ...], num_ranks: int, rank: int) -> Route:
    """The Route of tensors of these shapes on `rank`. Pure; a model asks for the same few again and again."""
    out_shapes = tuple(part.out_shape(shape, num_ranks, rank) for part, shape in zip(parts, shapes, strict=True))
    sends, send_sizes, receives, receive_sizes = [], [], [], []
    for other in range(num_ranks):
        out = [(i, source) for i, part in enumerate(parts) for source, _ in part.pieces(num_ranks, rank, other)]
        come = [(i, target) for i, part in enumerate(parts) for _, target in part.pieces(num_ranks, other, rank)]
        sends += out
        send_sizes.append(sum(_numel(shapes[i], where) for i, where in out))
        receives += come
        receive_sizes.append(sum(_numel(out_shapes[i], where) for i, where in come))
    return Route(tuple(sends), tuple(send_sizes), tuple(receives), tuple(receive_sizes), out_shapes)


def _numel(shape: torch.Size, where: Index) -> int:
    cut = [len(range(*index.indices(size))) for size, index in zip(shape, where, strict=False)]
    return math.prod(cut) * math.prod(shape[len(cut) :])


class Flight:
    """One exchange between its start and its end, there and, in backward, back."""

    def __init__(self, parts: Sequence[Part], group: dist.ProcessGroup, arrival: Arrival) -> None:
        self.parts, self.group, self.arrival = tuple(parts), group, arrival
        self.size, self.rank = group.size(), group.rank()
        self.coming: Tensor | None = None  # of `send`, until `receive`
        self.back_shapes: tuple[torch.Size, ...] = ()
        self._work: tuple[Any, Route, Tensor, Tensor] | None = None

    def receive(self) -> tuple[Tensor, ...]:
        """Wait; the outcome of each part."""
        coming, self.coming = self.coming, None  # it knows its graph and the graph knows us: no cycle
        assert coming is not None, "a flight ends once"
        return _Receive.apply(self, coming)

    def _start(self, parts: tuple[Part, ...], tensors: Sequence[Tensor]) -> Tensor:
        way = route(parts, tuple(tensor.shape for tensor in tensors), self.size, self.rank)
        packed = way.pack(tensors)
        incoming = packed.new_empty(sum(way.receive_sizes))
        with span("collective/start"):
            work = dist.all_to_all_single(
                incoming, packed, list(way.receive_sizes), list(way.send_sizes), group=self.group, async_op=True
            )
        self._work = work, way, packed, incoming  # both buffers stay until the wait
        return packed

    def _end(self, parts: tuple[Part, ...]) -> tuple[Tensor, ...]:
        assert self._work is not None
        work, way, _, incoming = self._work
        with span("collective/wait"):
            work.wait()  # on CUDA the current stream waits, not this thread
        self._work = None
        return way.unpack(parts, incoming)

    def depart(self, tensors: Sequence[Tensor]) -> Tensor:
        """Forward, first half. Returns the incoming buffer, to be read by nobody before the second half."""
        self.back_shapes = tuple(tensor.shape for tensor in tensors)
        if self.arrival.put_back:
            return tensors[0].new_empty(0)  # recomputation: it was saved when it came
        self._start(self.parts, tensors)
        assert self._work is not None
        return self._work[
            3
        ].detach()  # a backend's thread may let go of its tensor late: that one must not hold the graph

    def arrive(self) -> tuple[Tensor, ...]:
        """Forward, second half."""
        arrival, self.arrival = self.arrival, Arrival()
        if arrival.put_back:
            return tuple(arrival.put_back())
        outcomes = self._end(self.parts)
        arrival.save(outcomes)
        return outcomes

    def depart_back(self, gradients: Sequence[Tensor]) -> Tensor:
        """Backward, first half. The packed gradients are the gradient of the incoming buffer."""
        return self._start(tuple(part.back() for part in self.parts), gradients)

    def arrive_back(self) -> tuple[Tensor, ...]:
        """Backward, second half."""
        return self._end(tuple(part.back() for part in self.parts))


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *tensors: Tensor) -> Tensor:
        ctx.flight = flight
        return flight.depart(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.flight.arrive_back()


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, coming: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        return flight.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.flight.depart_back(gradients)


def send(
    parts: Sequence[Part], tensors: Sequence[Tensor], group: dist.ProcessGroup, *, saved_as: str | None = None
) -> Flight:
    """Start an exchange of tensors of one dtype; `receive` of what it returns ends it. All ranks of `group`, in the same order.

    saved_as  the activation group that the outcome belongs to: a Policy that keeps or offloads it spares recomputation the
              exchange (offload/groups.py); None: it is exchanged again whenever it is computed again
    """
    flight = Flight(parts, group, expect(saved_as) if saved_as else Arrival())
    flight.coming = _Send.apply(flight, *tensors)
    return flight


def exchange(
    parts: Sequence[Part], tensors: Sequence[Tensor], group: dist.ProcessGroup, *, saved_as: str | None = None
) -> tuple[Tensor, ...]:
    """`send` and `receive` at once."""
    return send(parts, tensors, group, saved_as=saved_as).receive()
