"""The three attention branches of a block, one public function each, and who computes them.

    spatial   every frame attends within itself: S visual + N text tokens
    temporal  every token position attends over the T frames, rotary on the frame index
    cross     all T (S+N) tokens attend to the first frame's N text tokens of their own sample

Scale 1/sqrt(C), no mask, no dropout. Source: model_spec, "Attention". `backend` (plan.ATTENTION_BACKENDS):
    sdpa           torch's scaled_dot_product_attention, which chooses for itself; the default
    math           the softmax written out, which defines the answer
    cudnn, flash   scaled_dot_product_attention restricted to that one
    fa2, fa3, fa4  FlashAttention's packages flash_attn, flash_attn_interface, flash_attn.cute (CUDA, 16-bit)
    triton         our kernels, which read two sources: a joint tensor goes in as two views, its rows come out in one copy
    auto           what a table tuned on this GPU has for these sizes (kernels/tuned.py), else sdpa; it says once what it took
A backend named otherwise that cannot run is an error, never another backend. Where torch is told to use deterministic algorithms, so are all.

Letters: B batch, T frames, J = S + N joint tokens, N text tokens, H heads, C head dim.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.kernels import ops
from vchitect_fast.kernels.reference import cross_joint, rotary_tables, rotate, spatial_joint, temporal_joint
from vchitect_fast.kernels.tiles import BACKEND
from vchitect_fast.kernels.tuned import look_up
from vchitect_fast.offload.groups import frame_at_work
from vchitect_fast.plan import ATTENTION_BACKENDS

__all__ = ["cross_attention", "rotary_tables", "rotate", "spatial_attention", "temporal_attention"]

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
PACKAGES = {"fa2": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
FULL_TILE = 128  # rows: a joint tensor is cut in two so that only the second view has a part of a tile
log = logging.getLogger(__name__)


def spatial_attention(q_BTJHC: Tensor, k_BTJHC: Tensor, v_BTJHC: Tensor, *, backend: str = "sdpa") -> Tensor:
    """Full attention within each frame. Returns [B, T, J, H, C] in the dtype of q."""
    given = q_BTJHC, k_BTJHC, v_BTJHC
    backend = _chosen("spatial", backend, q_BTJHC, J=q_BTJHC.shape[2])
    if backend in PACKAGES:
        return _flash_attention(backend, *(x.flatten(0, 1) for x in given)).view(q_BTJHC.shape)
    if backend == "triton":
        sources = _two_sources(given, _rest(q_BTJHC.shape[2]))
        return torch.cat(ops.spatial_attention(*sources, impl="triton"), dim=2)
    return _by_torch(backend, lambda math: spatial_joint(*given, math=math))


def temporal_attention(
    q_BTJHC: Tensor, k_BTJHC: Tensor, v_BTJHC: Tensor, *, rope_scaling_factor: float = 1.0, backend: str = "sdpa"
) -> Tensor:
    """Attention over the frames at each position, rotary on q and k. Returns [B, T, J, H, C] in the dtype of q."""
    given = q_BTJHC, k_BTJHC, v_BTJHC
    backend = _chosen("temporal", backend, q_BTJHC, T=q_BTJHC.shape[1])
    if backend == "triton":
        sources = _two_sources(given, _rest(q_BTJHC.shape[2]))
        outs = ops.temporal_attention(*sources, rope_scaling_factor=rope_scaling_factor, impl="triton")
        return torch.cat(outs, dim=2)
    return temporal_joint(*given, rope_scaling_factor=rope_scaling_factor, math=backend == "math")


def cross_attention(q_BTJHC: Tensor, k_BNHC: Tensor, v_BNHC: Tensor, *, backend: str = "sdpa") -> Tensor:
    """All tokens of a sample attend to its first frame's text. Returns [B, T, J, H, C] in the dtype of q."""
    _, T, J, _, _ = q_BTJHC.shape
    backend = _chosen("cross", backend, q_BTJHC, R=T * J, N=k_BNHC.shape[1])
    if backend in PACKAGES:
        return _flash_attention(backend, q_BTJHC.flatten(1, 2), k_BNHC, v_BNHC).view(q_BTJHC.shape)
    if backend == "triton":  # one frame of all rows, the last N of them for the text that the kernel expects
        [visual], [text] = _two_sources((q_BTJHC.flatten(1, 2)[:, None],), k_BNHC.shape[1])
        return torch.cat(ops.cross_attention(visual, text, k_BNHC, v_BNHC, impl="triton"), dim=2).view(q_BTJHC.shape)
    return _by_torch(backend, lambda math: cross_joint(q_BTJHC, k_BNHC, v_BNHC, math=math))


