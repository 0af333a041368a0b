"""`vchitect-fast autotune explain`: why a Plan is as it is, in sentences, from the cluster file that it was made from.

    time      what a step is made of, and which stream binds
    memory    the fullest moment, what is there then, what is to spare
    choice    what was chosen, against keeping and recomputing everything and the Plan's runners-up
    change    which fact of the cluster, a little less or more of it, leads to another choice; how far the links reach

The Plan's Layout and Policies are predicted again; where that differs from what the Plan says, it is said. Refused: a Plan
of another model, or of another device than the cluster file's. report.py and page.py show what is found here. Layer 0 only.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from vchitect_fast.architecture import PRESETS, TransformerConfig, preset
from vchitect_fast.autotune.bounds import fits
from vchitect_fast.autotune.calibrate import Calibration
from vchitect_fast.autotune.describe import blocks_in_words, layout_in_words, layout_of
from vchitect_fast.autotune.layout import Problem
from vchitect_fast.autotune.memory import GIB, ends_bytes
from vchitect_fast.autotune.model import SAFETY, Limits, Outcome, StepModel
from vchitect_fast.autotune.report import PART_NAMES, gib, render, render_explanation, seconds, show
from vchitect_fast.autotune.sensitivity import (
    HOST_LINKS,
    LINKS,
    LONGER,
    SLOWEST,
    Effect,
    changes,
    effect,
    links_between,
    slack,
)
from vchitect_fast.autotune.streams import STREAMS
from vchitect_fast.cluster import Cluster
from vchitect_fast.errors import UserError
from vchitect_fast.plan import OFFLOAD, RECOMPUTE, Plan, PlanEntry, Policy
from vchitect_fast.workload import DTYPE_BYTES

BINDS = 0.01  # of the step: less waiting than this is not worth a sentence
DIFFERS = 0.01  # between the Plan's prediction and the one made now
STREAM_WORDS = {
    "out": "copies to host memory", "in": "copies back from host memory", "exchange": "exchanges of sequence parallelism",
    "gather": "gathering parameters and reducing gradients",
}  # fmt: skip
SOME = (
    Policy.recompute(),
    replace(Policy.recompute(), block_input=OFFLOAD),
    Policy(OFFLOAD, OFFLOAD, OFFLOAD, OFFLOAD, OFFLOAD),
    Policy(mlp_pre=RECOMPUTE),
    Policy(qkv=RECOMPUTE),
    Policy(branch_out=OFFLOAD, stats=OFFLOAD),
)
SHARES = 6


@dataclass(frozen=True)
class Explanation:
    """What is to be said about one entry of a Plan."""

    problem: Problem
    entry: PlanEntry
    outcome: Outcome
    limits: Limits
    keep: Outcome  # the same layout, every block keeping everything
    recompute: Outcome  # and recomputing all but its input
    slacks: dict[str, float | None]  # kind of link -> how many times slower it may be; None: it does not matter
    effects: tuple[Effect, ...]
    looked_at: tuple[Outcome, ...]  # other choices on the same mesh, those that do not fit too
    said: dict[str, list[str]]  # "time" | "memory" | "choice" | "change" -> sentences

    @property
    def spare_bytes(self) -> int:
        """Of the device's memory that may be used; negative where the Plan does not fit."""
        return self.limits.device_bytes - self.outcome.memory.peak_bytes

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON object, units in the names."""
        line, host = self.outcome.timeline, self.limits.host_bytes
        streams = {
            name: {"busy_s": line.busy_s(name), "exposed_s": line.exposed_s(name), "hidden": line.hidden(name)}
            for name in STREAMS
        }
        return {
            "sentences": self.said,
            "step_s": self.outcome.cost.step_s,
            "step_parts_s": self.outcome.cost.parts(),
            "microbatch_streams": streams,
            "peak_gib": self.outcome.memory.peak_bytes / GIB,
            "peak_parts_gib": self.outcome.memory.parts_gib(),
            "peak_at": str(self.outcome.fullest),
            "limit_gib": self.limits.device_bytes / GIB,
            "spare_gib": self.spare_bytes / GIB,
            "host_gib": self.outcome.host_bytes / GIB,
            "host_limit_gib": None if host is None else host / GIB,
            "link_slack": self.slacks,
            "changes": [asdict(item) for item in self.effects],
            "left_out": self.outcome.left_out,
        }


def explain(plan: Plan, entry: PlanEntry, problem: Problem, tick: Callable[[], None] = lambda: None) -> Explanation:
    """Predict the entry again and look around it; `tick` is called after each of its `changes`."""
    # The cluster at hand may have less memory than the one that the Plan was searched for.
    usable = int(SAFETY * problem.cluster.device.memory_bytes)
    limit = min(plan.limit_bytes or usable, usable)
    model, layout = StepModel(problem, limit), layout_of(plan, entry)
    chosen = model.predict(layout, entry.policy)
    number = problem.config.num_layers
    keep, again = (model.predict(layout, [policy] * number) for policy in (Policy.keep(), Policy.recompute()))
    used = links_between(problem, layout) | (set(HOST_LINKS) if chosen.host_bytes else set())
    used &= {link.place for link in problem.cluster.links}
    slacks = {words: slack(problem, chosen, names) for words, names in LINKS.items() if used & set(names)}
    effects, looked_at = [], [keep, again, *around(model, chosen)]
    for change in changes(problem, layout):
        found, seen = effect(problem, chosen, change, limit)
        effects.append(found)
        looked_at += seen if change.factor == 1 else []
        tick()
    whole = Explanation(
        problem, entry, chosen, model.limits(), keep, again, slacks, tuple(effects), tuple(looked_at), {}
    )
    return replace(
        whole, said={"time": _time(whole), "memory": _memory(whole), "choice": _choice(whole), "change": _change(whole)}
    )


def around(model: StepModel, chosen: Outcome) -> list[Outcome]:
    """The chosen Layout, the first n blocks doing one thing and the others keeping everything: for SOME Policies, a few n."""
    number = model.problem.config.num_layers
    policies = dict.fromkeys((*SOME, *chosen.policies))
    counts = sorted({round(number * share / SHARES) for share in range(1, SHARES + 1)} - {0})
    mixes = ([policy] * n + [Policy.keep()] * (number - n) for policy in policies for n in counts)
    return [model.predict(chosen.layout, mix) for mix in mixes]


def explained(args: argparse.Namespace, cluster_path: str | Path) -> tuple[Plan, Cluster, list[Explanation]]:
    """Every entry of --plan, with a bar of progress on the terminal; UserError as `made_from` and `config_of`."""
    from rich.console import Console
    from rich.progress import Progress

    plan = Plan.load(args.plan)
    cluster = made_from(plan, cluster_path)
    config = config_of(plan, args.model)
    problems = [problem_of(plan, entry, cluster, config) for entry in plan.entries]
    found = []
    with Progress(console=Console(stderr=True), transient=True, disable=args.json) as progress:
        pairs = list(zip(plan.entries, problems, strict=True))
        total = sum(len(changes(problem, layout_of(plan, entry))) for entry, problem in pairs)
        task = progress.add_task("", total=total)
        for entry, problem in pairs:
            progress.update(task, description=f"looking around {entry.shape}")
            found.append(explain(plan, entry, problem, lambda: progress.advance(task)))
    return plan, cluster, found


def filling(problem: Problem, outcome: Outcome) -> list[tuple[float, int]]:
    """(second, bytes on the device) at the start of the microbatch and wherever a block's forward or a copy out of it ends.

    What blocks keep piles up, what they offload is there until its copy is done. The end of forward, which
    Timeline.memory begins with, adds what the ends save (memory.ends_bytes); the last point here is before it.
    """
    line, work = outcome.timeline, problem.workload(outcome.layout)
    done = next(task.end_s for task in line.tasks if task.name == "ends")
    passed = {task.block: task.end_s for task in line.tasks if task.name == "forward" and task.block is not None}
    moved = {} if problem.cluster.device.kind == "cpu" else {b: w.moved_bytes for b, w in enumerate(outcome.ways)}
    events = [(at_s, outcome.ways[block].kept_bytes + moved.get(block, 0)) for block, at_s in passed.items()]
    events += [(t.end_s, -moved[t.block]) for t in line.tasks if t.name == "copy out" and t.block in moved]
    before = sorted(event for event in events if event[0] <= done)
    start = line.memory[0][1] - ends_bytes(work, DTYPE_BYTES[problem.dtype]) - sum(change for _, change in before)
    totals = accumulate((change for _, change in before), initial=start)
    return list(zip((0.0, *(at_s for at_s, _ in before)), totals, strict=True))


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """None of its own: --plan, --cluster, --model and --json are those of `autotune`."""


def run(args: argparse.Namespace) -> int:
    """Print the Plan and why it is so; without a cluster file, the Plan alone. Exit code 0."""
    from rich.console import Group, RenderableType

    beside = Path(args.plan).with_name("cluster.json")
    path = args.cluster or (str(beside) if beside.exists() else None)
    if path is None:
        plan, explanations = Plan.load(args.plan), list[Explanation]()
    else:
        plan, _, explanations = explained(args, path)
    if args.json:
        rows = {item.entry.shape: item.to_json() for item in explanations}
        print(json.dumps({"hash": plan.digest(), **asdict(plan), "explained": rows}))
        return 0
    parts: list[RenderableType] = [render(plan), *map(render_explanation, explanations)]
    if path is None:
        parts.append(
            "Where the time goes, and what would change the decision, needs the cluster file: give it as --cluster."
        )
    show(Group(*parts))
    return 0


def problem_of(plan: Plan, entry: PlanEntry, cluster: Cluster, config: TransformerConfig) -> Problem:
    """The Problem whose answer the entry is."""
    layout = layout_of(plan, entry)
    return Problem(
        cluster=cluster,
        config=config,
        shape=entry.video_shape,
        batch=layout.num_dp * layout.microbatch * layout.accumulation,
        num_text_tokens=plan.num_text_tokens,
        dtype=plan.compute_dtype,
        num_devices=layout.num_ranks,
        encode=bool(entry.predicted.step_parts_s.get("encode_s")),
        calibration=Calibration.of(plan),
        parked=plan.parked,
    )


def made_from(plan: Plan, path: str | Path) -> Cluster:
    """The cluster file with as many nodes as the Plan's ranks fill (`plan --num-nodes`); UserError for another device."""
    cluster = Cluster.load(path)
    if plan.device != cluster.device.fingerprint():
        raise UserError(
            f"this Plan was made for {plan.device_name!r} ({plan.device}), {path} has {cluster.device.name!r} "
            f"({cluster.device.fingerprint()}); give the cluster file that the Plan was made from."
        )
    return replace(cluster, num_nodes=math.ceil(math.prod(plan.mesh.values()) / cluster.num_devices_per_node))


