"""`autotune scale`: sums against sums by hand, strong and weak, what does not fit, a recipe, the figure, mistakes.

pytest tests/autotune/test_scale.py; the machine and most Plans are made up, no torch.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from vchitect_fast.architecture import preset
from vchitect_fast.autotune import scale as verb
from vchitect_fast.autotune.scale_figure import draw
from vchitect_fast.autotune.scaling import TOTAL, Curve, Planner, Stage, asked, attempt, curves, stages_of
from vchitect_fast.cluster import Cluster, Device
from vchitect_fast.errors import UserError
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

CONFIG = preset("vchitect-nano")
SHORT, LONG = VideoShape(4, 64, 48), VideoShape(8, 64, 48)
CLUSTER = Cluster("made up", Device("some GPU", "cuda", 2**36), num_devices_per_node=8)
STAGE = Stage("", (SHORT, LONG), (3.0, 1.0), 64, 6400.0)
PEAK = 1e12


def planner(cluster: Cluster, stage: Stage) -> Plan:
    """A step takes 0.1 s of compute a sample of a device, as long again for each further 8 frames, and 10 ms to gather on 2 nodes or more."""
    devices = cluster.num_devices
    if stage.batch < devices:
        raise UserError(f"{devices} devices are too many for {stage.batch} samples; give a larger batch.")
    gather = 0.01 if cluster.num_nodes > 1 else 0.0
    entries = []
    for shape in stage.shapes:
        compute = 0.1 * stage.batch / devices * shape.num_frames / 4
        parts = {"forward_s": compute / 3, "backward_s": 2 * compute / 3, "gather_s": gather}
        found = Prediction(compute + gather, parts, 1.0 * shape.num_frames, {}, "made up")
        entries.append(PlanEntry(str(shape), (Policy.keep(),) * 2, 1, 1, found))
    mesh = {"dp_replicate": cluster.num_nodes, "dp_shard": 8, "sp": 1}
    return Plan("model", "device", "some GPU", "bfloat16", 16, tuple(entries), PEAK, mesh)


def curves_on(
    nodes: list[int], *, weak: bool = False, stages: tuple[Stage, ...] = (STAGE,), by: Planner = planner
) -> list[Curve]:
    items = asked(CLUSTER, stages, nodes, weak=weak)
    return curves(CONFIG, items, [attempt(by, item) for item in items], 16)


def test_sums_are_those_by_hand() -> None:
    (curve,) = curves_on([2, 1])
    one, two = curve.points
    assert [point.num_devices for point in curve.points] == [8, 16]
    steps = 6400 / 64
    assert one.seconds == pytest.approx(steps * (3 * 0.8 + 1.6) / 4)
    assert two.seconds == pytest.approx(steps * ((3 * 0.4 + 0.8) / 4 + 0.01))
    assert one.step_s == pytest.approx(1.0) and one.device_hours == pytest.approx(100 * 8 / 3600)
    tokens = 64 * (3 * SHORT.num_visual_tokens() + LONG.num_visual_tokens()) / 4
    assert one.tokens_per_s == pytest.approx(tokens / 1.0)
    flops = [Workload(CONFIG, shape, 64, 16).train_flops() for shape in (SHORT, LONG)]
    assert one.mfu == pytest.approx((3 * flops[0] + flops[1]) / 4 / (1.0 * 8 * PEAK))
    assert one.efficiency == 1 and two.efficiency == pytest.approx(0.5 / 0.51)
    assert one.exposed("gather_s") == 0 and two.exposed("gather_s") == pytest.approx(0.01 / 0.51)
    assert one.peak_gib == 8 and two.meshes == ({"dp_replicate": 2, "dp_shard": 8, "sp": 1},)


def test_strong_and_weak_are_different_questions() -> None:
    (strong,) = curves_on([1, 2, 4])
    (weak,) = curves_on([1, 2, 4], weak=True)
    assert [point.num_steps for point in strong.points] == [100, 100, 100]
    assert [point.num_steps for point in weak.points] == [100, 50, 25]  # the same samples
    assert [round(point.step_s, 6) for point in weak.points] == [1.0, 1.01, 1.01]
    assert weak.points[-1].efficiency > strong.points[-1].efficiency
    title = [verb.title_of(CLUSTER, [STAGE], weak=question) for question in (False, True)]
    assert (
        "strong scaling: the same 64 samples" in title[0]
        and "weak scaling: 64 samples a step at the fewest" in title[1]
    )


def test_what_does_not_fit_has_its_reason_and_no_point() -> None:
    (curve,) = curves_on([1, 8, 16, 32])
    assert [point.num_nodes for point in curve.points] == [1, 8]
    assert list(curve.refused) == [16, 32] and "256 devices are too many for 64 samples" in curve.refused[32]
    with pytest.raises(UserError, match="128 devices are too many for 64 samples"):
        curves_on([16, 32])


def test_efficiency_is_of_the_fewest_nodes_that_fit() -> None:
    def from_two(cluster: Cluster, stage: Stage) -> Plan:
        if cluster.num_nodes < 2:
            raise UserError("3 GiB are missing.")
        return planner(cluster, stage)

    (curve,) = curves_on([1, 2, 4], by=from_two)
    assert [point.num_nodes for point in curve.points] == [2, 4] and curve.points[0].efficiency == 1


def test_stages_add_up_where_all_of_them_fit() -> None:
    first, second = replace(STAGE, name="a"), replace(STAGE, name="b", batch=16, num_samples=160.0)
    a, b, both = curves_on([1, 2, 4], stages=(first, second))
    assert (a.name, b.name, both.name) == ("a", "b", TOTAL)
    assert list(both.refused) == [4] and both.refused[4].startswith("stage b: 32 devices")
    for place, point in enumerate(both.points):
        assert point.seconds == pytest.approx(a.points[place].seconds + b.points[place].seconds)
        assert point.num_steps == 110 and len(point.meshes) == 2
    assert both.points[0].mfu == pytest.approx(both.points[0].flops / (both.points[0].seconds * 8 * PEAK))


def test_a_recipe_gives_its_stages_batches_steps_and_weights(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: vchitect-nano\nmanifest: clips.jsonl\ncache: cached\nstages:\n"
        "  - {name: image, shapes: [1x64x48], batch: 32, steps: 10, plan: a.json}\n"
        "  - {name: video, shapes: [4x64x48, 8x64x48], mixture: {4x64x48: 3, 8x64x48: 1}, batch: 16, steps: 5,"
        " mesh: {dp_shard: 2}, plan: b.json, cache: null}\n"
    )
    model, stages = stages_of(path)
    assert model == "vchitect-nano"
    assert stages == [
        Stage("image", (VideoShape(1, 64, 48),), (1.0,), 32, 320.0),
        Stage("video", (SHORT, LONG), (3.0, 1.0), 16, 80.0, encode=True),
    ]


@pytest.mark.parametrize(
    ("nodes", "weak", "message"),
    [
        ([0, 1], False, "whole numbers from 1 up, got 0, 1"),
        ([], False, "got none"),
        ([128, 3], True, "grows in whole samples, got 64 at 3 nodes and so 2730.67 at 128"),
    ],
)
def test_numbers_of_nodes_that_are_none(nodes: list[int], weak: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        curves_on(nodes, weak=weak)


def test_the_figure_shows_every_curve_and_is_the_same_twice(tmp_path: Path) -> None:
    found = curves_on([1, 2, 4], stages=(replace(STAGE, name="first one"), replace(STAGE, name="second one")))
    for name in ("a.svg", "b.svg"):
        draw(found, tmp_path / name, "a title", price=2.5)
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.svg").read_text()
    for words in ("a title", "first one", "second one", TOTAL, "if nothing were lost", "cost, at 2.5 a device-hour"):
        assert words in svg
    draw(found, tmp_path / "a.png", "a title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write"):
        draw(found, tmp_path / "file" / "a.svg", "a title")


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name, default in (("--cluster", None), ("--model", "vchitect-nano"), ("--dtype", "auto")):
        parser.add_argument(name, default=default)
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    verb.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a run with the planner above."""
    monkeypatch.setattr(verb.Search, "__call__", lambda self, cluster, stage: planner(cluster, stage))
    CLUSTER.save(tmp_path / "cluster.json")
    where = ["--cluster", str(tmp_path / "cluster.json")]
    return [*where, "--shapes", str(SHORT), "--batch", "64", "--jobs", "1", "--nodes", "1", "2", "16"]


