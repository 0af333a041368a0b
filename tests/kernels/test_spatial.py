"""Spatial attention in Triton over two sources against its definition in fp64: outputs, all gradients, odd sizes, strides.

pytest tests/kernels/test_spatial.py; interpreted where there is no GPU. The interpreter multiplies bf16 as integers, so
bf16 runs on a GPU only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_close_to_exact
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import ops, reference

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
INPUTS = ("q", "k", "v", "text_q", "text_k", "text_v")
Shape = tuple[int, int, int, int, int, int]
SHAPES = [  # B, T, S, N, H, C
    (1, 1, 1, 1, 1, 64),  # one token of each
    (2, 1, 5, 7, 3, 64),  # odd, two samples, less than any tile
    (1, 1, 35, 83, 1, 64),  # several blocks and a tail in both sources
    (1, 1, 64, 3, 1, 128),  # the other head dim; the visual rows fill their blocks
    pytest.param((1, 32, 256, 333, 24, 64), marks=pytest.mark.gpu, id="32x256x256"),
    pytest.param((1, 4, 1296, 333, 24, 64), marks=pytest.mark.gpu, id="4x768x432"),
    pytest.param((2, 8, 300, 333, 12, 128), marks=pytest.mark.gpu, id="C=128"),
]


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The six inputs and (dout, dtext_out) in the dtype."""
    B, T, S, N, H, C = shape
    generator = torch.Generator().manual_seed(1)
    visual, text = (B, T, S, H, C), (B, T, N, H, C)
    sizes = [*[visual] * 3, *[text] * 3, visual, text]
    drawn = [torch.randn(size, generator=generator).to(dtype).to(device) for size in sizes]
    return drawn[:6], drawn[6:]