def config_of(plan: Plan, model: str) -> TransformerConfig:
    """The preset that the Plan is for, else the model that was named; UserError where that is another one."""
    for name in PRESETS:
        if preset(name).fingerprint() == plan.model:
            return preset(name)
    from vchitect_fast.autotune.command import load_config  # which imports this file

    config = load_config(model)
    if config.fingerprint() != plan.model:
        raise UserError(
            f"this Plan is for model {plan.model}, {model} is {config.fingerprint()}; give the Plan's model as --model FOLDER."
        )
    return config


def _time(found: Explanation) -> list[str]:
    cost, line, layout = found.outcome.cost, found.outcome.timeline, found.outcome.layout
    step = cost.step_s
    parts = sorted(cost.parts().items(), key=lambda item: -item[1])
    shares = ", ".join(
        f"{PART_NAMES.get(name, name)} {value / step:.0%}" for name, value in parts if value >= 0.005 * step
    )
    said = [f"A step of {found.entry.shape} takes {seconds(step)}: {shares}."]
    waits = {name: layout.accumulation * line.exposed_s(name) for name in STREAM_WORDS}
    waits |= {"exchange": cost.exchange_s, "gather": cost.gather_s}  # the last microbatch reduces, the others do not
    worth = sorted((name for name in waits if waits[name] > BINDS * step), key=lambda name: -waits[name])
    if not worth:
        said.append(f"Compute binds: no stream beside it is waited for more than {BINDS:.0%} of the step.")
    for name in worth:
        said.append(
            f"Compute waits about {seconds(waits[name])} a step ({waits[name] / step:.0%}) for {STREAM_WORDS[name]}; {line.hidden(name):.0%} of that is hidden."
        )
    parked_s = cost.copy_s - waits.get("out", 0.0) - waits.get("in", 0.0)
    if found.problem.parked and parked_s > BINDS * step:
        names = " and ".join(found.problem.parked)
        said.append(
            f"What is parked ({names}) comes and goes around the update: {seconds(parked_s)}, hidden by nothing."
        )
    hidden = [
        f"{STREAM_WORDS[name]} to {line.hidden(name):.0%} (busy {line.busy_s(name) / line.total_s:.0%} of a microbatch)"
        for name in STREAM_WORDS
        if name not in worth and line.busy_s(name)
    ]
    said += [f"Hidden behind compute: {', '.join(hidden)}."] if hidden else []
    if cost.pressure_s:
        said.append(
            f"The peak is above the measured threshold of memory pressure: {seconds(cost.pressure_s)} a step go into memory given back and taken again."
        )
    before = found.entry.predicted.step_s
    if abs(before / step - 1) > DIFFERS:
        said.append(
            f"The Plan says {seconds(before)}, predicted by another version or from another cluster file; plan again to be sure."
        )
    if found.outcome.left_out:
        said.append(f"Not included, since the cluster file has no figure for it: {', '.join(found.outcome.left_out)}.")
    return said


