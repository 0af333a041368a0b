"""Why a Plan is so: sentences that agree with the figures, changes that turn a decision, and how far links reach.

pytest tests/autotune/test_explain.py
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from made_up_plan import CONFIG, MESH, explained, made_up_cluster, made_up_plan, tight

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.calibrate import Calibration
from vchitect_fast.autotune.describe import blocks_in_words, difference, layout_of, policy_in_words
from vchitect_fast.autotune.explain import Explanation, config_of, filling, made_from, problem_of, run
from vchitect_fast.autotune.layout import Layout
from vchitect_fast.autotune.memory import ends_bytes, states_bytes
from vchitect_fast.autotune.model import StepModel
from vchitect_fast.autotune.rates import rates_of
from vchitect_fast.autotune.report import gib
from vchitect_fast.autotune.search import plan_run
from vchitect_fast.autotune.sensitivity import HOST_LINKS, LONGER, changes, faster, links_between, on, slack, with_links
from vchitect_fast.autotune.ways import POLICIES
from vchitect_fast.cluster import COLLECTIVES, Link, Timing
from vchitect_fast.errors import UserError
from vchitect_fast.plan import OFFLOAD, Plan, Policy, ShardSpec

MEMORY = "device memory"
OFFLOADED = Policy(*[OFFLOAD] * 5)


def all_said(found: Explanation) -> str:
    return "\n".join(line for lines in found.said.values() for line in lines)


def with_policies(plan: Plan, policies: list[Policy]) -> Plan:
    return replace(plan, entries=(replace(plan.entries[0], policy=tuple(policies)),))


def test_the_plan_is_predicted_as_it_was_planned() -> None:
    _, plan, found = tight()
    assert found.outcome.cost.step_s == plan.entries[0].predicted.step_s
    assert found.outcome.layout == Layout(**MESH, shard=plan.entries[0].shard, microbatch=1, accumulation=2)
    assert "The Plan says" not in all_said(found)


def test_a_calibrated_plan_is_predicted_as_it_was_planned(tmp_path: Path) -> None:
    cluster, plain, _ = tight()
    known = Calibration(
        CONFIG.fingerprint(), cluster.device.fingerprint(), "bfloat16", extra_bytes=-(2**21), extra_rows=1.7, forward=1.3,
        backward=1.1, optimizer=0.9, num_points=2, num_timed=2, peak_error=0.01, step_error=0.02, source="made up",
    )  # fmt: skip
    made_up_plan(cluster, calibration=known).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    [found], predicted = explained(cluster, plan), plan.entries[0].predicted
    assert predicted.step_s != plain.entries[0].predicted.step_s
    assert (found.outcome.cost.parts(), found.outcome.memory.parts_gib()) == (
        predicted.step_parts_s,
        predicted.peak_parts_gib,
    )
    assert "The Plan says" not in all_said(found)


def test_memory_fills_as_forward_goes() -> None:
    """Between what stands and the end of forward: what blocks keep, and what they offload until it is copied."""
    cluster = made_up_cluster(2**34, host_bytes_per_s=200e9)
    policies = [OFFLOADED] * 3 + [Policy.keep()] * (CONFIG.num_layers - 3)
    [found] = explained(cluster, with_policies(made_up_plan(cluster), policies))
    points, (done_s, done) = filling(found.problem, found.outcome), found.outcome.timeline.memory[0]
    work, ways = found.problem.workload(found.outcome.layout), found.outcome.ways
    gradients = 4 * CONFIG.num_parameters() if found.outcome.layout.accumulation > 1 else 0
    standing = states_bytes(work, "bfloat16", num_shards=4) + gradients + found.outcome.memory.exchange_bytes
    assert points[0] == (0.0, standing)
    assert [at_s for at_s, _ in points] == sorted(at_s for at_s, _ in points)
    assert points[1][1] - points[0][1] == ways[0].kept_bytes + ways[0].moved_bytes > 0
    left = {task.block: task.end_s for task in found.outcome.timeline.tasks if task.name == "copy out"}
    at_once = [at_s for at_s, _ in points]
    assert left.keys() == {0, 1, 2} and left[0] in at_once and left[0] < done_s
    there = sum(ways[block].moved_bytes for block, at_s in left.items() if at_s > done_s)
    kept = sum(way.kept_bytes for way in ways)
    assert points[-1][1] == points[0][1] + kept + there == done - ends_bytes(work, 2)


def test_the_limit_that_a_plan_was_searched_with_is_kept(tmp_path: Path) -> None:
    cluster, by_default, _ = tight()
    assert by_default.limit_bytes == int(0.9 * cluster.device.memory_bytes)
    plan = replace(by_default, limit_bytes=int(0.5 * cluster.device.memory_bytes))
    plan.save(tmp_path / "plan.json")
    [found] = explained(cluster, Plan.load(tmp_path / "plan.json"))
    assert found.limits.device_bytes == StepModel(found.problem, plan.limit_bytes).limits().device_bytes
    elsewhere = replace(plan, limit_bytes=64 * cluster.device.memory_bytes)  # searched for a device with more memory
    [capped], [own] = explained(cluster, elsewhere), explained(cluster, by_default)
    assert found.limits.device_bytes < capped.limits.device_bytes == own.limits.device_bytes


def test_the_sentences_have_the_figures() -> None:
    _, _, found = tight()
    cost, memory = found.outcome.cost, found.outcome.memory
    assert f"backward {cost.backward_s / cost.step_s:.0%}" in found.said["time"][0]
    assert (
        f"{memory.peak_bytes / 2**30:.2f} GiB of {found.limits.device_bytes / 2**30:.2f} GiB" in found.said["memory"][0]
    )
    assert str(found.outcome.fullest) in found.said["memory"][0]
    assert found.keep.memory.peak_bytes > found.limits.device_bytes > memory.peak_bytes
    faster_by = 1 - found.keep.cost.step_s / cost.step_s
    assert f"Keeping everything would be {faster_by:.1%} faster" in all_said(found)
    assert found.entry.runners_up[0]["why"] in all_said(found)


def test_everything_is_kept_where_it_fits() -> None:
    cluster = made_up_cluster(memory_bytes=64 * 2**30)
    [found] = explained(cluster, made_up_plan(cluster))
    assert "Everything fits, so nothing is recomputed and nothing leaves the device." in found.said["choice"]
    assert not any(item.winner for item in found.effects)
    assert found.said["change"][0] == "None of the changes looked at leads to another choice."


def test_memory_turns_the_decision_and_the_winner_is_what_planning_anew_finds() -> None:
    cluster, _, found = tight()
    less, more = (item for item in found.effects if item.change.startswith(MEMORY))
    assert (less.fits, more.fits) == (False, True)
    assert less.winner and more.winner and less.winner_step_s and more.winner_step_s
    assert less.winner_step_s > found.outcome.cost.step_s > more.winner_step_s
    for item, factor in ((less, 0.9), (more, 1.1)):
        device = replace(cluster.device, memory_bytes=round(factor * cluster.device.memory_bytes))
        anew = made_up_plan(replace(cluster, device=device)).entries[0]
        assert item.winner_step_s == pytest.approx(anew.predicted.step_s)
    assert f"With {less.change} this plan does not fit; then best" in all_said(found)


def test_a_plan_that_is_not_the_best_is_told_so_once() -> None:
    cluster, plan, _ = tight()
    worse = with_policies(plan, [Policy.recompute()] * CONFIG.num_layers)
    [found] = explained(cluster, worse)
    assert found.effects[0].winner_step_s == pytest.approx(plan.entries[0].predicted.step_s)
    assert [line for line in found.said["change"] if "another choice" in line] == [found.said["change"][0]]
    assert "plan again" in found.said["change"][0]
    assert "The Plan says" in all_said(found)  # its prediction belongs to other Policies


def test_a_plan_that_no_longer_fits_says_so() -> None:
    cluster, plan, _ = tight()
    [found] = explained(cluster, with_policies(plan, [Policy.keep()] * CONFIG.num_layers))
    assert found.spare_bytes < 0
    assert "too much" in found.said["memory"][0]
    assert "does not fit" in found.said["memory"][-1]
    assert not found.effects[0].fits


@pytest.mark.parametrize(("host_bytes_per_s", "binds"), [(400e9, False), (1e9, True)])
def test_the_stream_that_binds_is_named(host_bytes_per_s: float, binds: bool) -> None:
    cluster = made_up_cluster(2**34, host_bytes_per_s)
    policies = [OFFLOADED] * 2 + [Policy.keep()] * (CONFIG.num_layers - 2)
    plan = with_policies(made_up_plan(cluster), policies)
    [found] = explained(cluster, plan)
    waits = [line for line in found.said["time"] if line.startswith("Compute waits") and "copies" in line]
    assert bool(waits) == binds
    assert (found.outcome.cost.parts()["copy_s"] > 0.01 * found.outcome.cost.step_s) == binds
    assert ("Hidden behind compute: copies to host memory" in all_said(found)) != binds
    [line] = [line for line in found.said["change"] if line.startswith("The host links")]
    assert ("bind" in line) == binds
    assert f"Host memory holds {gib(found.outcome.host_bytes / 2**30)} of" in all_said(found)


def test_more_of_a_fact_never_makes_the_same_plan_slower() -> None:
    _, _, found = tight()
    pairs: dict[str, list[float]] = defaultdict(list)
    for item in found.effects[1:]:
        pairs[item.change.rpartition(" ")[0]].append(item.ratio)
    assert list(pairs) == ["host links", "links inside a node", MEMORY, "products", "attention"]
    assert all(less >= 1 >= more for less, more in pairs.values())
    assert all(less > more for name, (less, more) in pairs.items() if name not in (MEMORY, "host links"))


def test_links_between_nodes_are_looked_at_where_the_mesh_uses_them() -> None:
    found = tight()[2]
    layout = found.outcome.layout
    assert links_between(found.problem, layout) == {"intra_node"}
    wide, problem = replace(layout, dp_replicate=2), replace(found.problem, num_devices=8)
    assert links_between(problem, wide) == {"intra_node", "inter_node"}
    assert "links between nodes -20%" in map(str, changes(problem, wide))
    assert links_between(replace(found.problem, num_devices=1), Layout()) == set()


def test_slack_is_where_the_step_becomes_longer() -> None:
    _, _, found = tight()
    problem, chosen = found.problem, found.outcome
    times = found.slacks["links inside a node"]
    assert times and times > 1

    def step_s(factor: float) -> float:
        changed = on(problem, with_links(problem.cluster, ("intra_node",), 1 / factor))
        return StepModel(changed).predict(chosen.layout, chosen.policies).cost.step_s

    limit = (1 + LONGER) * chosen.cost.step_s
    assert step_s(times) <= limit < step_s(1.05 * times)
    assert slack(problem, chosen, HOST_LINKS) is None  # nothing is offloaded


def test_a_faster_link_has_every_rate_of_it_faster() -> None:
    cluster = made_up_cluster()
    links = tuple(replace(link, together_bytes_per_s=7e9, points=((1024, 3e9), (2**20, 9e9))) for link in cluster.links)
    cluster = replace(cluster, links=links)
    changed = with_links(cluster, HOST_LINKS, 2)
    for before, after in zip(cluster.links, changed.links, strict=True):
        times = 2 if before.name in HOST_LINKS else 1
        assert after.seconds(5000) - after.latency_s == pytest.approx((before.seconds(5000) - before.latency_s) / times)
        assert after.together_bytes_per_s == times * 7e9
        assert after.latency_s == before.latency_s
    assert changed.links[0].both_ways_bytes_per_s == 2 * 40e9


def test_a_slower_place_slows_the_links_of_its_collectives() -> None:
    """They go before the plain link of the place, which is then not used at all."""
    cluster = made_up_cluster()
    own = Link("intra_node/all_to_all", 3e11, 1e-5, "made up")
    assert (
        with_links(replace(cluster, links=(*cluster.links, own)), ("intra_node",), 0.5).links[-1].bytes_per_s == 1.5e11
    )
    everywhere = tuple(replace(cluster.link("intra_node"), name=f"intra_node/{kind}") for kind in COLLECTIVES)
    _, plan, found = tight()
    [by_kind] = explained(replace(cluster, links=(*cluster.links, *everywhere)), plan)
    assert by_kind.slacks == found.slacks


@pytest.mark.parametrize("measured", [False, True])
def test_a_faster_op_is_that_op_alone(measured: bool) -> None:
    device = made_up_cluster().device
    if measured:
        timing = Timing("linear", "bfloat16", 4096, 192, 1e-3, 2e-3)
        attention = replace(timing, op="attention", length=400)
        device = replace(device, timings=(timing, attention), attention_points=())
    for op, other in (("linear", "attention"), ("attention", "linear")):
        before, after = rates_of(device), rates_of(faster(device, op, 1.25))
        seconds = {
            "linear": [rates.linear("bfloat16", 40960, 1920, 1920) for rates in (before, after)],
            "attention": [rates.attention("bfloat16", 40960, 1920, 400) for rates in (before, after)],
        }
        assert seconds[op][0].forward_s == pytest.approx(1.25 * seconds[op][1].forward_s)
        assert seconds[op][0].backward_s == pytest.approx(1.25 * seconds[op][1].backward_s, rel=0.01)
        assert seconds[other][0] == seconds[other][1]


def test_words_of_blocks_and_of_differences() -> None:
    keep, again = Policy.keep(), Policy.recompute()
    assert (
        blocks_in_words([again] * 2 + [keep]) == "blocks 0 to 1: recompute all but the input; block 2: keep everything"
    )
    assert blocks_in_words([again, keep] * 3) == (
        "3 of 6 blocks: recompute all but the input; 3 of 6 blocks: keep everything"
    )
    assert policy_in_words(replace(again, block_input=OFFLOAD)) == "offload the input, recompute the rest"
    assert policy_in_words(Policy(OFFLOAD, "recompute", "keep", "recompute", "keep")) == (
        "offload block_input, recompute qkv and mlp_pre"
    )
    mine = Layout(1, 4, 2, ShardSpec("frames", temporal="tokens"), 1, 2)
    other = Layout(1, 2, 4, ShardSpec("tokens", spatial="heads"), 1, 4)
    assert difference(other, [again, keep], mine, [keep, keep]) == (
        "2 instead of 4 sharded data-parallel ranks, 4 instead of 2 sequence-parallel ranks, tokens cut, resharded to heads "
        "instead of frames cut, resharded to tokens, recomputes in 1 instead of 0 blocks"
    )


def test_words_differ_where_choices_do() -> None:
    words = {policy: policy_in_words(policy) for policy in POLICIES}
    assert len(set(words.values())) == len(POLICIES)
    for one in POLICIES:
        for other in POLICIES:
            assert bool(difference(Layout(), [one], Layout(), [other])) == (one != other)


def test_a_plan_of_something_else_is_refused(tmp_path: Path) -> None:
    cluster, plan, _ = tight()
    other = replace(cluster, device=replace(cluster.device, name="Made-up 2"))
    other.save(tmp_path / "c.json")
    with pytest.raises(UserError, match="was made for 'Made-up 1'.*c.json has 'Made-up 2'.*give the cluster file"):
        made_from(plan, tmp_path / "c.json")
    replace(cluster, num_nodes=1, num_devices_per_node=2).save(tmp_path / "small.json")
    assert made_from(plan, tmp_path / "small.json").num_devices == 4  # as many nodes as the Plan's ranks fill
    with pytest.raises(UserError, match="is for model .*, vchitect-2b is .*--model"):
        config_of(plan, "vchitect-2b")
    (tmp_path / "config.json").write_text(json.dumps(asdict(CONFIG)))
    assert config_of(plan, str(tmp_path)) == CONFIG
    assert config_of(replace(plan, model=preset("vchitect-2b").fingerprint()), str(tmp_path)) == preset("vchitect-2b")


def arguments(folder: Path, **changed: object) -> argparse.Namespace:
    (folder / "config.json").write_text(json.dumps(asdict(CONFIG)))
    given = {
        "plan": str(folder / "plan.json"),
        "cluster": None,
        "model": str(folder),
        "json": False,
        "out": "plan.json",
    }
    return argparse.Namespace(**{**given, **changed})


def test_the_command_prints_words_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = made_up_cluster(memory_bytes=64 * 2**30)
    plan = made_up_plan(cluster)
    plan.save(tmp_path / "plan.json")
    assert run(arguments(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "needs the cluster file" in shown and "what would change it" not in shown
    cluster.save(tmp_path / "cluster.json")  # beside the Plan, where autotune puts it
    assert run(arguments(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "needs the cluster file" not in shown and "what would change it" in shown
    assert run(arguments(tmp_path, json=True)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["hash"] == plan.digest()
    found = printed["explained"]["32x512x384"]
    assert found["step_s"] == pytest.approx(plan.entries[0].predicted.step_s)
    assert found["spare_gib"] == pytest.approx(found["limit_gib"] - found["peak_gib"])
    assert sum(found["peak_parts_gib"].values()) == pytest.approx(found["peak_gib"])
    assert found["microbatch_streams"]["exchange"]["busy_s"] > 0
    assert found["changes"][0]["change"] == "no change"


def test_one_device_without_links_is_explained_too() -> None:
    cluster = replace(made_up_cluster(memory_bytes=2**31), links=(), num_nodes=1, num_devices_per_node=1)
    shape = made_up_plan(made_up_cluster()).entries[0].video_shape
    plan = plan_run(CONFIG, [shape], cluster, batch=1, num_text_tokens=16, dtype="bfloat16")
    [found] = explained(cluster, plan)
    assert found.slacks == {}
    assert layout_of(plan, plan.entries[0]) == Layout()
    assert [item.change.rpartition(" ")[0] for item in found.effects[1::2]] == [MEMORY, "products", "attention"]
    assert "one rank" in all_said(found)


def test_the_problem_is_the_one_that_was_planned() -> None:
    cluster, plan, _ = tight()
    entry = plan.entries[0]
    problem = problem_of(replace(plan, parked=("optimizer",)), entry, cluster, CONFIG)
    assert (problem.batch, problem.num_devices, problem.encode, problem.parked) == (4, 4, False, ("optimizer",))
    timed = replace(entry.predicted, step_parts_s={**entry.predicted.step_parts_s, "encode_s": 0.1})
    assert problem_of(plan, replace(entry, predicted=timed), cluster, CONFIG).encode
