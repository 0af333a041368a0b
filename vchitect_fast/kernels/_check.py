"""What every op asks of its inputs before a kernel sees a pointer: one UserError sentence with expected and got.

Kernels read shapes, strides and dtypes as they are told; a wrong one is a wrong answer or a fault on the device, so nothing
is passed on unchecked and nothing is quietly converted. Only the last dim must be contiguous.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vchitect_fast.errors import UserError, unknown_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = ("triton", "reference")


def interpreted() -> bool:
    """Whether Triton interprets kernels in Python, on the CPU; it asks when a kernel's module is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_reference(impl: str) -> bool:
    """True for impl="reference", False for "triton"; any other name is a UserError."""
    if impl not in IMPLEMENTATIONS:
        raise unknown_name("impl", impl, IMPLEMENTATIONS)
    return impl == "reference"


def runnable(op: str, x: Tensor) -> None:
    """A Triton op runs where x lies: on a CUDA device, or anywhere under the interpreter."""
    if not (x.is_cuda or interpreted()):
        raise UserError(
            f'{op}: impl="triton" needs CUDA tensors, got {x.device}; pass impl="reference" there, or set '
            "TRITON_INTERPRET=1 before the first import to interpret the kernel."
        )
    if x.dtype not in DTYPES:
        raise UserError(f"{op}: expected float32, bfloat16 or float16, got {_name(x.dtype)}.")


def tensor(
    op: str,
    name: str,
    x: Tensor,
    shape: tuple[int | None, ...],
    *,
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """`shape` (None is any size of at least 1), device and dtype of `like` (`dtype` overrules), last dim contiguous."""
    if x.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise UserError(f"{op}: expected {name} of shape [{wanted}], got {list(x.shape)}.")
    if 0 in x.shape:
        raise UserError(f"{op}: expected {name} with at least one element in every dim, got {list(x.shape)}.")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise UserError(
            f"{op}: expected {name} with a contiguous last dim, got strides {list(x.stride())}; call .contiguous()."
        )
    if like is not None and x.device != like.device:
        raise UserError(f"{op}: expected {name} on {like.device}, got {x.device}; move it there.")
    wanted_dtype = dtype or (like.dtype if like is not None else x.dtype)
    if x.dtype != wanted_dtype:
        raise UserError(f"{op}: expected {name} in {_name(wanted_dtype)}, got {_name(x.dtype)}; cast it.")


def at_most(op: str, name: str, got: int, limit: int, why: str) -> None:
    """got <= limit, else a UserError that says why."""
    if got > limit:
        raise UserError(f"{op}: expected {name} of at most {limit} ({why}), got {got}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
