"""The three attention branches beside everything that could replace them.

eager, torch.compile: the plain path from two sources, with its concatenation (and for temporal its rotary and rearranging)
sdpa NAME, flash-attn 4: that backend alone on rows concatenated beforehand; for temporal with rotary and rearranging
Rates: spatial and cross in TFLOP/s (backward 2.5 x forward), temporal in GB/s of the bytes that must move.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vchitect_fast.benchmarks.case import Case, Problem, Provider, Sizes, Solve, compiled, draw_leaves, our_name
from vchitect_fast.kernels import ops, reference

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cuDNN": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
NO_GPU = "it needs a CUDA GPU"
Joint = Callable[..., Tensor]  # of q, k, v


def attention_cases() -> list[Callable[..., Case]]:
    """Makers: (label, sizes, check sizes or None, dtype, quick) -> Case."""
    return [temporal, spatial, cross]


def temporal(label: str, sizes: Sizes, check: Sizes | None, dtype: torch.dtype, quick: bool) -> Case:
    """Bytes: q, k, v, o forward; q, k, v, do, dq, dk, dv backward."""

    def run(impl: str) -> Solve:
        return lambda problem: ops.temporal_attention(*_sources(problem), impl=impl)

    def exact(problem: Problem) -> Sequence[Tensor]:
        return reference.temporal_attention(*_sources(problem), math=True)

    def work(at: Sizes, element_bytes: int) -> tuple[float, float]:
        moved = at.rows * at.D * element_bytes
        return 4 * moved, 7 * moved

    providers = _two_sources(run, quick) + _sdpa(reference.temporal_joint)
    check = check or replace(sizes, S=32, N=9)
    return Case(
        "temporal", label, sizes, check, dtype, _draw_six, exact, providers, "GB/s", work,
        join=_join_six, join_outputs=_join_pair,
    )  # fmt: skip


def spatial(label: str, sizes: Sizes, check: Sizes | None, dtype: torch.dtype, quick: bool) -> Case:
    """FLOPs: 4 B T J^2 D forward."""

    def run(impl: str) -> Solve:
        return lambda problem: ops.spatial_attention(*_sources(problem), impl=impl)

    def exact(problem: Problem) -> Sequence[Tensor]:
        return reference.spatial_attention(*_sources(problem), math=True)

    def work(at: Sizes, element_bytes: int) -> tuple[float, float]:
        flops = 4 * at.B * at.T * at.J**2 * at.D
        return flops, 2.5 * flops

    def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _flash_attn_4(*(x.flatten(0, 1) for x in (q, k, v))).view(q.shape)

    providers = _two_sources(run, quick) + _sdpa(reference.spatial_joint) + _flash4("flash-attn 4", flash4)
    check = check or replace(sizes, T=2, H=2)
    return Case(
        "spatial", label, sizes, check, dtype, _draw_six, exact, providers, "TFLOP/s", work,
        join=_join_six, join_outputs=_join_pair,
    )  # fmt: skip


def cross(label: str, sizes: Sizes, check: Sizes | None, dtype: torch.dtype, quick: bool) -> Case:
    """FLOPs: 4 B T J N D forward. "by frame" folds the frames into the batch, with the keys expanded over them."""

    def run(impl: str) -> Solve:
        return lambda problem: ops.cross_attention(*problem.leaves, impl=impl)

    def draw(at: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
        frame, text = (at.B, at.T), (at.B, at.N, at.H, at.C)
        shapes = [(*frame, at.S, at.H, at.C), (*frame, at.N, at.H, at.C), text, text]
        return Problem(draw_leaves(shapes, dtype, device))

    def exact(problem: Problem) -> Sequence[Tensor]:
        return reference.cross_attention(*problem.leaves, math=True)

    def work(at: Sizes, element_bytes: int) -> tuple[float, float]:
        flops = 4 * at.rows * at.N * at.D
        return flops, 2.5 * flops

    def by_frame(attend: Joint) -> Joint:
        def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            expanded = (x[:, None].expand(-1, q.shape[1], -1, -1, -1).flatten(0, 1) for x in (k, v))
            return attend(q.flatten(0, 1), *expanded).view(q.shape)

        return folded

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attend(*(x.transpose(1, 2) for x in (q, k, v)), math=False).transpose(1, 2).contiguous()

    def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _flash_attn_4(q.flatten(1, 2), k, v).view(q.shape)

    providers = _two_sources(run, quick) + _sdpa(reference.cross_joint) + _sdpa(by_frame(sdpa), " by frame")
    providers += _flash4("flash-attn 4", flash4) + _flash4("flash-attn 4 by frame", by_frame(_flash_attn_4))
    return Case(
        "cross", label, sizes, check or replace(sizes, T=2, H=2), dtype, draw, exact, providers, "TFLOP/s", work,
        join=lambda leaves: [torch.cat(list(leaves[:2]), dim=2), *leaves[2:]], join_outputs=_join_pair,
    )  # fmt: skip


def _draw_six(at: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """q, k, v of the visual rows, then of the text rows, contiguous."""
    visual, text = ((at.B, at.T, length, at.H, at.C) for length in (at.S, at.N))
    return Problem(draw_leaves([visual] * 3 + [text] * 3, dtype, device))


def _sources(problem: Problem) -> tuple[Any, Any]:
    return tuple(problem.leaves[:3]), tuple(problem.leaves[3:])


def _join_six(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat((leaves[i], leaves[i + 3]), dim=2) for i in range(3)]


def _join_pair(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(list(outputs), dim=2)]


def _two_sources(run: Callable[[str], Solve], quick: bool) -> tuple[Provider, ...]:
    return (
        Provider(our_name("triton"), run("triton")),
        Provider("eager", run("reference")),
        compiled(run("reference"), quick=quick),
    )


def _sdpa(attend: Joint, suffix: str = "") -> tuple[Provider, ...]:
    def run(backend: SDPBackend) -> Solve:
        def solved(problem: Problem) -> Sequence[Tensor]:
            with sdpa_kernel(backend):  # one backend or an error
                return (attend(*problem.leaves),)

        return solved

    def unavailable(backend: SDPBackend) -> str:
        return "" if torch.cuda.is_available() or backend == SDPBackend.FLASH_ATTENTION else NO_GPU

    return tuple(
        Provider(name + suffix, run(backend), unavailable(backend), joint=True) for name, backend in BACKENDS.items()
    )


def _flash4(name: str, attend: Joint) -> tuple[Provider, ...]:
    """Needs a GPU and the package; its import loads a compiler, so it is looked for and not tried."""
    unavailable = "" if torch.cuda.is_available() else NO_GPU
    if not unavailable and not _is_installed("flash_attn.cute"):
        unavailable = "flash_attn.cute is not installed (pip install 'vchitect-fast[flash]')"
    return (Provider(name, lambda problem: (attend(*problem.leaves),), unavailable, joint=True),)


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[batch, length, H, C] each."""
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # with or without the log-sum-exp, by its version


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        return False
