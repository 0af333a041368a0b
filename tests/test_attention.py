"""The three attention branches against written-out fp64, in both precisions, at odd sizes and strides, with gradients.

pytest tests/test_attention.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from close import assert_close_to_exact
from torch import Tensor

from vchitect_fast.attention import (
    cross_attention,
    rotary_tables,
    rotate,
    spatial_attention,
    temporal_attention,
)
from vchitect_fast.errors import UserError

BACKENDS = ["sdpa", "math"]
DTYPES = [torch.float32, torch.bfloat16]
# B, T, J, N, H, C: odd everywhere; one frame; one token; many frames; the head dim of the release
SIZES = [(2, 3, 7, 5, 3, 6), (1, 1, 9, 4, 2, 8), (2, 5, 1, 1, 1, 2), (1, 33, 5, 3, 2, 8), (2, 4, 21, 13, 2, 64)]
FACTOR = 1.5  # of the rotary, so that it cannot be forgotten


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend(q_LC: Tensor, k_MC: Tensor, v_MC: Tensor) -> Tensor:
    """One head of one sequence, softmax(q k^T / sqrt(C)) v."""
    weights = (q_LC @ k_MC.T / q_LC.shape[-1] ** 0.5).exp()
    return weights / weights.sum(-1, keepdim=True) @ v_MC


def turn(x_TC: Tensor) -> Tensor:
    """The rotary as a product of complex numbers; angles in fp32, as the release has them."""
    C = x_TC.shape[-1]
    i = torch.arange(C // 2, dtype=torch.float32)
    angle = (torch.arange(len(x_TC), dtype=torch.float32) / FACTOR)[:, None] * 1e6 ** (-2 * i / C)
    z = torch.view_as_complex(x_TC.reshape(len(x_TC), C // 2, 2)) * torch.polar(
        torch.ones((), dtype=torch.float64), angle.double()
    )
    return torch.view_as_real(z).flatten(1)


def written_out(branch: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The branch in fp64 by loops over samples, heads, and frames or positions."""
    B, T, J, H, _ = q.shape
    out = torch.empty_like(q)
    for b in range(B):
        for head in range(H):
            if branch == "spatial":
                for t in range(T):
                    out[b, t, :, head] = attend(q[b, t, :, head], k[b, t, :, head], v[b, t, :, head])
            elif branch == "temporal":
                for j in range(J):
                    out[b, :, j, head] = attend(turn(q[b, :, j, head]), turn(k[b, :, j, head]), v[b, :, j, head])
            else:
                flat = attend(q[b, :, :, head].flatten(0, 1), k[b, :, head], v[b, :, head])
                out[b, :, :, head] = flat.unflatten(0, (T, J))
    return out


BRANCHES: dict[str, Callable[..., Tensor]] = {
    "spatial": spatial_attention,
    "temporal": lambda q, k, v, backend: temporal_attention(q, k, v, rope_scaling_factor=FACTOR, backend=backend),
    "cross": cross_attention,
}


