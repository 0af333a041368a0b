"""Operations, bytes and rates of ops from their shapes, worked out by hand; the roof out of a Cluster file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made_up_trace import launched, op, span, write
from torch.profiler import ProfilerActivity, profile

from vchitect_fast.cluster import Cluster, Device
from vchitect_fast.errors import UserError
from vchitect_fast.profiling.chrome import read_chrome
from vchitect_fast.profiling.facts import OpTime, Roof
from vchitect_fast.profiling.roofline import Cost, cost, op_times, read_roof
from vchitect_fast.profiling.steps import analyse_steps
from vchitect_fast.profiling.work import find_work

BF16 = "c10::BFloat16"


def shapes(*dims: list[int], dtype: str = "float") -> str:
    return str((list(dims), [dtype if shape else "Scalar" for shape in dims]))


@pytest.mark.parametrize(
    ("name", "text", "flops", "num_bytes"),
    [
        ("aten::mm", shapes([2, 3], [3, 5]), 2 * 2 * 3 * 5, 4 * (6 + 15 + 10)),
        ("aten::addmm", shapes([5], [2, 3], [3, 5], [], [], dtype=BF16), 60, 2 * (5 + 6 + 15 + 10)),
        ("aten::bmm", shapes([7, 2, 3], [7, 3, 5]), 7 * 60, 4 * 7 * (6 + 15 + 10)),
        ("aten::_scaled_dot_product_flash_attention", shapes([2, 4, 6, 8], [2, 4, 10, 8], [2, 4, 10, 8], []),
         2 * 2 * 2 * 4 * 6 * 10 * 8, 4 * 2 * 4 * 8 * (6 + 10 + 10 + 6)),
        ("aten::_scaled_dot_product_flash_attention_backward", shapes([2, 4, 6, 8], [2, 4, 6, 8], [2, 4, 10, 8], [2, 4, 10, 8]),
         5 * 2 * 2 * 4 * 6 * 10 * 8, 4 * 2 * 4 * 8 * (6 + 6 + 10 + 10 + 3 * 6)),
        ("aten::mul", shapes([4, 1, 3], [2, 1]), None, 4 * (12 + 2 + 4 * 2 * 3)),
        ("aten::add_", shapes([4, 3], [3], []), None, 4 * (12 + 3 + 12)),
        ("aten::native_layer_norm", shapes([6, 8], [], [8], [8], []), None, 4 * (48 + 16 + 48)),
        ("aten::sum", shapes([6, 8], []), None, 4 * 48),
        ("aten::copy_", str(([[6, 8], [6, 8], []], ["float", BF16, "Scalar"])), None, 48 * (4 + 2)),
    ],
)  # fmt: skip
def test_the_cost_of_an_op(name: str, text: str, flops: float | None, num_bytes: float) -> None:
    assert cost(name, text) == Cost(flops, num_bytes, "bfloat16" if text.count(BF16) > 1 else "float32")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("aten::sort", shapes([4])),
        ("aten::mm", shapes([2, 3], [4, 5])),  # not a product
        ("aten::mm", "([], [])"),
        ("aten::mm", "__import__('os').abort()"),  # read as a literal, never run
        ("aten::mm", "(" * 2000),
        ("aten::mul", str(([[2], [3]], ["float", "float"]))),
        ("aten::mul", str(([[[2], [2]]], ["TensorList"]))),
        ("aten::_scaled_dot_product_flash_attention", shapes([2, 4], [2, 4], [2, 4])),
    ],
)
def test_an_op_that_no_rule_knows_has_no_cost(name: str, text: str) -> None:
    assert cost(name, text) is None


ROOF = Roof("made up", {"float32": 1e12, "bfloat16": 4e12}, 1e9, "measured 2026-11-25")


def ops(path: Path, roof: Roof | None) -> dict[str, OpTime]:
    dims = {"Input Dims": [[100, 200], [200, 300]], "Input type": ["float", "float"]}
    attention = {"Input Dims": [[1, 2, 64, 32]] * 3, "Input type": [BF16] * 3}
    events = [
        span("step/0", 0, 1000),
        op("aten::mm", 0, 10, **dims), *launched(1, 1, "sgemm", 100, 40), *launched(2, 4, "splitKreduce_kernel", 140, 10),
        op("aten::mm", 20, 10, **dims), *launched(3, 21, "sgemm", 200, 50),
        op("aten::_scaled_dot_product_flash_attention", 40, 20, **attention),
        op("aten::_flash_attention_forward", 42, 10), *launched(4, 45, "flash_fwd_kernel", 300, 20),
        *launched(5, 70, "Memcpy HtoD", 400, 50, 9, "gpu_memcpy", bytes=5_000_000),
        *launched(6, 80, "lonely_elementwise_kernel", 600, 5),
        op("aten::mm", 2000, 10, **dims), *launched(7, 2001, "sgemm", 2100, 400),  # after the step
    ]  # fmt: skip
    trace = read_chrome(write(path / "t.json", events))
    work = find_work(trace)
    return {f"{one.name} {one.kernel_class}": one for one in op_times(trace, work, analyse_steps(trace, work), roof)}


def test_ops_have_the_time_of_their_kernels_and_the_rates_that_follow(tmp_path: Path) -> None:
    found = ops(tmp_path, ROOF)
    assert list(found) == [
        "aten::mm gemm", "Memcpy HtoD copy", "aten::_scaled_dot_product_flash_attention attention",
        "lonely_elementwise_kernel elementwise",
    ]  # fmt: skip
    product = found["aten::mm gemm"]
    assert (product.num_calls, product.shapes, product.dtype) == (2, "100x200 200x300", "float32")
    assert (product.device_us, product.flops) == (pytest.approx(100), 2 * 2 * 100 * 200 * 300)
    assert product.flops_per_s == pytest.approx(24e6 / 100e-6)
    moved = 2 * 4 * (20_000 + 60_000 + 30_000)
    assert (product.num_bytes, product.bytes_per_s) == (moved, pytest.approx(moved / 100e-6))
    # By the bytes: 880 000 at 1e9 B/s would take 880 us, longer than the 24 us of computing.
    assert product.roof_share == pytest.approx(moved / 1e9 / 100e-6)
    attention = found["aten::_scaled_dot_product_flash_attention attention"]
    assert attention.device_us == pytest.approx(20) and attention.num_calls == 1
    copy = found["Memcpy HtoD copy"]
    assert (copy.bytes_per_s, copy.flops, copy.roof_share) == (pytest.approx(1e11), None, None)
    assert found["lonely_elementwise_kernel elementwise"].num_bytes is None


def test_without_a_measured_roof_nothing_is_said_about_it(tmp_path: Path) -> None:
    assert {one.roof_share for one in ops(tmp_path, None).values()} == {None}
    found = ops(tmp_path, Roof("made up", {"bfloat16": 1e12}, 1e15, ""))
    assert found["aten::mm gemm"].roof_share is None  # float32 was not measured
    attention = found["aten::_scaled_dot_product_flash_attention attention"]
    assert attention.roof_share == pytest.approx(4 * 2 * 64 * 64 * 32 / 1e12 / 20e-6)


def test_the_roof_is_read_from_the_file_of_the_probe(tmp_path: Path) -> None:
    device = Device("cpu of a test", "cpu", 2**30, {"float32": 5e10}, 1e10, source="measured 2026-11-25")
    Cluster("here", device).save(tmp_path / "cluster.json")
    assert read_roof(tmp_path / "cluster.json") == Roof("cpu of a test", {"float32": 5e10}, 1e10, "measured 2026-11-25")
    with pytest.raises(UserError, match="cannot read the cluster file"):
        read_roof(tmp_path / "none.json")


def test_flops_agree_with_torch_s_own_count(tmp_path: Path) -> None:
    a, b = torch.randn(2, 30, 40), torch.randn(2, 40, 50)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiler:
        torch.bmm(a, b)
        torch.addmm(torch.randn(50), a[0], b[0])
    profiler.export_chrome_trace(str(tmp_path / "t.json"))
    trace = read_chrome(tmp_path / "t.json")
    work = find_work(trace)
    found = {one.name: one.flops for one in op_times(trace, work, analyse_steps(trace, work), None) if one.flops}
    expected = {one.key: one.flops for one in profiler.key_averages() if one.key in ("aten::bmm", "aten::addmm")}
    assert found == expected