def _chosen(branch: str, backend: str, q: Tensor, **sizes: int) -> str:
    """The backend by its name; of "auto", what it stands for on q's device at these sizes."""
    if backend not in ATTENTION_BACKENDS[branch]:
        raise unknown_name(f"attention backend of the {branch} branch", backend, ATTENTION_BACKENDS[branch])
    if backend != "auto":
        return backend
    if not _on_gpu(q):
        return "sdpa"
    found = _tuned(branch, q.element_size(), *sizes.items(), ("C", q.shape[-1]))
    return (
        "sdpa" if found == "fa4" and frame_at_work() else found
    )  # no torch op, so that no group could save its output


@torch.compiler.assume_constant_result  # torch.compile calls this once a graph; it would trace through the cache
def _tuned(branch: str, element_bytes: int, *sizes: tuple[str, int]) -> str:
    return _by_table(branch, element_bytes, sizes)


@lru_cache(maxsize=1024)
def _by_table(branch: str, element_bytes: int, sizes: tuple[tuple[str, int], ...]) -> str:
    """What the tuned table has, where that is installed; said once."""
    choice = look_up(branch, BACKEND, element_bytes=element_bytes, **dict(sizes))
    found, why = ("sdpa", "no tuned row") if choice is None else (str(choice[BACKEND]), "tuned")
    if found in PACKAGES and not _is_installed(PACKAGES[found]):
        found, why = "sdpa", f"tuned {found} is not installed"
    shape = ", ".join(f"{name} {size}" for name, size in sizes)
    log.info(
        "attention backend auto: %s for the %s branch at %s, %d bytes (%s)", found, branch, shape, element_bytes, why
    )
    return found


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def _by_torch(backend: str, joint: Callable[[bool], Tensor]) -> Tensor:
    """`joint` by the written-out softmax or by SDPA, restricted to one of its backends where one is named."""
    if backend not in SDPA:
        return joint(backend == "math")
    try:
        with sdpa_kernel(SDPA[backend]):
            return joint(False)
    except RuntimeError as error:
        if not str(error).startswith(("No available kernel", "No viable backend")):
            raise
        raise UserError(
            f"expected torch's SDPA to have {backend!r} for this device, dtype and head dim, it has not; "
            "choose the attention backend sdpa, which takes what there is."
        ) from None


def _flash_attention(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over [batch, length, H, C] by a FlashAttention package."""
    if not _on_gpu(q) or q.dtype not in (torch.float16, torch.bfloat16):
        kind = str(q.dtype).removeprefix("torch.")
        raise UserError(
            f"attention backend {backend!r} expects CUDA tensors in float16 or bfloat16, got {kind} on {q.device}; "
            "choose sdpa, or bfloat16 on a GPU."
        )
    try:  # statements, which torch.compile follows
        if backend == "fa2":
            from flash_attn import flash_attn_func
        elif backend == "fa3":
            from flash_attn_interface import flash_attn_func
        else:
            from flash_attn.cute import flash_attn_func
    except ImportError as error:
        raise UserError(
            f"attention backend {backend!r} needs the package {PACKAGES[backend]}, which does not import here ({error}); "
            "`vchitect-fast doctor` says what is installed, sdpa needs nothing."
        ) from None
    out = flash_attn_func(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())
    return out[0] if isinstance(out, tuple) else out  # fa4, and fa3 of some versions, return the log-sum-exp too


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _rest(num_rows: int) -> int:
    """Rows behind the last full tile, or the last tile where all are full; at most all but one."""
    return min(num_rows % FULL_TILE or FULL_TILE, num_rows - 1)


def _two_sources(given: tuple[Tensor, ...], num_last: int) -> tuple[Any, Any]:
    """Views of all but the last `num_last` rows of each [B, T, J, H, C], and of those."""
    cut = given[0].shape[2] - num_last
    if cut < 1 or num_last < 1:
        raise UserError(
            f'attention backend "triton" reads rows of two sources, got {given[0].shape[2]} in all beside {num_last} of text; '
            "choose sdpa for so few."
        )
    return tuple(x[:, :, :cut] for x in given), tuple(x[:, :, cut:] for x in given)
