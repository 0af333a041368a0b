"""How a launcher becomes a torch op: define and impl, the cheapest boundary that torch.compile and opcheck understand.

    forward = register("bias_gelu_forward", "(Tensor x, Tensor bias) -> Tensor", launch, fake)

`launch` runs on CUDA tensors, on their device, and on CPU tensors only under the interpreter. `fake` returns empty tensors
of the right shapes, strides and dtypes. There is no autograd here: each op file wraps its two ops in an autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from vchitect_fast.kernels._check import interpreted

NAMESPACE = "vchitect_fast"


def register(name: str, schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define vchitect_fast::name and return the callable that dispatches to it."""
    full = f"{NAMESPACE}::{name}"
    torch.library.define(full, schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.impl(full, "CUDA", _on_its_device(launch))
    if interpreted():
        torch.library.impl(full, "CPU", launch)
    torch.library.register_fake(full, fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def rows(gradient: Tensor) -> Tensor:
    """A gradient as a kernel may read it: autograd may hand over an expanded scalar, whose last dim is not contiguous."""
    return gradient if gradient.stride(-1) == 1 or gradient.shape[-1] == 1 else gradient.contiguous()


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; the tensors may lie on another."""

    @wraps(launch)
    def guarded(x: Tensor, *rest: Any) -> Any:
        if x.device.index == torch.cuda.current_device():
            return launch(x, *rest)
        with torch.cuda.device(x.device):
            return launch(x, *rest)

    return guarded
