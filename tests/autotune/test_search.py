"""The search against an exhaustive one, refusals, and the Plan it makes.

pytest tests/autotune/test_search.py
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_device import device

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.cost import step_cost
from vchitect_fast.autotune.memory import GIB, step_memory
from vchitect_fast.autotune.search import plan_run
from vchitect_fast.cluster import Device
from vchitect_fast.errors import UserError
from vchitect_fast.plan import Plan, PlanEntry, Policy, ShardSpec
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

TINY = preset("vchitect-tiny")
SHAPE = VideoShape(8, 256, 256)


def planned(
    limit_bytes: int | None = None, *, batch: int = 4, on: Device | None = None, dtype: str = "float32"
) -> PlanEntry:
    plan = plan_run(
        TINY, [SHAPE], on or device(), batch=batch, num_text_tokens=16, dtype=dtype, limit_bytes=limit_bytes
    )
    return plan.entries[0]


def space(batch: int) -> dict[tuple[int, int], tuple[float, int]]:
    """(microbatch, recomputed) -> (seconds, peak bytes), written out."""
    found = {}
    for microbatch in range(1, batch + 1):
        if batch % microbatch == 0:
            for recomputed in range(TINY.num_layers + 1):
                work = Workload(TINY, SHAPE, microbatch, 16)
                options = {"num_recomputed": recomputed, "accumulation": batch // microbatch}
                cost, memory = (
                    step_cost(work, device(), "float32", **options),
                    step_memory(work, device(), "float32", **options),
                )
                found[microbatch, recomputed] = (cost.step_s, memory.peak_bytes)
    return found


def test_the_peak_of_a_gpu_is_without_its_context() -> None:
    """What torch.cuda.max_memory_allocated counts; the context lowers the limit instead."""
    on_cpu, context = planned(), device().process_bytes
    assert context
    on_gpu = planned(on=device(kind="cuda"))
    assert on_gpu.predicted.peak_parts_gib["process"] == 0 < on_cpu.predicted.peak_parts_gib["process"]
    assert on_gpu.predicted.peak_gib == sum(on_gpu.predicted.peak_parts_gib.values())
    peak = round(on_gpu.predicted.peak_gib * GIB)
    tight = device(kind="cuda", process_bytes=0)
    assert planned(peak, on=tight) == planned(peak + context, on=device(kind="cuda"))
    assert planned(peak - 1, on=tight) == planned(peak - 1 + context, on=device(kind="cuda")) != planned(peak, on=tight)


def test_the_choice_is_no_slower_than_whole_blocks_at_every_limit() -> None:
    every = space(4)
    peaks = sorted(peak for _, peak in every.values())
    chosen = set()
    for limit in [*peaks, peaks[-1] + 1]:
        entry = planned(limit)
        fitting = {key: value for key, value in every.items() if value[1] <= limit}
        assert entry.predicted.step_s <= min(seconds for seconds, _ in fitting.values()) * (1 + 1e-9)
        assert entry.predicted.peak_gib * GIB <= limit * (1 + 1e-9)
        chosen.add(entry.policy)
    assert len(chosen) > 2  # the limits really make a difference


def test_more_memory_is_never_slower() -> None:
    peaks = sorted(peak for _, peak in space(4).values())
    seconds = [planned(limit).predicted.step_s for limit in peaks]
    assert seconds == sorted(seconds, reverse=True)


def test_keeps_everything_where_everything_fits() -> None:
    entry = planned()
    assert entry.policy == (Policy.keep(),) * TINY.num_layers
    assert all(other["why"].startswith("slower by") for other in entry.runners_up)


def test_runners_up_that_were_faster_did_not_fit() -> None:
    limit = sorted(peak for _, peak in space(4).values())[2]
    entry = planned(limit)
    assert len(entry.runners_up) == 4
    assert sum(other["why"].endswith("chunks are computed again") for other in entry.runners_up) == 1
    for other in entry.runners_up:
        faster = other["step_s"] < entry.predicted.step_s
        assert faster == other["why"].startswith("does not fit")
        if faster:
            assert other["why"].startswith(f"does not fit: {other['peak_gib']:.2f} of {limit / GIB:.2f} GiB at the ")


def least_bytes() -> int:
    """Of one sample: in as many chunks as there are, each block keeping its input or what chunks keep."""
    works = [
        Workload(TINY, SHAPE, 1, 16, num_chunks=count) for count in (1, 2, 4, 8, 16, 32) if count <= SHAPE.num_frames
    ]
    return min(
        step_memory(
            work, device(), "float32", num_recomputed=0, accumulation=1, policy=[policy] * TINY.num_layers
        ).peak_bytes
        for work in works
        for policy in (Policy.keep(), Policy.recompute())
    )


def test_uses_nine_tenths_of_the_device_by_default() -> None:
    least = least_bytes()
    assert planned(batch=1, on=device(least / 0.89 / GIB))
    with pytest.raises(UserError):
        planned(batch=1, on=device(least / 0.91 / GIB))


def test_refusal_says_what_is_missing_and_what_fits() -> None:
    limit = least_bytes() - 2**20
    with pytest.raises(UserError) as caught:
        planned(limit, batch=1)
    message = str(caught.value)
    assert f"{SHAPE} in float32 needs" in message
    assert "0.001 GiB are missing" in message  # a MiB
    nearest = VideoShape.parse(re.search(r"nearest that fits is (\S+)\.", message).group(1))[0]
    fits = replace(SHAPE, num_frames=nearest.num_frames)
    plan_run(TINY, [fits], device(), batch=1, num_text_tokens=16, dtype="float32", limit_bytes=limit)
    larger = replace(SHAPE, num_frames=nearest.num_frames + 1)
    with pytest.raises(UserError):
        plan_run(TINY, [larger], device(), batch=1, num_text_tokens=16, dtype="float32", limit_bytes=limit)


def test_refusal_when_the_model_alone_does_not_fit() -> None:
    with pytest.raises(UserError, match="not even one frame fits, parameters and optimizer alone take"):
        planned(2**28)


def test_auto_takes_the_faster_dtype() -> None:
    def plan(on: Device) -> str:
        return plan_run(TINY, [SHAPE], on, batch=1, num_text_tokens=16, dtype="auto").compute_dtype

    assert plan(device()) == "bfloat16"  # half the bytes, the same FLOP/s
    slow = tuple(replace(t, forward_s=9 * t.forward_s) if t.dtype == "bfloat16" else t for t in device().timings)
    assert plan(device(timings=slow)) == "float32"


def test_plan_round_trip(tmp_path: Path) -> None:
    shapes = [SHAPE, VideoShape(1, 64, 64), SHAPE]  # one asked for twice is planned once
    plan = plan_run(TINY, shapes, device(), batch=2, num_text_tokens=16, dtype="bfloat16")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [entry.shape for entry in plan.entries] == ["8x256x256", "1x64x64"]
    assert plan.peak_flops == device().matmul_flops["bfloat16"]
    plan.check(model=TINY.fingerprint(), device=device().fingerprint())


def test_confidence_carries_the_probe_residual() -> None:
    assert "off by 10% on average" in planned().predicted.confidence
    assert "not included" in planned().predicted.confidence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "at least one shape, sample and text token"),
        ({"num_text_tokens": 0}, "at least one shape, sample and text token"),
        ({"shapes": []}, "at least one shape, sample and text token"),
        ({"shapes": [VideoShape(1, 1024, 512)]}, "1024x512 exceeds the model's position grid of 512 x 512 pixels"),
    ],
)
def test_rejects(options: dict[str, object], message: str) -> None:
    values = {"shapes": [SHAPE], "batch": 1, "num_text_tokens": 16, "dtype": "float32"} | options
    with pytest.raises(UserError, match=message):
        plan_run(TINY, values.pop("shapes"), device(), **values)


def test_a_mesh_divides_batch_rows_and_states() -> None:
    def plan(batch: int, shape: VideoShape = SHAPE, **mesh: int) -> Plan:
        sizes = {"dp_replicate": 1, "dp_shard": 1, "sp": 1} | mesh
        return plan_run(TINY, [shape], device(), batch=batch, num_text_tokens=16, dtype="float32", mesh=sizes)

    one, two = plan(4).entries[0], plan(8, dp_shard=2)
    assert two.mesh == {"dp_replicate": 1, "dp_shard": 2, "sp": 1}
    assert [p.fsdp_group for p in (two, plan(4, sp=2), plan(4, dp_replicate=2))] == ["global", "global", "none"]
    [dp] = two.entries
    assert (dp.microbatch, dp.accumulation, dp.shard) == (one.microbatch, one.accumulation, ShardSpec())
    assert dp.predicted.step_parts_s["forward_s"] == one.predicted.step_parts_s["forward_s"]
    assert dp.predicted.step_parts_s["optimizer_s"] < 0.6 * one.predicted.step_parts_s["optimizer_s"]
    assert "gathered parameters and reduced gradients not included" in dp.predicted.confidence
    [halves] = plan(4, sp=2).entries
    assert halves.shard == ShardSpec("frames", temporal="tokens")
    assert 0.4 < halves.predicted.step_s / one.predicted.step_s < 0.7
    assert halves.predicted.peak_parts_gib["saved"] == pytest.approx(one.predicted.peak_parts_gib["saved"] / 2, rel=0.1)
    # 7 frames over 3 ranks are 3 on the fullest, a fourth more than 7/3; 256 tokens divide nearly.
    assert plan(1, VideoShape(7, 256, 256), sp=3).entries[0].shard == ShardSpec("tokens", spatial="heads")
    with pytest.raises(UserError, match="a step of 3 samples does not divide over 2 data-parallel ranks"):
        plan(3, dp_shard=2)
