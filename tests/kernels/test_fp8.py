"""Rows in fp8: the kernels against the definition bit by bit, those that write fp8 behind an op near it, and products against fp64 on the same rounded values.

pytest tests/kernels/test_fp8.py; interpreted where there is no GPU.
"""

from __future__ import annotations

import pytest
import torch
from close import assert_close_to_exact
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import block_steps, fp8_rows, reference
from vchitect_fast.kernels.fp8 import E4M3, Quantised, product
from vchitect_fast.model import steps

SIZES = [(1, 1), (5, 33), (17, 96), (40, 20), pytest.param((13320, 6144), marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
on_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no fp8 on this GPU"
)
pytestmark = on_fp8


def draw(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows whose sizes are powers apart, one of zeros where there is room."""
    x = torch.randn(size) * torch.exp2(torch.randint(-6, 6, (size[0], 1)))
    x[size[0] // 2 :][1:2] = 0
    return x.to(device, dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.float(), b.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernels_are_the_definition(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = draw(size, dtype, device)
    q, scale = fp8_rows.quantise(x)
    expected_q, expected_scale = reference.quantised_rows(x)
    assert q.dtype == E4M3 and same(q, expected_q) and torch.equal(scale, expected_scale)
    found, expected = fp8_rows.turn(q, scale), reference.turned(expected_q, expected_scale)
    assert all(map(same, found, expected)) and found[0].shape[1] == -(-size[0] // 16) * 16


def test_scales_and_the_error_of_a_value() -> None:
    """Half a step of 3 bits of mantissa; below 2^-6 of the scale, half of 2^-9. All of [-448, 448] is used."""
    x = torch.cat([torch.randn(50, 64) * torch.exp2(torch.arange(-25.0, 25)[:, None]), torch.eye(1, 64) * 448])
    q, scale = reference.quantised_rows(x)
    assert scale[-1] == 1 and (q.float().abs().amax(1) > 216).all()  # above half of 448, rounded
    assert ((q.float() * scale[:, None] - x).abs() <= torch.maximum(x.abs() / 16, scale[:, None] * 2.0**-10)).all()
    above = torch.tensor([[448.5, 1.0]])
    assert reference.quantised_rows(above)[1] == 2


def test_extremes(device: torch.device) -> None:
    x = torch.tensor([[0.0, -0.0], [1e-44, 0.0], [3.4e38, -1.0], [torch.inf, 1.0], [torch.nan, 0.0]], device=device)
    q, scale = fp8_rows.quantise(x)
    expected_q, expected_scale = reference.quantised_rows(x)
    assert torch.equal(scale.nan_to_num(-1), expected_scale.nan_to_num(-1))
    assert scale[:2].tolist() == [2.0**-126] * 2 and scale[3:].isnan().all() and same(q[:3], expected_q[:3])
    _, one = fp8_rows.turn(q, scale)
    assert one.isnan().all(), "whatever it scales is NaN, and a step with such a row is not taken"


def test_rows_of_any_stride_and_the_same_bits_twice(device: torch.device) -> None:
    wide = torch.full((7, 60), 1e9, device=device)
    wide[:, 20:40] = torch.randn(7, 20)
    first, second = fp8_rows.quantise(wide[:, 20:40]), fp8_rows.quantise(wide[:, 20:40].contiguous())
    assert all(map(same, first, second)) and all(map(same, first, fp8_rows.quantise(wide[:, 20:40])))


@pytest.mark.parametrize("size", [(3, 33), (2, 96)])
def test_gelu_writes_fp8(size: tuple[int, int], device: torch.device) -> None:
    """Rounded once: as near to the exact GELU as its rows quantised from fp32."""
    x, bias = torch.randn(size, device=device), torch.randn(size[1], device=device)
    q, scale = fp8_rows.bias_gelu(x, bias)
    exact = reference.bias_gelu(x.double(), bias.double())
    low_q, low_scale = reference.quantised_rows(reference.bias_gelu(x, bias))
    values = [q.float() * scale[:, None], low_q.float() * low_scale[:, None]]
    assert_close_to_exact(values[0], exact, values[1], reduced=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size", [(2, 3, 33), (1, 5, 96), pytest.param((2, 1629, 1536), marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.parametrize("residual", [False, True])
def test_norms_write_fp8(residual: bool, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Rounded once, rows of their own scales: as near to the exact norm as the definition, and interpreted all bits agree."""
    x, branch = (torch.randn(size, device=device).to(dtype) + 20 for _ in range(2))
    gate, *vectors = (torch.randn(size[0], size[2], device=device).to(dtype) for _ in range(3))
    ys = [x, x]
    if residual:
        ys = [torch.empty_like(x) for _ in range(2)]
        n, *statistics = block_steps.residual_norm(x, branch, gate, *vectors, 1e-6, ys[0])
        q, scale, *found = block_steps.residual_norm_fp8(x, branch, gate, *vectors, 1e-6, ys[1])
    else:
        n, *statistics = block_steps.norm(x, *vectors, 1e-6)
        q, scale, *found = block_steps.norm_fp8(x, *vectors, 1e-6)
    exact = steps.norm(ys[1].double(), *(vector.double() for vector in vectors), 1e-6)[0]
    low_q, low_scale = (part.view(*size[:2], *part.shape[1:]) for part in reference.quantised_rows(n.flatten(0, 1)))
    values, low = (a.float() * b[..., None] for a, b in ((q, scale), (low_q, low_scale)))
    assert q.dtype == E4M3 and scale.shape == size[:2]
    assert_close_to_exact(values, exact, low, reduced=1)
    if device.type == "cpu":
        assert all(map(torch.equal, [ys[1], *found], [ys[0], *statistics]))
        if dtype == torch.float32:  # nothing was rounded in between
            assert same(q, low_q) and torch.equal(scale, low_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(3, 33), (70, 1100), pytest.param((13320, 6144), marks=pytest.mark.gpu)], ids=str)
def test_the_backward_of_gelu_writes_fp8(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """As GELU; the bias gradient is that of rows that were not rounded, over more programs than one."""
    dy = draw(size, dtype, device)
    x, bias = torch.randn(size).to(device, dtype), (torch.randn(size[1]) + 3).to(device, dtype)
    dbias, q, scale = fp8_rows.launch_gelu_backward(dy, x, bias)
    exact_dbias, exact = steps.gelu_backward(dy.double(), x.double(), bias.double())
    low_dbias, low = steps.gelu_backward(dy.clone(), x, bias)
    low_q, low_scale = reference.quantised_rows(low)
    values, low = q.float() * scale[:, None], low_q.float() * low_scale[:, None]
    assert_close_to_exact(values, exact, low, reduced=1)
    assert_close_to_exact(dbias, exact_dbias, low_dbias, reduced=size[0])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, id="float32")])
