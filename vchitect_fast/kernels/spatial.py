"""Spatial attention over two sources: within each frame, S visual and N text tokens attend to all L = S + N.

    forward    o = softmax(q k^T / sqrt(C)) v          lse = log2 sum exp2 of the scaled scores, saved in fp32
    backward   p = exp2(scores - lse);  delta = rowsum(do o);  ds = p (do v^T - delta)
               dq = ds k / sqrt(C);  dk = ds^T q / sqrt(C);  dv = p^T do
q, k and v of visual and text lie in their own buffers: a program owns a block of one source and loops over the blocks of
both. Full blocks need no mask; what is left of a source runs in a tail of the next power of two from 16, before the loop
(behind it, ptxas serializes every wgmma: its warning C7515).
The backward is two kernels, one owning queries (dq, and delta for the other), one owning keys (dk, dv): no atomics and no
fp32 buffer of dq, so the same inputs give the same bits, for 7 products where one fused loop would need 5.

R = B T L rows, e the element size. Saved beside q, k, v, o: lse, 4 R H bytes (3 % of q in bf16 at C = 64).
Bytes: forward 4 R H C e + 4 R H; dq 6 R H C e + 8 R H; dk, dv 6 R H C e + 8 R H. FLOPs: forward 4, dq 6, dk and dv 8, each
times R L H C; the products bound it at every size of the model.
Useful share of the tiles, (L / owned)(L / looped), at C = 64, where forward and dk, dv own 128 rows a program, dq 64:
    S, L    256, 589   768, 1101   1296, 1629   3072, 3405   3600, 3933   8100, 8433
            0.92       0.95        0.91         0.98         0.96         0.98            (dq alone 0.94 at 1629)
Not done: dropout, masks, a scale other than 1/sqrt(C).
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
def _owned_block(num_heads, num_frames, num_visual, num_text, BLOCK: tl.constexpr):
    """This program's b, t, h, rows, whether they are visual, and where (b, t, h) begins in lse and delta."""
    visual_blocks = tl.cdiv(num_visual, BLOCK)
    num_blocks = visual_blocks + tl.cdiv(num_text, BLOCK)
    block, bth = tl.program_id(0) % num_blocks, (tl.program_id(0) // num_blocks).to(tl.int64)
    is_visual = block < visual_blocks
    row = tl.where(is_visual, block, block - visual_blocks) * BLOCK + tl.arange(0, BLOCK)
    t = bth // num_heads % num_frames
    return bth // (num_heads * num_frames), t, bth % num_heads, row, is_visual, bth * (num_visual + num_text)


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    text_q,
    text_k,
    text_v,
    out,
    text_out,
    lse_ptr,
    scale,
    num_heads,
    num_frames,
    num_visual,
    num_text,
    HEAD_DIM: tl.constexpr,
    VISUAL_TAIL: tl.constexpr,
    TEXT_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b, t, h, row, is_visual, statistic = _owned_block(num_heads, num_frames, num_visual, num_text, BLOCK_M)
    if is_visual:
        query = load_rows(q, b, t, h, row, num_visual, 1, True, True, HEAD_DIM)
    else:
        query = load_rows(text_q, b, t, h, row, num_text, 1, True, True, HEAD_DIM)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    k, v, text_k, text_v = at(k, b, t, h), at(v, b, t, h), at(text_k, b, t, h), at(text_v, b, t, h)
    acc, row_max, row_sum = forward_tail(
        query, k, v, acc, row_max, row_sum, 0, 0, 0, num_visual, scale, VISUAL_TAIL, BLOCK_N
    )
    acc, row_max, row_sum = forward_tail(
        query, text_k, text_v, acc, row_max, row_sum, 0, 0, 0, num_text, scale, TEXT_TAIL, BLOCK_N
    )
    visual_blocks, text_blocks = num_visual // BLOCK_N, num_text // BLOCK_N
    for block in range(0, visual_blocks + text_blocks):
        _, key, ks, vs = looped_block(block, visual_blocks, k, text_k, v, text_v, BLOCK_N)
        keys = load_rows(ks, 0, 0, 0, key, 0, 1, False, True, HEAD_DIM)
        values = load_rows(vs, 0, 0, 0, key, 0, 1, False, True, HEAD_DIM)
        acc, row_max, row_sum = forward_step(query, keys, values, acc, row_max, row_sum, scale, True, False)
    acc = acc / row_sum[:, None]
    lse = row_max + tl.log2(row_sum)
    if is_visual:
        store_rows(out, acc, b, t, h, row, num_visual, 1, False, True, HEAD_DIM)
        tl.store(lse_ptr + statistic + row, lse, mask=row < num_visual)
    else:
        store_rows(text_out, acc, b, t, h, row, num_text, 1, False, True, HEAD_DIM)
        tl.store(lse_ptr + statistic + num_visual + row, lse, mask=row < num_text)


@triton.jit
def _dq_kernel(
    q,
    k,
    v,
    text_q,
    text_k,
    text_v,
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
    HEAD_DIM: tl.constexpr,
    VISUAL_TAIL: tl.constexpr,
    TEXT_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of one block of queries, and its delta for _dkv_kernel."""
    b, t, h, row, is_visual, statistic = _owned_block(num_heads, num_frames, num_visual, num_text, BLOCK_M)
    num_rows = tl.where(is_visual, num_visual, num_text)
    statistic += tl.where(is_visual, 0, num_visual)
    if is_visual:
        query, do, delta = load_gradients(q, dout, out, b, t, h, row, num_rows, 1, True, HEAD_DIM)
    else:
        query, do, delta = load_gradients(text_q, dtext_out, text_out, b, t, h, row, num_rows, 1, True, HEAD_DIM)
    tl.store(delta_ptr + statistic + row, delta, mask=row < num_rows)
    lse = tl.load(lse_ptr + statistic + row, mask=row < num_rows, other=float("inf"))
    grad = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    k, v, text_k, text_v = at(k, b, t, h), at(v, b, t, h), at(text_k, b, t, h), at(text_v, b, t, h)
    grad = dq_tail(query, do, k, v, lse, delta, grad, 0, 0, 0, num_visual, scale, VISUAL_TAIL, BLOCK_N)
    grad = dq_tail(query, do, text_k, text_v, lse, delta, grad, 0, 0, 0, num_text, scale, TEXT_TAIL, BLOCK_N)
    visual_blocks, text_blocks = num_visual // BLOCK_N, num_text // BLOCK_N
    for block in range(0, visual_blocks + text_blocks):
        _, key, ks, vs = looped_block(block, visual_blocks, k, text_k, v, text_v, BLOCK_N)
        keys = load_rows(ks, 0, 0, 0, key, 0, 1, False, True, HEAD_DIM)
        values = load_rows(vs, 0, 0, 0, key, 0, 1, False, True, HEAD_DIM)
        grad = dq_step(query, do, keys, values, lse, delta, grad, scale, True, False)
    if is_visual:
        store_rows(dq, grad * dscale, b, t, h, row, num_rows, 1, False, True, HEAD_DIM)
    else:
        store_rows(dtext_q, grad * dscale, b, t, h, row, num_rows, 1, ADD_TEXT, True, HEAD_DIM)


@triton.jit
def _dkv_kernel(
    q,
    k,
    v,
    text_q,
    text_k,
    text_v,
    dout,
    dtext_out,
    dk,
    dv,
    dtext_k,
    dtext_v,
    lse_ptr,
    delta_ptr,
    scale,
    dscale,
    num_heads,
    num_frames,
    num_visual,
    num_text,
    ADD_TEXT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VISUAL_TAIL: tl.constexpr,
    TEXT_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one block of keys, over the queries of both sources."""
    b, t, h, row, is_visual, statistic = _owned_block(num_heads, num_frames, num_visual, num_text, BLOCK_N)
    if is_visual:
        keys = load_rows(k, b, t, h, row, num_visual, 1, True, True, HEAD_DIM)
        values = load_rows(v, b, t, h, row, num_visual, 1, True, True, HEAD_DIM)
    else:
        keys = load_rows(text_k, b, t, h, row, num_text, 1, True, True, HEAD_DIM)
        values = load_rows(text_v, b, t, h, row, num_text, 1, True, True, HEAD_DIM)
    gk = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    gv = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    q, text_q, dout, dtext_out = at(q, b, t, h), at(text_q, b, t, h), at(dout, b, t, h), at(dtext_out, b, t, h)
    lse, delta = lse_ptr + statistic, delta_ptr + statistic
    gk, gv = dkv_tail(
        keys, values, gk, gv, q, dout, lse, delta, 0, 0, 0, num_visual, 1, scale, True, VISUAL_TAIL, BLOCK_M
    )
    gk, gv = dkv_tail(
        keys,
        values,
        gk,
        gv,
        text_q,
        dtext_out,
        lse + num_visual,
        delta + num_visual,
        0,
        0,
        0,
        num_text,
        1,
        scale,
        True,
        TEXT_TAIL,
        BLOCK_M,
    )
    visual_blocks, text_blocks = num_visual // BLOCK_M, num_text // BLOCK_M
    for block in range(0, visual_blocks + text_blocks):
        is_first, query, qs, dos = looped_block(block, visual_blocks, q, text_q, dout, dtext_out, BLOCK_M)
        queries = load_rows(qs, 0, 0, 0, query, 0, 1, False, True, HEAD_DIM)
        do = load_rows(dos, 0, 0, 0, query, 0, 1, False, True, HEAD_DIM)
        query += tl.where(is_first, 0, num_visual)
        gk, gv = dkv_step(keys, values, queries, do, tl.load(lse + query), tl.load(delta + query), gk, gv, scale)
    gk *= dscale
    if is_visual:
        store_rows(dk, gk, b, t, h, row, num_visual, 1, False, True, HEAD_DIM)
        store_rows(dv, gv, b, t, h, row, num_visual, 1, False, True, HEAD_DIM)
    else:
        store_rows(dtext_k, gk, b, t, h, row, num_text, 1, ADD_TEXT, True, HEAD_DIM)
        store_rows(dtext_v, gv, b, t, h, row, num_text, 1, ADD_TEXT, True, HEAD_DIM)


def _grid(q: Tensor, text_q: Tensor, block: int) -> tuple[int]:
    """A program for each owned block of each (b, t, h)."""
    B, T, S, H, _ = q.shape
    return (B * T * H * (triton.cdiv(S, block) + triton.cdiv(text_q.shape[2], block)),)


def _sizes(q: Tensor, text_q: Tensor, looped_block: int) -> dict[str, int]:
    """The arguments of all three kernels; the tails are those of the loop."""
    _, T, S, H, C = q.shape
    N = text_q.shape[2]
    tails = {"VISUAL_TAIL": tail_of(S, looped_block), "TEXT_TAIL": tail_of(N, looped_block)}
    return {"num_heads": H, "num_frames": T, "num_visual": S, "num_text": N, "HEAD_DIM": C, **tails}


def launch_forward(inputs: Tensors, out: Tensor, text_out: Tensor) -> Tensor:
    """From (q, k, v, text_q, text_k, text_v) into out and text_out (any strides, last dim contiguous).

    Returns lse [B, T, H, S + N] in fp32, visual first.
    """
    q, text_q = inputs[0], inputs[3]
    C = q.shape[-1]
    tile = tiles.flash("spatial", "forward", C, q.element_size(), S=q.shape[2], N=text_q.shape[2])
    lse = torch.empty(_lse_shape(inputs), dtype=torch.float32, device=q.device)
    _forward_kernel[_grid(q, text_q, tile.block_queries)](
        *(source(x) for x in (*inputs, out, text_out)),
        lse,
        softmax_scales(C)[0],
        **_sizes(q, text_q, tile.block_keys),
        **tile.options(),
    )
    return lse


def launch_backward(douts: Tensors, saved: Tensors, gradients: Tensors, *, add_text: bool = False) -> None:
    """From (dout, dtext_out) and (the six inputs, out, text_out, lse) into the gradients of the six inputs, in their order.

    Any strides, last dim contiguous. `add_text` adds the three of text to what their buffers hold instead.
    """
    *inputs, out, text_out, lse = saved
    dq, dk, dv, dtext_q, dtext_k, dtext_v = gradients
    q, text_q = inputs[0], inputs[3]
    C = q.shape[-1]
    delta = torch.empty_like(lse)
    tile = tiles.flash("spatial", "dq", C, q.element_size(), S=q.shape[2], N=text_q.shape[2])
    _dq_kernel[_grid(q, text_q, tile.block_queries)](
        *(source(x) for x in (*inputs, out, text_out, *douts, dq, dtext_q)),
        *(lse, delta, *softmax_scales(C)),
        ADD_TEXT=add_text,
        **_sizes(q, text_q, tile.block_keys),
        **tile.options(),
    )
    tile = tiles.flash("spatial", "dkv", C, q.element_size(), S=q.shape[2], N=text_q.shape[2])
    _dkv_kernel[_grid(q, text_q, tile.block_keys)](
        *(source(x) for x in (*inputs, *douts, dk, dv, dtext_k, dtext_v)),
        *(lse, delta, *softmax_scales(C)),
        ADD_TEXT=add_text,
        **_sizes(q, text_q, tile.block_queries),
        **tile.options(),
    )


def _lse_shape(inputs: Tensors) -> tuple[int, ...]:
    B, T, S, H, _ = inputs[0].shape
    return B, T, H, S + inputs[3].shape[2]


_attention = attention_op(
    "spatial", ("q", "k", "v", "text_q", "text_k", "text_v"), (0, 3), launch_forward, launch_backward, _lse_shape
)


def aot_variants() -> list[Variant]:
    """256 visual and 333 text tokens in a merged projection buffer; fp32 at the released head dim only (at 128 it spills)."""
    variants = []
    for dtype, C in (("bf16", 64), ("bf16", 128), ("fp16", 64), ("fp32", 64)):
        for name, kernel in (("forward", _forward_kernel), ("dq", _dq_kernel), ("dkv", _dkv_kernel)):
            tile = tiles.flash_by_size(name, C, 4 if dtype == "fp32" else 2)
            looped = tile.block_queries if name == "dkv" else tile.block_keys
            constants = {"HEAD_DIM": C, "VISUAL_TAIL": tail_of(1296, looped), "TEXT_TAIL": tail_of(333, looped)}
            constants |= {} if name == "forward" else {"ADD_TEXT": True}
            variants.append(variant(kernel, dtype, constants, tile, f"spatial {name} {dtype} C={C}"))
    return variants


def spatial_attention(
    visual: tuple[Tensor, Tensor, Tensor], text: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Full attention within each frame over two sources, each its q, k, v.

    visual [B, T, S, H, C] and text [B, T, N, H, C], C of 64 or 128; any strides, the last dim contiguous.
    Returns the visual and the text rows, contiguous, shaped as their queries.
    """
    op, q = "spatial_attention", visual[0]
    _check.runnable(op, q)
    _check.tensor(op, "visual q", q, (None,) * 5)
    B, T, S, H, C = q.shape
    if C not in HEAD_DIMS:
        raise UserError(f"{op}: expected a head dim of {' or '.join(map(str, HEAD_DIMS))}, got {C}.")
    _check.tensor(op, "text q", text[0], (B, T, None, H, C), like=q)
    for source_name, tensors, num_rows in (("visual", visual, S), ("text", text, text[0].shape[2])):
        for name, x in zip("kv", tensors[1:], strict=True):
            _check.tensor(op, f"{source_name} {name}", x, (B, T, num_rows, H, C), like=q)
    return _attention(*visual, *text)
