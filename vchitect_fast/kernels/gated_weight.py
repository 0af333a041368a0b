"""The weights of a gated product in backward: its weight gradient, its gate's gradient and the gated weight, in one pass.

    gate (x W^T + b) for one sample, d = dL/d(that):    G = d^T x  (a GEMM, made before)
    dW = gate G;  dgate = rowsum(W G)  (+ b sum(d), by the caller);  gated = gate W, for dx = d gated  (a GEMM, made behind)
So neither the product nor gated rows are ever written: [D, K] weights are read instead of [rows, D] activations.
A program owns a few rows of W: the sums are fp32 and of one order. Samples follow each other: `add` adds to dweight.
Bytes, e the element size: 4 D K e (W, G, dW, gated); over the memory's speed that is the floor.
In fp16 G may overflow where gate G would not (a gate near 0); bf16 has the range.
A step of the block, without an op or a gradient of its own: nothing is checked here.

D outputs (rows of W), K inputs (its columns).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vchitect_fast.kernels import tiles
from vchitect_fast.kernels.aot import Variant, pointers


@triton.jit
def _kernel(
    product_ptr,
    weight_ptr,
    gate_ptr,
    gated_ptr,
    dweight_ptr,
    dgate_ptr,
    stride_product,
    stride_weight,
    stride_gated,
    stride_dweight,
    num_rows,
    num_columns,
    ADD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    is_row = row < num_rows
    gate = tl.load(gate_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    for start in range(0, num_columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        inside = is_row & (k < num_columns)
        product = tl.load(product_ptr + row * stride_product + k, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + row * stride_weight + k, mask=inside, other=0.0).to(tl.float32)
        total += product * weight
        tl.store(gated_ptr + row * stride_gated + k, (gate * weight).to(gated_ptr.dtype.element_ty), mask=inside)
        dweight = gate * product
        pointers = dweight_ptr + row * stride_dweight + k
        if ADD:
            dweight += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        tl.store(pointers, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
    tl.store(dgate_ptr + row, tl.sum(total, 1, keep_dims=True), mask=is_row)


def launch(
    product_DK: Tensor,
    weight_DK: Tensor,
    gate_D: Tensor,
    gated_DK: Tensor,
    dweight_DK: Tensor,
    dgate_D: Tensor,
    add: bool,
) -> None:
    """Write gated, dweight (which may be the product itself, or fp32) and dgate (contiguous, fp32)."""
    D, K = weight_DK.shape
    tile = tiles.GATED_WEIGHT
    _kernel[(triton.cdiv(D, tile.block_rows),)](
        *(product_DK, weight_DK, gate_D, gated_DK, dweight_DK, dgate_D),
        *(x.stride(0) for x in (product_DK, weight_DK, gated_DK, dweight_DK)),
        *(D, K),
        ADD=add,
        BLOCK_D=tile.block_rows,
        BLOCK_K=tile.block_columns,
        num_warps=tile.num_warps,
    )


def aot_variants() -> list[Variant]:
    """One sample, and the second of several, which adds in fp32."""
    variants, tile = [], tiles.GATED_WEIGHT
    for dtype in ("bf16", "fp16", "fp32"):
        for add in (False, True):
            low, sum_type = f"{dtype}:16", "fp32:16" if add else f"{dtype}:16"
            signature = pointers(low, "product", "weight", "gate", "gated") | pointers(sum_type, "dweight")
            signature |= pointers("fp32:16", "dgate") | {"num_rows": "i32:16", "num_columns": "i32:16"}
            signature |= {f"stride_{name}": "i32:16" for name in ("product", "weight", "gated", "dweight")}
            constants = {"ADD": add, "BLOCK_D": tile.block_rows, "BLOCK_K": tile.block_columns}
            label = f"gated_weight {dtype}{' add' if add else ''}"
            variants.append(Variant(_kernel, signature, constants, tile.num_warps, label))
    return variants
