"""Exchanges against what they mean: every rank knows the whole tensor, so it can cut out what it should have got."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vchitect_fast.parallel.collectives import Axis, Part, exchange, send, share


def numbers(*shape: int, dtype: torch.dtype = torch.float64, start: int = 1) -> Tensor:
    """Small whole numbers, each of its own place."""
    count = torch.Size(shape).numel()
    return (torch.arange(start, start + count) % 251).view(shape).to(dtype)


def cut(whole: Tensor, axis: Axis, rank: int) -> Tensor:
    """A rank's part, segment by segment."""
    parts = whole.split(list(axis.segments), dim=axis.dim)
    indices = [range(part.shape[axis.dim])[share(part.shape[axis.dim], dist.get_world_size(), rank)] for part in parts]
    return torch.cat(
        [
            part.index_select(axis.dim, torch.tensor(i, dtype=torch.long))
            for part, i in zip(parts, indices, strict=True)
        ],
        axis.dim,
    )


def moved(sizes: Sequence[tuple[int, int, int]], dtype_name: str) -> list[bool]:
    """Tensors [2, T, S + N, 3] from frames to tokens, and back by the gradient for each (T, S, N). What is right of it."""
    rank, dtype = dist.get_rank(), getattr(torch, dtype_name)
    right = []
    for T, S, N in sizes:
        frames, tokens = Axis(1, (T,)), Axis(2, (S, N))
        whole, other = numbers(2, T, S + N, 3, dtype=dtype), numbers(1, T, S + N, 2, dtype=dtype, start=7)
        mine = [cut(tensor, frames, rank).requires_grad_() for tensor in (whole, other)]
        out = exchange([Part(tokens, frames)] * 2, mine, dist.group.WORLD)
        right += [torch.equal(got, cut(tensor, tokens, rank)) for got, tensor in zip(out, (whole, other), strict=True)]
        gradients = [numbers(*tensor.shape, dtype=dtype, start=90) for tensor in (whole, other)]
        torch.autograd.backward(out, [cut(gradient, tokens, rank) for gradient in gradients])
        right += [torch.equal(m.grad, cut(g, frames, rank)) for m, g in zip(mine, gradients, strict=True)]
    return right


def unsent(T: int, S: int, N: int) -> list[bool]:
    """The last segment stays: zeros stand for it, and its gradient is zero."""
    rank, frames, tokens = dist.get_rank(), Axis(1, (T,)), Axis(2, (S, N), num_unsent=1)
    whole = numbers(2, T, S + N, 3)
    mine = cut(whole, tokens, rank).requires_grad_()
    (out,) = exchange([Part(frames, tokens)], [mine], dist.group.WORLD)
    expected = whole.clone()
    expected[:, :, S:] = 0
    gradient = numbers(2, T, S + N, 3, start=50)
    out.backward(cut(gradient, frames, rank))
    gradient[:, :, S:] = 0
    return [torch.equal(out, cut(expected, frames, rank)), torch.equal(mine.grad, cut(gradient, tokens, rank))]


def gathered(N: int, dtype_name: str) -> tuple[bool, Tensor, Tensor]:
    """All get everything; the gradient of what a rank has is the sum of what all ranks say. Right, the sum, and it exactly."""
    rank, size, axis = dist.get_rank(), dist.get_world_size(), Axis(1, (N,))
    whole = numbers(1, N, 2, dtype=getattr(torch, dtype_name))
    mine = cut(whole, axis, rank).requires_grad_()
    (out,) = exchange([Part(None, axis)], [mine], dist.group.WORLD)
    draws = [torch.randn(out.shape, generator=torch.Generator().manual_seed(r)).to(out.dtype) for r in range(size)]
    out.backward(draws[rank])
    exact = torch.stack([cut(draw, axis, rank).double() for draw in draws]).sum(0)
    assert mine.grad is not None
    return torch.equal(out, whole), mine.grad.double(), exact.to(out.dtype).double()


def two_at_once() -> list[bool]:
    """Two exchanges under way together, ended in the other order; used twice, so that gradients add up."""
    rank, frames, tokens = dist.get_rank(), Axis(1, (3,)), Axis(2, (4,))
    wholes = [numbers(1, 3, 4, 2), numbers(1, 3, 4, 2, start=30)]
    mine = [cut(whole, frames, rank).requires_grad_() for whole in wholes]
    flights = [send([Part(tokens, frames)], [m * 2], dist.group.WORLD) for m in mine]
    second = flights[1].receive()[0]
    first = flights[0].receive()[0]
    right = [
        torch.equal(first, cut(2 * wholes[0], tokens, rank)),
        torch.equal(second, cut(2 * wholes[1], tokens, rank)),
    ]
    (first.sum() + 3 * (first * second).sum()).backward(retain_graph=True)
    once = [m.grad.clone() for m in mine if m.grad is not None]
    (first.sum() + 3 * (first * second).sum()).backward()  # through the same flights again
    expected = cut(2 + 12 * 2 * wholes[1] / 2, frames, rank)
    assert mine[0].grad is not None
    return [*right, torch.equal(once[0], expected), torch.equal(mine[0].grad, 2 * expected)]
