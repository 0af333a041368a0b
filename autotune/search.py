"""Chooses the mesh of a run and, for each VideoShape, how a step is divided and what its blocks do: the fastest that fits.

    mesh       one for all shapes: the one with the least sum of step times, each weighted; a mesh on which a shape does not
               fit has lost
    layouts    all of space.py on that mesh, in chunks where whole blocks cannot keep all; policies.py finds the best choice of one layout and a bound that none beats
    order      meshes, layouts and choices in the order of their bounds, until no bound beats the best: what is never
               predicted could not have won

A bound of compute alone is shared by layouts that differ only in how ranks with other samples share the parameters. Time and
memory are StepModel's (model.py); what the cluster file has no figure for is named in the Plan as not included. Refused: ranks
that cannot share the batch, a shape that fits in no way, a cluster without the links that its ranks need. Layer 0 only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.autotune.bounds import Bounds, fits
from vchitect_fast.autotune.calibrate import Calibration
from vchitect_fast.autotune.layout import Layout, Problem
from vchitect_fast.autotune.memory import GIB
from vchitect_fast.autotune.model import SAFETY as SAFETY
from vchitect_fast.autotune.model import Limits, Outcome, StepModel
from vchitect_fast.autotune.policies import Blocks, Model, PolicySearch
from vchitect_fast.autotune.reasons import leanest_of, no_common_mesh, nothing_fits, runners_up
from vchitect_fast.autotune.space import VAE_MINI_BATCHES, check_grid, check_mesh, common_meshes, in_chunks, layouts
from vchitect_fast.autotune.ways import host_bytes
from vchitect_fast.cluster import Cluster, Device
from vchitect_fast.errors import UserError
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import DTYPE_BYTES

ONE = {"dp_replicate": 1, "dp_shard": 1, "sp": 1}
Policies = Sequence[Policy]


@dataclass(frozen=True)
class Answer:
    """What was found for one shape on the chosen mesh."""

    problem: Problem
    best: Outcome
    limits: Limits
    seen: tuple[Outcome, ...]  # everything that was predicted for this shape, on every mesh


class ShapeSearch:
    """One Problem on any mesh. `fixed`, a Policy a block, leaves only the layout to search."""

    def __init__(self, model: Model, fixed: Policies | None = None) -> None:
        self.model, self.problem, self.fixed = model, model.problem, fixed
        self.limits = model.limits()
        self._blocks: dict[Layout, Blocks] = {}
        self._searches: dict[Layout, PolicySearch] = {}
        self._shared: dict[Layout, float] = {}
        self._several: dict[tuple[tuple[str, int], ...], list[Layout]] = {}

    def layouts(self, mesh: Mapping[str, int]) -> list[Layout]:
        """All of space.py: blocks in chunks only where one sample in whole blocks cannot keep everything.

        Where it can, chunks cannot win: they compute more. A sequence that is cut over ranks has none.
        """
        key = tuple(mesh.items())
        if key not in self._several:
            several = layouts(self.problem, mesh)
            one, *_ = several
            if not self.fixed and one.sp == 1 and self.model.unhindered(one)[1] > self.limits.device_bytes:
                several += in_chunks(self.problem, one)
            self._several[key] = several
        return self._several[key]

    def least_s(self, mesh: Mapping[str, int]) -> float:
        """No choice on this mesh takes less."""
        return min((self._shared_s(layout) for layout in self.layouts(mesh)), default=math.inf)

    def own_least_s(self, mesh: Mapping[str, int], cutoff_s: float) -> float:
        """The same with what ranks of this mesh wait for each other; the cutoff where that is at least as much."""
        least_s = cutoff_s
        for layout in sorted(self.layouts(mesh), key=self._shared_s):
            if self._shared_s(layout) >= least_s:
                break
            search = self._search(layout)
            if search.bounds.keep_s < least_s:
                least_s = min(least_s, search.least_s)
        return least_s

    def best(self, mesh: Mapping[str, int], cutoff_s: float = math.inf) -> Outcome | None:
        """The fastest that fits on this mesh, and beats the cutoff."""
        found = None
        several = [layout for layout in self.layouts(mesh) if self._shared_s(layout) < cutoff_s]
        for layout in sorted(several, key=self._known_s):
            if self._known_s(layout) < cutoff_s:
                search = self._search(layout)
                if search.bounds.keep_s < cutoff_s and search.least_s < cutoff_s:
                    if better := search.search(cutoff_s).best:
                        found, cutoff_s = better, better.cost.step_s
        return self._encoded(found) if found and self.problem.encode else found

    def finish(self, found: Outcome) -> Outcome:
        """The best of the chosen mesh once more, thoroughly, and "keep everything" of its other layouts, to say why they lost."""
        for layout in self.layouts(found.layout.mesh):
            self._search(layout)
        search = self._search(self._bare(found.layout))
        search.polish()
        best = search.best or found
        return self._encoded(best) if self.problem.encode else best

    def seen(self) -> tuple[Outcome, ...]:
        """Everything that was predicted."""
        return tuple(outcome for search in self._searches.values() for outcome in search.seen.values())

    def _search(self, layout: Layout) -> PolicySearch:
        if layout not in self._searches:
            self._searches[layout] = PolicySearch(
                self.model, layout, self.limits, self.fixed, lambda: self._blocks_of(layout)
            )
        return self._searches[layout]

    def _blocks_of(self, layout: Layout) -> Blocks:
        alike = replace(layout, dp_replicate=1, dp_shard=1, accumulation=1)  # blocks have the same Ways
        if alike not in self._blocks:
            self._blocks[alike] = Blocks(self.model, layout)
        return self._blocks[alike]

    def _shared_s(self, layout: Layout) -> float:
        """The bound of compute, of the layout that shards parameters over as many ranks as can be: it has the most room."""
        roomy = replace(layout, dp_replicate=1, dp_shard=layout.num_dp)
        if roomy not in self._shared:
            cost, peak_bytes = self.model.unhindered(roomy)
            bounds = Bounds(
                cost, peak_bytes, roomy.accumulation, lambda: self._blocks_of(roomy).kinds, self.problem,
                self.limits.device_bytes,
            )  # fmt: skip
            self._shared[roomy] = bounds.compute_s if self.fixed else bounds.relaxed_s
        return self._shared[roomy]

    def _known_s(self, layout: Layout) -> float:
        """The best bound that is there without another prediction."""
        return self._searches[layout].least_s if layout in self._searches else self._shared_s(layout)

    def _bare(self, layout: Layout) -> Layout:
        """As space.layouts has it."""
        mini_batch = 1 if self.problem.encode else layout.vae_mini_batch
        return replace(layout, prefetch_depth=1, vae_mini_batch=mini_batch)

    def _encoded(self, found: Outcome) -> Outcome:
        """The same with as many frames in the codec at once as cost nothing."""
        sizes = [size for size in VAE_MINI_BATCHES if size <= self.problem.shape.num_frames]
        several = [self.model.predict(replace(found.layout, vae_mini_batch=size), found.policies) for size in sizes]
        fitting = [outcome for outcome in several if fits(outcome, self.limits)]
        return min(fitting, key=lambda item: (item.cost.step_s, -item.layout.vae_mini_batch), default=found)


def decide(
    searches: Sequence[ShapeSearch], candidates: Sequence[Mapping[str, int]], weights: Sequence[float]
) -> list[Answer] | None:
    """The mesh with the least weighted sum of step times, and the best of every shape on it; None where none fits all."""
    shared = [[search.least_s(mesh) for search in searches] for mesh in candidates]
    best: list[Outcome] = []
    best_s = math.inf
    for bounds, mesh in sorted(zip(shared, candidates, strict=True), key=lambda item: _weighted(item[0], weights)):
        found: list[Outcome] = []
        bounds = list(bounds)  # replaced by what ranks of this mesh wait for, then by step times, one after the other
        for place, (search, weight) in enumerate(zip(searches, weights, strict=True)):
            total_s = _weighted(bounds, weights)
            if total_s >= best_s or math.isinf(best_s):  # the first mesh has nothing to lose against
                break
            bounds[place] = search.own_least_s(mesh, bounds[place] + (best_s - total_s) / weight)
        for place, (search, weight) in enumerate(zip(searches, weights, strict=True)):
            total_s = _weighted(bounds, weights)
            if total_s >= best_s:
                break
            outcome = search.best(mesh, bounds[place] + (best_s - total_s) / weight)
            if outcome is None:
                break
            found.append(outcome)
            bounds[place] = outcome.cost.step_s
        if len(found) == len(searches) and _weighted(bounds, weights) < best_s:
            best, best_s = found, _weighted(bounds, weights)
    if not best:
        return None
    chosen = []
    for search, outcome in zip(searches, best, strict=True):
        best_of_all = search.finish(outcome)
        chosen.append(Answer(search.problem, best_of_all, search.limits, search.seen()))
    return chosen


def _weighted(seconds: Sequence[float], weights: Sequence[float]) -> float:
    return sum(weight * value for weight, value in zip(weights, seconds, strict=True))


def plan_run(
    config: TransformerConfig, shapes: list[VideoShape], cluster: Cluster | Device, *, batch: int, num_text_tokens: int,
    dtype: str, limit_bytes: int | None = None, policy: tuple[Policy, ...] | None = None,
    mesh: Mapping[str, int] | None = None, weights: Sequence[float] | None = None, ema: bool = True, encode: bool = False,
    parked: tuple[str, ...] = (), calibration: Calibration | None = None,
    model_of: Callable[[Problem, int | None], Model] = StepModel,
) -> Plan:  # fmt: skip
    """The Plan for a run on all devices of a cluster; a Device is a cluster of one.

    batch            samples a step, of all ranks together, the same for every shape
    num_text_tokens  of the text encoder that the run will use
    dtype            "float32", "bfloat16", or "auto": the one with the shorter steps, summed over the shapes
    limit_bytes      memory that may be used; 0.9 of the device's by default
    policy           of each block, where it is not to be searched
    mesh             ranks by axis (dp_replicate, dp_shard, sp), where it is not to be searched
    weights          steps of each shape, for the sum that decides about the mesh; all alike by default
    ema, encode      whether the run keeps an average of the weights; whether the codec encodes inside the step
    calibration      what measured steps said about the formulas
    parked           states that lie in host memory between their uses (plan.PARKABLE)

    Raises UserError when the ranks cannot share the batch evenly, when the cluster lacks a link that its ranks need, or when a
    shape fits in no way: with what is missing, how many devices would do and the nearest shape that fits.
    """
    if batch < 1 or num_text_tokens < 1 or not shapes:
        raise UserError(
            f"a Plan needs at least one shape, sample and text token, got {len(shapes)}, {batch} and {num_text_tokens}."
        )
    if isinstance(cluster, Device):
        cluster = Cluster(cluster.name, cluster)
    weighed = _weighed(shapes, weights)
    for shape in weighed:
        check_grid(config, shape)
    if mesh is not None:
        check_mesh(mesh, cluster)
    dtypes = DTYPE_BYTES if dtype == "auto" else (dtype,)
    number = math.prod(mesh.values()) if mesh is not None else cluster.num_devices
    found: list[tuple[str, list[Answer]]] = []
    refusal: UserError | None = None
    for name in dtypes:
        problems = [
            Problem(
                cluster,
                config,
                shape,
                batch,
                num_text_tokens,
                name,
                number,
                ema=ema,
                encode=encode,
                calibration=calibration,
                parked=parked,
            )
            for shape in weighed
        ]
        try:
            found.append((name, answers(problems, mesh, list(weighed.values()), policy, limit_bytes, model_of)))
        except UserError as error:
            refusal = error  # the last is of the narrower dtype: the nearest to fitting
    if not found:
        assert refusal is not None
        raise refusal
    name, best = min(
        found, key=lambda item: _weighted([one.best.cost.step_s for one in item[1]], list(weighed.values()))
    )
    return _plan(config, cluster, name, num_text_tokens, parked, limit_bytes, best, calibration)


def answers(
    problems: Sequence[Problem], mesh: Mapping[str, int] | None, weights: Sequence[float], policy: Policies | None = None,
    limit_bytes: int | None = None, model_of: Callable[[Problem, int | None], Model] = StepModel,
) -> list[Answer]:  # fmt: skip
    """The best of every shape on the best mesh, or on `mesh`. UserError as `plan_run`."""
    candidates = [mesh] if mesh is not None else common_meshes(problems)
    searches = [ShapeSearch(model_of(problem, limit_bytes), policy) for problem in problems]
    if (found := decide(searches, candidates, weights)) is not None:
        return found
    for search in searches:
        alone = candidates if mesh is not None else common_meshes([search.problem])
        if all(search.best(candidate) is None for candidate in alone):
            several = [layout for candidate in alone for layout in search.layouts(candidate)]
            raise nothing_fits(
                search.problem, search.limits, leanest_of(search.model, several),
                lambda problem: model_of(problem, limit_bytes), given=mesh is not None,
            )  # fmt: skip
    raise no_common_mesh(problems)


def _calibrated(problem: Problem) -> list[str]:
    return [problem.calibration.words()] if problem.calibration else []


def confidence(device: Device) -> str:
    """What the predictions rest on, from the probe's own residuals."""
    source = f"rates {device.source or 'of unknown source'}"
    if not device.timings:
        return f"{source}; declared, not measured; reading and encoding data not included"
    held_out = (
        "no held-out sizes"
        if device.fit_error is None
        else f"off by {device.fit_error:.0%} on average at held-out sizes"
    )
    spread = statistics.median(timing.spread for timing in device.timings)
    return (
        f"{source}; interpolated between sizes, {held_out}; "
        f"repeats spread by {spread:.0%} (large on a machine that others use); reading and encoding data not included"
    )


