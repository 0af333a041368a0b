"""The whole analysis: ranks side by side, findings with settings that exist, real traces of ours and of another program."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_nsight import PROCESS, export
from made_up_trace import event, launched, op, span, write
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.model import VchitectTransformer, preset
from vchitect_fast.plan import Plan, PlanEntry
from vchitect_fast.profiling.analysis import analyse
from vchitect_fast.profiling.facts import Analysis, Finding, Roof
from vchitect_fast.profiling.findings import RULES
from vchitect_fast.profiling.kinds import KINDS
from vchitect_fast.profiling.reading import read_traces
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

ROOF = Roof("made up", {"float32": 1e12, "bfloat16": 4e12}, 1e12, "measured")


def one_step(
    *events: dict[str, Any] | list[dict[str, Any]], wall: float = 1000, number: int = 0
) -> list[dict[str, Any]]:
    flat: list[dict[str, Any]] = [span(f"step/{number}", 0, wall)]
    for item in events:
        flat += item if isinstance(item, list) else [item]
    return flat


def analysed(path: Path, *ranks: list[dict[str, Any]], roof: Roof | None = None) -> Analysis:
    files = [write(path / f"trace-rank{rank}.json", events) for rank, events in enumerate(ranks)]
    return analyse([trace for file in files for trace in read_traces(file)], roof)


BUSY = launched(1, 0, "sgemm", 0, 1000)  # a device with nothing to find
CASES: dict[str, tuple[list[dict[str, Any]], str, str, float]] = {
    # what happens -> events, how the sentence begins, setting, cost
    "data": (one_step(span("data/batch", 0, 400), launched(1, 400, "sgemm", 400, 600)),
             "The device waits 0.40 ms a step (40 %) for data.", "cache", 400),
    "encode": (one_step(span("encode/video", 0, 100), launched(1, 1, "sgemm", 0, 300), launched(2, 150, "sgemm", 300, 700)),
               "Encoding videos and texts takes 0.30 ms a step (30 %).", "cache", 300),
    "launching": (one_step(span("forward/a", 0, 1000), *(launched(k, 100 * k, "sgemm", 100 * k + 10, 20) for k in range(10))),
                  "The CPU launches more slowly than the device works: 0.80 ms a step (80 %) idle; the longest stretch is 1.00 ms with 10",
                  "microbatch", 800),
    "synchronizing": (one_step(span("forward/a", 0, 1000), launched(1, 0, "sgemm", 0, 500), event("cuda_runtime", "cudaStreamSynchronize", 100, 405),
                               launched(2, 700, "sgemm", 700, 300)),
                      "The CPU waits for the device to finish and only then goes on: 0.20 ms a step (20 %) idle.", "", 200),
    "copy_out": (one_step(launched(1, 0, "sgemm", 0, 700), launched(2, 1, "Memcpy DtoH", 600, 400, 9, "gpu_memcpy")),
                 "Copies to main memory are not hidden for 0.30 ms a step (30 %); 25 % of their time is.", "policy", 300),
    "copy_in": (one_step(launched(1, 1, "Memcpy HtoD", 0, 200, 9, "gpu_memcpy"), launched(2, 2, "sgemm", 200, 800)),
                "Copies back to the device are not hidden for 0.20 ms a step (20 %); 0 % of their time is.", "policy", 200),
    "collective": (one_step(launched(1, 0, "sgemm", 0, 900), launched(2, 1, "ncclDevKernel_AllReduce", 800, 200, 9)),
                   "Collectives are not hidden for 0.10 ms a step (10 %); 50 % of their time is.", "mesh", 100),
    "within": (one_step(launched(1, 0, "sgemm", 0, 900), launched(2, 1, "Memcpy DtoD", 900, 100, 9, "gpu_memcpy")),
               "Copies and memory sets within the device take 0.10 ms a step (10 %) for themselves.", "", 100),
    "recompute": (one_step(span("recompute/a", 0, 100), launched(1, 1, "sgemm", 0, 250), launched(2, 200, "sgemm", 250, 750)),
                  "Recomputing activations takes 0.25 ms a step (25 %).", "policy", 250),
    "optimizer": (one_step(span("optimizer/step", 0, 100), launched(1, 1, "multi_tensor_apply_kernel", 0, 200), launched(2, 200, "sgemm", 200, 800)),
                  "The optimizer takes 0.20 ms a step (20 %).", "accumulation", 200),
    "elementwise": (one_step(launched(1, 0, "vectorized_elementwise_kernel", 0, 400), launched(2, 1, "sgemm", 400, 600)),
                    "Elementwise and reduction kernels take 0.40 ms a step (40 %).", "", 400),
    "elsewhere": (one_step(launched(1, 0, "sgemm", 0, 800)), "The device is idle for 0.20 ms a step (20 %) while the CPU neither", "", 200),
    "retries": (one_step(BUSY, event("cuda_runtime", "cudaMalloc", 5, 0), event("cuda_runtime", "cudaFree", 10, 20),
                         event("cuda_runtime", "cudaMalloc", 30, 30)),
                "Memory is short: 1 times a step the allocator gave its cache back", "num_chunks", 50),
    "allocations": (one_step(BUSY, event("cuda_runtime", "cudaMalloc", 30, 30)),
                    "Memory is taken from the driver 1 times a step, 0.03 ms (3 %)", "", 30),
    "interpreter": (one_step(op("aten::mm", 0, 600), op("aten::mul", 800, 200)), "Between ops, in the interpreter, pass 0.20 ms a step (20 %).",
                    "microbatch", 200),
    "float32": (one_step(op("aten::mm", 0, 9, **{"Input Dims": [[4, 4], [4, 4]], "Input type": ["float", "float"]}), launched(1, 1, "sgemm", 0, 400),
                         launched(2, 20, "flash_fwd", 400, 600)),
                "Matrix products and attention in float32 take 0.40 ms a step (40 %).", "compute_dtype", 300),
    "roof": (one_step(op("aten::mm", 0, 9, **{"Input Dims": [[1000, 100], [100, 1000]], "Input type": ["float", "float"]}),
                      launched(1, 1, "sgemm", 0, 1000)),
             "aten::mm of 1000x100 100x1000 reaches 20 % of the measured roof, in 1.00 ms a step.", "microbatch", 800),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_finding_says_what_it_costs_and_what_to_change(tmp_path: Path, case: str) -> None:
    events, text, setting, cost_us = CASES[case]
    findings = analysed(tmp_path, events, roof=ROOF if case in ("float32", "roof") else None).findings
    [found] = [finding for finding in findings if finding.text.startswith(text)]
    assert (found.setting, found.cost_us) == (setting, pytest.approx(cost_us, abs=1e-2)) and found.remedy
    assert [finding.cost_us for finding in findings] == sorted((f.cost_us for f in findings), reverse=True)


def test_every_rule_has_its_case() -> None:
    begins = [rule.text.split("{")[0] for rule in RULES]
    assert [text for text in begins if not any(case[1].startswith(text) for case in CASES.values())] == []


def test_every_setting_is_one_that_exists() -> None:
    known = {field.name for kind in (TrainConfig, Plan, PlanEntry) for field in dataclasses.fields(kind)}
    settings = {rule.setting for rule in RULES} | {case[2] for case in CASES.values()} | {"attention"}
    assert settings - known == {""}


def test_a_step_with_nothing_to_mend_has_no_findings(tmp_path: Path) -> None:
    assert analysed(tmp_path, one_step(BUSY)).findings == ()


def test_the_straggler_is_the_rank_that_the_others_wait_for(tmp_path: Path) -> None:
    def rank(spatial: float, wait: float) -> list[dict[str, Any]]:
        forward = [span("forward/spatial", 0, 10), *launched(1, 1, "sgemm", 0, spatial)]
        return one_step(forward, launched(2, 20, "ncclDevKernel_AllReduce", spatial, wait, 9))

    found = analysed(tmp_path, rank(400, 600), rank(900, 100), rank(500, 500))
    uneven = found.imbalance
    assert uneven is not None and (uneven.straggler, uneven.num_steps, uneven.explained) == ("1", 1, "forward/spatial")
    assert uneven.own_us == {"0": pytest.approx(400), "1": pytest.approx(900), "2": pytest.approx(500)}
    assert uneven.ratio == pytest.approx(0.5)
    [finding] = [item for item in found.findings if "works" in item.text]
    assert "Rank 1 works 50.0 % longer than the mean of the ranks, most of it in forward/spatial" in finding.text
    assert finding.cost_us == pytest.approx(300)
    worst = next(item for item in found.findings if "Collectives" in item.text)
    assert worst.text.startswith("Rank 0: Collectives are not hidden for 0.60 ms")


def test_ranks_come_in_order_and_one_rank_twice_is_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / f"rank{k}.json", one_step(BUSY)) for k in (2, 0)]
    traces = [trace for file in files for trace in read_traces(file)]
    assert [rank.rank for rank in analyse(traces).ranks] == [0, 2]
    with pytest.raises(UserError, match=r"expected one trace a rank, got rank 2 in rank2.json, rank2.json"):
        analyse([traces[0], traces[0]])
    with pytest.raises(UserError, match="expected at least one trace"):
        analyse([])


def test_two_files_of_one_name_stay_two_ranks(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "t.json", one_step(BUSY))
    found = analyse([read_traces(tmp_path / folder / "t.json")[0] for folder in ("a", "b")])
    assert found.imbalance is not None and set(found.imbalance.own_us) == {"t.json", "t.json (2)"}


def test_events_of_another_kind_of_device_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    known = [event("python_function", "f", 0, 9), event("gpu_user_annotation", "step/0", 0, 9)]
    [rank] = analyse(read_traces(write(tmp_path / "t.json", [*one_step(BUSY), *known]))).ranks
    assert not any("not understood" in note for note in rank.notes)
    other = event("mtia_ccp_events", "gemm", 0, 9)
    [rank] = analyse(read_traces(write(tmp_path / "t.json", [*one_step(BUSY), *known, other]))).ranks
    assert any("not understood, and not counted: mtia_ccp_events." in note for note in rank.notes)


def test_exports_of_nsight_systems_are_told_apart_by_content(tmp_path: Path) -> None:
    path = export(tmp_path / "t.json", kernels=[(0, 1000, 0, 7, 1, "sgemm", PROCESS)])
    [rank] = analyse(read_traces(path)).ranks
    assert (rank.tool, rank.ops[0].name) == ("nsys", "sgemm")
    assert any("has no launches" in note for note in rank.notes)
    with pytest.raises(UserError, match="must be exported first; run `nsys export --type sqlite run.nsys-rep`"):
        read_traces(tmp_path / "run.nsys-rep")


def foreign_program() -> tuple[nn.Module, Callable[[], None]]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    x = torch.randn(4, 3, 16, 16)
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        nn.functional.cross_entropy(model(x), torch.zeros(4, dtype=torch.long)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def test_another_program_s_trace_is_analysed(tmp_path: Path) -> None:
    _, step = foreign_program()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(3):
            step()
            profiler.step()
    profiler.export_chrome_trace(str(tmp_path / "resnet.json"))
    [rank] = analyse(read_traces(tmp_path / "resnet.json")).ranks
    assert len(rank.steps) == 3 or any("names no steps" in note for note in rank.notes)
    for one in rank.steps:
        assert one.compute_us + one.exposed_any_us + one.idle_us == pytest.approx(one.wall_us)
        assert one.by_class_us["gemm"] > 0 and one.by_class_us["elementwise"] > 0
    assert any("Optimizer.step#SGD.step" == span.name for one in rank.steps for span in one.by_span)
    assert any(item.name == "aten::addmm" and item.flops for item in rank.ops)


def test_the_analysis_runs_without_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", one_step(BUSY))
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from vchitect_fast.profiling.analysis import analyse\n"
        "from vchitect_fast.profiling.reading import read_traces\n"
        "from vchitect_fast.profiling import roofline\n"
        f"print(analyse(read_traces({str(path)!r})).ranks[0].steps[0].compute_us)"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(1000)


def test_all_of_it_goes_into_json(tmp_path: Path) -> None:
    found = analysed(tmp_path, CASES["launching"][0], one_step(BUSY), roof=ROOF)
    text = json.dumps(dataclasses.asdict(found), allow_nan=False)
    assert json.loads(text)["findings"][0]["text"] == found.findings[0].text
    assert isinstance(found.findings[0], Finding) and set(KINDS) >= {
        span.kind for span in found.ranks[0].steps[0].by_span
    } - {""}


def tiny_model() -> tuple[TransformerConfig, Callable[[], torch.Tensor]]:
    config = preset("vchitect-tiny")
    model = VchitectTransformer(config)
    latents, text = torch.randn(1, 8, 16, 8, 16), torch.randn(1, 16, config.joint_attention_dim)
    pooled, timestep = torch.randn(1, config.pooled_projection_dim), torch.tensor([500.0])
    return config, lambda: model(latents, text, pooled, timestep)


def test_the_backward_of_our_model_goes_to_the_part_of_its_forward(tmp_path: Path) -> None:
    _, run = tiny_model()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler, record_function("step/0"):
        with record_function("forward/model"):
            out = run()
        with record_function("forward/loss"):
            loss = out.square().mean()
        with record_function("backward/all"):
            loss.backward()
    profiler.export_chrome_trace(str(tmp_path / "t.json"))
    [rank] = analyse(read_traces(tmp_path / "t.json"), ROOF).ranks
    [step] = rank.steps
    spans = {span.name: span for span in step.by_span}
    # Autograd's nodes lead every product of the backward to the model; what is left is bookkeeping between nodes.
    assert spans["backward/model"].by_class_us["gemm"] == pytest.approx(
        step.by_class_us["gemm"] - spans["forward/model"].by_class_us["gemm"]
    )
    assert spans["backward/loss"].device_us > 0
    assert step.attributed == 1
    assert step.compute_us + step.idle_us == pytest.approx(step.wall_us)


def test_our_model_s_flops_are_those_of_its_workload(tmp_path: Path) -> None:
    config, run = tiny_model()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    profiler.export_chrome_trace(str(tmp_path / "t.json"))
    [rank] = analyse(read_traces(tmp_path / "t.json"), ROOF).ranks
    counted = sum(op.flops for op in rank.ops if op.flops)
    expected = Workload(config, VideoShape.parse("8x128x64")[0], 1, 16).forward_flops()
    assert 1 <= counted / expected < 1.05  # the embeddings, which the formula leaves out
