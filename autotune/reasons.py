"""Why a choice lost, and what to do where nothing fits: sentences from Outcomes, no search of its own beyond "does it fit".

    summary      a choice in a line
    why          does not fit: by how much, and at which moment; or slower: by how much, and by which parts of the step
    runners_up   the best of every other kind of choice, each with its reason
    nothing_fits, no_common_mesh
                 the error: bytes that are missing, the number of devices that would do, the nearest shape that fits

Layer 0 only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vchitect_fast.autotune.bounds import fits
from vchitect_fast.autotune.layout import Layout, Problem
from vchitect_fast.autotune.memory import GIB
from vchitect_fast.autotune.space import divisors, most_chunks, shard_specs
from vchitect_fast.errors import UserError
from vchitect_fast.plan import OFFLOAD, RECOMPUTE, Policy

if TYPE_CHECKING:
    from vchitect_fast.autotune.model import Limits, Outcome
    from vchitect_fast.autotune.policies import Model

NUM_RUNNERS_UP = 5
NUM_FASTER = 2  # of them, that do not fit; more where fewer fit
MAX_TIMES_MORE = 4096  # devices, where the search for enough of them ends
LIKE = 0.01  # parts of a step that differ by less, in shares of it, are not named
PARTS = {
    "recompute_s": "more is made again",
    "copy_s": "copies to host memory that no compute hides",
    "exchange_s": "exchanges of sequence parallelism",
    "gather_s": "gathering parameters and reducing gradients",
    "pressure_s": "memory pressure near the limit",
    "encode_s": "encoding",
    "optimizer_s": "a larger share of the parameters in each update",
    "forward_s": "less compute hidden in a pass",
    "backward_s": "less compute hidden in a pass",
}


def num_doing(action: str, policies: Iterable[Policy]) -> int:
    """Blocks of which any group is kept, recomputed or offloaded."""
    return sum(action in (p.block_input, p.qkv, p.branch_out, p.mlp_pre, p.stats) for p in policies)


def summary(outcome: Outcome) -> str:
    """The division of the step, and how many blocks recompute and offload; what is 1 or 0 is left out, except a single rank's."""
    layout, policies = outcome.layout, outcome.policies
    said = [f"{axis} {size}" for axis, size in layout.mesh.items() if size > 1]
    if layout.sp > 1:
        to = layout.shard.spatial if layout.shard.axis == "tokens" else layout.shard.temporal
        said.append(f"{layout.shard.axis} to {to}")
    said.append(f"microbatch {layout.microbatch} x {layout.accumulation}")
    said.append(f"{num_doing(RECOMPUTE, policies)} of {len(policies)} blocks recomputed")
    if moved := num_doing(OFFLOAD, policies):
        said.append(f"{moved} offloaded")
    if layout.num_chunks > 1:
        said.append(f"{layout.num_chunks} chunks")
    return ", ".join(said)


def why(other: Outcome, best: Outcome, limits: Limits) -> str:
    """Why `other` is not the choice."""
    if other.memory.peak_bytes > limits.device_bytes:
        return (
            f"does not fit: {_gib(other.memory.peak_bytes)} of {_gib(limits.device_bytes)} GiB at the {other.fullest}"
        )
    if not fits(other, limits):
        return f"does not fit: {_gib(other.host_bytes)} of {_gib(limits.host_bytes or 0)} GiB of host memory a rank"
    times = other.cost.step_s / best.cost.step_s - 1
    if times < 0:
        return f"faster here by {-times:.1%}, but all shapes together take longer on this mesh"
    if times == 0:
        return "as fast, with no less memory"
    return f"slower by {times:.1%}: {' and '.join(_more(other, best)) or 'a little more of everything'}"


