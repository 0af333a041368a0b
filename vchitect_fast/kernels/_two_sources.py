"""From two launchers to a differentiable op: what spatial.py and cross.py share between kernel and public function.

    apply = attention_op("spatial", inputs, queries, launch_forward, launch_backward, lse_shape)
    out, text_out = apply(*tensors)
The launchers write into tensors that they are given (any strides, last dim contiguous), so that the block can hand them slots
of its merged buffers; here they get contiguous ones. Saved: the inputs, both outputs and lse. Nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vchitect_fast.kernels._op import register, rows

Tensors = tuple[Tensor, ...]


def attention_op(
    name: str,
    inputs: Sequence[str],
    queries: tuple[int, int],
    launch_forward: Callable[[Tensors, Tensor, Tensor], Tensor],
    launch_backward: Callable[..., None],
    lse_shape: Callable[[Tensors], tuple[int, ...]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register name_forward and name_backward; return the autograd op over `inputs`.

    queries          which of the inputs the two outputs are shaped as, visual and text
    launch_forward   (inputs, out, text_out) -> lse
    launch_backward  ((dout, dtext_out), (*inputs, out, text_out, lse), gradients of the inputs)
    lse_shape        of the fp32 statistics, by the inputs
    """

    def outputs(given: Tensors) -> tuple[Tensor, Tensor]:
        visual, text = (given[i].new_empty(given[i].shape) for i in queries)
        return visual, text

    def op_forward(*given: Tensor) -> Tensors:
        out, text_out = outputs(given)
        return out, text_out, launch_forward(given, out, text_out)

    def fake_forward(*given: Tensor) -> Tensors:
        return *outputs(given), given[0].new_empty(lse_shape(given), dtype=torch.float32)

    def fake_backward(dout: Tensor, dtext_out: Tensor, *saved: Tensor) -> Tensors:
        return tuple(x.new_empty(x.shape) for x in saved[: len(inputs)])

    def op_backward(dout: Tensor, dtext_out: Tensor, *saved: Tensor) -> Tensors:
        gradients = fake_backward(dout, dtext_out, *saved)
        launch_backward((dout, dtext_out), saved, gradients)
        return gradients

    def schema(names: Sequence[str], num_outputs: int) -> str:
        return f"({', '.join(f'Tensor {x}' for x in names)}) -> ({', '.join(['Tensor'] * num_outputs)})"

    saved = (*inputs, "out", "text_out", "lse")
    forward = register(f"{name}_forward", schema(inputs, 3), op_forward, fake_forward)
    backward = register(
        f"{name}_backward", schema(("dout", "dtext_out", *saved), len(inputs)), op_backward, fake_backward
    )

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
            out, text_out, lse = forward(*given)
            ctx.save_for_backward(*given, out, text_out, lse)
            return out, text_out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dout: Tensor, dtext_out: Tensor) -> Tensors:
            return backward(rows(dout), rows(dtext_out), *ctx.saved_tensors)

    return Attention.apply
