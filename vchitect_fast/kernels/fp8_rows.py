"""Rows to fp8, alone or behind bias and GELU, and fp8 rows turned for the products that sum over rows.

    quantise      x [R, K] -> q [R, K] in e4m3, scale [R] in fp32, a power of two a row         reference.py's quantised_rows
    bias_gelu     the same of GELU (tanh) of x + bias, which is never written in 16 bits
    its backward  the same of dy GELU'(x + bias), and dbias, the sum of its rows before they are rounded
    turn          q, scale -> qT [K, R up to a multiple of 16], scale [1]                       reference.py's turned
A program owns whole rows in its registers, so its largest value is known before anything is written: K <= 16384.
Bytes: quantise 3 R K in 16 bits, bias_gelu the same, its backward 5 R K + 8 R K / 64, turn 2 R K; over the memory's speed that is the floor. Steps of a block
without a gradient of their own.

R rows, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vchitect_fast.kernels import _check, tiles
from vchitect_fast.kernels._fp8 import FIRST_CC, to_e4m3
from vchitect_fast.kernels._fp8 import quantise as quantised
from vchitect_fast.kernels._op import register
from vchitect_fast.kernels.aot import Variant, pointers
from vchitect_fast.kernels.bias_gelu import gate, gradient
from vchitect_fast.kernels.fp8 import E4M3


@triton.jit
def _rows_kernel(
    x_ptr,
    bias_ptr,
    q_ptr,
    scale_ptr,
    stride_xr,
    num_rows,
    num_columns,
    GELU: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    is_row, is_column = r < num_rows, k < num_columns
    inside = is_row & is_column
    v = tl.load(x_ptr + r * stride_xr + k, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        z = v + tl.load(bias_ptr + k, mask=is_column, other=0.0).to(tl.float32)  # 0 outside, and so is its GELU
        v = z * gate(z)
    q, scale = quantised(v, INTERPRETED)
    tl.store(q_ptr + r * num_columns + k, q, mask=inside)
    tl.store(scale_ptr + r, scale, mask=is_row)


@triton.jit
def _gelu_backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    q_ptr,
    scale_ptr,
    dbias_ptr,
    stride_dyr,
    stride_xr,
    num_rows,
    num_columns,
    INTERPRETED: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)[None, :]
    is_column = k < num_columns
    bias = tl.load(bias_ptr + k, mask=is_column, other=0.0).to(tl.float32)
    total = tl.zeros((1, BLOCK_K), tl.float32)
    for block in range(NUM_BLOCKS):
        r = (pid * NUM_BLOCKS + block) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        is_row = r < num_rows
        inside = is_row & is_column
        dy = tl.load(dy_ptr + r * stride_dyr + k, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(x_ptr + r * stride_xr + k, mask=inside, other=0.0).to(tl.float32) + bias
        dx = dy * gradient(z)  # 0 outside
        total += tl.sum(dx, axis=0, keep_dims=True)
        q, scale = quantised(dx, INTERPRETED)
        tl.store(q_ptr + r * num_columns + k, q, mask=inside)
        tl.store(scale_ptr + r, scale, mask=is_row)
    tl.store(dbias_ptr + pid * num_columns + k, total, mask=is_column)


@triton.jit
def _turn_kernel(
    q_ptr,
    ratio_ptr,
    out_ptr,
    num_rows,
    num_columns,
    num_padded,
    INTERPRETED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_sheets = tl.cdiv(num_columns, BLOCK_K)
    pid = tl.program_id(0).to(tl.int64)
    r = (pid // num_sheets) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    k = (pid % num_sheets) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    is_row, is_column = r < num_rows, k < num_columns
    ratio = tl.load(ratio_ptr + r, mask=is_row, other=0.0)
    v = tl.load(q_ptr + r * num_columns + k, mask=is_row & is_column, other=0.0).to(tl.float32) * ratio
    out = tl.trans(to_e4m3(v, INTERPRETED))
    r, k = tl.trans(r), tl.trans(k)
    tl.store(out_ptr + k * num_padded + r, out, mask=(r < num_padded) & (k < num_columns))


def launch_rows(x_RK: Tensor, bias_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q and scale of x, or of GELU (tanh) of x + bias. Nothing is checked."""
    R, K = x_RK.shape
    q, scale = _fake_rows(x_RK)
    block = max(16, triton.next_power_of_2(K))
    block_rows = tiles.fp8_block_rows(block)
    _rows_kernel[(triton.cdiv(R, block_rows),)](
        *(x_RK, x_RK if bias_K is None else bias_K, q, scale),
        *(x_RK.stride(0), R, K),
        GELU=bias_K is not None,
        INTERPRETED=_check.interpreted(),
        BLOCK_R=block_rows,
        BLOCK_K=block,
        num_warps=tiles.fp8_row_warps(block),
    )
    return q, scale