def _more(other: Outcome, best: Outcome) -> list[str]:
    """The parts of the step that are longer than the best's, the longest first."""
    theirs, ours = other.cost.parts(), best.cost.parts()
    work = "forward_s", "backward_s"
    longer = {name: theirs[name] - ours[name] for name in theirs if name not in work}
    compute = sum(theirs[name] - ours[name] for name in work)
    said = []
    for name, more_s in sorted(longer.items(), key=lambda item: -item[1]):
        if more_s > LIKE * best.cost.step_s:
            said.append(PARTS.get(name, name))
    if compute > LIKE * best.cost.step_s:
        said.append(_more_compute(other.layout, best.layout))
    if not said:  # nothing stands out: what there is most of
        name = max(longer, key=lambda item: longer[item])
        said = [f"mostly {PARTS.get(name, name)}"] if longer[name] > 0 else []
    return said[:3]


def _more_compute(other: Layout, best: Layout) -> str:
    if other.num_chunks > best.num_chunks:
        return "chunks are computed again" if best.num_chunks == 1 else "smaller chunks"
    if other.microbatch != best.microbatch:
        return f"{'smaller' if other.microbatch < best.microbatch else 'larger'} microbatches"
    return "uneven shares or text projected twice"


def runners_up(seen: Iterable[Outcome], best: Outcome, limits: Limits) -> tuple[dict[str, Any], ...]:
    """The best of every other kind of choice, the fastest first: some that would be faster and do not fit, and those that do."""
    kinds: dict[tuple[Any, ...], Outcome] = {}
    for outcome in seen:
        fit = fits(outcome, limits)
        kind = (*_kind(outcome, best), fit)
        if (fit or outcome.cost.step_s < best.cost.step_s) and kind != (*_kind(best, best), True):
            if kind not in kinds or _rank(outcome) < _rank(kinds[kind]):
                kinds[kind] = outcome
    others = sorted(kinds.values(), key=_rank)
    fitting = [item for item in others if fits(item, limits)]
    faster = [item for item in others if not fits(item, limits)]
    num_faster = max(NUM_FASTER, NUM_RUNNERS_UP - len(fitting))
    chosen = sorted([*faster[:num_faster], *fitting][:NUM_RUNNERS_UP], key=_rank)
    return tuple(
        {
            "choice": summary(item),
            "step_s": item.cost.step_s,
            "peak_gib": item.memory.peak_bytes / GIB,
            "why": why(item, best, limits),
        }
        for item in chosen
    )


def _kind(outcome: Outcome, best: Outcome) -> tuple[Any, ...]:
    """What makes choices worth telling apart: on another mesh no more than how many ranks share a sample, and how."""
    layout, policies = outcome.layout, outcome.policies
    if layout.mesh != best.layout.mesh and layout.sp != best.layout.sp:
        return layout.sp, layout.shard
    doing = tuple(num_doing(action, policies) > 0 for action in (RECOMPUTE, OFFLOAD))
    return layout.sp, layout.shard, layout.mesh == best.layout.mesh, layout.microbatch, layout.num_chunks > 1, doing


def _rank(outcome: Outcome) -> tuple[float, int]:
    return outcome.cost.step_s, outcome.memory.peak_bytes


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}"


# Where nothing fits


def leanest_of(model: Model, several: Iterable[Layout]) -> Outcome:
    """Of these layouts with the smallest microbatch the one that takes the least memory, of what host memory has room for."""
    smallest = [layout for layout in several if layout.microbatch == 1]
    outcomes = [model.predict(layout, item) for layout in smallest for item in lean_policies(model.problem)]
    room = model.limits().host_bytes
    return min(
        (item for item in outcomes if room is None or item.host_bytes <= room or not num_doing(OFFLOAD, item.policies)),
        key=lambda item: item.memory.peak_bytes,
    )


