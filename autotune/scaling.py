"""How a training scales with nodes: the best Plan at each number of nodes, and what it gives and costs.

    seconds       = sum over shapes of steps x predicted step_s      steps = samples / batch, divided among shapes by weight
    tokens/s      = visual tokens / seconds                          T x S of a sample
    MFU           = 3 forwards' FLOPs / (seconds x devices x peak)   workload.py; peak: the device's matmul FLOP/s in the Plan
    device-hours  = seconds x devices / 3600
    efficiency    = tokens/s of one device / the same at the fewest nodes that fit

Two questions, never mixed: strong scaling has the same batch at every number of nodes, weak scaling has a batch that grows
with them. The samples of the training are the same in both. What a step takes is the search's; this file only adds up.
Not included, because Plans do not: reading data, validation, saving, failures and slow devices. Layer 0 only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.cluster import Cluster
from vchitect_fast.errors import UserError
from vchitect_fast.plan import Plan
from vchitect_fast.recipe import Recipe
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

EXPOSED = ("exchange_s", "gather_s", "copy_s")  # parts of a predicted step that nothing hides
TOTAL = "all stages"


@dataclass(frozen=True)
class Stage:
    """What is trained: one stage of a recipe, or the whole of a run without one."""

    name: str
    shapes: tuple[VideoShape, ...]
    weights: tuple[float, ...]  # of steps, one a shape
    batch: int  # samples a step, over all ranks; of weak scaling, at the fewest nodes
    num_samples: float
    encode: bool = False  # latents are not cached, the codec runs in the step

    def mean(self, values: Sequence[float]) -> float:
        """Of a step, over the shapes."""
        return sum(w * value for w, value in zip(self.weights, values, strict=True)) / sum(self.weights)


@dataclass(frozen=True)
class Asked:
    """One Plan to be found."""

    cluster: Cluster  # its num_nodes are those asked for
    stage: Stage  # its batch is the step's there


Planner = Callable[[Cluster, Stage], Plan]  # the best Plan of a stage on a cluster


@dataclass(frozen=True)
class Point:
    """A stage on a number of nodes, or several stages after each other; sums over all their samples."""

    num_nodes: int
    num_devices: int
    num_steps: float
    seconds: float
    num_tokens: float
    flops: float  # of the model, three forwards
    exposed_s: dict[str, float]  # by part, of EXPOSED
    peak_gib: float
    peak_flops: float | None  # of one device
    meshes: tuple[dict[str, int], ...]  # one a stage
    efficiency: float = 1.0

    @property
    def step_s(self) -> float:
        """Mean over steps."""
        return self.seconds / self.num_steps

    @property
    def tokens_per_s(self) -> float:
        """Visual tokens, of all devices."""
        return self.num_tokens / self.seconds

    @property
    def mfu(self) -> float | None:
        """None where the device's peak is not known."""
        return self.flops / (self.seconds * self.num_devices * self.peak_flops) if self.peak_flops else None

    @property
    def device_hours(self) -> float:
        """For all samples."""
        return self.seconds * self.num_devices / 3600

    def exposed(self, part: str) -> float:
        """Share of the time."""
        return self.exposed_s[part] / self.seconds


@dataclass(frozen=True)
class Curve:
    """One stage, or all, over numbers of nodes."""

    name: str
    points: tuple[Point, ...]  # where it fits, fewest nodes first
    refused: dict[int, str]  # number of nodes -> why it does not


def stages_of(path: str | Path) -> tuple[str, list[Stage]]:
    """The model and the stages of a recipe file. Meshes in it are for one size and are searched anew."""
    recipe = Recipe.load(path)
    stages = []
    for item in recipe.stages:
        mixture = item.config.mixture or {}
        weights = tuple(float(mixture.get(str(shape), 1.0)) for shape in item.shapes)
        samples = float(item.config.steps * item.batch)
        stages.append(Stage(item.name, item.shapes, weights, item.batch, samples, item.config.cache is None))
    return recipe.stages[0].config.model, stages


def asked(cluster: Cluster, stages: Sequence[Stage], num_nodes: Sequence[int], *, weak: bool) -> list[Asked]:
    """Every stage on every number of nodes, fewest first, with the batch that it has there.

    weak  the batch grows with the nodes, from the stage's at the fewest

    Raises UserError for numbers of nodes that are none, or that a batch does not grow to in whole samples.
    """
    counts = sorted(dict.fromkeys(num_nodes))
    if not counts or counts[0] < 1:
        raise UserError(
            f"--nodes must be whole numbers from 1 up, got {', '.join(map(str, num_nodes)) or 'none'}; for example --nodes 1 2 4 8."
        )
    return [
        Asked(replace(cluster, num_nodes=count), replace(stage, batch=_batch(stage, counts, count, weak)))
        for stage in stages
        for count in counts
    ]