def triton(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    return ops.spatial_attention(inputs[:3], inputs[3:], impl="triton")


def defined(*inputs: Tensor, math: bool = False) -> tuple[Tensor, Tensor]:
    return reference.spatial_attention(inputs[:3], inputs[3:], math=math)


def run(op: Callable[..., Any], inputs: list[Tensor], douts: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = op(*leaves)
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, douts)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    inputs, douts = draw(shape, dtype, device)
    actual, low = run(triton, inputs, douts), run(defined, inputs, douts)
    exact = run(lambda *x: defined(*x, math=True), [x.double() for x in inputs], [x.double() for x in douts])
    names = ("out", "text_out", *(f"d{name}" for name in INPUTS))
    for name, got, true, rough in zip(names, actual, exact, low, strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        assert_close_to_exact(got, true, rough, reduced=max(shape[5], shape[2] + shape[3]), name=name)


def test_frames_and_samples_do_not_mix(device: torch.device) -> None:
    inputs, douts = draw((2, 2, 5, 9, 2, 64), torch.float16, device)
    whole = run(triton, inputs, douts)
    for b in range(2):
        for t in range(2):
            one = run(triton, *([x[b : b + 1, t : t + 1] for x in given] for given in (inputs, douts)))
            assert all(torch.equal(x[b, t], y[0, 0]) for x, y in zip(whole, one, strict=True))


def test_the_order_of_the_sources_does_not_matter(device: torch.device) -> None:
    inputs, douts = draw((1, 2, 37, 21, 1, 64), torch.float16, device)
    actual, low = run(triton, inputs[3:] + inputs[:3], douts[::-1]), run(defined, inputs, douts)
    exact = run(lambda *x: defined(*x, math=True), [x.double() for x in inputs], [x.double() for x in douts])
    for i, j in enumerate((1, 0, 5, 6, 7, 2, 3, 4)):
        assert_close_to_exact(actual[i], exact[j], low[j], reduced=64, name=str(i))


def test_is_deterministic(device: torch.device) -> None:
    given = draw((1, 2, 70, 20, 1, 64), torch.float16, device)
    assert all(map(torch.equal, run(triton, *given), run(triton, *given)))


def merged(tensors: list[Tensor], num_slots: int) -> list[Tensor]:
    """The same values as the last slots of a merged buffer [B, T, rows, num_slots, H, C]."""
    unused = [torch.full_like(tensors[0], 7.0)] * (num_slots - len(tensors))
    buffer = torch.stack([*unused, *tensors], dim=-3)
    return [buffer[..., slot, :, :] for slot in range(num_slots - len(tensors), num_slots)]


def test_strides_do_not_matter(device: torch.device) -> None:
    inputs, douts = draw((2, 2, 3, 5, 1, 64), torch.float16, device)
    plain = run(triton, inputs, douts)
    slices = merged(inputs[:3], 7) + merged(inputs[3:], 3)
    turned = [x.permute(3, 2, 0, 1, 4).contiguous().permute(2, 3, 1, 0, 4) for x in inputs]  # [H, rows, B, T, C]
    for others in (slices, turned):
        assert not any(x.is_contiguous() for x in others)
        assert all(map(torch.equal, plain, run(triton, others, [merged([x], 3)[0] for x in douts])))
    ones = [
        torch.ones((), device=device, dtype=torch.float16).expand(x.shape) for x in douts
    ]  # of out.sum().backward()
    assert all(map(torch.equal, run(triton, inputs, ones), run(triton, inputs, [x.contiguous() for x in ones])))
    same = [*inputs[:3], *(x[:, :1].expand(-1, 2, -1, -1, -1) for x in inputs[3:])]  # one frame's text for all
    assert all(map(torch.equal, run(triton, same, douts), run(triton, [x.contiguous() for x in same], douts)))


def test_writes_into_slices_of_given_buffers(device: torch.device) -> None:
    from vchitect_fast.kernels.spatial import launch_backward, launch_forward

    inputs, douts = draw((2, 2, 5, 9, 2, 64), torch.float16, device)
    out, text_out, *gradients = run(triton, inputs, douts)
    buffers = [torch.full((*x.shape[:-2], 7, *x.shape[-2:]), 0.5, dtype=x.dtype, device=device) for x in inputs[2:4]]
    visual, text = ([buffer[..., slot, :, :] for slot in (1, 2, 4)] for buffer in buffers)
    lse = launch_forward(tuple(inputs), visual[2], text[2])
    assert torch.equal(visual[2], out) and torch.equal(text[2], text_out)
    saved = (*inputs, out, text_out, lse)
    launch_backward(tuple(douts), saved, (*visual, *text))
    assert all(map(torch.equal, visual + text, gradients))
    launch_backward(tuple(douts), saved, (*visual, *text), add_text=True)
    assert all(map(torch.equal, visual, gradients))
    for slot, gradient in zip(text, gradients[3:], strict=True):
        assert_close_to_exact(slot, 2 * gradient.double(), 2 * gradient, reduced=2)
    assert all((x[..., (0, 3, 5, 6), :, :] == 0.5).all() for x in buffers)


def test_large_scores_are_finite(device: torch.device) -> None:
    inputs, douts = draw((1, 1, 3, 20, 1, 64), torch.float16, device)
    inputs = [100 * x for x in inputs]
    for x in run(triton, inputs, [x / 100 for x in douts])[:2]:
        assert torch.isfinite(x).all()
    smaller = [x.sign() * 3 if i % 3 == 0 else x for i, x in enumerate(inputs)]  # gradients within fp16
    for x in run(triton, smaller, [x / 100 for x in douts]):
        assert torch.isfinite(x).all()


def test_keys_beyond_the_end_stay_out_of_very_negative_scores(device: torch.device) -> None:
    inputs, douts = draw((1, 1, 3, 20, 1, 64), torch.float16, device)
    inputs = [torch.full_like(x, (4, -4, 1)[i % 3]) for i, x in enumerate(inputs)]
    for x in run(triton, inputs, douts):  # exp2(0 - lse) of a key that is not there overflows
        assert torch.isfinite(x).all()


@pytest.mark.gpu  # 5 GB
def test_more_than_2_31_elements(device: torch.device) -> None:
    frames = 2**31 // (256 * 7 * 24 * 64) + 2
    buffer = torch.zeros(1, frames, 256, 7, 24, 64, dtype=torch.bfloat16, device=device)
    given, _ = draw((1, 1, 256, 40, 24, 64), torch.bfloat16, device)
    buffer[:, -1:, :, :3] = torch.stack(given[:3], dim=3)
    text = [x.expand(-1, frames, -1, -1, -1) for x in given[3:]]
    out, _ = triton(*(buffer[..., slot, :, :] for slot in range(3)), *text)
    assert torch.equal(out[:, -1:], triton(*given)[0])


@pytest.mark.gpu  # more programs and more (b, t, h) than a grid's second axis may have
def test_more_than_65535_heads(device: torch.device) -> None:
    inputs, douts = draw((300, 10, 1, 3, 24, 64), torch.float16, device)
    whole = run(triton, inputs, douts)
    last = run(triton, *([x[-1:] for x in given] for given in (inputs, douts)))
    assert all(torch.equal(x[-1:], y) for x, y in zip(whole, last, strict=True))


def test_op_keeps_torchs_rules(device: torch.device) -> None:
    inputs, douts = draw((1, 2, 3, 4, 1, 64), torch.float16, device)
    checks = ("test_schema", "test_faketensor")
    forward, backward = (
        torch.ops.vchitect_fast.spatial_forward.default,
        torch.ops.vchitect_fast.spatial_backward.default,
    )
    torch.library.opcheck(forward, (*merged(inputs[:3], 7), *inputs[3:]), test_utils=checks)
    torch.library.opcheck(backward, (*douts, *inputs, *forward(*inputs)), test_utils=checks)


def test_one_graph(device: torch.device) -> None:
    given = draw((1, 2, 3, 4, 1, 64), torch.float16, device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # Inductor would translate the interpreter itself
    assert all(
        map(torch.equal, run(torch.compile(triton, fullgraph=True, backend=backend), *given), run(triton, *given))
    )


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(2, 3, 1, 64)}, "expected visual q of shape [any, any, any, any, any], got [2, 3, 1, 64]"),
    ({"q": torch.zeros(1, 2, 3, 1, 32)}, "expected a head dim of 64 or 128, got 32"),
    ({"q": torch.zeros(1, 2, 0, 1, 64)}, "at least one element in every dim, got [1, 2, 0, 1, 64]"),
    ({"q": torch.zeros(1, 2, 3, 1, 64, dtype=torch.float64)}, "expected float32, bfloat16 or float16, got float64"),
    ({"k": torch.zeros(1, 2, 4, 1, 64)}, "expected visual k of shape [1, 2, 3, 1, 64], got [1, 2, 4, 1, 64]"),
    ({"v": torch.zeros(1, 2, 3, 1, 128)[..., ::2]}, "expected visual v with a contiguous last dim"),
    ({"text_q": torch.zeros(1, 3, 4, 1, 64)}, "expected text q of shape [1, 2, any, 1, 64], got [1, 3, 4, 1, 64]"),
    ({"text_k": torch.zeros(1, 2, 4, 1, 64, dtype=torch.float16)}, "expected text k in float32, got float16"),
    ({"text_v": torch.zeros(1, 2, 4, 1, 64, device="meta")}, "expected text v on"),
    ({"impl": "sdpa"}, "unknown impl 'sdpa'"),
]


@pytest.mark.parametrize(("wrong", "message"), REJECTED, ids=lambda value: value if isinstance(value, str) else "")
def test_rejects(wrong: dict[str, Any], message: str, device: torch.device) -> None:
    right = {name: torch.zeros(1, 2, 4 if name.startswith("text") else 3, 1, 64) for name in INPUTS}
    given = {**right, "impl": "triton", **wrong}
    moved = [x if x.is_meta else x.to(device) for x in (given[name] for name in INPUTS)]
    with pytest.raises(UserError) as caught:
        ops.spatial_attention(tuple(moved[:3]), tuple(moved[3:]), impl=given["impl"])
    assert message in str(caught.value)


def test_reference_needs_no_kernel() -> None:
    inputs, _ = draw((1, 2, 3, 4, 2, 32), torch.float32, torch.device("cpu"))  # a head dim no kernel has
    actual = ops.spatial_attention(tuple(inputs[:3]), tuple(inputs[3:]), impl="reference")
    assert all(map(torch.equal, actual, defined(*inputs)))
