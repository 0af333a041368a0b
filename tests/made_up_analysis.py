"""An Analysis, a Trace and its memory written by hand, for tests of what shows them; every text may be given an attack."""

from __future__ import annotations

from vchitect_fast.profiling.facts import (
    ATTENTION,
    COLLECTIVE,
    COPY,
    ELEMENTWISE,
    GEMM,
    IDLE,
    Analysis,
    Finding,
    Imbalance,
    OpTime,
    RankAnalysis,
    Roof,
    SpanTime,
    StepAnalysis,
    Stretch,
)  # fmt: skip
from vchitect_fast.profiling.memory import MemoryAnalysis, Owned, analyse_memory
from vchitect_fast.profiling.trace import Columns, Kind, Lane, Trace

MAIN, GPU, COPIES = Lane("1", "7", False), Lane("0", "7", True), Lane("0", "20", True)
STEP_US, NUM_STEPS = 10_000.0, 3


def made_up_trace(attack: str = "") -> Trace:
    """Three steps on a GPU: spans with depth, kernels of two classes, a copy beside them, memory."""
    columns = Columns()
    for step in range(NUM_STEPS):
        at = step * STEP_US
        for name, start, end in (
            (f"step/{step + 3}", 0, 10_000), ("data/batch", 0, 800), (f"forward/model{attack}", 900, 3900),
            ("forward/spatial", 1000, 2400), ("forward/temporal", 2500, 3800), ("backward/model", 4000, 8800),
            (f"recompute/spatial{attack}", 4500, 5000), ("optimizer/step", 8900, 9900),
        ):  # fmt: skip
            columns.add(Kind.SPAN, name, at + start, end - start, MAIN)
        for number, (name, start, end) in enumerate(
            (
                (f"gemm{attack}", 1000, 2000),
                (f"flash_fwd{attack}", 2000, 3000),
                ("gemm", 4200, 7000),
                ("multi_tensor", 9000, 9800),
            )
        ):
            key = 100 * step + number
            columns.add(
                Kind.OP,
                f"aten::addmm{attack}",
                at + start - 40,
                30,
                MAIN,
                external=key,
                shapes="([[64, 64]], ['float'])",
            )
            columns.add(Kind.RUNTIME, "cudaLaunchKernel", at + start - 30, 10, MAIN, correlation=key, external=key)
            columns.add(Kind.KERNEL, name, at + start, end - start, GPU, correlation=key, external=key)
        columns.add(Kind.COPY, "Memcpy DtoH (Device -> Pinned)", at + 2500, 2500, COPIES, num_bytes=1 << 20)
        for when, size, address in (
            (1100, 4 << 20, 1),
            (1200, 2 << 20, 2),
            (1300, -(2 << 20), 2),
            (4500, 3 << 20, 3),
            (8000, -(3 << 20), 3),
            (8500, -(4 << 20), 1),
        ):
            columns.add_memory(at + when, size, address, 20 << 20, -1, 0)
    return columns.finish(f"trace{attack}.json", "torch", 0)


def made_up_memory(attack: str = "") -> MemoryAnalysis:
    """Of the trace, with a weight."""
    found = analyse_memory(made_up_trace(attack), Owned(held=((9, 8 << 20, "weights", f"proj_out.weight{attack}"),)))
    assert found is not None
    return found


def made_up_step(number: int, attack: str = "") -> StepAnalysis:
    """One of the steps, its times roughly those of the trace and a little longer each step."""
    spans = (
        SpanTime(f"forward/model{attack}", "forward", 1, 3000.0, 200.0, {ELEMENTWISE: 200.0}),
        SpanTime("forward/spatial", "forward", 4, 1400.0, 1000.0 + number, {GEMM: 900.0, ATTENTION: 100.0}),
        SpanTime(f"backward/spatial{attack}", "backward", 0, 0.0, 2800.0, {GEMM: 2800.0}),
        SpanTime("optimizer/step", "optimizer", 1, 1000.0, 800.0, {ELEMENTWISE: 800.0}),
    )
    return StepAnalysis(
        step=number, start_us=(number - 3) * STEP_US, wall_us=STEP_US + number, compute_us=5600.0, exposed_any_us=700.0, idle_us=3700.0,
        by_span=spans, by_class_us={GEMM: 3800.0, ATTENTION: 1000.0, ELEMENTWISE: 800.0, COPY: 2500.0, COLLECTIVE: 0.0, IDLE: 3700.0},
        stream_us={"collective": 0.0, "copy_out": 2500.0, "copy_in": 0.0, "copy_within": 0.0},
        exposed_us={"collective": 0.0, "copy_out": 1200.0, "copy_in": 0.0, "copy_within": 0.0},
        overlap={"collective": None, "copy_out": 0.52, "copy_in": None, "copy_within": None},
        idle_by_cause_us={"launching": 900.0, "synchronizing": 0.0, "data": 2800.0, "elsewhere": 0.0},
        launch_bound=(Stretch((number - 3) * STEP_US + 8900.0, 100.0, 90.0, 12, f"optimizer/step{attack}"),), coverage=0.991, attributed=0.97,
        num_device_allocations=0, num_allocator_retries=0, allocator_us=0.0,
    )  # fmt: skip


def made_up_rank(rank: int = 0, attack: str = "") -> RankAnalysis:
    """Three steps and two ops, one of known FLOPs."""
    ops = (
        OpTime(f"aten::addmm{attack}", GEMM, f"4096x1536 1536x1536{attack}", "bfloat16", 12, 11_400.0, 2.3e11, 3.1e7, 2.0e13, 2.7e9, 0.4),
        OpTime("aten::scaled_dot_product_attention", ATTENTION, "", "bfloat16", 6, 3000.0, 5e10, 4e7, 1.6e13, 1.3e10, None),
        OpTime("aten::add", ELEMENTWISE, "64x64", "float32", 6, 2400.0, 3e6, 1e6, 1.2e9, 5e9, None),
    )  # fmt: skip
    steps = tuple(made_up_step(number, attack) for number in range(3, 3 + NUM_STEPS))
    return RankAnalysis(
        rank, f"trace{attack}.json", "torch", True, steps, ops, (f"no FLOPs are known of {attack or 'some ops'}",)
    )


def made_up_analysis(attack: str = "", num_ranks: int = 2) -> Analysis:
    """Two ranks with a straggler, a roof, a finding."""
    roof = Roof(f"a GPU{attack}", {"bfloat16": 8e14, "float32": 6e13}, 3e12, f"cluster.json{attack}")
    uneven = Imbalance(3, {"0": 5600.0, "1": 5000.0}, f"0{attack}", 0.06, f"forward/spatial{attack}")
    finding = Finding(
        f"The device waits 2.8 ms a step for data{attack}.",
        f"Decode ahead{attack}, or cache latents.",
        f"cache{attack}",
        2800.0,
    )
    ranks = tuple(made_up_rank(rank, attack) for rank in range(num_ranks))
    return Analysis(ranks, roof, uneven if num_ranks > 1 else None, (finding,))
