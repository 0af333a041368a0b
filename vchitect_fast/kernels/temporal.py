"""Temporal attention: each position of each head attends over the T frames, where its rows lie, in one pass over memory.

    forward    q' = R q, k' = R k;  p = softmax(q' k'^T / sqrt(C));  o = p v
    backward   dv = p^T do;  dp = do v^T;  ds = p (dp - rowsum(p dp)) / sqrt(C);  dq = R^-1 (ds k'),  dk = R^-1 (ds^T q')
R turns the interleaved pairs (2i, 2i + 1) of frame t by (t / rope_scaling_factor) 1e6^(-2i/C); tables [T, C/2] in fp32.
Saved: q, k, v, nothing else. Softmax, and the delta of its derivative as rowsum(p dp), are computed again in backward.
Visual rows [B, T, S, H, C] and text rows [B, T, N, H, C] stay in their own buffers, read and written by stride: one launch
forward and one backward, where a program picks its source by its position. No atomics; one order of sums.
    T <= 128   a (position, head) problem is one tile; PACK heads of one position share a tile by a block-diagonal mask
    T <= 512   tiles of queries and keys, online softmax; backward is one program a problem that makes the row statistics
               first, keeps them in registers, then dq, then dk and dv: 9 products of T x T x C instead of 5
The pairs are turned whole: one contiguous load, reshape and split, turn, join and reshape. For sm_90 that compiles to 16-byte
loads and register moves, the only shuffles are those of the softmax. Alternatives, compiled for sm_90 too: even and odd
columns loaded apart (stride 2) give 2-byte loads, and products q_even k_even + q_odd k_odd; pairs loaded as int32 and
unpacked by shifts give the same count of instructions, for 16-bit types only. None of the three is measured.
Floor: 4 tensors of B T (S + N) H C elements forward (q, k, v, o), 7 backward (q, k, v, do, dq, dk, dv), over the memory's
speed; 4 B (S + N) H T^2 C FLOPs forward. fp32 multiplies in fp32, which is slow. Source: model_spec, "Attention", 2.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import _check, tiles
from vchitect_fast.kernels._flash import softmax_scales
from vchitect_fast.kernels._op import register, rows
from vchitect_fast.kernels._temporal_rows import load, place_of, rows_of, store, store_gradient, tables, turn
from vchitect_fast.kernels._temporal_tiled import tiled_backward_kernel, tiled_forward_kernel
from vchitect_fast.kernels.aot import Variant, pointers

ROTARY_BASE = 1e6
QKV = tuple[Tensor, Tensor, Tensor]  # q, k, v of one source
Tensors = tuple[Tensor, ...]
HEAD_DIMS = (64, 128)
MAX_FRAMES = 512  # backward keeps two statistics of every frame in registers
MAX_PROGRAMS = 2**31 - 1
AOT_FRAMES = {
    ("bf16", 64): (16, 24, 32, 40, 64, 128, 144),
    ("bf16", 128): (16, 32, 64, 128),
    ("fp16", 64): (128,),
    ("fp32", 128): (16, 144),
}


@triton.jit
def _probabilities(q, k, scale, T: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """exp2 of the scores less their row's maximum, and its row sums; a row of padding comes out finite."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    r = tl.arange(0, BLOCK)
    if PACK > 1:
        own = (r // T)[:, None] == (r // T)[None, :]
        scores = tl.where(own & (r < T * PACK)[None, :], scores, -1e30)
    elif T < BLOCK:
        scores = tl.where((r < T)[None, :], scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p, tl.sum(p, 1)


@triton.jit
def _packed(pid, num_visual, num_positions, num_heads, T: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """Of a program of the one-tile kernels: its place, and the head, frame and validity of its rows."""
    num_groups = tl.cdiv(num_heads, PACK)
    r = tl.arange(0, BLOCK)
    if PACK == 1:
        heads, frames, valid = pid % num_groups, r, r < T
    else:
        heads, frames = (pid % num_groups) * PACK + r // T, r % T
        valid = (r < T * PACK) & (heads < num_heads)
    return place_of(pid // num_groups, num_visual, num_positions), heads, frames, valid


@triton.jit
def _forward_kernel(
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
    T: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    MASKED: tl.constexpr = PACK > 1 or T < BLOCK
    place, heads, frames, valid = _packed(tl.program_id(0), num_visual, num_positions, num_heads, T, BLOCK, PACK)
    cos, sin = tables(cos_ptr, sin_ptr, frames, valid, HEAD_DIM, MASKED)
    q = load(rows_of(q_source, place, heads, frames), valid, HEAD_DIM, MASKED)
    k = load(rows_of(k_source, place, heads, frames), valid, HEAD_DIM, MASKED)
    p, row_sum = _probabilities(turn(q, cos, sin).to(q.dtype), turn(k, cos, sin).to(k.dtype), scale, T, BLOCK, PACK)
    # v is asked for late: 95 registers instead of 111 at T = 40, so five programs on a multiprocessor instead of four.
    v = load(rows_of(v_source, place, heads, frames), valid, HEAD_DIM, MASKED)
    o = tl.dot(p.to(v.dtype), v, input_precision="ieee") / row_sum[:, None]
    store(rows_of(o_source, place, heads, frames), valid, o, HEAD_DIM, MASKED)


@triton.jit
def _backward_kernel(
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
    ADD_TEXT: tl.constexpr,
    T: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    MASKED: tl.constexpr = PACK > 1 or T < BLOCK
    place, heads, frames, valid = _packed(tl.program_id(0), num_visual, num_positions, num_heads, T, BLOCK, PACK)
    cos, sin = tables(cos_ptr, sin_ptr, frames, valid, HEAD_DIM, MASKED)
    q = load(rows_of(q_source, place, heads, frames), valid, HEAD_DIM, MASKED)
    k = load(rows_of(k_source, place, heads, frames), valid, HEAD_DIM, MASKED)
    v = load(rows_of(v_source, place, heads, frames), valid, HEAD_DIM, MASKED)
    do = load(rows_of(do_source, place, heads, frames), valid, HEAD_DIM, MASKED)
    q, k = turn(q, cos, sin).to(q.dtype), turn(k, cos, sin).to(k.dtype)
    p, row_sum = _probabilities(q, k, scale, T, BLOCK, PACK)
    p = p / row_sum[:, None]
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
    store_gradient(dv_source, place, heads, frames, valid, dv, HEAD_DIM, MASKED, ADD_TEXT)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
    if HEAD_DIM > 64:  # read them again rather than keep them: registers
        cos, sin = tables(cos_ptr, sin_ptr, frames, valid, HEAD_DIM, MASKED)
    dq = turn(tl.dot(ds, k, input_precision="ieee") * root, cos, -sin)
    store_gradient(dq_source, place, heads, frames, valid, dq, HEAD_DIM, MASKED, ADD_TEXT)
    dk = turn(tl.dot(tl.trans(ds), q, input_precision="ieee") * root, cos, -sin)
    store_gradient(dk_source, place, heads, frames, valid, dk, HEAD_DIM, MASKED, ADD_TEXT)


@lru_cache(maxsize=64)
def _rotary_tables(
    num_frames: int, head_dim: int, scaling_factor: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, C/2] in fp32, made on the host once: the blocking copy makes them good on every stream.

    A CUDA graph can therefore not capture the first call at a T.
    """
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frame = torch.arange(num_frames, dtype=torch.float32, device="cpu")
    angle = torch.outer(frame / scaling_factor, ROTARY_BASE ** (-even / head_dim))
    return angle.cos().to(device), angle.sin().to(device)


def _source(visual: Tensor, text: Tensor) -> tuple[Any, ...]:
    """Both pointers, then both strides over (b, t, s, h); 0 for a dim of one, whose stride may be anything."""
    return visual, text, *(x.stride(dim) if x.shape[dim] > 1 else 0 for x in (visual, text) for dim in range(4))


def _launch(
    kernels: tuple[Any, Any],
    pairs: list[tuple[Tensor, Tensor]],
    factor: float,
    name: str,
    *scales: float,
    **launch: Any,
) -> None:
    """Run the one-tile or the tiled kernel over (visual, text) pairs, q first."""
    visual, text = pairs[0]
    B, T, S, H, C = visual.shape
    J = S + text.shape[2]
    tile = tiles.temporal(name, T, C, visual.element_size())
    arguments = (*(_source(*pair) for pair in pairs), *_rotary_tables(T, C, factor, visual.device), S, J, H, *scales)
    launch |= {"HEAD_DIM": C, "num_warps": tile.num_warps}
    if isinstance(tile, tiles.PackedTile):
        grid = (B * J * triton.cdiv(H, tile.pack),)
        kernels[0][grid](*arguments, T=T, PACK=tile.pack, BLOCK=tile.block, num_stages=1, **launch)
        return
    num_blocks = triton.cdiv(T, tile.block_q)
    launch |= {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "num_stages": tile.num_stages}
    if kernels[1] is tiled_backward_kernel:
        kernels[1][(B * J * H,)](*arguments, T, NUM_BLOCKS=triton.next_power_of_2(num_blocks), **launch)
    else:
        kernels[1][(B * J * H * num_blocks,)](*arguments, T, **launch)


def launch_forward(visual: Tensors, text: Tensors, rope_scaling_factor: float, out: Tensor, text_out: Tensor) -> None:
    """Write the attention of checked inputs into `out` and `text_out` of any strides (a slot of a merged buffer)."""
    pairs = list(zip((*visual, out), (*text, text_out), strict=True))
    scale, _ = softmax_scales(out.shape[-1])
    _launch((_forward_kernel, tiled_forward_kernel), pairs, rope_scaling_factor, "forward", scale)


def launch_backward(
    do: Tensor,
    text_do: Tensor,
    visual: Tensors,
    text: Tensors,
    rope_scaling_factor: float,
    grads: Tensors,
    text_grads: Tensors,
    *,
    add_text: bool = False,
) -> None:
    """Write dq, dk, dv of checked inputs into `grads` and `text_grads` of any strides, or add to what the latter hold."""
    pairs = list(zip((*visual, do, *grads), (*text, text_do, *text_grads), strict=True))
    kernels, scales = (_backward_kernel, tiled_backward_kernel), softmax_scales(do.shape[-1])
    _launch(kernels, pairs, rope_scaling_factor, "backward", *scales, ADD_TEXT=add_text)


def _empty(*like: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in like]


def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, text_q: Tensor, text_k: Tensor, text_v: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    out, text_out = _empty(q, text_q)
    launch_forward((q, k, v), (text_q, text_k, text_v), factor, out, text_out)
    return out, text_out


def _backward_op(do: Tensor, text_do: Tensor, *rest: Any) -> Tensors:
    *qkv, factor = rest
    grads = _empty(*qkv)
    launch_backward(do, text_do, tuple(qkv[:3]), tuple(qkv[3:]), factor, tuple(grads[:3]), tuple(grads[3:]))
    return tuple(grads)


_QKV = "Tensor q, Tensor k, Tensor v, Tensor text_q, Tensor text_k, Tensor text_v, float rope_scaling_factor"
_forward = register(
    "temporal_forward",
    f"({_QKV}) -> (Tensor, Tensor)",
    _forward_op,
    lambda q, k, v, text_q, text_k, text_v, factor: tuple(_empty(q, text_q)),
)
_backward = register(
    "temporal_backward",
    f"(Tensor do, Tensor text_do, {_QKV}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_op,
    lambda do, text_do, *rest: tuple(_empty(*rest[:-1])),
)


class _Temporal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: float, *qkv: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*qkv)
        ctx.factor = factor
        return _forward(*qkv, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, text_do: Tensor) -> tuple[Any, ...]:
        return None, *_backward(rows(do), rows(text_do), *ctx.saved_tensors, ctx.factor)


def aot_variants() -> list[Variant]:
    """The tiles that ship, each at frames that need it; text gradients added, as the block does."""
    return [
        _variant(name, dtype, head_dim, num_frames)
        for (dtype, head_dim), frames in AOT_FRAMES.items()
        for num_frames in frames
        for name in ("forward", "backward")
    ]


def _variant(name: str, dtype: str, C: int, T: int) -> Variant:
    is_forward, size = name == "forward", (T, C, 4 if dtype == "fp32" else 2)
    tile = tiles.temporal_forward(*size) if is_forward else tiles.temporal_backward(*size)
    source, names = (f"*{dtype}:16",) * 2 + ("i32:16",) * 8, ("q k v o" if is_forward else "q k v do dq dk dv").split()
    types = {f"{x}_source": source for x in names} | pointers("fp32:16", "cos", "sin")
    types |= dict.fromkeys(("num_visual", "num_positions", "num_heads"), "i32")
    types |= {"scale": "fp32"} if is_forward else {"scale": "fp32", "root": "fp32"}
    constants: dict[str, Any] = {"HEAD_DIM": C} if is_forward else {"HEAD_DIM": C, "ADD_TEXT": True}
    label = f"temporal {name} {dtype} C={C} T={T}"
    if isinstance(tile, tiles.PackedTile):
        kernel = _forward_kernel if is_forward else _backward_kernel
        constants |= {"T": T, "PACK": tile.pack, "BLOCK": tile.block}
        return Variant(kernel, types, constants, tile.num_warps, f"{label} {tile.block} rows x{tile.pack}")
    constants |= {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
    if not is_forward:
        constants["NUM_BLOCKS"] = triton.next_power_of_2(triton.cdiv(T, tile.block_q))
    kernel = tiled_forward_kernel if is_forward else tiled_backward_kernel
    label += f" {tile.block_q}x{tile.block_k}"
    return Variant(kernel, types | {"num_frames": "i32"}, constants, tile.num_warps, label, tile.num_stages)


def temporal_attention(visual: QKV, text: QKV, *, rope_scaling_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Attention over the frames of visual q, k, v [B, T, S, H, C] and text q, k, v [B, T, N, H, C]; their rows apart.

    Contiguous results in the dtype of q; any strides in, the last dim contiguous. C is 64 or 128, T at most 512. A T not
    above 128 that was not seen before compiles once.
    """
    op, q = "temporal_attention", visual[0]
    _check.runnable(op, q)
    _check.tensor(op, "visual q", q, (None,) * 5)
    B, T, S, H, C = q.shape
    if C not in HEAD_DIMS:
        raise UserError(f'{op}: expected a head dim of 64 or 128, got {C}; pass impl="reference" for others.')
    for name, source, num_tokens in (("visual", visual, S), ("text", text, None)):
        for letter, x in zip("qkv", source, strict=True):
            _check.tensor(op, f"{name} {letter}", x, (B, T, num_tokens, H, C), like=q)
            num_tokens = x.shape[2]
    _check.at_most(op, "frames", T, MAX_FRAMES, "the backward keeps its statistics in registers")
    num_programs = B * (S + text[0].shape[2]) * H * triton.cdiv(T, 16)
    _check.at_most(op, "problems", num_programs, MAX_PROGRAMS, "programs of one launch")
    if not 0 < rope_scaling_factor < math.inf:
        raise UserError(f"{op}: expected a positive rope_scaling_factor, got {rope_scaling_factor}.")
    return _Temporal.apply(rope_scaling_factor, *visual, *text)
