"""Every op of kernels/ops.py, two merged GEMMs, the whole block, in fp8 too: each with its alternatives and formula of work.

On a GPU: bf16, 24 heads x 64, 333 text tokens, the video shapes that the goals are stated for. On a CPU: fp32 at one tiny
shape, kernels interpreted, which checks them and times nothing worth knowing. Formulas of bytes count each tensor that must
be read or written once; FLOPs of attention backward are 2.5 times forward, of GEMMs and of the block twice.
Attention lives in attention_cases.py, what a CPU can measure in host.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vchitect_fast.architecture import TransformerConfig, preset
from vchitect_fast.benchmarks.attention_cases import attention_cases
from vchitect_fast.benchmarks.case import Case, Problem, Provider, Sizes, compiled, draw_leaves, our_name
from vchitect_fast.benchmarks.record import BACKWARD, BOTH, FORWARD
from vchitect_fast.errors import UserError
from vchitect_fast.kernels import ops
from vchitect_fast.kernels.branch_sum import branch_sum
from vchitect_fast.kernels.projections import project
from vchitect_fast.model.blocks import SPATIAL_WEIGHT, Block, Branches
from vchitect_fast.model.fp8_steps import check_device
from vchitect_fast.model.fused import fused_block
from vchitect_fast.model.handwritten import handwritten_block
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

# Where the goals are stated. 1080 rows become 1088.
ATTENTION_SHAPES = (
    "32x256x256", "32x512x384", "40x768x432", "32x1024x768", "128x256x256", "16x1280x720", "8x1920x1088",
)  # fmt: skip
BLOCK_SHAPES = ("32x256x256", "32x512x384", "40x768x432", "128x256x256", "32x1024x768")
QUICK_SHAPE = "40x768x432"
TINY_SHAPE = "2x48x16"
EPS = 1e-6
Make = Callable[..., Case]


def all_cases(*, quick: bool) -> list[Case]:
    """Every case for this machine; `quick` keeps one shape on a GPU and leaves torch.compile out on a CPU."""
    shapes: tuple[tuple[str, ...], tuple[str, ...]]
    check: Sizes | None
    if not torch.cuda.is_available():
        shapes, dtype, sizes = ((TINY_SHAPE,),) * 2, torch.float32, (2, 2, 64)
        check = Sizes.of(VideoShape.parse(TINY_SHAPE)[0], *sizes)
    else:
        shapes = ((QUICK_SHAPE,),) * 2 if quick else (ATTENTION_SHAPES, BLOCK_SHAPES)
        dtype, sizes, check = torch.bfloat16, (333, 24, 64), None
    found = []
    for names, makers in ((shapes[0], attention_cases()), (shapes[1], row_cases())):
        for make in makers:
            for name in names:
                at = Sizes.of(VideoShape.parse(name)[0], *sizes)
                label = name if at.N == 333 else f"{name} N{at.N} H{at.H} C{at.C}"
                found.append(make(label, at, check, dtype, quick))
    return found


def row_cases() -> list[Make]:
    """Makers of every case but attention: (label, sizes, check sizes or None, dtype, quick) -> Case."""
    return [
        modulated_norm, gated_residual, gated_residual_norm, bias_gelu, branch_sum_case, project_case, block_case, fp8_block_case,
    ]  # fmt: skip


def _rows_case(
    bench: str, solve: Callable[..., object], extra: tuple[int, int, int], passes: tuple[int, int], num_vectors: int,
    label: str, sizes: Sizes, check: Sizes | None, dtype: torch.dtype, quick: bool,
) -> Case:  # fmt: skip
    """An op over rows: `extra` = (row tensors, columns per D, 1 if its vectors have no batch)."""
    num_rows_tensors, widen, flat = extra

    def draw(at: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
        row = (at.B, at.T * at.S, widen * at.D)
        vector = (widen * at.D,) if flat else (at.B, widen * at.D)
        return Problem(draw_leaves([row] * num_rows_tensors + [vector] * num_vectors, dtype, device))

    def run(impl: str) -> Callable[[Problem], Sequence[Tensor]]:
        def solved(problem: Problem) -> Sequence[Tensor]:
            out = solve(*problem.leaves, impl=impl)
            return (out,) if isinstance(out, Tensor) else out  # type: ignore[return-value]

        return solved

    def work(at: Sizes, element_bytes: int) -> tuple[float, float]:
        moved = at.visual_rows * widen * at.D * element_bytes
        return passes[0] * moved, passes[1] * moved

    providers = (
        Provider(our_name("triton"), run("triton")),
        Provider("eager", run("reference")),
        compiled(run("reference"), quick=quick),
    )
    check = check or replace(sizes, T=2, S=300)
    return Case(bench, label, sizes, check, dtype, draw, run("reference"), providers, "GB/s", work)


def modulated_norm(*args: object) -> Case:
    """LayerNorm and modulation: reads x, writes y; backward reads dy, x, writes dx."""

    def solve(x: Tensor, shift: Tensor, scale: Tensor, *, impl: str) -> Tensor:
        return ops.modulated_norm(x, shift, scale, EPS, impl=impl)

    return _rows_case("modulated_norm", solve, (1, 1, 0), (2, 3), 2, *args)  # type: ignore[arg-type]


def gated_residual(*args: object) -> Case:
    """x + gate branch: 3 passes each way (backward: dy, branch, dbranch)."""
    return _rows_case("gated_residual", ops.gated_residual, (2, 1, 0), (3, 3), 1, *args)  # type: ignore[arg-type]


def gated_residual_norm(*args: object) -> Case:
    """The gated residual and the norm that reads it: x, branch, y, n; backward dy, dn, y, branch, dx, dbranch."""

    def solve(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, impl: str) -> object:
        return ops.gated_residual_norm(x, branch, gate, shift, scale, EPS, impl=impl)

    return _rows_case("gated_residual_norm", solve, (2, 1, 0), (4, 6), 3, *args)  # type: ignore[arg-type]


def bias_gelu(*args: object) -> Case:
    """The MLP's widest activation, 4 D columns: x, y; backward dy, x, dx."""
    return _rows_case("bias_gelu", ops.bias_gelu, (1, 4, 1), (2, 3), 1, *args)  # type: ignore[arg-type]


