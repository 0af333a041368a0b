"""torch.compile takes the ops into one graph, without a break, and changes nothing: values and gradients.

pytest tests/kernels/test_compile.py. Inductor on a GPU; elsewhere aot_eager, which traces the same way and compiles nothing.
"""

from __future__ import annotations

import torch
from close import assert_close_to_exact
from torch import Tensor

from vchitect_fast.kernels import ops
from vchitect_fast.kernels.branch_sum import branch_sum
from vchitect_fast.kernels.projections import project

D = 8


def rows_ops(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    n = ops.modulated_norm(x, shift, scale, 1e-6, impl="triton")
    y, n = ops.gated_residual_norm(n, branch, gate, shift, scale, 1e-6, impl="triton")
    return ops.gated_residual(y, ops.bias_gelu(n, bias, impl="triton"), gate, impl="triton")


def gemm_ops(x: Tensor, *parameters: Tensor) -> Tensor:
    weights, biases = parameters[:6], parameters[6:]
    rows = torch.cat(project(x, weights[:3], biases[:3]), dim=-1)
    out, context, temporal = zip(weights[3:], biases[3:], strict=True)
    return branch_sum(rows, out, context, temporal, spatial_weight=1.1, is_image=False)


def leaves(*sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    return [torch.randn(size, device=device).requires_grad_() for size in sizes]


def backend(device: torch.device) -> str:
    return "inductor" if device.type == "cuda" else "aot_eager"


def test_row_ops_in_one_graph(device: torch.device) -> None:
    given = leaves((2, 3, D), (2, 3, D), (2, D), (2, D), (2, D), (D,), device=device)
    compiled = torch.compile(rows_ops, fullgraph=True, backend=backend(device))
    (y, *grads), (z, *others) = (
        [out := f(*given), *torch.autograd.grad(out.square().sum(), given)] for f in (rows_ops, compiled)
    )
    assert torch.equal(y, z) and all(map(torch.equal, grads, others))


def test_gemm_ops_in_one_graph(device: torch.device) -> None:
    given = leaves((6, D), *[(D, D)] * 6, *[(D,)] * 6, device=device)
    compiled = torch.compile(gemm_ops, fullgraph=True, backend=backend(device))
    wide = [t.detach().double().requires_grad_() for t in given]
    low, actual, exact = (
        [out := f(*inputs), *torch.autograd.grad(out.square().sum(), inputs)]
        for f, inputs in ((gemm_ops, given), (compiled, given), (gemm_ops, wide))
    )
    for i, values in enumerate(zip(actual, exact, low, strict=True)):
        assert_close_to_exact(*(t.detach() for t in values), reduced=3 * D, name=str(i))
