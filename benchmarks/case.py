"""What a bench is made of: Sizes, a Problem drawn at them, the Providers that solve it, and the Case that holds all four.

A Problem's leaves get gradients, and so do its module's parameters. A provider that takes visual and text rows already
concatenated says `joint`: it is measured without that copy, so it does less than ours and is the stricter alternative.
Providers of ours carry "(ours" in their name; only the name stands in a Record.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vchitect_fast.benchmarks.record import BACKWARD, FORWARD
from vchitect_fast.shapes import VideoShape

OURS = "(ours"


@dataclass(frozen=True)
class Sizes:
    """B samples, T frames, S visual tokens and N text tokens a frame, H heads of C columns."""

    B: int
    T: int
    S: int
    N: int
    H: int
    C: int

    @classmethod
    def of(cls, shape: VideoShape, num_text_tokens: int, num_heads: int, head_dim: int) -> Sizes:
        """One sample of a VideoShape."""
        return cls(1, shape.num_frames, shape.tokens_per_frame(), num_text_tokens, num_heads, head_dim)

    @property
    def D(self) -> int:
        """Hidden columns."""
        return self.H * self.C

    @property
    def J(self) -> int:
        """Tokens a frame."""
        return self.S + self.N

    @property
    def rows(self) -> int:
        """Visual and text rows."""
        return self.B * self.T * self.J

    @property
    def visual_rows(self) -> int:
        """B T S."""
        return self.B * self.T * self.S


@dataclass
class Problem:
    """Inputs of one call, and the module whose parameters it uses."""

    leaves: list[Tensor]
    module: nn.Module | None = None

    def wanted(self) -> list[Tensor]:
        """All tensors that get gradients."""
        return [*self.leaves, *(self.module.parameters() if self.module else ())]

    def double(self) -> Problem:
        """The same values in fp64."""
        module = copy.deepcopy(self.module).double() if self.module else None
        return Problem([leaf.detach().double().requires_grad_() for leaf in self.leaves], module)


def draw_leaves(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Noise, made on the device from torch's seed."""
    return [torch.randn(*shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]


Solve = Callable[[Problem], Sequence[Tensor]]


def same(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Nothing to join."""
    return list(tensors)


@dataclass(frozen=True)
class Provider:
    """Who computes. `unavailable` says why it cannot run here, before anything is tried."""

    name: str
    run: Solve
    unavailable: str = ""
    joint: bool = False
    compiled: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether the name says so."""
        return is_ours(self.name)


@dataclass(frozen=True)
class Case:
    """One op or block at one shape.

    work    (sizes, bytes of an element) -> FLOPs or bytes, by `unit`, of forward and of backward
    exact   the definition, in any dtype; run in fp64 at the check sizes
    join    leaves, or gradients, as the joint providers have them; join_outputs likewise
    """

    bench: str
    shape: str
    sizes: Sizes
    check: Sizes
    dtype: torch.dtype
    draw: Callable[[Sizes, torch.dtype, torch.device], Problem]
    exact: Solve
    providers: tuple[Provider, ...]
    unit: str
    work: Callable[[Sizes, int], tuple[float, float]]
    directions: tuple[str, ...] = (FORWARD, BACKWARD)
    join: Callable[[Sequence[Tensor]], list[Tensor]] = same
    join_outputs: Callable[[Sequence[Tensor]], list[Tensor]] = same

    def amount(self, direction: str) -> float:
        """FLOPs or bytes of a direction."""
        forward, backward = self.work(self.sizes, self.dtype.itemsize)
        return {FORWARD: forward, BACKWARD: backward}.get(direction, forward + backward)

    def without_compile(self, why: str) -> Case:
        """The same with torch.compile's providers unavailable."""
        providers = tuple(replace(p, unavailable=p.unavailable or why) if p.compiled else p for p in self.providers)
        return replace(self, providers=providers)

    def joined(self, problem: Problem) -> Problem:
        """The problem as joint providers get it."""
        with torch.no_grad():
            return Problem([leaf.clone().requires_grad_() for leaf in self.join(problem.leaves)], problem.module)


def is_ours(provider: str) -> bool:
    """Whether a Record's provider is this project's."""
    return OURS in provider


def is_interpreted(provider: str) -> bool:
    """Whether its time is that of Triton's interpreter, which says nothing about a GPU."""
    return provider.endswith("interpreted)")


def our_name(kind: str) -> str:
    """ "triton (ours)", or with the warning where Triton only interprets."""
    return f"{kind} (ours)" if torch.cuda.is_available() else f"{kind} (ours, interpreted)"


def compiled(solve: Solve, *, quick: bool) -> Provider:
    """torch.compile of a solution: fixed shapes, one graph or an error."""
    unavailable = "left out by --quick on a CPU" if quick and not torch.cuda.is_available() else ""
    run = torch.compile(solve, fullgraph=True, dynamic=False)
    return Provider("torch.compile", run, unavailable, compiled=True)


def prepare_process() -> None:
    """Without a GPU Triton must be told to interpret before a kernel's module is imported."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
