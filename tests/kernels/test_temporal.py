"""Temporal attention in Triton against its definition in fp64: outputs, all gradients, every kind of tile, odd sizes, strides.

pytest tests/kernels/test_temporal.py; interpreted where there is no GPU. The interpreter multiplies bf16 as integers, so
bf16 runs on a GPU only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_close_to_exact
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import ops, reference, tiles
from vchitect_fast.kernels.tiles import PackedTile, TiledTile

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
NAMES = ("out", "text_out", "dq", "dk", "dv", "dtext_q", "dtext_k", "dtext_v")
FACTOR = 1.5  # rope_scaling_factor; not 1, so that a kernel which forgets it fails
Shape = tuple[int, int, int, int, int, int]
SHAPES = [  # B, T, S, N, H, C
    (1, 1, 2, 1, 1, 64),  # an image
    (2, 2, 2, 1, 3, 64),  # two samples
    (1, 3, 1, 2, 2, 128),  # the other head dim
    (1, 16, 2, 1, 1, 64),  # no padding
    (1, 17, 1, 1, 3, 64),  # two heads a tile, the last tile half empty
    (1, 40, 1, 1, 1, 64),  # the release's T
    pytest.param((1, 32, 256, 333, 24, 64), marks=pytest.mark.gpu, id="32x256x256"),
    pytest.param((1, 40, 1296, 333, 24, 64), marks=pytest.mark.gpu, id="40x768x432"),
    pytest.param((1, 128, 256, 333, 24, 64), marks=pytest.mark.gpu, id="128x256x256"),
    pytest.param((1, 16, 3600, 333, 24, 64), marks=pytest.mark.gpu, id="16x1280x720"),  # 94,392 (position, head) pairs
    pytest.param((1, 144, 256, 333, 24, 64), marks=pytest.mark.gpu, id="144x256x256"),
    pytest.param((1, 512, 16, 7, 24, 64), marks=pytest.mark.gpu, id="512 frames"),
    pytest.param((2, 128, 100, 77, 12, 128), marks=pytest.mark.gpu, id="C=128"),
]
TILES = [  # T, tile: every branch of the kernels at sizes that an interpreter can do
    (5, PackedTile(block=32, pack=3, num_warps=4)),
    (16, PackedTile(block=32, pack=2, num_warps=4)),
    (21, TiledTile(block_q=16, block_k=32, num_warps=4, num_stages=1)),
    (33, TiledTile(block_q=32, block_k=16, num_warps=4, num_stages=1)),
    (48, TiledTile(block_q=16, block_k=16, num_warps=4, num_stages=1)),
]


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """(q, k, v, text q, k, v) and (dout, dtext_out) in the dtype."""
    B, T, S, N, H, C = shape
    generator = torch.Generator().manual_seed(1)
    sizes = [(B, T, tokens, H, C) for tokens in (S, S, S, N, N, N, S, N)]
    drawn = [torch.randn(size, generator=generator).to(dtype).to(device) for size in sizes]
    return drawn[:6], drawn[6:]


def op(*inputs: Tensor, impl: str = "triton") -> tuple[Tensor, Tensor]:
    visual, text = (inputs[0], inputs[1], inputs[2]), (inputs[3], inputs[4], inputs[5])
    if impl == "exact":
        return reference.temporal_attention(visual, text, rope_scaling_factor=FACTOR, math=True)
    return ops.temporal_attention(visual, text, rope_scaling_factor=FACTOR, impl=impl)


def run(f: Callable[..., Any], inputs: list[Tensor], douts: list[Tensor], **how: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = f(*leaves, **how)
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, douts)]


def check(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    inputs, douts = draw(shape, dtype, device)
    actual, low = run(op, inputs, douts), run(op, inputs, douts, impl="reference")
    exact = run(op, [x.double() for x in inputs], [x.double() for x in douts], impl="exact")
    for name, got, true, rough in zip(NAMES, actual, exact, low, strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        assert_close_to_exact(got, true, rough, reduced=max(shape[1], shape[5]), name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    check(shape, dtype, device)


def test_matches_definition_beyond_one_tile(device: torch.device) -> None:
    check((1, 130, 1, 1, 1, 64), torch.float16, device)  # in fp32 17 frames are beyond one tile


@pytest.mark.parametrize(("num_frames", "tile"), TILES, ids=str)
def test_every_kind_of_tile(
    num_frames: int, tile: PackedTile | TiledTile, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("temporal_forward", "temporal_backward"):
        monkeypatch.setattr(tiles, name, lambda *size: tile)
    check((1, num_frames, 1, 1, 2, 64), torch.float16, device)


def test_problems_fit_their_tiles() -> None:
    for num_frames, head_dim, element_bytes in itertools.product(range(1, 513), (64, 128), (2, 4)):
        for choose in (tiles.temporal_forward, tiles.temporal_backward):
            tile = choose(num_frames, head_dim, element_bytes)
            assert isinstance(tile, TiledTile) or tile.pack * num_frames <= tile.block


def test_one_frame_returns_v(device: torch.device) -> None:
    inputs, douts = draw((1, 1, 3, 2, 2, 64), torch.float16, device)
    out, text_out, dq, dk, dv, dtext_q, dtext_k, dtext_v = run(op, inputs, douts)
    assert torch.equal(out, inputs[2]) and torch.equal(text_out, inputs[5])
    assert torch.equal(dv, douts[0]) and torch.equal(dtext_v, douts[1])
    assert not any(x.any() for x in (dq, dk, dtext_q, dtext_k))


def test_positions_samples_and_heads_do_not_mix(device: torch.device) -> None:
    inputs, douts = draw((2, 17, 2, 2, 3, 64), torch.float16, device)
    whole = run(op, inputs, douts)
    for b, s, h in ((0, 0, 2), (1, 1, 1)):
        one = run(op, *([x[b : b + 1, :, s : s + 1, h : h + 1] for x in given] for given in (inputs, douts)))
        assert all(torch.equal(x[b, :, s, h], y[0, :, 0, 0]) for x, y in zip(whole, one, strict=True))


@pytest.mark.parametrize("num_frames", [20, 130])
def test_is_deterministic(num_frames: int, device: torch.device) -> None:
    given = draw((1, num_frames, 1, 1, 1, 64), torch.float16, device)
    assert all(map(torch.equal, run(op, *given), run(op, *given)))


def merged(x: Tensor, num_slots: int, slot: int) -> Tensor:
    """The same values as one slot of a merged buffer [B, T, rows, num_slots, H, C]."""
    return torch.stack([x if i == slot else torch.full_like(x, 7.0) for i in range(num_slots)], dim=-3).select(-3, slot)


def test_strides_do_not_matter(device: torch.device) -> None:
    inputs, douts = draw((2, 3, 2, 1, 2, 64), torch.float16, device)
    plain = run(op, inputs, douts)
    slots = [merged(x, 7, 3 + i) for i, x in enumerate(inputs[:3])] + [
        merged(x, 3, i) for i, x in enumerate(inputs[3:])
    ]
    frames_inside = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in inputs]
    for others in (slots, frames_inside):
        assert not any(x.is_contiguous() for x in others)
        assert all(map(torch.equal, plain, run(op, others, [merged(x, 3, 1) for x in douts])))
    ones = [
        torch.ones((), device=device, dtype=torch.float16).expand(x.shape) for x in douts
    ]  # of out.sum().backward()
    assert all(map(torch.equal, run(op, inputs, ones), run(op, inputs, [x.contiguous() for x in ones])))


def test_expanded_text_is_read_in_place(device: torch.device) -> None:
    inputs, douts = draw((2, 3, 1, 2, 1, 64), torch.float16, device)
    expanded = [*inputs[:3], *(x[:, :1].expand(x.shape) for x in inputs[3:])]  # the same text at every frame
    assert all(map(torch.equal, run(op, expanded, douts), run(op, [x.contiguous() for x in expanded], douts)))


@pytest.mark.parametrize(("num_frames", "num_heads"), [(18, 3), (130, 1)])  # 3: the last tile has room for a fourth
def test_writes_into_slots_of_given_buffers(num_frames: int, num_heads: int, device: torch.device) -> None:
    from vchitect_fast.kernels.temporal import launch_backward, launch_forward

    inputs, douts = draw((1, num_frames, 1, 1, num_heads, 64), torch.float16, device)
    visual, text = tuple(inputs[:3]), tuple(inputs[3:])
    out, text_out, *gradients = run(op, inputs, douts)
    buffers, slots = [], []  # room for one frame and one head more than is given, and for the neighbours of the slot
    for x in inputs:
        B, T, J, H, C = x.shape
        buffers.append(torch.full((B, T + 1, J, 3, H + 1, C), 0.5, dtype=x.dtype, device=device))
        slots.append(buffers[-1][:, :T, :, 1, :H])
    launch_forward(visual, text, FACTOR, slots[0], slots[3])
    assert torch.equal(slots[0], out) and torch.equal(slots[3], text_out)
    launch_backward(douts[0], douts[1], visual, text, FACTOR, tuple(slots[:3]), tuple(slots[3:]))
    assert all(map(torch.equal, slots, gradients))
    launch_backward(douts[0], douts[1], visual, text, FACTOR, tuple(slots[:3]), tuple(slots[3:]), add_text=True)
    assert all(map(torch.equal, slots[:3], gradients[:3]))
    for slot, gradient in zip(slots[3:], gradients[3:], strict=True):
        assert_close_to_exact(slot, 2 * gradient.double(), 2 * gradient, reduced=2)
    for buffer, slot in zip(buffers, slots, strict=True):
        slot.fill_(0.5)
        assert (buffer == 0.5).all()  # nothing but the slot was written


@pytest.mark.parametrize("num_frames", [18, 130])
def test_large_scores_are_finite(num_frames: int, device: torch.device) -> None:
    inputs, douts = draw((1, num_frames, 1, 1, 1, 64), torch.float16, device)
    inputs = [x * 100 for x in inputs]
    for x in run(op, inputs, douts):
        assert torch.isfinite(x).all()


@pytest.mark.gpu  # 14 GB
@pytest.mark.parametrize("num_frames", [40, 144])
def test_more_than_2_31_elements(num_frames: int, device: torch.device) -> None:
    num_tokens = 3 * 2**31 // 2 // (7 * 24 * 64 * num_frames)
    buffer = torch.zeros(1, num_frames, num_tokens, 7, 24, 64, dtype=torch.bfloat16, device=device)
    small, douts = draw((1, num_frames, 30, 20, 24, 64), torch.bfloat16, device)
    dout = torch.zeros(1, num_frames, num_tokens, 24, 64, dtype=torch.bfloat16, device=device)
    visual = [buffer[..., 4 + i, :, :] for i in range(3)]
    for x, y in zip((*visual, dout), (*small[:3], douts[0]), strict=True):
        x[:, :, -30:] = y
    for x, y in zip(run(op, [*visual, *small[3:]], [dout, douts[1]]), run(op, small, douts), strict=True):
        assert torch.equal(x[:, :, -30:] if x.shape[2] == num_tokens else x, y)


def test_op_keeps_torchs_rules(device: torch.device) -> None:
    inputs, douts = draw((1, 2, 2, 1, 1, 64), torch.float16, device)
    checks = ("test_schema", "test_faketensor")
    forward, backward = (
        getattr(torch.ops.vchitect_fast, f"temporal_{name}").default for name in ("forward", "backward")
    )
    torch.library.opcheck(forward, (merged(inputs[0], 7, 2), *inputs[1:], FACTOR), test_utils=checks)
    torch.library.opcheck(backward, (*douts, *inputs, FACTOR), test_utils=checks)


def test_compiles_into_one_graph(device: torch.device) -> None:
    """Inductor on a GPU; elsewhere aot_eager, which traces the same way and compiles nothing."""
    given = draw((1, 3, 2, 1, 1, 64), torch.float16, device)
    compiled = torch.compile(op, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    assert all(map(torch.equal, run(op, *given), run(compiled, *given)))


def test_second_derivatives_are_refused_and_not_wrong(device: torch.device) -> None:
    inputs = [x.requires_grad_() for x in draw((1, 2, 1, 1, 1, 64), torch.float32, device)[0]]
    (dq,) = torch.autograd.grad(op(*inputs)[0].square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(1, 2, 3, 64)}, "expected visual q of shape [any, any, any, any, any], got [1, 2, 3, 64]"),
    ({"q": torch.zeros(1, 2, 3, 1, 96)}, "expected a head dim of 64 or 128, got 96"),
    ({"q": torch.zeros(1, 0, 3, 1, 64)}, "at least one element in every dim, got [1, 0, 3, 1, 64]"),
    ({"q": torch.zeros(1, 2, 3, 1, 64, dtype=torch.float64)}, "expected float32, bfloat16 or float16, got float64"),
    ({"k": torch.zeros(1, 2, 4, 1, 64)}, "expected visual k of shape [1, 2, 3, 1, 64], got [1, 2, 4, 1, 64]"),
    ({"v": torch.zeros(1, 2, 3, 1, 64, dtype=torch.float16)}, "expected visual v in float32, got float16"),
    ({"text_q": torch.zeros(1, 3, 4, 1, 64)}, "expected text q of shape [1, 2, any, 1, 64], got [1, 3, 4, 1, 64]"),
    ({"text_k": torch.zeros(1, 2, 5, 1, 64)}, "expected text k of shape [1, 2, 4, 1, 64], got [1, 2, 5, 1, 64]"),
    ({"text_v": torch.zeros(1, 2, 4, 1, 128)[..., ::2]}, "expected text v with a contiguous last dim"),
    ({"text_v": torch.zeros(1, 2, 4, 1, 64, device="meta")}, "expected text v on"),
    ({"q": torch.zeros(1, 513, 3, 1, 64)}, "expected visual k of shape [1, 513, 3, 1, 64]"),
    ({"factor": 0.0}, "expected a positive rope_scaling_factor, got 0.0"),
    ({"impl": "sdpa"}, "unknown impl 'sdpa'"),
]


def call(wrong: dict[str, Any], num_frames: int, device: torch.device) -> None:
    given = {name: torch.zeros(1, num_frames, 3, 1, 64) for name in ("q", "k", "v")}
    given |= {f"text_{name}": torch.zeros(1, num_frames, 4, 1, 64) for name in "qkv"} | wrong
    moved = [x if x.is_meta else x.to(device) for name, x in given.items() if name not in ("factor", "impl")]
    visual, text = (moved[0], moved[1], moved[2]), (moved[3], moved[4], moved[5])
    factor, impl = wrong.get("factor", 1.0), wrong.get("impl", "triton")
    ops.temporal_attention(visual, text, rope_scaling_factor=factor, impl=impl)


@pytest.mark.parametrize(("wrong", "message"), REJECTED, ids=lambda value: value if isinstance(value, str) else "")
def test_rejects(wrong: dict[str, Any], message: str, device: torch.device) -> None:
    with pytest.raises(UserError) as caught:
        call(wrong, 2, device)
    assert message in str(caught.value)


def test_rejects_more_frames_than_statistics_fit(device: torch.device) -> None:
    with pytest.raises(UserError, match="frames of at most 512 .*, got 513"):
        call({}, 513, device)


def test_reference_needs_no_kernel() -> None:
    inputs, _ = draw((1, 3, 2, 1, 2, 32), torch.float32, torch.device("cpu"))  # a head dim no kernel has
    expected = reference.temporal_attention(tuple(inputs[:3]), tuple(inputs[3:]), rope_scaling_factor=FACTOR)  # type: ignore[arg-type]
    assert all(map(torch.equal, op(*inputs, impl="reference"), expected))