def _memory(found: Explanation) -> list[str]:
    memory, limits = found.outcome.memory, found.limits
    peak, limit = memory.peak_bytes, limits.device_bytes
    spare = f"{gib(found.spare_bytes / GIB)} to spare" if peak <= limit else f"{gib(-found.spare_bytes / GIB)} too much"
    said = [
        f"The fullest moment is the {found.outcome.fullest}: {gib(peak / GIB)} of {gib(limit / GIB)} that may be used, {spare}."
    ]
    parts = sorted(memory.parts_gib().items(), key=lambda item: -item[1])
    said.append(
        "There then: " + ", ".join(f"{name.replace('_', ' ')} {gib(value)}" for name, value in parts if value) + "."
    )
    if found.outcome.host_bytes:
        host = limits.host_bytes
        of = f" of {gib(host / GIB)} that each rank may pin" if host is not None else ""
        said.append(f"Host memory holds {gib(found.outcome.host_bytes / GIB)}{of}.")
    if not fits(found.outcome, limits):
        said.append("So it does not fit in this cluster's memory; plan again from this file.")
    return said


def _choice(found: Explanation) -> list[str]:
    chosen, entry = found.outcome, found.entry
    said = [f"Chosen: {layout_in_words(chosen.layout)}; {blocks_in_words(chosen.policies)}."]
    everything = chosen.policies == found.keep.policies
    said += [] if everything else [_against("Keeping everything", found.keep, found)]
    if everything and fits(found.keep, found.limits):
        said.append("Everything fits, so nothing is recomputed and nothing leaves the device.")
    if chosen.policies != found.recompute.policies:
        said.append(_against("Recomputing everything", found.recompute, found))
    said += [f"First runner-up: {other['choice']}: {other['why']}." for other in entry.runners_up[:1]]
    return said


