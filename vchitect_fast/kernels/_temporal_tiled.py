"""Temporal attention for T beyond one tile, in Triton: blocks of queries and keys of one (position, head) problem.

Forward is one program a block of queries, with an online softmax. Backward is one program a problem: for each block of
queries the row statistics (log-sum-exp and delta, kept in registers for all T) and dq, then for each block of keys dk and dv.
Everything is read again where it is needed; a problem is small (T C elements a tensor), so that comes from the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vchitect_fast.kernels._flash import dkv_step, dq_step, forward_step
from vchitect_fast.kernels._temporal_rows import load, place_of, rows_of, store, store_gradient, tables, turn, turned


@triton.jit
def tiled_forward_kernel(
    q_source,
    k_source,
    v_source,
    o_source,
    cos_ptr,
    sin_ptr,
    num_visual,
    num_positions,
    num_heads,
    scale,
    num_frames,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_blocks = tl.cdiv(num_frames, BLOCK_Q)
    pid = tl.program_id(0)
    problem = pid // num_blocks
    place, head = place_of(problem // num_heads, num_visual, num_positions), problem % num_heads
    frames = (pid % num_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = turned(q_source, place, head, frames, frames < num_frames, cos_ptr, sin_ptr, HEAD_DIM)
    row_max, row_sum = tl.full((BLOCK_Q,), float("-inf"), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    for start in range(0, num_frames, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = turned(k_source, place, head, keys, keys < num_frames, cos_ptr, sin_ptr, HEAD_DIM)
        v = load(rows_of(v_source, place, head, keys), keys < num_frames, HEAD_DIM, True)
        acc, row_max, row_sum = forward_step(q, k, v, acc, row_max, row_sum, scale, keys < num_frames, True)
    store(rows_of(o_source, place, head, frames), frames < num_frames, acc / row_sum[:, None], HEAD_DIM, True)


@triton.jit
def _statistics_step(q, k, v, do, row_max, row_sum, dot_sum, scale, valid):
    """One block of keys of the row maximum, the row sum of exp2 and of exp2 times dp."""
    scores = tl.where(valid[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shrink = tl.exp2(row_max - new_max)
    p = tl.exp2(scores - new_max[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    return new_max, row_sum * shrink + tl.sum(p, 1), dot_sum * shrink + tl.sum(p * dp, 1)


@triton.jit
def tiled_backward_kernel(
    q_source,
    k_source,
    v_source,
    do_source,
    dq_source,
    dk_source,
    dv_source,
    cos_ptr,
    sin_ptr,
    num_visual,
    num_positions,
    num_heads,
    scale,
    root,
    num_frames,
    ADD_TEXT: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # At C = 128 what a loop does not change is made again inside it: hoisted, it takes more registers than there are.
    LEAN: tl.constexpr = HEAD_DIM > 64
    problem = tl.program_id(0)
    place, head = place_of(problem // num_heads, num_visual, num_positions), problem % num_heads
    block = tl.arange(0, NUM_BLOCKS)[:, None]  # a power of two that covers the blocks of queries
    all_lse = tl.zeros((NUM_BLOCKS, BLOCK_Q), tl.float32)
    all_delta = tl.zeros((NUM_BLOCKS, BLOCK_Q), tl.float32)
    for i in tl.range(0, tl.cdiv(num_frames, BLOCK_Q), disable_licm=LEAN):
        frames = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
        q = turned(q_source, place, head, frames, frames < num_frames, cos_ptr, sin_ptr, HEAD_DIM)
        do = load(rows_of(do_source, place, head, frames), frames < num_frames, HEAD_DIM, True)
        row_max, row_sum = tl.full((BLOCK_Q,), float("-inf"), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
        dot_sum = tl.zeros((BLOCK_Q,), tl.float32)
        for start in tl.range(0, num_frames, BLOCK_K, disable_licm=LEAN):
            keys = start + tl.arange(0, BLOCK_K)
            k = turned(k_source, place, head, keys, keys < num_frames, cos_ptr, sin_ptr, HEAD_DIM)
            v = load(rows_of(v_source, place, head, keys), keys < num_frames, HEAD_DIM, True)
            row_max, row_sum, dot_sum = _statistics_step(
                q, k, v, do, row_max, row_sum, dot_sum, scale, keys < num_frames
            )
        lse = row_max + tl.log2(row_sum)  # finite in padding too, where do = 0 and nothing is added
        delta = dot_sum / row_sum
        all_lse = tl.where(block == i, lse[None, :], all_lse)
        all_delta = tl.where(block == i, delta[None, :], all_delta)
        dq = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
        for start in tl.range(0, num_frames, BLOCK_K, disable_licm=LEAN):
            keys = start + tl.arange(0, BLOCK_K)
            k = turned(k_source, place, head, keys, keys < num_frames, cos_ptr, sin_ptr, HEAD_DIM)
            v = load(rows_of(v_source, place, head, keys), keys < num_frames, HEAD_DIM, True)
            dq = dq_step(q, do, k, v, lse, delta, dq, scale, keys < num_frames, True)
        cos, sin = tables(cos_ptr, sin_ptr, frames, frames < num_frames, HEAD_DIM, True)
        dq = turn(dq * root, cos, -sin)
        store_gradient(dq_source, place, head, frames, frames < num_frames, dq, HEAD_DIM, True, ADD_TEXT)
    for start in tl.range(0, num_frames, BLOCK_K, disable_licm=LEAN):
        keys = start + tl.arange(0, BLOCK_K)
        valid = keys < num_frames
        k = turned(k_source, place, head, keys, valid, cos_ptr, sin_ptr, HEAD_DIM)
        v = load(rows_of(v_source, place, head, keys), valid, HEAD_DIM, True)
        dk, dv = tl.zeros((BLOCK_K, HEAD_DIM), tl.float32), tl.zeros((BLOCK_K, HEAD_DIM), tl.float32)
        for i in tl.range(0, tl.cdiv(num_frames, BLOCK_Q), disable_licm=LEAN):
            frames = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
            q = turned(q_source, place, head, frames, frames < num_frames, cos_ptr, sin_ptr, HEAD_DIM)
            do = load(rows_of(do_source, place, head, frames), frames < num_frames, HEAD_DIM, True)
            lse = tl.sum(tl.where(block == i, all_lse, 0.0), 0)
            delta = tl.sum(tl.where(block == i, all_delta, 0.0), 0)
            dk, dv = dkv_step(k, v, q, do, lse, delta, dk, dv, scale)
        cos, sin = tables(cos_ptr, sin_ptr, keys, valid, HEAD_DIM, True)
        dk = turn(dk * root, cos, -sin)
        store_gradient(dk_source, place, head, keys, valid, dk, HEAD_DIM, True, ADD_TEXT)
        store_gradient(dv_source, place, head, keys, valid, dv, HEAD_DIM, True, ADD_TEXT)
