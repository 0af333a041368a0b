"""Cross attention in Triton against its definition in fp64: outputs, all gradients, odd sizes, strides, chunks of queries.

pytest tests/kernels/test_cross.py; interpreted where there is no GPU. The interpreter multiplies bf16 as integers, so bf16
runs on a GPU only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_close_to_exact
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import ops, reference, tiles

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
NAMES = ("out", "text_out", "dq", "dtext_q", "dk", "dv")
Shape = tuple[int, int, int, int, int, int]
SHAPES = [  # B, T, S, N, H, C
    (1, 1, 1, 2, 1, 64),  # one visual token, fewer keys than any tile
    (2, 3, 5, 7, 3, 64),  # odd everywhere, two samples
    (1, 2, 35, 83, 1, 64),  # several blocks of queries and of keys, tails in both sources
    (1, 1, 3, 64, 1, 128),  # the other head dim; keys fill their blocks
    pytest.param((1, 32, 256, 333, 24, 64), marks=pytest.mark.gpu, id="32x256x256"),
    pytest.param((2, 8, 300, 333, 12, 128), marks=pytest.mark.gpu, id="C=128"),
]


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """(q, text_q, k, v) and (dout, dtext_out) in the dtype."""
    B, T, S, N, H, C = shape
    generator = torch.Generator().manual_seed(1)
    sizes = [(B, T, S, H, C), (B, T, N, H, C), (B, N, H, C), (B, N, H, C), (B, T, S, H, C), (B, T, N, H, C)]
    drawn = [torch.randn(size, generator=generator).to(dtype).to(device) for size in sizes]
    return drawn[:4], drawn[4:]


def triton(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    return ops.cross_attention(*inputs, impl="triton")


def run(op: Callable[..., Any], inputs: list[Tensor], douts: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = op(*leaves)
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, douts)]


def check(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    _, T, S, N, _, C = shape
    inputs, douts = draw(shape, dtype, device)
    actual, low = run(triton, inputs, douts), run(reference.cross_attention, inputs, douts)
    doubles = [x.double() for x in inputs], [x.double() for x in douts]
    exact = run(lambda *x: reference.cross_attention(*x, math=True), *doubles)
    for name, got, true, rough in zip(NAMES, actual, exact, low, strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        reduced = max(C, T * (S + N) if name in ("dk", "dv") else N)
        assert_close_to_exact(got, true, rough, reduced=reduced, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    check(shape, dtype, device)


@pytest.mark.parametrize("num_programs", [1, 2, 3])  # 1 + 2 full blocks of queries and two tails: chunks of 3, 2, 1
def test_chunks_of_queries_add_up(num_programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CROSS_PROGRAMS", num_programs)
    check((1, 2, 35, 83, 1, 64), torch.float16, device)


def test_samples_do_not_mix(device: torch.device) -> None:
    inputs, douts = draw((2, 2, 5, 9, 2, 64), torch.float16, device)
    both = run(triton, inputs, douts)
    for b in range(2):
        one = run(triton, [x[b : b + 1] for x in inputs], [x[b : b + 1] for x in douts])
        assert all(torch.equal(x[b], y[0]) for x, y in zip(both, one, strict=True))


def test_is_deterministic(device: torch.device) -> None:
    given = draw((1, 2, 70, 20, 1, 64), torch.float16, device)
    assert all(map(torch.equal, run(triton, *given), run(triton, *given)))


def merged(x: Tensor, num_slots: int) -> Tensor:
    """The same values as one slot of a merged buffer [..., rows, num_slots, H, C]."""
    return torch.stack([torch.full_like(x, 7.0)] * (num_slots - 1) + [x], dim=-3)[..., num_slots - 1, :, :]


def test_strides_do_not_matter(device: torch.device) -> None:
    inputs, douts = draw((2, 3, 5, 7, 2, 64), torch.float16, device)
    plain = run(triton, inputs, douts)
    q, text_q, k, v = inputs
    frames_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, text_q)]  # no common stride of (t, s)
    first = [merged(x[:, None].expand(-1, 3, -1, -1, -1), 3)[:, 0] for x in (k, v)]  # a slice of the first frame's rows
    for others in ([merged(q, 7), merged(text_q, 3), *first], [*frames_last, k, v]):
        assert not any(x.is_contiguous() for x in others[:2])
        assert all(map(torch.equal, plain, run(triton, others, [merged(x, 3) for x in douts])))
    ones = [torch.ones((), device=device, dtype=q.dtype).expand(x.shape) for x in douts]  # of out.sum().backward()
    assert all(map(torch.equal, run(triton, inputs, ones), run(triton, inputs, [x.contiguous() for x in ones])))


def test_one_sample_and_keys_may_be_expanded(device: torch.device) -> None:
    (q, text_q, k, v), douts = draw((2, 2, 3, 4, 1, 64), torch.float16, device)
    k, v = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)
    plain = run(triton, [q, text_q, k.contiguous(), v.contiguous()], douts)
    assert all(map(torch.equal, plain, run(triton, [q, text_q, k, v], douts)))


def test_writes_into_slices_of_given_buffers(device: torch.device) -> None:
    from vchitect_fast.kernels.cross import launch_backward, launch_forward

    inputs, douts = draw((2, 2, 5, 9, 2, 64), torch.float16, device)
    out, text_out, *gradients = run(triton, inputs, douts)
    buffers = [torch.full((*x.shape[:-2], 3, *x.shape[-2:]), 0.5, dtype=x.dtype, device=device) for x in inputs]
    slots = [x[..., 1, :, :] for x in buffers]
    lse = launch_forward(tuple(inputs), *slots[:2])
    assert torch.equal(slots[0], out) and torch.equal(slots[1], text_out)
    launch_backward(tuple(douts), (*inputs, out, text_out, lse), tuple(slots))
    assert all(map(torch.equal, slots, gradients))
    launch_backward(tuple(douts), (*inputs, out, text_out, lse), tuple(slots), add_text=True)
    assert torch.equal(slots[0], gradients[0])
    for slot, gradient in zip(slots[1:], gradients[1:], strict=True):
        assert_close_to_exact(slot, 2 * gradient.double(), 2 * gradient, reduced=2)
    assert all((x[..., (0, 2), :, :] == 0.5).all() for x in buffers)


def test_large_scores_are_finite(device: torch.device) -> None:
    inputs, douts = draw((1, 1, 3, 20, 1, 64), torch.float16, device)
    inputs[0], inputs[2] = inputs[0] * 100, inputs[2] * 100
    for x in run(triton, inputs, douts):
        assert torch.isfinite(x).all()


def test_keys_beyond_the_end_stay_out_of_very_negative_scores(device: torch.device) -> None:
    inputs, douts = draw((1, 1, 3, 20, 1, 64), torch.float16, device)
    inputs[:3] = [torch.full_like(x, c) for x, c in zip(inputs[:3], (4, 4, -4), strict=True)]
    for x in run(triton, inputs, douts):  # exp2(0 - lse) of a key that is not there overflows
        assert torch.isfinite(x).all()


@pytest.mark.gpu  # 9 GB
def test_more_than_2_31_elements(device: torch.device) -> None:
    rows = 2**31 // (7 * 24 * 64) + 1000
    buffer = torch.zeros(1, 1, rows, 7, 24, 64, dtype=torch.bfloat16, device=device)
    q = buffer[..., 6, :, :]
    last, _ = draw((1, 1, 500, 40, 24, 64), torch.bfloat16, device)
    q[:, :, -500:] = last[0]
    out, _ = triton(q, *last[1:])
    assert torch.equal(out[:, :, -500:], triton(*last)[0])


def test_op_keeps_torchs_rules(device: torch.device) -> None:
    (q, text_q, k, v), (dout, dtext_out) = draw((1, 2, 3, 4, 1, 64), torch.float16, device)
    checks = ("test_schema", "test_faketensor")
    forward, backward = torch.ops.vchitect_fast.cross_forward.default, torch.ops.vchitect_fast.cross_backward.default
    torch.library.opcheck(forward, (merged(q, 7), text_q, k, v), test_utils=checks)
    saved = forward(q, text_q, k, v)
    torch.library.opcheck(backward, (dout, dtext_out, q, text_q, k, v, *saved), test_utils=checks)


def test_one_graph(device: torch.device) -> None:
    given = draw((1, 2, 3, 4, 1, 64), torch.float16, device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # Inductor would translate the interpreter itself
    assert all(
        map(torch.equal, run(torch.compile(triton, fullgraph=True, backend=backend), *given), run(triton, *given))
    )


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(1, 2, 3, 64)}, "expected q of shape [any, any, any, any, any], got [1, 2, 3, 64]"),
    ({"q": torch.zeros(1, 2, 3, 1, 32)}, "expected a head dim of 64 or 128, got 32"),
    ({"q": torch.zeros(1, 0, 3, 1, 64)}, "at least one element in every dim, got [1, 0, 3, 1, 64]"),
    ({"q": torch.zeros(1, 2, 3, 1, 64, dtype=torch.float64)}, "expected float32, bfloat16 or float16, got float64"),
    ({"text_q": torch.zeros(1, 3, 4, 1, 64)}, "expected text_q of shape [1, 2, any, 1, 64], got [1, 3, 4, 1, 64]"),
    ({"text_q": torch.zeros(1, 2, 4, 1, 128)[..., ::2]}, "expected text_q with a contiguous last dim"),
    ({"k": torch.zeros(1, 5, 1, 64)}, "expected k of shape [1, 4, 1, 64], got [1, 5, 1, 64]"),
    ({"v": torch.zeros(1, 4, 1, 64, dtype=torch.float16)}, "expected v in float32, got float16"),
    ({"v": torch.zeros(1, 4, 1, 64, device="meta")}, "expected v on"),
    ({"impl": "sdpa"}, "unknown impl 'sdpa'"),
]


@pytest.mark.parametrize(("wrong", "message"), REJECTED, ids=lambda value: value if isinstance(value, str) else "")
def test_rejects(wrong: dict[str, Any], message: str, device: torch.device) -> None:
    right = {"q": torch.zeros(1, 2, 3, 1, 64), "text_q": torch.zeros(1, 2, 4, 1, 64), "impl": "triton"}
    given = right | {"k": torch.zeros(1, 4, 1, 64), "v": torch.zeros(1, 4, 1, 64)} | wrong
    moved = [x if x.is_meta else x.to(device) for x in (given[name] for name in ("q", "text_q", "k", "v"))]
    with pytest.raises(UserError) as caught:
        ops.cross_attention(*moved, impl=given["impl"])
    assert message in str(caught.value)


def test_reference_needs_no_kernel() -> None:
    inputs, _ = draw((1, 2, 3, 4, 2, 32), torch.float32, torch.device("cpu"))  # a head dim no kernel has
    expected = reference.cross_attention(*inputs)
    assert all(map(torch.equal, ops.cross_attention(*inputs, impl="reference"), expected))