def attempt(planner: Planner, item: Asked) -> Plan | UserError:
    """The Plan, or why there is none."""
    try:
        return planner(item.cluster, item.stage)
    except UserError as error:
        return error


def curves(
    config: TransformerConfig, items: Sequence[Asked], plans: Sequence[Plan | UserError], num_text_tokens: int
) -> list[Curve]:
    """A Curve a stage, and of several stages one of them all.

    plans  what `attempt` gave for each of `items`

    Raises the first UserError where nothing fits anywhere.
    """
    errors = [plan for plan in plans if isinstance(plan, UserError)]
    if len(errors) == len(plans):
        raise errors[0]
    found = []
    for name in dict.fromkeys(item.stage.name for item in items):
        points, refused = [], {}
        for item, plan in zip(items, plans, strict=True):
            if item.stage.name != name:
                continue
            if isinstance(plan, UserError):
                refused[item.cluster.num_nodes] = str(plan)
            else:
                points.append(_point(item.cluster, config, item.stage, plan, num_text_tokens))
        found.append(Curve(name, _with_efficiency(points), refused))
    counts = sorted({item.cluster.num_nodes for item in items})
    return [*found, _total(found, counts)] if len(found) > 1 else found


def _batch(stage: Stage, counts: Sequence[int], count: int, weak: bool) -> int:
    batch = Fraction(stage.batch * count, counts[0]) if weak else Fraction(stage.batch)
    if batch.denominator > 1:
        raise UserError(
            f"expected a batch that grows in whole samples, got {stage.batch} at {counts[0]} nodes and so {float(batch):.2f} at "
            f"{count}; give numbers of nodes that are multiples of {counts[0]}, or another batch."
        )
    return int(batch)


def _point(cluster: Cluster, config: TransformerConfig, stage: Stage, plan: Plan, num_text_tokens: int) -> Point:
    entries = [plan.entry(shape) for shape in stage.shapes]
    num_steps = stage.num_samples / stage.batch
    flops = [Workload(config, shape, stage.batch, num_text_tokens).train_flops() for shape in stage.shapes]
    tokens = [stage.batch * shape.num_visual_tokens(config.patch_size) for shape in stage.shapes]
    parts = [entry.predicted.step_parts_s for entry in entries]
    return Point(
        num_nodes=cluster.num_nodes,
        num_devices=cluster.num_devices,
        num_steps=num_steps,
        seconds=num_steps * stage.mean([entry.predicted.step_s for entry in entries]),
        num_tokens=num_steps * stage.mean(tokens),
        flops=num_steps * stage.mean(flops),
        exposed_s={name: num_steps * stage.mean([part.get(name, 0.0) for part in parts]) for name in EXPOSED},
        peak_gib=max(entry.predicted.peak_gib for entry in entries),
        peak_flops=plan.peak_flops,
        meshes=(plan.mesh,),
    )


def _with_efficiency(points: Sequence[Point]) -> tuple[Point, ...]:
    def of_one(point: Point) -> float:
        return point.tokens_per_s / point.num_devices

    return tuple(replace(point, efficiency=of_one(point) / of_one(points[0])) for point in points)


def _total(curves: Sequence[Curve], counts: Sequence[int]) -> Curve:
    at: Mapping[str, dict[int, Point]] = {
        curve.name: {point.num_nodes: point for point in curve.points} for curve in curves
    }
    points, refused = [], {}
    for count in counts:
        without = [curve for curve in curves if count in curve.refused]
        if without:
            refused[count] = f"stage {without[0].name}: {without[0].refused[count]}"
        else:
            points.append(_sum([at[curve.name][count] for curve in curves]))
    return Curve(TOTAL, _with_efficiency(points), refused)


def _sum(points: Sequence[Point]) -> Point:
    return Point(
        num_nodes=points[0].num_nodes,
        num_devices=points[0].num_devices,
        num_steps=math.fsum(point.num_steps for point in points),
        seconds=math.fsum(point.seconds for point in points),
        num_tokens=math.fsum(point.num_tokens for point in points),
        flops=math.fsum(point.flops for point in points),
        exposed_s={name: math.fsum(point.exposed_s[name] for point in points) for name in EXPOSED},
        peak_gib=max(point.peak_gib for point in points),
        peak_flops=points[0].peak_flops,
        meshes=tuple(mesh for point in points for mesh in point.meshes),
    )