def _weighed(shapes: Sequence[VideoShape], weights: Sequence[float] | None) -> dict[VideoShape, float]:
    """Each shape once, with its weight."""
    if weights is None:
        return dict.fromkeys(shapes, 1.0)
    if len(weights) != len(shapes) or not all(weight > 0 for weight in weights):
        raise UserError(
            f"expected a positive weight for each of {len(shapes)} shapes, got {list(weights)}; give the steps that each takes."
        )
    found = dict.fromkeys(shapes, 0.0)
    for shape, weight in zip(shapes, weights, strict=True):
        found[shape] += weight
    return found


def _plan(
    config: TransformerConfig, cluster: Cluster, dtype: str, num_text_tokens: int, parked: tuple[str, ...],
    limit_bytes: int | None, found: Sequence[Answer], calibration: Calibration | None,
) -> Plan:  # fmt: skip
    device, layout = cluster.device, found[0].best.layout
    inside = cluster.num_nodes > 1 and cluster.num_devices_per_node % layout.num_shards == 0
    return Plan(
        model=config.fingerprint(),
        device=device.fingerprint(),
        device_name=device.name,
        compute_dtype=dtype,
        num_text_tokens=num_text_tokens,
        entries=tuple(_entry(answer) for answer in found),
        peak_flops=device.matmul_flops.get(dtype),
        mesh=layout.mesh,
        fsdp_group="none" if layout.num_shards == 1 else "node" if inside else "global",
        device_threads=device.num_threads,
        device_gib=device.memory_gib,
        parked=parked,
        limit_bytes=int(SAFETY * device.memory_bytes) if limit_bytes is None else limit_bytes,
        calibration=asdict(calibration) if calibration else None,
    )


def _entry(answer: Answer) -> PlanEntry:
    best, layout = answer.best, answer.best.layout
    memory = best.memory
    rests_on = "; ".join(
        [
            *_calibrated(answer.problem),
            confidence(answer.problem.cluster.device),
            *(f"{what} not included" for what in best.left_out),
        ]
    )
    return PlanEntry(
        shape=str(answer.problem.shape),
        policy=best.policies,
        offload_bytes=host_bytes(best.ways),
        microbatch=layout.microbatch,
        accumulation=layout.accumulation,
        shard=layout.shard,
        num_chunks=layout.num_chunks,
        vae_mini_batch=layout.vae_mini_batch,
        prefetch_depth=layout.prefetch_depth,
        predicted=Prediction(
            best.cost.step_s, best.cost.parts(), memory.peak_bytes / GIB, memory.parts_gib(), rests_on
        ),
        runners_up=runners_up(answer.seen, best, answer.limits),
    )