def nothing_fits(
    problem: Problem, limits: Limits, leanest: Outcome, model_of: Callable[[Problem], Model], given: bool
) -> UserError:
    """`leanest`: the choice with the least memory. `given`: the mesh is the user's, so more devices are not looked for."""
    missing = (leanest.memory.peak_bytes - limits.device_bytes) / GIB
    need = f"{problem.shape} in {problem.dtype} needs {_gib(leanest.memory.peak_bytes)} GiB at the least ({summary(leanest)})"
    said = [
        f"{need}, {_gib(limits.device_bytes)} GiB may be used on {problem.cluster.device.name}, {missing:.3f} GiB are missing"
    ]
    if not given and (number := _enough_devices(problem, limits, model_of, leanest.layout.num_chunks)):
        said.append(f"{number} devices would do, {number - problem.num_devices} more")
    frames = _most_frames(problem, limits, leanest.layout, model_of)
    if frames:
        said.append(f"the nearest that fits is {replace(problem.shape, num_frames=frames)}")
    else:
        memory = leanest.memory
        resident = memory.states_bytes + memory.process_bytes
        said.append(f"not even one frame fits, parameters and optimizer alone take {_gib(resident)} GiB")
    return UserError(f"{'; '.join(said)}.")


def no_common_mesh(problems: Sequence[Problem]) -> UserError:
    """Every shape fits on some mesh, and not all on one."""
    shapes = ", ".join(str(problem.shape) for problem in problems)
    return UserError(
        f"each of {shapes} fits on some mesh of {problems[0].num_devices} devices, but no mesh fits them all; plan them in "
        "separate Plans, one a stage of a recipe."
    )


def lean_policies(problem: Problem) -> list[tuple[Policy, ...]]:
    """What leaves least on the device: of every block its input only; where that can be copied, in host memory."""
    links = {link.name for link in problem.cluster.links}
    copies = problem.cluster.device.kind != "cpu" and {"host_to_device", "device_to_host"} <= links
    several = [Policy.recompute()] + [replace(Policy.recompute(), block_input=OFFLOAD)] * copies
    return [(policy,) * problem.config.num_layers for policy in several]


def _enough_devices(
    problem: Problem, limits: Limits, model_of: Callable[[Problem], Model], num_chunks: int
) -> int | None:
    """The least number, in whole nodes beyond the first, on which leaner shares fit; None where no number does."""
    per_node = problem.cluster.num_devices_per_node
    number = problem.num_devices
    while number < MAX_TIMES_MORE * problem.num_devices:
        number = number * 2 if number < per_node else (number // per_node + 1) * per_node
        if number > 8 * per_node:  # from here on in powers of two of nodes: the search stays short
            number = per_node * 2 ** max(3, (number // per_node - 1).bit_length())
        if _leanest_fits(problem, number, limits, model_of, num_chunks):
            return number
    return None


def _leanest_fits(
    problem: Problem, number: int, limits: Limits, model_of: Callable[[Problem], Model], num_chunks: int
) -> bool:
    nodes = max(problem.cluster.num_nodes, -(-number // problem.cluster.num_devices_per_node))
    larger = replace(problem, cluster=replace(problem.cluster, num_nodes=nodes), num_devices=number)
    model = model_of(larger)
    for sp in divisors(number):
        num_dp = number // sp
        if problem.batch % num_dp:
            continue
        for spec in shard_specs(problem.config, problem.shape, sp, problem.num_text_tokens, strict=True):
            layout = Layout(1, num_dp, sp, spec, 1, problem.batch // num_dp, num_chunks if sp == 1 else 1)
            if any(fits(model.predict(layout, item), limits) for item in lean_policies(problem)):
                return True
    return False


def _most_frames(problem: Problem, limits: Limits, layout: Layout, model_of: Callable[[Problem], Model]) -> int:
    """Of the leanest choice's layout; 0 where not even one frame fits."""

    def fit(frames: int) -> bool:
        shorter = replace(problem, shape=replace(problem.shape, num_frames=frames))
        model, own = model_of(shorter), replace(layout, num_chunks=min(layout.num_chunks, most_chunks(frames)))
        return any(fits(model.predict(own, item), limits) for item in lean_policies(problem))

    low, high = 0, problem.shape.num_frames  # `low` frames fit or are 0, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low
