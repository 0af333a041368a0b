"""Where a step's time went, on traces made by hand whose answers are known to the microsecond.

The drawing of `two_steps`, microseconds on the device (step/0 is 0 to 1000):

    compute     [120, 300) forward     [350, 650) backward    [740, 840) optimizer
    copy out    [200, 340)     copy in [600, 640)     collective [440, 720)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_up_nsight import PROCESS, export
from made_up_trace import event, launched, op, span, write

from vchitect_fast.profiling.chrome import read_chrome
from vchitect_fast.profiling.facts import COLLECTIVE, COPY, ELEMENTWISE, GEMM, IDLE, NO_SPAN, StepAnalysis
from vchitect_fast.profiling.nsight import read_nsight
from vchitect_fast.profiling.steps import analyse_steps
from vchitect_fast.profiling.work import find_work

FLASH = "void flash_fwd_kernel<Traits>"


def seq(number: int, backward: bool = False) -> dict[str, int]:
    return {"Sequence number": number, "Fwd thread id": int(backward)}


def two_steps() -> list[dict[str, Any]]:
    return [
        span("step/0", 0, 1000), span("data/batch", 0, 100), span("forward/spatial", 100, 200),
        span("backward/model", 300, 400), span("optimizer/step", 700, 200),
        op("aten::addmm", 110, 20, **seq(1)), *launched(1, 115, "ampere_sgemm_128x64", 120, 100),
        op("aten::_flash_attention_forward", 150, 9, **seq(2)), *launched(2, 155, FLASH, 220, 80),
        *launched(3, 160, "Memcpy DtoH (Device -> Pinned)", 200, 140, 20, "gpu_memcpy", bytes=7_000_000),
        op("FlashBackward0", 310, 30, 2, **seq(2, True)), *launched(4, 320, "flash_bwd_kernel", 350, 100, tid=2),
        op("AddmmBackward0", 345, 35, 2, **seq(1, True)), *launched(5, 350, "ampere_sgemm_64x64", 450, 200, tid=2),
        *launched(6, 360, "ncclDevKernel_AllReduce_Sum_bf16", 440, 280, 30, tid=2),
        *launched(7, 365, "Memcpy HtoD (Pinned -> Device)", 600, 40, 21, "gpu_memcpy", tid=2),
        op("aten::_fused_adamw_", 715, 20), *launched(8, 720, "multi_tensor_apply_kernel<FusedAdam>", 740, 100),
        event("cuda_runtime", "cudaStreamSynchronize", 835, 155),
        event("cuda_runtime", "cudaMalloc", 991, 1), event("cuda_runtime", "cudaFree", 992, 1),
        event("cuda_runtime", "cudaFree", 993, 1), event("cuda_runtime", "cudaMalloc", 994, 1),
        span("step/1", 1000, 400), span("forward/spatial", 1040, 100),
        op("aten::addmm", 1045, 20), *launched(9, 1050, "ampere_sgemm_128x64", 1060, 100),
    ]  # fmt: skip


def steps(path: Path, events: list[dict[str, Any]]) -> tuple[StepAnalysis, ...]:
    trace = read_chrome(write(path / "t.json", events))
    return analyse_steps(trace, find_work(trace))


def us(value: float) -> Any:
    """Exact to a nanosecond: the times of a trace are numbers near 5e12."""
    return pytest.approx(value, abs=2e-3)


@pytest.fixture
def step(tmp_path: Path) -> StepAnalysis:
    first, second = steps(tmp_path, two_steps())
    assert (first.step, second.step, second.wall_us, second.idle_us) == (0, 1, us(400), us(300))
    return first


def test_a_step_is_compute_exposed_and_idle_time(step: StepAnalysis) -> None:
    assert step.wall_us == us(1000)
    assert (step.compute_us, step.exposed_any_us, step.idle_us) == (us(580), us(110), us(310))


def test_what_each_stream_hides_and_exposes(step: StepAnalysis) -> None:
    assert step.stream_us == {"collective": us(280), "copy_out": us(140), "copy_in": us(40), "copy_within": 0}
    assert step.exposed_us == {"collective": us(70), "copy_out": us(40), "copy_in": us(0), "copy_within": 0}
    overlap = {name: share and round(share, 5) for name, share in step.overlap.items()}
    assert overlap == {
        "collective": round(210 / 280, 5), "copy_out": round(100 / 140, 5), "copy_in": 1.0, "copy_within": None
    }  # fmt: skip


def test_time_by_class(step: StepAnalysis) -> None:
    assert step.by_class_us == {
        GEMM: us(300), "attention": us(180), ELEMENTWISE: us(100), "other": 0, COPY: us(180), COLLECTIVE: us(280), IDLE: us(310)
    }  # fmt: skip


def test_kernels_go_to_the_span_that_launched_them_and_backward_to_the_branch_of_its_forward(
    step: StepAnalysis,
) -> None:
    found = {one.name: (one.num_calls, one.cpu_us, one.device_us) for one in step.by_span}
    assert found == {
        "backward/spatial": (0, 0, us(300 + 280 + 40)),  # the two nodes' kernels, and what they sent and fetched
        "forward/spatial": (1, us(200), us(100 + 80 + 140)),
        "optimizer/step": (1, us(200), us(100)),
        "data/batch": (1, us(100), 0),
        "backward/model": (1, us(400), 0),
    }
    [forward] = [one for one in step.by_span if one.name == "forward/spatial"]
    assert forward.kind == "forward" and forward.by_class_us == {GEMM: us(100), "attention": us(80), COPY: us(140)}
    assert step.attributed == 1 and step.coverage == pytest.approx(0.9)


def test_every_idle_microsecond_has_its_cause(step: StepAnalysis) -> None:
    # [0, 120): 100 in data, then launching. [340, 350): launched before. [720, 740): launching. [840, 1000): the CPU waited
    # to 990 and was at work from 991 on, freeing and allocating.
    assert step.idle_by_cause_us == {
        "data": us(100),
        "launching": us(40),
        "synchronizing": us(159),
        "elsewhere": us(11),
    }


def test_allocations_and_retries_are_counted(step: StepAnalysis) -> None:
    assert (step.num_device_allocations, step.num_allocator_retries, step.allocator_us) == (2, 1, us(4))


@pytest.mark.parametrize(
    ("calls", "taken", "retries"),
    [
        (["cudaFree", "cudaMalloc", "cudaMalloc"], 2, 0),  # how programs begin
        (["cudaMalloc", "cudaFree", "cudaEventQuery", "cudaMalloc"], 2, 1),
        (["cudaMalloc", "cudaLaunchKernel", "cudaFree", "cudaMalloc"], 2, 0),  # memory given back by the program
        (["cuMemCreate", "cuMemUnmap", "cuMemRelease", "cuMemCreate", "cuMemUnmap", "cuMemCreate"], 3, 2),
    ],
)
def test_a_retry_asks_gives_back_and_asks_again(tmp_path: Path, calls: list[str], taken: int, retries: int) -> None:
    events = [event("cuda_runtime", name, 10 * k, 2) for k, name in enumerate(calls, 1)]
    [step] = steps(tmp_path, [span("step/0", 0, 100), *launched(1, 0, "sgemm", 5, 90), *events])
    assert (step.num_device_allocations, step.num_allocator_retries) == (taken, retries)


def test_an_asynchronous_step_lasts_as_long_as_its_kernels(tmp_path: Path) -> None:
    events = [
        span("ProfilerStep#3", 0, 100), *launched(1, 10, "sgemm", 20, 300),
        span("ProfilerStep#4", 100, 100), *launched(2, 110, "sgemm", 320, 300),
        *launched(3, 120, "Memcpy DtoH", 400, 2000, 9, "gpu_memcpy"),  # a copy may outlast its step
    ]  # fmt: skip
    first, second = steps(tmp_path, events)
    assert [(s.step, s.start_us, s.wall_us, s.idle_us) for s in (first, second)] == [
        (3, us(0), us(320), us(20)), (4, us(320), us(300), us(0))
    ]  # fmt: skip
    assert second.overlap["copy_out"] == 1 and second.stream_us["copy_out"] == us(220)


def test_a_launch_bound_stretch_is_one_stretch(tmp_path: Path) -> None:
    events = [span("step/0", 0, 2000), span("forward/temporal", 0, 1500), *launched(0, 0, "sgemm", 10, 190)]
    for number in range(1, 21):  # 20 kernels of 5 us, one every 50 us: each is launched 3 us before it starts
        events += launched(number, 197 + 50 * number, "elementwise_kernel", 200 + 50 * number, 5)
    events += [*launched(99, 1000, "sgemm", 1205, 795)]  # launched long before: the device was busy enough
    [step] = steps(tmp_path, events)
    [stretch] = step.launch_bound
    assert (stretch.start_us, stretch.dur_us) == (us(200), us(1000))
    assert (stretch.idle_us, stretch.num_kernels, stretch.span) == (us(50 + 19 * 45), 20, "forward/temporal")
    assert step.idle_by_cause_us["launching"] == us(10 + 50 + 19 * 45)


def test_a_trace_without_steps_is_one_step_and_work_without_a_launch_has_no_span(tmp_path: Path) -> None:
    [step] = steps(tmp_path, [event("kernel", "sgemm", 10, 30, 7), event("kernel", "sgemm", 50, 50, 7)])
    assert (step.step, step.wall_us, step.compute_us, step.idle_us) == (0, us(90), us(80), us(10))
    assert step.attributed == 0 and [one.name for one in step.by_span] == [NO_SPAN]


def test_an_external_id_leads_a_kernel_to_its_op_where_calls_are_not_recorded(tmp_path: Path) -> None:
    events = [
        span("forward/cross", 0, 100), op("vchitect_fast::cross_forward", 10, 20, External_id=5),
        event("kernel", "_forward_kernel", 40, 10, 7, External_id=5),
    ]  # fmt: skip
    [step] = steps(tmp_path, events)
    assert step.attributed == 1 and step.by_class_us["attention"] == us(10)


def test_without_a_gpu_the_ops_own_time_is_the_work(tmp_path: Path) -> None:
    events = [
        span("step/0", 0, 100), span("forward/mlp", 10, 40), span("collective/grads", 60, 30),
        op("aten::linear", 12, 30), op("aten::addmm", 15, 20), op("aten::copy_", 16, 4),
        event("user_annotation", "gloo:all_reduce", 65, 15, tid=3), op("aten::mul", 70, 5),
    ]  # fmt: skip
    [step] = steps(tmp_path, events)
    # linear and addmm without the copy inside are GEMM; the thread waits in the collective span but for 5 us of aten::mul.
    assert step.by_class_us == {
        GEMM: us(26), ELEMENTWISE: us(4 + 5), COLLECTIVE: us(25 + 15), "attention": 0, "other": 0, COPY: 0, IDLE: us(40)
    }  # fmt: skip
    assert (step.compute_us, step.exposed_us["collective"], step.stream_us["collective"]) == (us(35), us(25), us(30))
    assert {one.name: one.device_us for one in step.by_span} == {"forward/mlp": us(30), "collective/grads": us(45)}
    assert step.idle_by_cause_us == {"data": 0, "launching": 0, "synchronizing": 0, "elsewhere": us(40)}


def test_where_spans_alone_were_recorded_they_stand_for_the_work(tmp_path: Path) -> None:
    events = [
        span("curate/signals", 0, 40), span("curate/wait", 30, 10), span("curate/scan", 70, 30), span("not ours", 50, 10),
        span("data/decode", 20, 40, tid=2), span("collective/grads", 110, 10), span("copy_in/wait", 125, 5),
    ]  # fmt: skip
    [step] = steps(tmp_path, events)
    assert (step.wall_us, step.compute_us, step.exposed_any_us) == (us(130), us(60 + 30), us(10 + 5))
    assert step.idle_us == us(10 + 10 + 5)
    assert {one.name: one.device_us for one in step.by_span if one.device_us} == {
        "curate/signals": us(30), "curate/wait": us(10), "curate/scan": us(30), "data/decode": us(40),
        "collective/grads": us(10), "copy_in/wait": us(5),
    }  # fmt: skip
    # No name of a span is a kernel's: "scan" is a mark of elementwise kernels.
    assert {name for name, time in step.by_class_us.items() if time} == {"other", COLLECTIVE, COPY, IDLE}


def test_recomputation_keeps_its_own_span_inside_backward(tmp_path: Path) -> None:
    events = [
        span("step/0", 0, 100), span("forward/spatial", 0, 20), op("aten::mm", 5, 10, **seq(4)),
        span("backward/model", 30, 60), op("MmBackward0", 35, 50, **seq(4, True)),
        span("recompute/spatial", 40, 20), op("aten::mm", 42, 10, **seq(9)), op("aten::mm", 65, 15),
    ]  # fmt: skip
    [step] = steps(tmp_path, events)
    device = {one.name: one.device_us for one in step.by_span if one.device_us}
    assert device == {"forward/spatial": us(10), "backward/spatial": us(30), "recompute/spatial": us(20)}


def test_of_ops_with_one_number_the_last_made_the_node(tmp_path: Path) -> None:
    events = [
        span("step/0", 0, 100),
        span("forward/a", 0, 20), op("aten::detach", 5, 10, **seq(4)),  # sees the next number and does not use it up
        span("forward/b", 20, 20), op("aten::mul", 25, 10, **seq(4)),
        span("backward/model", 50, 40), op("MulBackward0", 55, 20, **seq(4, True)),
    ]  # fmt: skip
    [step] = steps(tmp_path, events)
    assert {one.name for one in step.by_span if one.kind == "backward" and one.device_us} == {"backward/b"}


def test_a_trace_of_nsight_systems_gives_the_same_answers(tmp_path: Path) -> None:
    thread = PROCESS + 1
    path = export(
        tmp_path / "t.sqlite",
        kernels=[(1_120_000, 1_300_000, 0, 7, 1, "sgemm", PROCESS), (1_350_000, 1_500_000, 0, 7, 2, "sgemm", PROCESS)],
        copies=[(1_200_000, 1_340_000, 0, 9, 3, 2, PROCESS, 10)],
        calls=[
            (1_110_000, 1_112_000, thread, 1, "cudaLaunchKernel_v7000"),
            (1_345_000, 1_346_000, thread, 2, "cudaLaunchKernel_v7000"),
            (1_113_000, 1_114_000, thread, 3, "cudaMemcpyAsync_v3020"),
        ],
        ranges=[
            (1_000_000, 1_500_000, 59, "step/7", None, thread),
            (1_100_000, 1_340_000, 59, "forward/spatial", None, thread),
        ],
    )
    [trace] = read_nsight(path)
    [step] = analyse_steps(trace, find_work(trace))
    assert (step.step, step.wall_us, step.compute_us, step.idle_us) == (7, us(500), us(330), us(130))
    assert (step.exposed_us["copy_out"], step.overlap["copy_out"]) == (us(40), pytest.approx(100 / 140))
    assert {one.name: one.device_us for one in step.by_span} == {"forward/spatial": us(320), NO_SPAN: us(150)}
    assert step.attributed == pytest.approx(320 / 470)
