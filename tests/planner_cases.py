"""Problems for tests of the planner: the made-up device as a GPU with links whose rates decide what is worth doing.

Times of the made-up device can be worked out by hand (made_up_device.py); a model of few layers is small enough that every
assignment of every Way can be predicted, which is what the searches are held against.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from made_up_device import cluster, device

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.bounds import fits
from vchitect_fast.autotune.layout import Layout, Problem
from vchitect_fast.autotune.memory import GIB
from vchitect_fast.autotune.model import Outcome, StepModel
from vchitect_fast.autotune.space import PREFETCH_DEPTHS, in_chunks, layouts
from vchitect_fast.autotune.ways import Way
from vchitect_fast.cluster import Cluster, Link
from vchitect_fast.plan import Policy
from vchitect_fast.shapes import VideoShape

TINY = preset("vchitect-tiny")
SHAPE = VideoShape(8, 128, 128)
FAST, SLOW = 1e11, 3e7  # bytes a second of the host link: copies cost nothing, or far more than computing again


def gpus(
    number: int = 1, *, per_node: int = 8, host: float = FAST, inside: float = 1e9, outside: float = 1e8,
    memory_gib: float = 64.0, host_gib: float = 64.0, **facts: object,
) -> Cluster:  # fmt: skip
    """The made-up device as a GPU; rates in bytes a second, each way."""
    rates = {"device_to_host": host, "host_to_device": host, "intra_node": inside, "inter_node": outside}
    links = tuple(Link(name, rate, 1e-6, "made up") for name, rate in rates.items())
    return replace(
        cluster(), device=device(memory_gib, kind="cuda", process_bytes=0, **facts), links=links,
        num_nodes=-(-number // per_node), num_devices_per_node=min(number, per_node),
        host_memory_bytes=int(host_gib * GIB),
    )  # fmt: skip


def problem(on: Cluster, *, num_layers: int = 3, batch: int = 2, shape: VideoShape = SHAPE) -> Problem:
    """The tiny model with so many layers, on all devices of a cluster."""
    return Problem(on, replace(TINY, num_layers=num_layers), shape, batch, 16, "float32", on.num_devices)


class Few(StepModel):
    """Blocks have only so many Ways, drawn with a seed; keeping and recomputing everything are always among them."""

    def __init__(self, problem: Problem, limit_bytes: int | None = None, *, seed: int = 0, number: int = 4) -> None:
        super().__init__(problem, limit_bytes)
        self.seed, self.number = seed, number

    def ways(self, layout: Layout) -> tuple[list[Way], list[Way], list[Way]]:
        """The same Policies in every layout, as far as a block has them."""
        first, middle, last = super().ways(layout)
        always = {Policy.keep(), Policy.recompute()}
        others = [way.policy for way in middle if way.policy not in always]
        chosen = always | set(random.Random(self.seed).sample(others, min(len(others), self.number - 2)))
        return tuple([way for way in ways if way.policy in chosen] for ways in (first, middle, last))  # type: ignore[return-value]


def all_layouts(problem: Problem, mesh: Mapping[str, int]) -> list[Layout]:
    """Of blocks computed whole, and in chunks."""
    whole = layouts(problem, mesh)
    return whole + (in_chunks(problem, whole[0]) if mesh["sp"] == 1 else [])


def assignments(model: StepModel, layout: Layout) -> Iterator[tuple[Policy, ...]]:
    """Every one."""
    layers = model.problem.config.num_layers
    first, middle, last = ([way.policy for way in ways] for ways in model.ways(layout))
    yield from product(*([first] if layers > 1 else []), *([middle] * (layers - 2)), last)


def every(model: StepModel, several: Sequence[Layout]) -> list[Outcome]:
    """The prediction of every assignment at every depth of fetching; with copies only where they have a price."""
    found = []
    for layout in several:
        for policies in assignments(model, layout):
            for depth in PREFETCH_DEPTHS:
                outcome = model.predict(replace(layout, prefetch_depth=depth), policies)
                found.append(outcome)
                if not any(way.moved_bytes for way in outcome.ways):
                    break
    return found


def fastest(model: StepModel, outcomes: Sequence[Outcome]) -> float | None:
    """Seconds of the fastest that fits."""
    return min((item.cost.step_s for item in outcomes if fits(item, model.limits())), default=None)
