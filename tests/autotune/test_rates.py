"""Rates: measured before declared; declared ones follow their formulas and come near the H100 that was measured.

pytest tests/autotune/test_rates.py; arithmetic, and one count of what the rotary of kernels/reference.py reads and writes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_up_device import device
from torch.utils._python_dispatch import TorchDispatchMode

from vchitect_fast.architecture import preset
from vchitect_fast.autotune import rates
from vchitect_fast.autotune.cost import block_seconds
from vchitect_fast.autotune.rates import DeclaredRates, Moved, Rates, rates_of
from vchitect_fast.cluster import AttentionPoint, Cluster, Device, MatmulPoint
from vchitect_fast.errors import UserError
from vchitect_fast.kernels.reference import rotary_tables, rotate
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

FLOPS, BANDWIDTH = 1e12, 1e9
GPU = Device("a GPU", "cuda", 2**30, {"bfloat16": FLOPS}, BANDWIDTH, op_overhead_s=1e-9, source="made up")
POINTS = (AttentionPoint(1000, 4e11, 2e11), AttentionPoint(10, 1e10, 5e9))


def test_measured_goes_before_declared() -> None:
    measured = device()
    assert isinstance(rates_of(measured), Rates)
    assert isinstance(rates_of(replace(measured, timings=())), DeclaredRates)
    with pytest.raises(UserError, match="has no timings of made-up CPU; run `vchitect-fast autotune probe`"):
        rates_of(replace(measured, timings=(), matmul_flops={}))
    with pytest.raises(UserError, match="declares no matmul_flops, memory_bytes_per_s or op_overhead_s of a GPU"):
        rates_of(replace(GPU, memory_bytes_per_s=None))


def test_linear_is_flops_over_the_rate_or_bytes_over_the_bandwidth() -> None:
    found = DeclaredRates(GPU).linear("bfloat16", 2**20, 4096, 8192)
    products = 2 * 2**20 * 4096 * 8192 / FLOPS
    assert found.forward_s == pytest.approx(products)
    assert found.backward_s == pytest.approx(2 * products + 2 * 2**20 * 8192 / BANDWIDTH)  # and the bias's gradient
    thin = DeclaredRates(GPU).linear("bfloat16", 1, 64, 64)  # its weights are all that takes time
    assert thin.forward_s == pytest.approx(2 * (128 + 64 * 64) / BANDWIDTH)


def test_linear_takes_the_nearest_product_and_the_transposed_one_behind() -> None:
    points = (MatmulPoint(4096, 8192, 5e11), MatmulPoint(8192, 4096, 2e11), MatmulPoint(8192, 8192, 1e12))
    found = DeclaredRates(replace(GPU, matmul_points=points)).linear("bfloat16", 2**20, 4000, 8000)
    flops = 2 * 2**20 * 4000 * 8000
    assert found.forward_s == pytest.approx(flops / 5e11)
    assert found.backward_s == pytest.approx(flops / 2e11 + flops / 5e11 + 2 * 2**20 * 8000 / BANDWIDTH)


def test_attention_is_interpolated_in_log_length() -> None:
    given = DeclaredRates(replace(GPU, attention_points=POINTS))

    def flops_per_s(length: int) -> tuple[float, float]:
        found = given.attention("bfloat16", 2**20, 64, length)
        flops = 4 * 2**20 * 64 * length
        return flops / found.forward_s, 2.5 * flops / found.backward_s

    assert flops_per_s(10) == pytest.approx((1e10, 5e9))
    assert flops_per_s(1000) == pytest.approx((4e11, 2e11))
    assert flops_per_s(100) == pytest.approx(((1e10 * 4e11) ** 0.5, (5e9 * 2e11) ** 0.5))
    assert flops_per_s(5000) == pytest.approx((4e11, 2e11))
    # Below the shortest, padding and launches remain: a row takes as long.
    assert given.attention("bfloat16", 2**20, 64, 5) == given.attention("bfloat16", 2**20, 64, 10)


def test_one_rate_of_attention_will_do() -> None:
    found = DeclaredRates(replace(GPU, attention_flops={"bfloat16": 2e11})).attention("bfloat16", 1000, 64, 512)
    flops = 4 * 1000 * 64 * 512
    assert (found.forward_s, found.backward_s) == pytest.approx((flops / 2e11, 2.5 * flops / 2e11))


@pytest.mark.parametrize(
    ("op", "dtype", "ahead", "behind"),
    [
        ("multiply", "bfloat16", 6, 0),
        ("gelu", "bfloat16", 4, 6),
        ("layer_norm", "float32", 8, 12),
        ("adamw", "float32", 28, 0),
    ],
)
def test_elementwise_moves_its_bytes(op: str, dtype: str, ahead: int, behind: int) -> None:
    found = DeclaredRates(GPU).elementwise(op, dtype, 10**6)
    assert (found.forward_s, found.backward_s) == pytest.approx((ahead * 1e6 / BANDWIDTH, behind * 1e6 / BANDWIDTH))


class Counted(TorchDispatchMode):
    """Bytes that every dispatched op reads and writes; a strided half is read with what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            given = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else [arg])]
            tensors = [one for one in given if isinstance(one, torch.Tensor)]
            self.num_bytes += out.numel() * out.itemsize
            for one in tensors:
                if one.numel() * 2 >= out.numel():  # the tables of angles are small
                    self.num_bytes += one.numel() * one.itemsize * max(1, one.stride(-1))
        return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rotary_moves_what_the_table_says(dtype: str) -> None:
    x = torch.randn(1, 64, 8, 2, 64, dtype=getattr(torch, dtype), requires_grad=True)
    cos, sin = rotary_tables(64, 64, 1.0, x.device)
    with Counted() as ahead:
        out = rotate(x, cos, sin)
    gradient = torch.randn_like(out)
    with Counted() as behind:
        out.backward(gradient)
    found = DeclaredRates(GPU).elementwise("rotate", dtype, x.numel())
    assert found.forward_s * BANDWIDTH == pytest.approx(ahead.num_bytes, rel=0.02)
    assert found.backward_s * BANDWIDTH == pytest.approx(behind.num_bytes, rel=0.02)