def inputs(branch: str, size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    B, T, J, N, H, C = size
    keys = (B, N, H, C) if branch == "cross" else (B, T, J, H, C)
    return draw(1, B, T, J, H, C, dtype=dtype), draw(2, *keys, dtype=dtype), draw(3, *keys, dtype=dtype)


def reduced(size: tuple[int, ...]) -> int:
    """The longest sum: over keys or over the head."""
    return max(size[1:4]) + size[5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("branch", BRANCHES)
def test_outputs_and_gradients_are_those_of_the_formula(branch: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    """sdpa against fp64, with the written-out softmax in the low precision as the measure."""
    results = {}
    for name in ("exact", *BACKENDS):
        given = [x.detach() for x in inputs(branch, size, dtype)]
        given = [(x.double() if name == "exact" else x).requires_grad_() for x in given]
        out = written_out(branch, *given) if name == "exact" else BRANCHES[branch](*given, backend=name)
        assert out.dtype == given[0].dtype
        gradients = torch.autograd.grad(out, given, draw(4, *out.shape, dtype=dtype).to(out))
        results[name] = dict(zip(("output", "dq", "dk", "dv"), (out, *gradients), strict=True))
    num_keys = {"spatial": size[2], "temporal": size[1], "cross": size[3]}[branch]
    for part, actual in results["sdpa"].items():
        if num_keys == 1 and part in (
            "dq",
            "dk",
        ):  # 0, as the difference of two equal sums of C products of three draws
            largest = max(x.abs().max() for x in (*inputs(branch, size, dtype), draw(4, *out.shape, dtype=dtype)))
            assert actual.abs().max() <= torch.finfo(dtype).eps * size[5] * largest**3
            continue
        assert_close_to_exact(
            actual, results["exact"][part], results["math"][part], reduced=reduced(size), name=f"{branch} {part}"
        )


@pytest.mark.parametrize("branch", BRANCHES)
def test_math_defines_the_answer(branch: str) -> None:
    """In fp64 the math backend is the loop, up to fp64 rounding and the fp32 angles that both have."""
    given = [x.double() for x in inputs(branch, SIZES[0], torch.float32)]
    exact, actual = written_out(branch, *given), BRANCHES[branch](*given, backend="math")
    assert_close_to_exact(actual, exact, exact, reduced=reduced(SIZES[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("branch", BRANCHES)
def test_strides_change_nothing(branch: str, backend: str) -> None:
    """Inputs as slices of one wide projection, heads before tokens, and every second channel of a wider tensor."""
    given = inputs(branch, SIZES[0], torch.float32)
    expected = BRANCHES[branch](*given, backend=backend)
    sliced = [torch.cat((x, x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]] for x in given]
    moved = [x.transpose(-3, -2).contiguous().transpose(-3, -2) for x in given]
    spread = [torch.stack((x, -x), -1)[..., 0] for x in given]
    for other in (sliced, moved, spread):
        assert not any(x.is_contiguous() for x in other)
        actual = BRANCHES[branch](*other, backend=backend)
        exact = written_out(branch, *[x.double() for x in given])
        assert_close_to_exact(actual, exact, expected, reduced=reduced(SIZES[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_sample_sees_no_other_sample(branch: str, backend: str) -> None:
    given = [x.requires_grad_() for x in inputs(branch, SIZES[0], torch.float32)]
    out = BRANCHES[branch](*given, backend=backend)
    for gradient in torch.autograd.grad(out[0].square().sum(), given):
        assert gradient[0].any() and not gradient[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_attends_to_what(backend: str) -> None:
    """By the gradient at one output token: its own frame; its own position; all of the text."""
    size = SIZES[0]
    seen = {}
    for branch in BRANCHES:
        q, k, v = inputs(branch, size, torch.float32)
        v.requires_grad_()
        out = BRANCHES[branch](q, k, v, backend=backend)
        [gradient] = torch.autograd.grad(out[0, 1, 2].sum(), v)
        seen[branch] = gradient[0].flatten(-2).any(-1)
    assert seen["spatial"].nonzero().tolist() == [[1, j] for j in range(size[2])]
    assert seen["temporal"].nonzero().tolist() == [[t, 2] for t in range(size[1])]
    assert seen["cross"].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_frame_attends_to_itself(backend: str) -> None:
    q, k, v = inputs("temporal", (2, 1, 7, 5, 3, 6), torch.float32)
    assert torch.equal(temporal_attention(q, k, v, backend=backend), v)


@pytest.mark.parametrize("branch", BRANCHES)
def test_twice_is_bit_by_bit_the_same(branch: str) -> None:
    given = inputs(branch, SIZES[-1], torch.bfloat16)
    first, second = (BRANCHES[branch](*given, backend="sdpa") for _ in range(2))
    assert torch.equal(first, second)


def test_rotary_angles_by_hand() -> None:
    """C = 4: frequencies 1 and 1e6^(-1/2) = 1e-3; frame 3 at a factor of 2 turns by 1.5 and 0.0015."""
    cos, sin = rotary_tables(4, 4, 2.0, torch.device("cpu"))
    assert cos.shape == sin.shape == (4, 2) and cos.dtype == sin.dtype == torch.float32
    angle = torch.tensor([[0.0, 0.0], [0.5, 0.0005], [1.0, 0.001], [1.5, 0.0015]], dtype=torch.float64)
    assert_close_to_exact(cos, angle.cos(), angle.float().cos(), reduced=1)
    assert_close_to_exact(sin, angle.sin(), angle.float().sin(), reduced=1)


def test_rotary_turns_interleaved_pairs() -> None:
    """Channel 2i turns into channel 2i + 1, and into no other."""
    C, frame = 6, 2
    tables = rotary_tables(3, C, 1.0, torch.device("cpu"))
    for channel in range(C):
        x = torch.zeros(1, 3, 1, 1, C)
        x[..., channel] = 1.0
        pair, first = channel // 2, channel % 2 == 0
        cos, sin = (float(table[frame, pair]) for table in tables)
        expected = [0.0] * C
        expected[2 * pair : 2 * pair + 2] = [cos, sin] if first else [-sin, cos]
        assert rotate(x, *tables)[0, frame, 0, 0].tolist() == expected


def test_rotary_keeps_the_norm_of_each_pair() -> None:
    x = draw(1, 2, 9, 3, 2, 8)
    turned = rotate(x, *rotary_tables(9, 8, 1.0, x.device))
    pairs, exact = (y.unflatten(-1, (-1, 2)).norm(dim=-1) for y in (turned, x.double()))
    assert_close_to_exact(pairs, exact, x.unflatten(-1, (-1, 2)).norm(dim=-1), reduced=2)
    assert torch.equal(turned[:, 0], x[:, 0])  # frame 0 is not turned
    assert not torch.equal(turned[:, 1], x[:, 1])


def test_rotary_scores_depend_on_the_distance_of_frames_alone() -> None:
    """q at frame s and k at frame t: the same product for every s - t, another for every other distance."""
    T, C = 12, 8
    q, k = (draw(seed, 1, 1, 1, 1, C).double().expand(1, T, 1, 1, C) for seed in (1, 2))
    tables = rotary_tables(T, C, 1.0, q.device)
    frequency = 1e6 ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)
    angle = torch.outer(torch.arange(T, dtype=torch.float64), frequency)
    tables64 = (angle.cos(), angle.sin())
    scores = rotate(q, *tables).flatten(1).view(T, C) @ rotate(k, *tables).flatten(1).view(T, C).T
    exact = rotate(q, *tables64).flatten(1).view(T, C) @ rotate(k, *tables64).flatten(1).view(T, C).T
    by_distance = torch.stack([exact[s, s - 3] for s in range(3, T)])
    assert (by_distance - by_distance[0]).abs().max() <= C * torch.finfo(torch.float64).eps * q.norm() * k.norm()
    assert_close_to_exact(scores.float(), exact, exact.float(), reduced=T * C)
    assert len({round(float(exact[s, 0]), 6) for s in range(T)}) == T


def test_rotary_computes_in_fp32_for_low_precision() -> None:
    x = draw(1, 1, 40, 3, 2, 16, dtype=torch.bfloat16)
    tables = rotary_tables(40, 16, 1.0, x.device)
    assert torch.equal(rotate(x, *tables), rotate(x.float(), *tables).bfloat16())


@pytest.mark.parametrize("branch", BRANCHES)
def test_an_unknown_backend_is_refused_with_the_nearest(branch: str) -> None:
    with pytest.raises(UserError, match="unknown attention backend of the .* branch 'spda'; did you mean 'sdpa'"):
        BRANCHES[branch](*inputs(branch, SIZES[0], torch.float32), backend="spda")