def launch_gelu_backward(dy_RK: Tensor, x_RK: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dbias in fp32, and q and scale of the gradient of x. Nothing is checked."""
    R, K = x_RK.shape
    q, scale = _fake_rows(x_RK)
    block = max(16, triton.next_power_of_2(K))
    block_rows = tiles.fp8_block_rows(block)
    num_blocks = max(1, tiles.FP8_GELU_ROWS // block_rows)
    num_programs = triton.cdiv(R, block_rows * num_blocks)
    partial = x_RK.new_empty(num_programs, K, dtype=torch.float32)
    _gelu_backward_kernel[(num_programs,)](
        *(dy_RK, x_RK, bias_K, q, scale, partial),
        *(dy_RK.stride(0), x_RK.stride(0), R, K),
        INTERPRETED=_check.interpreted(),
        NUM_BLOCKS=num_blocks,
        BLOCK_R=block_rows,
        BLOCK_K=block,
        num_warps=tiles.fp8_gelu_warps(block),
    )
    return partial.sum(0), q, scale


def launch_turn(q_RK: Tensor, scale_R: Tensor) -> tuple[Tensor, Tensor]:
    """qT [K, padded R] and scale [1]; q contiguous. Nothing is checked."""
    R, K = q_RK.shape
    out, _ = _fake_turn(q_RK, scale_R)
    largest = scale_R.amax(0, keepdim=True)
    tile = tiles.FP8_TURN
    _turn_kernel[(triton.cdiv(out.shape[1], tile.block_rows) * triton.cdiv(K, tile.block_columns),)](
        *(q_RK, scale_R / largest, out),
        *(R, K, out.shape[1]),
        INTERPRETED=_check.interpreted(),
        BLOCK_R=tile.block_rows,
        BLOCK_K=tile.block_columns,
        num_warps=tile.num_warps,
    )
    return out, largest


def _fake_rows(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    return x_RK.new_empty(x_RK.shape, dtype=E4M3), x_RK.new_empty(x_RK.shape[:1], dtype=torch.float32)


def _fake_bias_gelu(x_RK: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_rows(x_RK)


def _fake_turn(q_RK: Tensor, scale_R: Tensor) -> tuple[Tensor, Tensor]:
    R, K = q_RK.shape
    return q_RK.new_empty(K, (R + 15) // 16 * 16), scale_R.new_empty(1)


_rows = register("fp8_rows", "(Tensor x) -> (Tensor, Tensor)", launch_rows, _fake_rows)
_bias_gelu = register("fp8_bias_gelu", "(Tensor x, Tensor bias) -> (Tensor, Tensor)", launch_rows, _fake_bias_gelu)
_turn = register("fp8_turn", "(Tensor q, Tensor scale) -> (Tensor, Tensor)", launch_turn, _fake_turn)


def quantise(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """q [R, K] in e4m3 and scale [R]; x with a contiguous last dim."""
    _check_rows("fp8 rows", x_RK)
    return _rows(x_RK)


def bias_gelu(x_RK: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
    """The same of GELU (tanh) of x + bias."""
    _check_rows("fp8 bias_gelu", x_RK)
    _check.tensor("fp8 bias_gelu", "bias", bias_K, (x_RK.shape[1],), like=x_RK)
    return _bias_gelu(x_RK, bias_K)


def turn(q_RK: Tensor, scale_R: Tensor) -> tuple[Tensor, Tensor]:
    """qT [K, R up to a multiple of 16] and the one scale [1]; q and scale as `quantise` gives them."""
    q_RK = q_RK.contiguous()
    _check.tensor("fp8 turn", "q", q_RK, (None, None), dtype=E4M3)
    _check.tensor("fp8 turn", "scale", scale_R, tuple(q_RK.shape[:1]), like=q_RK, dtype=torch.float32)
    _check.runnable("fp8 turn", scale_R)
    return _turn(q_RK, scale_R)


def _check_rows(op: str, x_RK: Tensor) -> None:
    _check.runnable(op, x_RK)
    _check.tensor(op, "x", x_RK, (None, None))
    _check.at_most(op, "columns", x_RK.shape[1], tiles.MAX_FP8_ROW, "one program holds a whole row")


def aot_variants() -> list[Variant]:
    """The widths that a block quantises at D = 1536: D, 3 D, 4 D (with GELU too) and 7 D; narrow rows; the turning."""
    variants = []
    for K, gelu in [(64, False), (1536, False), (4608, False), (6144, False), (6144, True), (10752, False)]:
        block = triton.next_power_of_2(K)
        signature = pointers("bf16:16", "x", "bias") | pointers("fp8e4nv:16", "q") | pointers("fp32:16", "scale")
        signature |= {"stride_xr": "i32:16", "num_rows": "i32", "num_columns": "i32:16"}
        constants = {"GELU": gelu, "INTERPRETED": False, "BLOCK_R": tiles.fp8_block_rows(block), "BLOCK_K": block}
        label = f"fp8_rows bf16 K={K}{' gelu' if gelu else ''}"
        variants.append(
            Variant(_rows_kernel, signature, constants, tiles.fp8_row_warps(block), label, first_cc=FIRST_CC)
        )
    for K in (256, 6144):  # 4 D at D = 64 and 1536
        block = triton.next_power_of_2(K)
        signature = (
            pointers("bf16:16", "dy", "x", "bias") | pointers("fp8e4nv:16", "q") | pointers("fp32:16", "scale", "dbias")
        )
        signature |= {"stride_dyr": "i32:16", "stride_xr": "i32:16", "num_rows": "i32", "num_columns": "i32:16"}
        rows = tiles.fp8_block_rows(block)
        constants = {"INTERPRETED": False, "NUM_BLOCKS": max(1, tiles.FP8_GELU_ROWS // rows), "BLOCK_R": rows}
        constants |= {"BLOCK_K": block}
        label = f"fp8_rows bf16 K={K} gelu backward"
        variants.append(
            Variant(_gelu_backward_kernel, signature, constants, tiles.fp8_gelu_warps(block), label, first_cc=FIRST_CC)
        )
    tile = tiles.FP8_TURN
    signature = pointers("fp8e4nv:16", "q", "out") | pointers("fp32:16", "ratio")
    signature |= {"num_rows": "i32", "num_columns": "i32:16", "num_padded": "i32:16"}
    constants = {"INTERPRETED": False, "BLOCK_R": tile.block_rows, "BLOCK_K": tile.block_columns}
    variants.append(Variant(_turn_kernel, signature, constants, tile.num_warps, "fp8_rows turn", first_cc=FIRST_CC))
    return variants
