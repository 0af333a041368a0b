"""StepModel: with one device it is the sums of cost.py and memory.py; with links it does what can be worked out by hand.

pytest tests/autotune/test_model.py; on the made-up device, plus links whose rates are chosen for the case.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up_device import cluster, device

from vchitect_fast.architecture import preset
from vchitect_fast.autotune import model
from vchitect_fast.autotune.calibrate import Calibration
from vchitect_fast.autotune.cost import step_cost
from vchitect_fast.autotune.layout import Layout, Problem
from vchitect_fast.autotune.memory import GIB, step_memory
from vchitect_fast.autotune.model import StepModel
from vchitect_fast.autotune.streams import STREAMS
from vchitect_fast.cluster import Cluster, Link
from vchitect_fast.errors import UserError
from vchitect_fast.plan import OFFLOAD, RECOMPUTE, Policy, ShardSpec
from vchitect_fast.shapes import VideoShape

TINY = replace(preset("vchitect-tiny"), num_layers=6)
SHAPE = VideoShape(8, 256, 256)
KEPT, AGAIN = Policy.keep(), Policy.recompute()
ALL_OUT = Policy(*[OFFLOAD] * 5)
FRAMES = ShardSpec("frames", temporal="tokens")
HEADS, ROWS = ShardSpec("tokens", spatial="heads"), ShardSpec("tokens", spatial="frames")


def gpus(number: int = 1, per_node: int = 8, **rates: float) -> Cluster:
    """The made-up device as a GPU with 60 GB/s to the host, 1 GB/s inside a node and a tenth of it outside, or as given."""
    speeds = {"device_to_host": 6e10, "host_to_device": 6e10, "intra_node": 1e9, "inter_node": 1e8, **rates}
    links = tuple(Link(name, rate, 0.0, "made up") for name, rate in speeds.items())
    made = cluster()
    return replace(
        made, device=device(kind="cuda"), links=links, num_nodes=-(-number // per_node),
        num_devices_per_node=min(number, per_node), host_memory_bytes=64 * GIB,
    )  # fmt: skip


def problem(on: Cluster, num_devices: int = 1, **changes: object) -> Problem:
    given = {"cluster": on, "config": TINY, "shape": SHAPE, "batch": 8, "num_text_tokens": 16, "dtype": "float32"}
    return Problem(**{**given, "num_devices": num_devices, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, 2, 6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_device_is_the_sum_of_the_formulas(number: int, dtype: str) -> None:
    layout = Layout(microbatch=2, accumulation=4)
    asked = problem(cluster(), dtype=dtype)
    policies = (AGAIN,) * number + (KEPT,) * (6 - number)
    found = StepModel(asked).predict(layout, policies)
    work = asked.workload(layout)
    expected = step_cost(work, device(), dtype, num_recomputed=number, accumulation=4)
    assert found.cost.parts() == pytest.approx(expected.parts())
    memory = step_memory(work, device(), dtype, num_recomputed=number, accumulation=4, policy=policies)
    assert found.memory.peak_bytes == memory.peak_bytes
    assert max(used for _, used in found.timeline.memory) == memory.peak_bytes
    assert found.timeline.memory == tuple(sorted(found.timeline.memory, key=lambda point: point[0]))
    assert (found.left_out, found.host_bytes) == ((), 0)


def test_hidden_copies_cost_nothing_and_free_the_device() -> None:
    """Two of six blocks go, the link is fast: the first fetch too runs behind the blocks before it."""
    policies = (ALL_OUT, KEPT, KEPT, ALL_OUT, KEPT, KEPT)
    model = StepModel(problem(gpus(), batch=1))
    kept, moved = model.predict(Layout(), (KEPT,) * 6), model.predict(Layout(), policies)
    assert moved.cost.copy_s == 0
    assert (
        moved.memory.saved_bytes == kept.memory.saved_bytes - moved.ways[0].working_bytes - moved.ways[3].working_bytes
    )
    assert moved.host_bytes >= moved.ways[0].moved_bytes + moved.ways[3].moved_bytes


def test_a_slow_link_is_waited_for_and_its_bytes_are_still_there() -> None:
    """Copies that take longer than the step: both ways are exposed, and the peak is no lower than with everything kept."""
    policies = (ALL_OUT,) * 5 + (KEPT,)
    model = StepModel(problem(gpus(device_to_host=1e7, host_to_device=1e7), batch=1))
    kept, moved = model.predict(Layout(), (KEPT,) * 6), model.predict(Layout(), policies)
    bytes_moved = sum(item.moved_bytes for item in moved.ways)
    whole = moved.cost.step_s - moved.cost.optimizer_s
    assert 2 * bytes_moved / 1e7 <= whole <= 2 * bytes_moved / 1e7 + kept.cost.step_s * 2
    assert moved.memory.in_flight_bytes > 0.7 * bytes_moved
    assert moved.timeline.hidden("in") < 0.1


def test_fetching_further_ahead_hides_more_and_holds_more() -> None:
    policies = (ALL_OUT,) * 5 + (KEPT,)
    model = StepModel(problem(gpus(host_to_device=5e8), batch=1))
    near, far = (model.predict(Layout(prefetch_depth=depth), policies) for depth in (1, 3))
    assert far.cost.copy_s <= near.cost.copy_s
    assert max(m for _, m in far.timeline.memory) >= max(m for _, m in near.timeline.memory)


def test_frames_exchange_less_than_heads_and_hide_half() -> None:
    """Volumes forward a layer: 2 with one hidden, 4, 2 (docs/design.md); backward the same."""
    model = StepModel(problem(gpus(4), 4, batch=1))
    policies = (KEPT,) * 6
    cost = {spec: model.predict(Layout(sp=4, shard=spec), policies).cost for spec in (FRAMES, HEADS, ROWS)}
    assert 0 < cost[FRAMES].exchange_s < cost[ROWS].exchange_s < cost[HEADS].exchange_s
    assert cost[HEADS].exchange_s == pytest.approx(2 * cost[ROWS].exchange_s)
    alone = StepModel(problem(cluster(), batch=1)).predict(Layout(), policies).cost
    assert cost[HEADS].forward_s == pytest.approx(alone.forward_s / 4, rel=0.02)


@pytest.mark.parametrize(("group", "times"), [("qkv", 1), ("branch_out", 1), ("both", 2), ("mlp_pre", 0)])
def test_only_a_group_made_again_is_exchanged_again(group: str, times: int) -> None:
    model = StepModel(problem(gpus(2), 2, batch=1))
    names = ("qkv", "branch_out") if group == "both" else (group,)
    changed = {name: RECOMPUTE for name in names} | ({"stats": RECOMPUTE} if "branch_out" in names else {})

    def count(first: Policy) -> int:
        found = model.predict(Layout(sp=2, shard=ROWS), (first, *(KEPT,) * 5))
        return sum(task.stream == "exchange" for task in found.timeline.tasks)

    assert count(KEPT) == 6 * 4
    assert count(replace(KEPT, **changed)) == 6 * 4 + times


def test_parameters_are_gathered_twice_a_microbatch_and_gradients_reduced_once_a_step() -> None:
    model = StepModel(problem(gpus(4), 4))
    one, four = (
        model.predict(Layout(dp_shard=4, microbatch=m, accumulation=n), (KEPT,) * 6) for m, n in ((2, 1), (1, 2))
    )
    for found, name in ((one, "gather"), (four, "gather")):
        tasks = [task for task in found.timeline.tasks if task.stream == name]
        assert sum(task.name == "gather" for task in tasks) == 12
        assert sum(task.name == "reduce" for task in tasks) == 7  # six blocks and what is outside them
    assert four.memory.gradients_bytes == 4 * TINY.num_parameters() > one.memory.gradients_bytes


def test_a_slow_network_only_matters_where_a_group_leaves_the_node() -> None:
    slow = gpus(4, per_node=2, inter_node=1e5)
    model = StepModel(problem(slow, 4, batch=2))
    policies = (KEPT,) * 6
    inside = model.predict(Layout(dp_replicate=2, sp=2, shard=FRAMES), policies).cost
    across = model.predict(Layout(sp=4, shard=FRAMES, microbatch=2), policies).cost
    assert inside.exchange_s < 0.01 * across.exchange_s
    assert inside.gather_s > 0  # its gradients are reduced over the network


def test_pressure_begins_where_the_device_says() -> None:
    calm = problem(gpus(), batch=1)
    peak = StepModel(calm).predict(Layout(), (KEPT,) * 6).memory.peak_bytes
    used = peak + 2**28
    for fraction, expected in ((1.0, 0.0), (0.5, 0.5 * used / GIB)):
        pressed = replace(calm.cluster.device, memory_bytes=used, pressure_fraction=fraction, remap_s_per_gib=1.0)
        asked = replace(calm, cluster=replace(calm.cluster, device=pressed))
        assert StepModel(asked).predict(Layout(), (KEPT,) * 6).cost.pressure_s == pytest.approx(expected)


def test_parked_states_are_away_but_for_the_update_and_waited_for() -> None:
    """12 bytes a parameter: 8 of AdamW, 4 of the average; gradients are the same in both."""
    here, away = problem(gpus(), batch=1), problem(gpus(), batch=1, parked=("optimizer", "average"))
    policies, number = (KEPT,) * 6, TINY.num_parameters()
    kept, parked = StepModel(here).predict(Layout(), policies), StepModel(away).predict(Layout(), policies)
    assert kept.memory.peak_bytes - parked.memory.peak_bytes == 12 * number
    assert parked.host_bytes - kept.host_bytes == 12 * number
    assert parked.cost.step_s - kept.cost.step_s == pytest.approx(
        2 * 12 * number / 6e10
    )  # one turn: it comes, then it leaves
    small = problem(gpus(), batch=1, parked=("optimizer", "average"), shape=VideoShape(1, 32, 32))
    update = StepModel(small).predict(Layout(), policies)
    assert update.fullest.phase == "update"
    assert update.memory.states_bytes == 4 * number + 8 * number + TINY.pos_embed_max_size**2 * TINY.hidden_dim * 4


def test_parked_states_of_many_turns_come_and_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten turns take the longer direction's time and one turn more; three are on the device for the update."""
    number = TINY.num_parameters()
    monkeypatch.setattr(model, "TURN_BYTES", -(-8 * number // 10))
    here, away = (problem(gpus(), batch=1, parked=p, shape=VideoShape(1, 32, 32)) for p in ((), ("optimizer",)))
    kept, parked = (StepModel(item).predict(Layout(), (KEPT,) * 6) for item in (here, away))
    assert parked.cost.step_s - kept.cost.step_s == pytest.approx(1.1 * 8 * number / 6e10)
    assert kept.memory.states_bytes - parked.memory.states_bytes == 8 * number - 3 * model.TURN_BYTES


def test_a_calibration_scales_seconds_and_adds_bytes() -> None:
    made = device(kind="cuda")
    known = Calibration(
        TINY.fingerprint(), made.fingerprint(), "float32", extra_bytes=1000, extra_rows=2.0, forward=2.0, backward=3.0,
        optimizer=5.0, num_points=1, num_timed=1, peak_error=None, step_error=None, source="made up",
    )  # fmt: skip
    plain, sharper = problem(gpus(), batch=1), problem(gpus(), batch=1, calibration=known)
    policies = (AGAIN,) * 3 + (KEPT,) * 3
    before, after = StepModel(plain).predict(Layout(), policies), StepModel(sharper).predict(Layout(), policies)
    for name, factor in (("forward_s", 2), ("backward_s", 3), ("recompute_s", 3), ("optimizer_s", 5)):
        assert after.cost.parts()[name] == pytest.approx(factor * before.cost.parts()[name])
    rows = plain.workload(Layout()).rows
    assert after.memory.peak_bytes - before.memory.peak_bytes == 1000 + 2 * rows * TINY.hidden_dim * 4
    with pytest.raises(UserError, match="the calibration is of dtype float32, this is planned for bfloat16"):
        StepModel(replace(sharper, dtype="bfloat16"))


def test_what_has_no_figure_is_named() -> None:
    bare = replace(gpus(4), links=())
    asked = problem(bare, 4, encode=True)
    found = StepModel(asked).predict(Layout(dp_shard=2, sp=2, shard=FRAMES, microbatch=4), (ALL_OUT,) * 6)
    assert found.left_out == (
        "copies to host memory", "exchanges", "gathered parameters and reduced gradients", "encoding"
    )  # fmt: skip
    assert (found.cost.copy_s, found.cost.exchange_s, found.cost.encode_s) == (0, 0, 0)


def test_limits_of_one_rank() -> None:
    limits = StepModel(problem(gpus(4), 4)).limits()
    assert limits.device_bytes == int(0.9 * 64 * GIB) - 2**28
    assert limits.host_bytes == int(0.6 * 64 * GIB / 4)
    assert StepModel(problem(cluster())).limits().host_bytes is None


def test_all_seconds_are_somebodys() -> None:
    """The simulated microbatch ends when its compute and the exposed seconds are over."""
    model = StepModel(problem(gpus(4), 4, batch=2))
    found = model.predict(Layout(dp_shard=2, sp=2, shard=HEADS), (ALL_OUT, AGAIN, KEPT, ALL_OUT, AGAIN, KEPT))
    cost, line = found.cost, found.timeline
    exposed = sum(line.exposed_s(name) for name in STREAMS)
    assert line.total_s == pytest.approx(cost.forward_s + cost.backward_s + cost.recompute_s + exposed)
    assert exposed == pytest.approx(cost.exchange_s + cost.gather_s + cost.copy_s)


def test_a_policy_for_every_block_is_asked_for() -> None:
    with pytest.raises(UserError, match="expected a Policy for each of 6 blocks, got 2"):
        StepModel(problem(cluster())).predict(Layout(), (KEPT, KEPT))