def _against(name: str, other: Outcome, found: Explanation) -> str:
    ratio = other.cost.step_s / found.outcome.cost.step_s - 1
    pace = "as fast" if abs(ratio) < 0.0005 else f"{abs(ratio):.1%} {'slower' if ratio > 0 else 'faster'}"
    peak, limit = other.memory.peak_bytes, found.limits.device_bytes
    room = "" if peak <= limit else f", which is {gib((peak - limit) / GIB)} too much"
    return f"{name} would be {pace} and take {gib(peak / GIB)}{room}."


def _change(found: Explanation) -> list[str]:
    now, *others = found.effects
    said = []
    if now.winner_step_s is not None:
        gain = 1 - now.winner_step_s / now.step_s
        faster = f"is {gain:.1%} faster" if now.fits else "fits"
        said.append(
            f"Already without a change the search finds another choice that {faster}: {now.winner}; plan again from this file."
        )
    else:
        said += [_turn(item) for item in others if item.winner]
    if not said:
        said.append("None of the changes looked at leads to another choice.")
    most = max(others, key=lambda item: abs(item.ratio - 1))
    if abs(most.ratio - 1) >= 0.0005:
        said.append(
            f"Of the changes looked at the step follows this most: {most.change} makes it {most.ratio - 1:+.1%}."
        )
    for words, times in found.slacks.items():
        if times is None:
            said.append(
                f"The {words} could be {SLOWEST:.0f} times slower, and the step would not be {LONGER:.0%} longer."
            )
        elif times >= 1.1:
            said.append(f"The {words} could be {times:.2g} times slower before the step is {LONGER:.0%} longer.")
        else:
            said.append(f"The {words} bind: any slower, and the step is longer.")
    return said


def _turn(item: Effect) -> str:
    if item.winner_step_s is None:
        return f"With {item.change} nothing fits."
    if not item.fits:
        return f"With {item.change} this plan does not fit; then best, at {seconds(item.winner_step_s)}: {item.winner}."
    return f"With {item.change} another choice wins by {1 - item.winner_step_s / item.step_s:.1%}: {item.winner}."