def test_what_is_not_declared_is_not_made_up() -> None:
    given = DeclaredRates(GPU)
    with pytest.raises(UserError, match="declares no attention_points of a GPU in bfloat16; add them"):
        given.attention("bfloat16", 1, 64, 8)
    with pytest.raises(UserError, match="declares no matmul_flops of a GPU in float32; add them"):
        given.linear("float32", 1, 64, 64)
    with pytest.raises(UserError, match="unknown op 'gelo'; did you mean 'gelu'"):
        given.elementwise("gelo", "bfloat16", 1)


# Forward and backward of one block in ms, plain PyTorch model with a complex rotary, torch 2.11, measured 2026-11-22 on one
# H100 SXM, B = 1, 333 text tokens, bfloat16. The rates come from single products and branches, not from these.
MEASURED_MS = {"32x256x256": 14.4, "32x512x384": 27.9, "40x768x432": 52.3, "128x256x256": 53.0, "32x1024x768": 98.2}


@pytest.mark.parametrize(("shape", "measured_ms"), MEASURED_MS.items())
def test_the_declared_h100_comes_near_the_measured_blocks(
    shape: str, measured_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 % once the rotary is that of the measured model: bfloat16 to fp32 and back around one complex product."""
    monkeypatch.setitem(rates.MOVED, "rotate", Moved(0, 0, forward_wide=16, backward_wide=16))
    work = Workload(preset("vchitect-2b"), VideoShape.parse(shape)[0], 1, 333)
    found = block_seconds(work, rates_of(Cluster.load("h100").device), "bfloat16")
    assert 1e3 * (found.forward_s + found.backward_s) == pytest.approx(measured_ms, rel=0.05)


@pytest.mark.parametrize("field", ["matmul_flops", "memory_bytes_per_s"])
def test_a_faster_device_is_never_slower(field: str) -> None:
    work = Workload(preset("vchitect-2b"), VideoShape(32, 256, 256), 1, 333)
    slow = replace(Cluster.load("h100").device, matmul_points=())
    fast = replace(slow, **{field: {"bfloat16": 9e14} if field == "matmul_flops" else 4e12})
    before, after = (block_seconds(work, rates_of(one), "bfloat16") for one in (slow, fast))
    assert after.forward_s < before.forward_s and after.backward_s < before.backward_s