def test_the_verb_prints_a_table_and_draws(
    made_up: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "scale.svg"
    assert verb.run(arguments(*made_up, "--price", "2", "--figure", str(figure))) == 0
    printed = capsys.readouterr().out
    for words in (
        "strong scaling: the same 64 samples",
        "1x8x1",
        "gather 2.4%",
        "98%",
        "cost",
        "not on 16 nodes: 128 devices",
    ):
        assert words in printed
    assert figure.exists() and f"wrote {figure}" in printed
    assert verb.run(arguments(*made_up)) == 0
    assert "cost" not in capsys.readouterr().out


def test_the_real_search_gives_the_same_in_processes_of_its_own() -> None:
    cluster, search = Cluster.load("8xh100"), verb.Search(CONFIG, 16, "bfloat16")
    stages = [
        Stage("fits", (SHORT,), (1.0,), 16, 1e6),
        Stage("is too large", (VideoShape(1, 512, 384),), (1.0,), 16, 1e6),
    ]
    items = asked(cluster, stages, [1, 2], weak=False)
    one, two = (verb.plans_of(search, items, num_jobs, quiet=True) for num_jobs in (1, 2))
    assert one[:2] == two[:2] and list(map(str, one[2:])) == list(map(str, two[2:]))
    fits, too_large, _ = curves(CONFIG, items, one, 16)
    assert [math.prod(point.meshes[0].values()) for point in fits.points] == [8, 16] and not fits.refused
    assert not too_large.points and all("position grid" in reason for reason in too_large.refused.values())


def test_the_verb_as_json(made_up: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert verb.run(arguments(*made_up, "--price", "2", "--weak", "--samples", "640", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    (curve,) = found["curves"]
    assert found["scaling"] == "weak" and [point["num_devices"] for point in curve["points"]] == [8, 16, 128]
    first = curve["points"][0]
    assert first["num_steps"] == 10 and first["cost"] == pytest.approx(2 * first["device_hours"])
    assert first["step_s"] == pytest.approx(0.8) and 0 < first["mfu"] < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --cluster"),
        (["--cluster", "c.json"], "give --shapes 32x512x384 or several, or --recipe"),
        (["--cluster", "c.json", "--shapes", "1x64x48", "--recipe", "r.yaml"], "leave out --shapes"),
        (["--cluster", "c.json", "--shapes", "1x64x48", "--batch", "0"], "--batch must be"),
        (["--cluster", "c.json", "--shapes", "1x64x48", "--samples", "nan"], "--samples must be above 0"),
        (["--cluster", "c.json", "--shapes", "1x64x48", "--price", "-1"], "--price must be 0 or more"),
        (["--cluster", "c.json", "--shapes", "1x64x48", "--jobs", "0"], "--jobs must be"),
        (["--cluster", "c.json", "--shapes", "1x64x48", "--figure", "a.pdf"], "end in .svg or .png"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        verb.run(arguments(*words))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.5, "0.5"), (12.345, "12.35"), (999.9, "999.9"), (1234.0, "1,234"), (12340.0, "12.34k"), (2.5e6, "2.5M")],
)
def test_numbers_in_short(value: float, shown: str) -> None:
    assert verb.in_short(value) == shown