def branch_sum_case(label: str, sizes: Sizes, check: Sizes | None, dtype: torch.dtype, quick: bool) -> Case:
    """One GEMM over the concatenated K axis beside the chained linears: 6 R D^2 FLOPs, twice that backward."""

    def draw(at: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
        linears = [(at.D, at.D), (at.D,)] * 3
        leaves = draw_leaves([(at.visual_rows, 3 * at.D), *linears], dtype, device)
        with torch.no_grad():
            for weight in leaves[1::2]:
                weight /= at.D**0.5
        return Problem(leaves)

    def run(chained: bool) -> Callable[[Problem], Sequence[Tensor]]:
        def solved(problem: Problem) -> Sequence[Tensor]:
            x, Wo, bo, Wc, bc, Wt, bt = problem.leaves
            linears = ((Wo, bo), (Wc, bc), (Wt, bt))
            return (branch_sum(x, *linears, spatial_weight=SPATIAL_WEIGHT, is_image=False, chained=chained),)

        return solved

    def work(at: Sizes, element_bytes: int) -> tuple[float, float]:
        flops = 6 * at.visual_rows * at.D**2
        return flops, 2 * flops

    providers = (
        Provider("merged GEMM (ours)", run(False)),
        Provider("chained, eager", run(True)),
        compiled(run(True), quick=quick),
    )
    check = check or replace(sizes, T=2, S=300)
    return Case("branch_sum", label, sizes, check, dtype, draw, run(True), providers, "TFLOP/s", work)


def project_case(label: str, sizes: Sizes, check: Sizes | None, dtype: torch.dtype, quick: bool) -> Case:
    """The seven visual projections: 14 R D^2 FLOPs, twice that backward. Joint: one weight that needs no laying together."""

    def draw(at: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
        leaves = draw_leaves([(at.visual_rows, at.D), *[(at.D, at.D)] * 7, *[(at.D,)] * 7], dtype, device)
        with torch.no_grad():
            for weight in leaves[1:8]:
                weight /= at.D**0.5
        return Problem(leaves)

    def separate(problem: Problem) -> Sequence[Tensor]:
        x, *parameters = problem.leaves
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(parameters[:7], parameters[7:], strict=True))

    def merged(problem: Problem) -> Sequence[Tensor]:
        x, *parameters = problem.leaves
        return project(x, parameters[:7], parameters[7:])

    def work(at: Sizes, element_bytes: int) -> tuple[float, float]:
        flops = 14 * at.visual_rows * at.D**2
        return flops, 2 * flops

    providers = (
        Provider("merged GEMM (ours)", merged),
        Provider("separate linears, eager", separate),
        compiled(separate, quick=quick),
        Provider("one weight, GEMM alone", lambda problem: (F.linear(*problem.leaves),), joint=True),
    )
    return Case(
        "project", label, sizes, check or replace(sizes, T=2, S=300), dtype, draw, separate, providers, "TFLOP/s", work,
        join=lambda leaves: [leaves[0], torch.cat(list(leaves[1:8])), torch.cat(list(leaves[8:]))],
        join_outputs=lambda outputs: [torch.cat(list(outputs), dim=-1)],
    )  # fmt: skip


def block_case(label: str, sizes: Sizes, check: Sizes | None, dtype: torch.dtype, quick: bool) -> Case:
    """The whole block, not the last one: three forwards of FLOPs in all.

    hand-written: model/handwritten.py; composed: the ops under autograd, model/fused.py; eager, torch.compile: blocks.py.
    """
    backend = dict.fromkeys(("spatial", "temporal", "cross"), "sdpa")

    def draw(at: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
        module = Block(block_config(at), last=False, branches=Branches()).to(device, dtype)
        shapes = [(at.B, at.T, at.S, at.D), (at.B, at.T, at.N, at.D), (at.B, at.D)]
        return Problem(draw_leaves(shapes, dtype, device), module)

    def plain(backend: dict[str, str]) -> Callable[[Problem], Sequence[Tensor]]:
        def solved(problem: Problem) -> Sequence[Tensor]:
            assert problem.module is not None
            return problem.module(*problem.leaves, backend)

        return solved

    def ours(run: Callable[..., object], impl: str) -> Callable[[Problem], Sequence[Tensor]]:
        return lambda problem: run(problem.module, *problem.leaves, impl=impl)  # type: ignore[return-value]

    def work(at: Sizes, element_bytes: int) -> tuple[float, float]:
        shape = VideoShape(at.T, 16 * at.S, 16)  # as many tokens a frame, in one row
        load = Workload(block_config(at), shape, at.B, at.N)
        forward = load.linear_flops() + load.attention_flops()
        return forward, 2 * forward

    providers = (
        Provider(our_name("hand-written, triton"), ours(handwritten_block, "triton")),
        Provider("hand-written, plain steps (ours)", ours(handwritten_block, "reference")),
        Provider(our_name("composed, triton"), ours(fused_block, "triton")),
        Provider("composed, plain ops (ours)", ours(fused_block, "reference")),
        Provider("eager", plain(backend)),
        compiled(plain(backend), quick=quick),
    )
    exact = plain(dict.fromkeys(backend, "math"))
    check = check or replace(sizes, T=4, S=64, N=33)
    return Case(
        "block", label, sizes, check, dtype, draw, exact, providers, "TFLOP/s", work, (FORWARD, BACKWARD, BOTH)
    )  # fmt: skip


def fp8_block_case(label: str, sizes: Sizes, check: Sizes | None, dtype: torch.dtype, quick: bool) -> Case:
    """The block with its linears in fp8, forward and backward, beside our own in 16 bits: what fp8 has to beat.

    Counted and checked as block: nothing in fp8 is kept for backward, and the ceiling is that of products in 16 bits. On a CPU
    it is emulated, at six rows, where the worst gradient is of a bias that all but cancels (error 1.1; 0.08 at the check
    sizes of a GPU).
    """
    block = block_case(label, sizes, check, dtype, quick)
    known = {provider.name: provider for provider in block.providers}
    by_hand, missing = known[our_name("hand-written, triton")], no_fp8(dtype, sizes.D)

    def ours(impl: str) -> Callable[[Problem], Sequence[Tensor]]:
        return lambda problem: handwritten_block(problem.module, *problem.leaves, impl=impl, fp8=True)

    providers = (
        Provider(our_name("fp8, triton"), ours("triton"), missing),
        Provider("fp8, plain steps (ours)", ours("reference"), missing),
        replace(by_hand, name=by_hand.name.replace("(ours)", "in 16 bits").replace("ours", "in 16 bits")),
        known["eager"],
    )
    return replace(block, bench="block fp8", providers=providers)


def no_fp8(dtype: torch.dtype, hidden_dim: int) -> str:
    """Why linears cannot compute in fp8 here; empty where they can."""
    try:
        check_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype, hidden_dim)
    except UserError as error:
        return str(error)
    return ""


def block_config(at: Sizes) -> TransformerConfig:
    """A TransformerConfig with these heads."""
    return replace(
        preset("vchitect-2b"), num_attention_heads=at.H, attention_head_dim=at.C, caption_projection_dim=at.D
    )