def test_products(dtype: torch.dtype, turned: bool, device: torch.device) -> None:
    """a b^T of the same rounded values in fp64: forward and, turned, the sum over 37 rows of a weight gradient."""
    if device.type == "cuda" and dtype != torch.bfloat16:
        pytest.skip("the scaled GEMM of a GPU gives bfloat16")
    x, y = draw((37, 64), dtype, device), draw((37 if turned else 48, 48 if turned else 64), dtype, device)
    operands = []
    for one in (x, y):
        q, scale = fp8_rows.quantise(one)
        operands.append(Quantised(*(fp8_rows.turn(q, scale) if turned else (q, scale)), dtype))
    wide = [one.q.double() * one.scale.double()[:, None] for one in operands]
    exact = wide[0] @ wide[1].T
    low = (wide[0].float() @ wide[1].T.float()).to(dtype)
    assert_close_to_exact(product(*operands), exact, low, reduced=64)
    if turned:
        true = x.double().T @ y.double()
        assert (exact - true).norm() < 2**-4 * true.norm()  # half a step of each factor, and they are independent


@pytest.mark.parametrize("op", ["fp8_rows", "fp8_bias_gelu", "fp8_turn"])
def test_opcheck(op: str, device: torch.device) -> None:
    x = torch.randn(5, 20, device=device)
    arguments = {"fp8_rows": (x,), "fp8_bias_gelu": (x, x[0].clone()), "fp8_turn": fp8_rows.quantise(x)}[op]
    # The schema check multiplies outputs, which torch does not do in fp8 on a CPU.
    checks = ("test_faketensor",) if op == "fp8_turn" else ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.vchitect_fast, op), arguments, test_utils=checks)


def test_refused(device: torch.device) -> None:
    x = torch.randn(4, 32, device=device)
    with pytest.raises(UserError, match="float32, bfloat16 or float16, got float64"):
        fp8_rows.quantise(x.double())
    with pytest.raises(UserError, match="contiguous last dim"):
        fp8_rows.quantise(x.T)
    with pytest.raises(UserError, match="columns of at most 16384"):
        fp8_rows.quantise(x.new_empty(1, 16385))
    with pytest.raises(UserError, match="scale of shape \\[4\\]"):
        fp8_rows.turn(*(fp8_rows.quantise(x)[0], x[0]))
