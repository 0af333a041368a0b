"""Full-sequence cross attention: all T (S + N) queries of a sample against its first frame's N text keys.

    forward    o = softmax(q k^T / sqrt(C)) v          lse = log2 sum exp2 of the scaled scores, saved in fp32
    backward   p = exp2(scores - lse);  delta = rowsum(do o);  ds = p (do v^T - delta)
               dq = ds k / sqrt(C);  dk = ds^T q / sqrt(C) and dv = p^T do over ALL queries of the sample
Visual and text queries lie in their own buffers and are never concatenated; the programs of the first blocks read the one,
the rest the other. Few keys and very many queries: a backward that is parallel over keys alone runs three programs a head.
Here dk and dv are split over chunks of queries into fp32 partials and summed in a fixed order; dq has a kernel of its own
that also leaves delta for the other, and a last one adds up the partials. No atomics: the same inputs give the same bits.
Price: 7 products where one fused loop would need 5 (its 2 x 333 x 64 fp32 sums a head fill 2/3 of the registers of an SM).

R = B T (S + N) rows, e the element size. Saved beside q, k, v, o: lse, 4 R H bytes (3 % of q in bf16 at C = 64).
Bytes: forward 2 R H C e + 4 R H; dq 4 R H C e + 8 R H; dk, dv 2 R H C e + 8 R H and 16 B N H C bytes for each chunk.
FLOPs: forward 4, dq 6, dk and dv 8, each times R N H C. At N = 333 the products bound it, not the bytes.
Useful share of the tiles at N = 333: forward and dq 333/336 (five blocks of 64 without masks, a tail of 16), dk and dv
333/384. Not done: dropout, masks, a scale other than 1/sqrt(C).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import _check, tiles
from vchitect_fast.kernels._flash import (
    HEAD_DIMS,
    at,
    dkv_step,
    dkv_tail,
    dq_step,
    dq_tail,
    forward_step,
    forward_tail,
    is_flat,
    load_gradients,
    load_rows,
    looped_block,
    softmax_scales,
    source,
    store_rows,
    tail_of,
    variant,
)
from vchitect_fast.kernels._two_sources import Tensors, attention_op
from vchitect_fast.kernels.aot import Variant


@triton.jit
def _query_block(num_heads, num_frames, num_visual, num_text, BLOCK_M: tl.constexpr):
    """This program's b, h, first row, whether that row is visual, and where the row's source begins in lse and delta."""
    visual_rows, text_rows = num_frames * num_visual, num_frames * num_text
    visual_blocks = tl.cdiv(visual_rows, BLOCK_M)
    num_blocks = visual_blocks + tl.cdiv(text_rows, BLOCK_M)
    block, bh = tl.program_id(0) % num_blocks, (tl.program_id(0) // num_blocks).to(tl.int64)
    is_visual = block < visual_blocks
    first = tl.where(is_visual, block, block - visual_blocks) * BLOCK_M
    statistic = bh * (visual_rows + text_rows) + tl.where(is_visual, 0, visual_rows)
    return bh // num_heads, bh % num_heads, first, is_visual, statistic


@triton.jit
def _forward_kernel(
    q,
    text_q,
    k,
    v,
    out,
    text_out,
    lse_ptr,
    scale,
    num_heads,
    num_frames,
    num_visual,
    num_text,
    FLAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b, h, first, is_visual, statistic = _query_block(num_heads, num_frames, num_visual, num_text, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M)
    rows_per_frame = tl.where(is_visual, num_visual, num_text)
    num_rows = num_frames * rows_per_frame
    if is_visual:
        query = load_rows(q, b, 0, h, row, num_rows, rows_per_frame, True, FLAT, HEAD_DIM)
    else:
        query = load_rows(text_q, b, 0, h, row, num_rows, rows_per_frame, True, FLAT, HEAD_DIM)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc, row_max, row_sum = forward_tail(query, k, v, acc, row_max, row_sum, b, 0, h, num_text, scale, TAIL, BLOCK_N)
    for start in range(0, num_text // BLOCK_N * BLOCK_N, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, b, 0, h, key, num_text, 1, False, True, HEAD_DIM)
        values = load_rows(v, b, 0, h, key, num_text, 1, False, True, HEAD_DIM)
        acc, row_max, row_sum = forward_step(query, keys, values, acc, row_max, row_sum, scale, True, False)
    acc = acc / row_sum[:, None]
    if is_visual:
        store_rows(out, acc, b, 0, h, row, num_rows, rows_per_frame, False, FLAT, HEAD_DIM)
    else:
        store_rows(text_out, acc, b, 0, h, row, num_rows, rows_per_frame, False, FLAT, HEAD_DIM)
    tl.store(lse_ptr + statistic + row, row_max + tl.log2(row_sum), mask=row < num_rows)


@triton.jit
def _dq_kernel(
    q,
    text_q,
    k,
    v,
    out,
    text_out,
    dout,
    dtext_out,
    dq,
    dtext_q,
    lse_ptr,
    delta_ptr,
    scale,
    dscale,
    num_heads,
    num_frames,
    num_visual,
    num_text,
    ADD_TEXT: tl.constexpr,
    FLAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of one block of queries, and its delta for _dkv_kernel."""
    b, h, first, is_visual, statistic = _query_block(num_heads, num_frames, num_visual, num_text, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M)
    rows_per_frame = tl.where(is_visual, num_visual, num_text)
    num_rows = num_frames * rows_per_frame
    if is_visual:
        query, do, delta = load_gradients(q, dout, out, b, 0, h, row, num_rows, rows_per_frame, FLAT, HEAD_DIM)
    else:
        query, do, delta = load_gradients(
            text_q, dtext_out, text_out, b, 0, h, row, num_rows, rows_per_frame, FLAT, HEAD_DIM
        )
    tl.store(delta_ptr + statistic + row, delta, mask=row < num_rows)
    lse = tl.load(lse_ptr + statistic + row, mask=row < num_rows, other=float("inf"))
    grad = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    grad = dq_tail(query, do, k, v, lse, delta, grad, b, 0, h, num_text, scale, TAIL, BLOCK_N)
    for start in range(0, num_text // BLOCK_N * BLOCK_N, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, b, 0, h, key, num_text, 1, False, True, HEAD_DIM)
        values = load_rows(v, b, 0, h, key, num_text, 1, False, True, HEAD_DIM)
        grad = dq_step(query, do, keys, values, lse, delta, grad, scale, True, False)
    grad *= dscale
    if is_visual:
        store_rows(dq, grad, b, 0, h, row, num_rows, rows_per_frame, False, FLAT, HEAD_DIM)
    else:
        store_rows(dtext_q, grad, b, 0, h, row, num_rows, rows_per_frame, ADD_TEXT, FLAT, HEAD_DIM)


@triton.jit
def _dkv_kernel(
    q,
    text_q,
    k,
    v,
    dout,
    dtext_out,
    partial_dk,
    partial_dv,
    lse_ptr,
    delta_ptr,
    scale,
    dscale,
    num_heads,
    num_frames,
    num_visual,
    num_text,
    num_chunks,
    num_chunk_blocks,
    FLAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VISUAL_TAIL: tl.constexpr,
    TEXT_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Partial sums dk, dv [B, chunk, N, H, C] of one block of keys over one chunk of the full blocks of queries.

    Visual blocks come first, then text; the last chunk also has what is left of both sources.
    """
    visual_rows, text_rows = num_frames * num_visual, num_frames * num_text
    visual_blocks, text_blocks = visual_rows // BLOCK_M, text_rows // BLOCK_M
    key_blocks = tl.cdiv(num_text, BLOCK_N)
    pid = tl.program_id(0)
    chunk, bh = (pid // key_blocks % num_chunks).to(tl.int64), (pid // (key_blocks * num_chunks)).to(tl.int64)
    b, h = bh // num_heads, bh % num_heads
    key = pid % key_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = load_rows(k, b, 0, h, key, num_text, 1, True, True, HEAD_DIM)
    values = load_rows(v, b, 0, h, key, num_text, 1, True, True, HEAD_DIM)
    dk = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    lse = lse_ptr + bh * (visual_rows + text_rows)
    delta = delta_ptr + bh * (visual_rows + text_rows)
    q, text_q, dout, dtext_out = at(q, b, 0, h), at(text_q, b, 0, h), at(dout, b, 0, h), at(dtext_out, b, 0, h)
    is_last = chunk == num_chunks - 1
    end = tl.where(is_last, visual_rows, 0)
    dk, dv = dkv_tail(
        keys, values, dk, dv, q, dout, lse, delta, 0, 0, 0, end, num_visual, scale, FLAT, VISUAL_TAIL, BLOCK_M
    )
    end = tl.where(is_last, text_rows, 0)
    dk, dv = dkv_tail(
        keys,
        values,
        dk,
        dv,
        text_q,
        dtext_out,
        lse + visual_rows,
        delta + visual_rows,
        0,
        0,
        0,
        end,
        num_text,
        scale,
        FLAT,
        TEXT_TAIL,
        BLOCK_M,
    )
    begin = chunk.to(tl.int32) * num_chunk_blocks
    for block in range(begin, tl.minimum(begin + num_chunk_blocks, visual_blocks + text_blocks)):
        is_visual, row, qs, dos = looped_block(block, visual_blocks, q, text_q, dout, dtext_out, BLOCK_M)
        rows_per_frame = tl.where(is_visual, num_visual, num_text)
        query = load_rows(qs, 0, 0, 0, row, 0, rows_per_frame, False, FLAT, HEAD_DIM)
        do = load_rows(dos, 0, 0, 0, row, 0, rows_per_frame, False, FLAT, HEAD_DIM)
        row += tl.where(is_visual, 0, visual_rows)
        dk, dv = dkv_step(keys, values, query, do, tl.load(lse + row), tl.load(delta + row), dk, dv, scale)
    store_rows(partial_dk, dk * dscale, b, chunk, h, key, num_text, 1, False, True, HEAD_DIM)
    store_rows(partial_dv, dv, b, chunk, h, key, num_text, 1, False, True, HEAD_DIM)


@triton.jit
def _sum_kernel(
    partial_dk, partial_dv, dk, dv, num_text, num_heads, num_chunks, ADD_TEXT: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """The chunks of one key's dk and dv in their order, into the gradient's buffer or onto what it holds."""
    pid = tl.program_id(0).to(tl.int64)
    h, key, b = pid % num_heads, pid // num_heads % num_text, pid // (num_heads * num_text)
    row = key + tl.zeros((1,), tl.int64)
    total_k = tl.zeros((1, HEAD_DIM), tl.float32)
    total_v = tl.zeros((1, HEAD_DIM), tl.float32)
    for chunk in range(num_chunks):
        total_k += load_rows(partial_dk, b, chunk, h, row, 0, 1, False, True, HEAD_DIM)
        total_v += load_rows(partial_dv, b, chunk, h, row, 0, 1, False, True, HEAD_DIM)
    store_rows(dk, total_k, b, 0, h, row, num_text, 1, ADD_TEXT, True, HEAD_DIM)
    store_rows(dv, total_v, b, 0, h, row, num_text, 1, ADD_TEXT, True, HEAD_DIM)


def launch_forward(inputs: Tensors, out: Tensor, text_out: Tensor) -> Tensor:
    """From (q, text_q, k, v) into out and text_out (any strides, last dim contiguous).

    Returns lse [B, H, T (S + N)] in fp32, visual first.
    """
    q, text_q, k, v = inputs
    B, T, S, H, C = q.shape
    N = k.shape[1]
    tile = tiles.flash("cross", "forward", C, q.element_size(), R=T * (S + N), N=N)
    lse = torch.empty(_lse_shape(inputs), dtype=torch.float32, device=q.device)
    num_blocks = triton.cdiv(T * S, tile.block_queries) + triton.cdiv(T * N, tile.block_queries)
    _forward_kernel[(B * H * num_blocks,)](
        *(source(x) for x in (q, text_q, k[:, None], v[:, None], out, text_out)),
        lse,
        softmax_scales(C)[0],
        *(H, T, S, N),
        FLAT=is_flat(q, text_q, out, text_out),
        HEAD_DIM=C,
        TAIL=tail_of(N, tile.block_keys),
        **tile.options(),
    )
    return lse


def launch_backward(douts: Tensors, saved: Tensors, gradients: Tensors, *, add_text: bool = False) -> None:
    """From (dout, dtext_out) and (q, text_q, k, v, out, text_out, lse) into gradients (dq, dtext_q, dk, dv).

    Any strides, last dim contiguous. `add_text` adds the three of text to what their buffers hold instead.
    """
    (dout, dtext_out), (dq, dtext_q, dk, dv) = douts, gradients
    q, text_q, k, v, out, text_out, lse = saved
    B, T, S, H, C = q.shape
    N = k.shape[1]
    scales = softmax_scales(C)
    k, v = k[:, None], v[:, None]
    delta = torch.empty_like(lse)
    flat = is_flat(q, text_q, out, text_out, dout, dtext_out, dq, dtext_q)
    tile = tiles.flash("cross", "dq", C, q.element_size(), R=T * (S + N), N=N)
    num_blocks = triton.cdiv(T * S, tile.block_queries) + triton.cdiv(T * N, tile.block_queries)
    _dq_kernel[(B * H * num_blocks,)](
        *(source(x) for x in (q, text_q, k, v, out, text_out, dout, dtext_out, dq, dtext_q)),
        *(lse, delta),
        *scales,
        *(H, T, S, N),
        ADD_TEXT=add_text,
        FLAT=flat,
        HEAD_DIM=C,
        TAIL=tail_of(N, tile.block_keys),
        **tile.options(),
    )
    tile = tiles.flash("cross", "dkv", C, q.element_size(), R=T * (S + N), N=N)
    key_blocks = triton.cdiv(N, tile.block_keys)
    num_blocks = max(1, T * S // tile.block_queries + T * N // tile.block_queries)
    num_chunk_blocks = triton.cdiv(num_blocks, tiles.cross_chunks(B * H * key_blocks, num_blocks))
    num_chunks = triton.cdiv(num_blocks, num_chunk_blocks)
    partial = torch.empty(2, B, num_chunks, N, H, C, dtype=torch.float32, device=q.device)
    _dkv_kernel[(B * H * key_blocks * num_chunks,)](
        *(source(x) for x in (q, text_q, k, v, dout, dtext_out, partial[0], partial[1])),
        *(lse, delta),
        *scales,
        *(H, T, S, N, num_chunks, num_chunk_blocks),
        FLAT=flat,
        HEAD_DIM=C,
        VISUAL_TAIL=tail_of(T * S, tile.block_queries),
        TEXT_TAIL=tail_of(T * N, tile.block_queries),
        **tile.options(),
    )
    _sum_kernel[(B * N * H,)](
        *(source(x) for x in (partial[0], partial[1], dk[:, None], dv[:, None])),
        *(N, H, num_chunks),
        ADD_TEXT=add_text,
        HEAD_DIM=C,
        num_warps=1,
    )


def _lse_shape(inputs: Tensors) -> tuple[int, ...]:
    B, T, S, H, _ = inputs[0].shape
    return B, H, T * (S + inputs[1].shape[2])


_attention = attention_op("cross", ("q", "text_q", "k", "v"), (0, 1), launch_forward, launch_backward, _lse_shape)


def aot_variants() -> list[Variant]:
    """333 keys, rows of a merged projection buffer; fp32 at the released head dim only (at 128 it spills)."""
    variants = []
    for dtype, C in (("bf16", 64), ("bf16", 128), ("fp16", 64), ("fp32", 64)):
        for name, kernel in (("forward", _forward_kernel), ("dq", _dq_kernel), ("dkv", _dkv_kernel)):
            tile = tiles.flash_by_size(name, C, 4 if dtype == "fp32" else 2)
            constants = {"FLAT": True, "HEAD_DIM": C}
            if name == "dkv":
                constants |= {"VISUAL_TAIL": 0, "TEXT_TAIL": 16}
            else:
                constants |= {"TAIL": tail_of(333, tile.block_keys)} | ({"ADD_TEXT": True} if name == "dq" else {})
            variants.append(variant(kernel, dtype, constants, tile, f"cross {name} {dtype} C={C}"))
        variants.append(_sum_variant(dtype, C))
    return variants


def _sum_variant(dtype: str, C: int) -> Variant:
    strides = 4 * ("i32:16",)
    types: dict[str, str | tuple[str, ...]] = {
        **dict.fromkeys(("partial_dk", "partial_dv"), ("*fp32:16", *strides)),
        **dict.fromkeys(("dk", "dv"), (f"*{dtype}:16", *strides)),
        **dict.fromkeys(("num_text", "num_heads", "num_chunks"), "i32"),
    }
    return Variant(_sum_kernel, types, {"ADD_TEXT": True, "HEAD_DIM": C}, 1, f"cross sum {dtype} C={C}")


def cross_attention(q_BTSHC: Tensor, text_q_BTNHC: Tensor, k_BNHC: Tensor, v_BNHC: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of a sample attend to its first frame's text.

    q [B, T, S, H, C], text_q [B, T, N, H, C], k and v [B, N, H, C], C of 64 or 128; any strides, the last dim contiguous.
    Returns the visual and the text rows, contiguous, shaped as their queries.
    """
    op = "cross_attention"
    _check.runnable(op, q_BTSHC)
    _check.tensor(op, "q", q_BTSHC, (None,) * 5)
    B, T, _, H, C = q_BTSHC.shape
    if C not in HEAD_DIMS:
        raise UserError(f"{op}: expected a head dim of {' or '.join(map(str, HEAD_DIMS))}, got {C}.")
    _check.tensor(op, "text_q", text_q_BTNHC, (B, T, None, H, C), like=q_BTSHC)
    for name, x in (("k", k_BNHC), ("v", v_BNHC)):
        _check.tensor(op, name, x, (B, text_q_BTNHC.shape[2], H, C), like=q_BTSHC)
    return _attention(q_BTSHC, text_q_BTNHC, k_BNHC, v_BNHC)
