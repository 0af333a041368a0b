"""The choice of one layout against every assignment, its bounds, its sketch.

pytest tests/autotune/test_policies.py; clusters are planner_cases.py's.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from planner_cases import FAST, SLOW, Few, every, fastest, gpus, problem

from vchitect_fast.autotune.bounds import dominant, fits, lower_hull
from vchitect_fast.autotune.choices import Choice, Path, arranged, neighbours, useful
from vchitect_fast.autotune.layout import Layout
from vchitect_fast.autotune.model import StepModel
from vchitect_fast.autotune.policies import Blocks, PolicySearch
from vchitect_fast.autotune.space import FRAMES
from vchitect_fast.cluster import Cluster
from vchitect_fast.plan import OFFLOAD, Policy
from vchitect_fast.shapes import VideoShape

AGAIN = Policy.recompute()
ALL_OUT = Policy(*[OFFLOAD] * 5)
INPUT_OUT = replace(AGAIN, block_input=OFFLOAD)
CASES = {
    "fast link": gpus(host=FAST),
    "link as fast as compute": gpus(host=2e9),
    "slow link": gpus(host=SLOW),
    "little host memory": gpus(host=FAST, host_gib=0.02),
    "pressure": gpus(host=2e9, pressure_fraction=0.0005, remap_s_per_gib=3.0),
    "no link": replace(gpus(), links=()),
}


def searched(model: StepModel, layout: Layout) -> PolicySearch:
    return PolicySearch(model, layout, model.limits())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CASES)
def test_equals_the_best_of_every_assignment(name: str, seed: int) -> None:
    on, layout = CASES[name], Layout(microbatch=1, accumulation=2)
    whole = Few(problem(on), seed=seed)
    outcomes = [
        item
        for item in every(whole, [layout])
        if on.links or not any(way.moved_bytes for way in item.ways)  # without a link copies have no price
    ]
    peaks = sorted({item.memory.peak_bytes for item in outcomes})
    for limit in [peaks[-1], *peaks[:: max(1, len(peaks) // 12)]]:
        model = Few(problem(on), limit, seed=seed)
        found = searched(model, layout).search()
        expected = fastest(model, outcomes)
        assert (found.best and found.best.cost.step_s) == expected
        assert found.proven  # that nothing is better was shown, not hoped
        if found.best is not None:
            assert fits(found.best, model.limits())
    assert len(peaks) > 3


def test_nothing_is_lost_by_leaving_out_what_others_beat() -> None:
    """All 54 Policies of two blocks."""
    layout = Layout(microbatch=2)
    outcomes = every(StepModel(problem(gpus(host=2e9), num_layers=2)), [layout])
    peaks = sorted(item.memory.peak_bytes for item in outcomes)
    for limit in (peaks[0], peaks[len(peaks) // 3], peaks[-1] - 1):
        model = StepModel(problem(gpus(host=2e9), num_layers=2), limit)
        best = searched(model, layout).search().best
        assert best is not None
        assert best.cost.step_s == fastest(model, outcomes)


def test_one_layer() -> None:
    model = StepModel(problem(gpus(), num_layers=1))
    best = searched(model, Layout(microbatch=2)).search().best
    assert best is not None
    assert best.policies == (Policy.keep(),)


@pytest.mark.parametrize("name", CASES)
def test_bounds_are_never_above_a_prediction(name: str) -> None:
    on, layout, draw = CASES[name], Layout(microbatch=1, accumulation=2), random.Random(0)
    model = StepModel(problem(on, num_layers=6))
    ways = model.ways(layout)
    found = []
    for _ in range(25):
        policies = [
            draw.choice(ways[0]).policy,
            *(draw.choice(ways[1]).policy for _ in range(4)),
            draw.choice(ways[2]).policy,
        ]
        outcome = model.predict(replace(layout, prefetch_depth=draw.choice((1, 2, 3))), policies)
        if on.links or not any(way.moved_bytes for way in outcome.ways):
            found.append(outcome)
    blocks = Blocks(model, layout)
    keep = searched(model, layout).keep
    for outcome in found:
        limits = replace(model.limits(), device_bytes=outcome.memory.peak_bytes)
        search = PolicySearch(model, layout, limits, blocks=lambda: blocks)
        again_s, moved = (sum(getattr(way, name) for way in outcome.ways) for name in ("again_s", "moved_bytes"))
        slack = 1 + 1e-9
        assert search.bounds.step_s(again_s, moved) <= outcome.cost.step_s * slack
        if fits(outcome, search.limits):
            assert search.least_s <= outcome.cost.step_s * slack
        spared = sum(a.kept_bytes - b.kept_bytes for a, b in zip(keep.ways, outcome.ways, strict=True))
        assert keep.memory.peak_bytes - spared <= outcome.memory.peak_bytes


def test_the_bound_bites() -> None:
    """It is above the time of keeping everything where memory forces a part of it away."""
    model = StepModel(problem(gpus(host=SLOW), num_layers=8))
    keep = searched(model, Layout(microbatch=2)).keep
    tight = replace(model.limits(), device_bytes=keep.memory.peak_bytes - sum(way.kept_bytes for way in keep.ways) // 3)
    search = PolicySearch(model, Layout(microbatch=2), tight)
    best = search.search().best
    assert best is not None
    assert keep.cost.step_s < search.least_s <= best.cost.step_s < 1.1 * search.least_s
    none = PolicySearch(model, Layout(microbatch=2), replace(tight, device_bytes=1000))
    assert none.least_s == float("inf")
    assert none.search().best is None


def test_says_keep_where_everything_fits() -> None:
    search = searched(StepModel(problem(gpus(), num_layers=12)), Layout(microbatch=2))
    found = search.search()
    assert found.best is search.keep
    assert found.proven
    assert len(search.seen) == 1


def pressed(fraction: float, price_s: float) -> Cluster:
    return gpus(host=SLOW, pressure_fraction=fraction, remap_s_per_gib=price_s)


def test_recomputes_below_the_limit_where_pressure_costs_more() -> None:
    layout = Layout(microbatch=2)
    keep = searched(StepModel(problem(gpus(host=SLOW), num_layers=8)), layout).keep
    fraction = 0.8 * keep.memory.peak_bytes / gpus().device.memory_bytes
    dear = searched(StepModel(problem(pressed(fraction, 1e4), num_layers=8)), layout).search().best
    cheap = searched(StepModel(problem(pressed(fraction, 1e-6), num_layers=8)), layout).search().best
    assert dear is not None and cheap is not None
    assert dear.memory.peak_bytes <= 0.8 * keep.memory.peak_bytes
    assert dear.cost.recompute_s > 0 == dear.cost.parts()["pressure_s"]
    assert cheap.policies == keep.policies


def tight_search(host: float, share: float, num_layers: int = 12, **layout: object) -> PolicySearch:
    """With memory for such a share of what keeping everything saves."""
    asked = problem(gpus(host=host), num_layers=num_layers, shape=VideoShape(16, 256, 256))
    model, given = StepModel(asked), Layout(microbatch=2, **layout)  # type: ignore[arg-type]
    keep = searched(model, given).keep
    saved = sum(way.kept_bytes for way in keep.ways)
    limit = keep.memory.peak_bytes - int((1 - share) * saved)
    return PolicySearch(model, given, replace(model.limits(), device_bytes=limit))


def test_refuses_to_offload_everything_over_a_slow_link_and_does_so_over_a_fast_one() -> None:
    slow, fast = (tight_search(host, 0.6).search().best for host in (SLOW, FAST))
    assert slow is not None and fast is not None
    saved = sum(way.kept_bytes for way in tight_search(SLOW, 0.6).keep.ways)
    assert slow.host_bytes < 0.02 * saved < 0.2 * saved < fast.host_bytes
    assert slow.cost.recompute_s > 0 == slow.cost.parts()["copy_s"]
    assert fast.cost.step_s < slow.cost.step_s
    everything = tight_search(SLOW, 0.6)
    assert everything.predict((ALL_OUT,) * 11 + (Policy.keep(),)).cost.step_s > 2 * slow.cost.step_s


def test_twelve_layers_are_near_the_bound() -> None:
    """What is found cannot be much better than this above what no choice can beat (measured: at most 1.8 and 8.9 %)."""
    for host, above in ((FAST, 1.02), (4e9, 1.02), (SLOW, 1.09)):
        for share in (0.4, 0.6, 0.8):
            search = tight_search(host, share)
            found = search.search()
            assert found.best is not None
            assert found.best.cost.step_s <= above * search.least_s, (host, share)
            assert len(search.seen) < 60


def test_a_cutoff_leaves_only_what_beats_it() -> None:
    best = tight_search(4e9, 0.6).search().best
    assert best is not None
    assert tight_search(4e9, 0.6).search(best.cost.step_s).best is None
    better = tight_search(4e9, 0.6).search(1.01 * best.cost.step_s).best
    assert better is not None
    assert better.cost.step_s <= best.cost.step_s


def test_given_policies_are_not_changed() -> None:
    policies = (AGAIN, Policy.keep(), INPUT_OUT, Policy.keep())
    model = StepModel(problem(gpus(host=1e8), num_layers=4))
    found = PolicySearch(model, Layout(microbatch=2), model.limits(), policies).search()
    assert found.best is not None
    assert found.best.policies == policies
    depths = [model.predict(Layout(microbatch=2, prefetch_depth=depth), policies).cost.step_s for depth in (1, 2, 3)]
    assert found.best.cost.step_s == min(depths)


def test_the_sketch_is_near_the_prediction() -> None:
    """In time and memory, with copies that are hidden and copies that are not, and exchanges between ranks."""
    draw = random.Random(1)
    for layout, number in ((Layout(microbatch=2), 1), (Layout(dp_shard=2, sp=2, shard=FRAMES, accumulation=1), 4)):
        for host in (1e11, 2e9):
            model = StepModel(problem(gpus(number, host=host), num_layers=10))
            search = searched(model, layout)
            sketch = search._sketch()
            for _ in range(10):
                number_out, number_again = draw.randint(0, 5), draw.randint(0, 4)
                rest = 9 - number_out - number_again
                policies = (ALL_OUT,) * number_out + (AGAIN,) * number_again + (Policy.keep(),) * (rest + 1)
                outcome = model.predict(layout, policies)
                seconds, peak = sketch.of(outcome.ways, 1)
                assert seconds == pytest.approx(outcome.cost.step_s, rel=0.03)
                assert peak == pytest.approx(outcome.memory.peak_bytes, rel=0.05)


def test_lower_hull() -> None:
    points = [(0, 0.0), (1, 3.0), (2, 2.0), (2, 1.0), (3, 6.0), (4, 4.0), (4, 5.0)]
    assert lower_hull(points) == [0, 3, 5]
    assert lower_hull([(0, 0.0)]) == [0]


def test_dominant_leaves_out_what_another_beats_in_everything() -> None:
    ways = StepModel(problem(gpus())).ways(Layout())[1]
    kept = dominant(ways)
    policies = {way.policy for way in kept}
    assert {Policy.keep(), AGAIN, INPUT_OUT} <= policies
    assert len(kept) <= len(ways)
    worse = replace(ways[0], again_s=1.0, policy=ALL_OUT)
    assert worse not in dominant([*ways, worse])


def test_a_path_spares_the_least_that_is_asked() -> None:
    ways = StepModel(problem(gpus())).ways(Layout())[1]
    by_policy = {way.policy: way for way in ways}
    keep, again, out = by_policy[Policy.keep()], by_policy[AGAIN], by_policy[ALL_OUT]
    each = keep.kept_bytes - again.kept_bytes
    path = Path(None, 0, (keep, again), 5)
    assert path.counts(0) == ((keep.policy, 5),)
    assert path.counts(1) == ((AGAIN, 1), (keep.policy, 4))
    assert path.counts(each) == ((AGAIN, 1), (keep.policy, 4))
    assert path.counts(each + 1) == ((AGAIN, 2), (keep.policy, 3))
    assert path.counts(5 * each) == ((AGAIN, 5),)
    assert path.counts(5 * each + 1) is None
    both = Path(out, 2, (keep, again), 5)
    assert both.counts(2 * (keep.kept_bytes - out.kept_bytes) + 1) == ((ALL_OUT, 2), (AGAIN, 1), (keep.policy, 2))


def test_what_keeps_least_comes_first_and_offloading_blocks_first_or_spread() -> None:
    ways = {way.policy: way for way in StepModel(problem(gpus())).ways(Layout())[1]}
    keep = Policy.keep()
    choice = Choice(((keep, 3), (AGAIN, 2), (ALL_OUT, 2)))
    assert arranged(choice, ways) == (ALL_OUT, ALL_OUT, AGAIN, AGAIN, keep, keep, keep, keep)
    spread = arranged(replace(choice, spread=True), ways)
    assert sorted(map(str, spread)) == sorted(map(str, arranged(choice, ways)))
    places = [i for i, policy in enumerate(spread) if policy == ALL_OUT]
    assert places[1] - places[0] > 2
    assert [policy for policy in spread if policy != ALL_OUT] == [AGAIN, AGAIN, keep, keep, keep, keep]


def test_neighbours_change_one_block_or_two() -> None:
    _, middle, last = StepModel(problem(gpus())).ways(Layout())
    choice = Choice(((Policy.keep(), 3), (AGAIN, 1)))
    for two in (False, True):
        near = list(neighbours(choice, useful(middle, 1e-9), last, two=two))
        assert choice not in near
        assert all(sum(number for _, number in item.counts) == 4 for item in near)
        assert all(number > 0 for item in near for _, number in item.counts)
    assert any(item.counts == ((Policy.keep(), 4),) for item in neighbours(choice, middle, last))
