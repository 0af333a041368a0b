"""What must hold of every answer: more is never slower, the mesh is the best, and what is said of the others is true.

pytest tests/autotune/test_properties.py; draws are seeded, clusters are planner_cases.py's.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from functools import partial

import pytest
from planner_cases import SHAPE, TINY, Few, all_layouts, every, fastest, gpus, problem

from vchitect_fast.autotune.bounds import fits
from vchitect_fast.autotune.layout import Problem
from vchitect_fast.autotune.memory import GIB
from vchitect_fast.autotune.model import StepModel
from vchitect_fast.autotune.policies import PolicySearch
from vchitect_fast.autotune.reasons import why
from vchitect_fast.autotune.search import Answer, ShapeSearch, answers, plan_run
from vchitect_fast.autotune.space import common_meshes, layouts
from vchitect_fast.cluster import Cluster
from vchitect_fast.errors import UserError
from vchitect_fast.plan import OFFLOAD, Policy
from vchitect_fast.shapes import VideoShape

WIDE = VideoShape(16, 256, 256)
MESHES = {
    "two devices": gpus(2, host=4e9),
    "four, slow network": gpus(4, per_node=2, host=4e9, outside=3e7),
    "four, fast everything": gpus(4, host=1e11, inside=1e12),
    "two, slow inside": gpus(2, host=1e11, inside=1e7),
}


def tight(asked: Problem, share: float) -> int:
    """A limit between the least and the most that the layouts of a problem take, keeping and recomputing everything."""
    model = StepModel(asked)
    several = [layout for mesh in common_meshes([asked]) for layout in layouts(asked, mesh)]
    peaks = [model.predict(layout, policies).memory.peak_bytes for layout in several for policies in _ends(asked)]
    return int(min(peaks) + share * (max(peaks) - min(peaks)))


def _ends(asked: Problem) -> list[tuple[Policy, ...]]:
    return [(policy,) * asked.config.num_layers for policy in (Policy.keep(), Policy.recompute())]


@pytest.mark.parametrize("name", MESHES)
def test_the_mesh_equals_the_best_of_every_layout_and_assignment(name: str) -> None:
    """Two shapes: the mesh with the least sum, each shape with its best on it."""
    on, of = MESHES[name], partial(Few, number=3)
    asked = [problem(on, num_layers=2, batch=4, shape=shape) for shape in (SHAPE, VideoShape(3, 128, 128))]
    candidates = common_meshes(asked)
    every_one = [[every(of(item), all_layouts(item, mesh)) for mesh in candidates] for item in asked]
    for limit in (None, *(tight(asked[0], share) for share in (0.1, 0.3, 0.6))):
        sums = []
        for place in range(len(candidates)):
            steps = [fastest(of(item, limit), found[place]) for item, found in zip(asked, every_one, strict=True)]
            sums.append(math.inf if None in steps else steps[0] + 2 * steps[1])  # type: ignore[operator]
        if math.isinf(min(sums)):
            continue
        found = answers(asked, None, [1.0, 2.0], limit_bytes=limit, model_of=of)
        assert found[0].best.cost.step_s + 2 * found[1].best.cost.step_s == pytest.approx(min(sums), rel=1e-12)
        assert found[0].best.layout.mesh == found[1].best.layout.mesh
        assert all(fits(item.best, item.limits) for item in found)


def test_the_bound_shared_by_meshes_is_below_every_choice() -> None:
    asked = problem(gpus(4, host=4e9), num_layers=2, batch=4)
    model = Few(asked, tight(asked, 0.3), number=3)
    search = ShapeSearch(model)
    for mesh in common_meshes([asked]):
        best = fastest(model, every(model, all_layouts(asked, mesh)))
        slack = 1 - 1e-12
        assert search.least_s(mesh) * slack <= search.own_least_s(mesh, math.inf)
        assert best is None or search.own_least_s(mesh, math.inf) * slack <= best


@pytest.mark.parametrize("number", [1, 4])
def test_unhindered_is_the_prediction_without_waiting(number: int) -> None:
    asked = replace(problem(gpus(number, host=4e9), batch=4), parked=("optimizer",))
    model = StepModel(asked)
    for mesh in common_meshes([asked]):
        for layout in layouts(asked, mesh):
            cost, peak_bytes = model.unhindered(layout)
            keep = PolicySearch(model, layout, model.limits()).keep
            waited = {"exchange_s": 0.0, "gather_s": 0.0}
            assert cost.parts() == keep.cost.parts() | waited
            assert peak_bytes == keep.memory.peak_bytes


def best_s(on: Cluster, limit: int | None = None, *, batch: int = 2) -> float:
    """Of three blocks with four Ways, so that every assignment is looked at."""
    asked = problem(on, batch=batch, shape=WIDE)
    return answers([asked], None, [1.0], limit_bytes=limit, model_of=partial(Few, number=4))[0].best.cost.step_s


def test_more_memory_never_gives_a_slower_plan() -> None:
    asked = problem(gpus(host=4e9), batch=2, shape=WIDE)
    limits = [tight(asked, share) for share in (0.02, 0.1, 0.2, 0.4, 0.7, 1.0)]
    steps = [best_s(gpus(host=4e9), limit) for limit in limits]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > steps[-1]


@pytest.mark.parametrize("link", ["host", "inside", "outside"])
def test_a_faster_link_never_gives_a_slower_step(link: str) -> None:
    rates = {"host": (3e7, 1e9, 4e9, 1e11), "inside": (1e7, 1e9, 1e11), "outside": (1e6, 1e8, 1e10)}[link]
    number, per_node = (2, 8) if link == "host" else (4, 2)
    limit = tight(problem(gpus(number, per_node=per_node), batch=number, shape=WIDE), 0.1)
    steps = [best_s(gpus(number, per_node=per_node, **{link: rate}), limit, batch=number) for rate in rates]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > steps[-1]


def test_time_scales_with_the_clock_and_bytes_with_the_batch() -> None:
    """Units: a machine whose every rate is twice as high takes half the time and as many bytes."""
    asked = problem(gpus(host=4e9), batch=2, shape=WIDE)
    limit = tight(asked, 0.1)
    slow = answers([asked], None, [1.0], limit_bytes=limit)[0].best
    device = asked.cluster.device
    timings = tuple(
        replace(t, forward_s=t.forward_s / 2, backward_s=t.backward_s and t.backward_s / 2) for t in device.timings
    )
    twice = replace(
        device, timings=timings, memory_bytes_per_s=2 * (device.memory_bytes_per_s or 0), op_overhead_s=0.5e-6
    )
    links = tuple(
        replace(link, bytes_per_s=2 * link.bytes_per_s, latency_s=link.latency_s / 2) for link in asked.cluster.links
    )
    faster = replace(asked, cluster=replace(asked.cluster, device=twice, links=links))
    quick = answers([faster], None, [1.0], limit_bytes=limit)[0].best
    assert quick.cost.step_s == pytest.approx(slow.cost.step_s / 2)
    assert quick.memory.peak_bytes == slow.memory.peak_bytes
    assert quick.policies == slow.policies


@pytest.mark.parametrize("seed", range(3))
def test_random_problems_fit_and_no_random_choice_is_better(seed: int) -> None:
    draw = random.Random(seed)
    on = gpus(
        draw.choice((1, 2, 4)),
        per_node=draw.choice((1, 2, 4)),
        host=10 ** draw.uniform(8, 11),
        inside=10 ** draw.uniform(8, 11),
    )
    asked = problem(on, num_layers=6, batch=4, shape=VideoShape(draw.choice((4, 16)), 128, 256))
    limit = tight(asked, draw.uniform(0.05, 0.5))
    [found] = answers([asked], None, [1.0], limit_bytes=limit)
    assert fits(found.best, found.limits)
    model = StepModel(asked, limit)
    several = [layout for mesh in common_meshes([asked]) for layout in all_layouts(asked, mesh)]
    for _ in range(40):
        layout = replace(draw.choice(several), prefetch_depth=draw.choice((1, 2, 3)))
        ways = model.ways(layout)
        few = draw.sample(ways[1], 2) if len(ways[1]) > 1 else ways[1]
        policies = [draw.choice(few).policy for _ in range(5)] + [draw.choice(ways[2]).policy]
        other = model.predict(layout, policies)
        assert not fits(other, found.limits) or other.cost.step_s >= found.best.cost.step_s


def answered(limit: int | None = None, number: int = 2) -> Answer:
    asked = problem(gpus(number, host=4e9), num_layers=6, batch=4, shape=WIDE)
    return answers([asked], None, [1.0], limit_bytes=limit or tight(asked, 0.1))[0]


def test_reasons_are_true() -> None:
    found = answered()
    for other in found.seen:
        said = why(other, found.best, found.limits)
        if not fits(other, found.limits):
            needs, has = re.fullmatch(r"does not fit: (\S+) of (\S+) GiB at the .*", said).groups()  # type: ignore[union-attr]
            assert float(needs) == round(other.memory.peak_bytes / GIB, 2)
            assert float(has) == round(found.limits.device_bytes / GIB, 2)
            assert str(other.fullest) in said
        elif other.cost.step_s > found.best.cost.step_s:
            assert said.startswith(f"slower by {other.cost.step_s / found.best.cost.step_s - 1:.1%}: ")
            more_again = other.cost.recompute_s - found.best.cost.recompute_s > 0.01 * found.best.cost.step_s
            assert not more_again or "more is made again" in said


def test_runners_up_are_of_other_kinds_and_those_that_are_faster_do_not_fit() -> None:
    plan = plan_run(
        replace(TINY, num_layers=6), [WIDE], gpus(2, host=4e9), batch=4, num_text_tokens=16, dtype="float32",
        limit_bytes=answered().limits.device_bytes,
    )  # fmt: skip
    [entry] = plan.entries
    assert 1 <= len(entry.runners_up) <= 5
    assert len({other["choice"] for other in entry.runners_up}) == len(entry.runners_up)
    for other in entry.runners_up:
        assert (other["step_s"] < entry.predicted.step_s) == other["why"].startswith("does not fit")


def test_a_plan_says_what_was_searched() -> None:
    plan = plan_run(
        replace(TINY, num_layers=6), [WIDE, SHAPE], gpus(4, per_node=2, host=4e9), batch=4, num_text_tokens=16,
        dtype="float32", weights=[3.0, 1.0],
    )  # fmt: skip
    assert math.prod(plan.mesh.values()) == 4
    shards = plan.mesh["dp_shard"] * plan.mesh["sp"]
    assert plan.fsdp_group == ("none" if shards == 1 else "node" if shards == 2 else "global")
    for entry in plan.entries:
        samples = entry.microbatch * entry.accumulation * plan.mesh["dp_replicate"] * plan.mesh["dp_shard"]
        assert samples == 4
        assert (entry.offload_bytes > 0) == any(OFFLOAD in vars(policy).values() for policy in entry.policy)
        assert (entry.predicted.step_parts_s["recompute_s"] > 0) == any(
            policy != Policy.keep() for policy in entry.policy
        )


def test_where_nothing_fits_it_says_how_many_devices_would_do() -> None:
    asked = problem(gpus(2, per_node=2), num_layers=6, batch=4, shape=WIDE)
    limit = int(0.7 * tight(asked, 0.0))
    with pytest.raises(UserError) as caught:
        answers([asked], None, [1.0], limit_bytes=limit)
    message = str(caught.value)
    number, more = map(int, re.search(r"(\d+) devices would do, (\d+) more", message).groups())  # type: ignore[union-attr]
    assert number == 2 + more
    enough = problem(gpus(number, per_node=2), num_layers=6, batch=4, shape=WIDE)
    assert answers([enough], None, [1.0], limit_bytes=limit)
    fewer = problem(gpus(number - 2, per_node=2), num_layers=6, batch=4, shape=WIDE)
    with pytest.raises(UserError):
        answers([fewer], None, [1.0], limit_bytes=limit)
    missing = float(re.search(r"(\S+) GiB are missing", message).group(1))  # type: ignore[union-attr]
    assert answers([asked], None, [1.0], limit_bytes=limit + math.ceil((missing + 0.0006) * GIB))


def test_a_given_mesh_is_kept_and_more_devices_are_not_offered() -> None:
    asked = problem(gpus(4), batch=4, shape=WIDE)
    mesh = {"dp_replicate": 2, "dp_shard": 1, "sp": 2}
    assert answers([asked], mesh, [1.0])[0].best.layout.mesh == mesh
    with pytest.raises(UserError, match="are missing") as caught:
        answers([asked], mesh, [1.0], limit_bytes=1000)
    assert "would do" not in str(caught.value)


def test_shapes_that_fit_on_different_meshes_only_are_refused() -> None:
    """A long video fits where 4 ranks share it; an image of 2 x 2 tokens has no rows for 4 ranks with 3 heads."""
    on = gpus(4)
    on = replace(on, links=tuple(link for link in on.links if link.name.endswith("node")))  # nothing is offloaded
    long, image = (
        problem(on, num_layers=12, batch=4, shape=shape) for shape in (VideoShape(128, 256, 256), VideoShape(1, 32, 32))
    )
    model = StepModel(long)
    limit = min(
        model.predict(layout, _ends(long)[1]).memory.peak_bytes
        for mesh in common_meshes([long])
        for layout in all_layouts(long, mesh)
        if layout.sp < 4
    )
    assert answers([long], None, [1.0], limit_bytes=limit - 1)[0].best.layout.sp == 4
    assert answers([image], None, [1.0], limit_bytes=limit - 1)[0].best.layout.sp < 4
    with pytest.raises(UserError, match="no mesh fits them all; plan them in separate Plans"):
        answers([long, image], None, [1.0, 1.0], limit_bytes=limit - 1)


def test_bad_weights_are_refused() -> None:
    with pytest.raises(UserError, match="a positive weight for each of 1 shapes"):
        plan_run(TINY, [SHAPE], gpus(), batch=1, num_text_tokens=16, dtype="float32", weights=[0.0])
