"""`vchitect-fast autotune report`: a Plan and why it is so, as one HTML file.

Of each shape: cards, sentences, the streams and the memory of a microbatch on one axis, what lies in memory at its fullest
moment, time against memory of the choices looked at, what a little less or more of the cluster would change, why the
runners-up lost. At the end what the predictions rest on: confidence and sources. It shows what explain.py found and
predicts nothing; every text from a file goes through page.text. Refused: --out that is not named .html.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from vchitect_fast.autotune.bounds import fits
from vchitect_fast.autotune.describe import blocks_in_words, difference
from vchitect_fast.autotune.explain import Explanation, explained, filling
from vchitect_fast.autotune.memory import GIB
from vchitect_fast.autotune.model import Outcome
from vchitect_fast.autotune.pictures import Point, front, near, peak, streams
from vchitect_fast.autotune.reasons import num_doing
from vchitect_fast.autotune.report import PART_NAMES, SAID, gib, seconds
from vchitect_fast.cluster import Cluster, Link
from vchitect_fast.errors import UserError
from vchitect_fast.files import write_text
from vchitect_fast.page import cards, figure, foreign, page, table, text
from vchitect_fast.plan import OFFLOAD, Plan

DEFAULT_OUT = "plan.json"  # of `autotune`: stands for no --out here


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """None of its own: --plan, --cluster, --model, --out and --json are those of `autotune`."""


def run(args: argparse.Namespace) -> int:
    """Write the page beside the Plan, or to --out. Exit code 0; UserError for what the user can mend."""
    out = Path(args.plan).with_suffix(".html") if args.out == DEFAULT_OUT else Path(args.out)
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"expected --out to be an HTML file, got {out}; name it like plan.html.")
    plan, cluster, found = explained(args, args.cluster or Path(args.plan).with_name("cluster.json"))
    write_text(out, plan_page(plan, cluster, found))
    print(json.dumps({"page": str(out)}) if args.json else f"wrote {out}")
    return 0


def plan_page(plan: Plan, cluster: Cluster, found: Sequence[Explanation]) -> str:
    """The whole document; `found` has an Explanation an entry, in their order."""
    number = math.prod(plan.mesh.values())
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    where = f"{number} x {plan.device_name}" if number > 1 else plan.device_name
    shapes = f"{len(found)} shape{'' if len(found) == 1 else 's'}"
    title = f"Plan for {where}"
    body = [
        f"<h1>{foreign(title)}</h1>",
        f'<p class="lead">{shapes}, {text(plan.compute_dtype)}, {plan.num_text_tokens} text tokens'
        f"{f', mesh {text(mesh)}' if mesh else ''}. Cluster {foreign(cluster.name)}. All steps on this page are predicted, none was run.</p>",
        _overview(found) if len(found) > 1 else "",
        *(part for item in found for part in _entry(item)),
        *_rests_on(plan, cluster),
    ]
    return page(title, body)


def _overview(found: Sequence[Explanation]) -> str:
    heads = (
        "shape",
        "visual tokens",
        "step",
        "visual tokens/s",
        "peak",
        "to spare",
        "recompute",
        "offload",
        "chunks",
    )
    rows = []
    for item in found:
        tokens, cost = item.problem.shape.num_visual_tokens(item.problem.config.patch_size), item.outcome.cost
        blocks = len(item.entry.policy)
        rows.append(
            (
                f'<a href="#{text(item.entry.shape)}">{text(item.entry.shape)}</a>',
                f"{tokens:,}",
                seconds(cost.step_s),
                f"{item.problem.batch * tokens / cost.step_s:,.0f}",
                gib(item.outcome.memory.peak_bytes / GIB),
                _spare(item),
                f"{item.entry.num_recomputed} of {blocks}",
                f"{num_doing(OFFLOAD, item.entry.policy)} of {blocks}",
                f"{item.entry.num_chunks}",
            )
        )
    return table(heads, rows)


def _entry(item: Explanation) -> list[str]:
    line, limit = item.outcome.timeline, item.limits.device_bytes
    accumulation = item.outcome.layout.accumulation
    stretch = "One microbatch" if accumulation == 1 else f"The last of {accumulation} microbatches"
    return [
        f'<h2 id="{text(item.entry.shape)}">{text(item.entry.shape)}</h2>',
        cards(_facts(item)),
        *_said(item, "time"),
        f"<h3>{text(stretch)}, {text(seconds(line.total_s))}; then the optimizer, {text(seconds(item.outcome.cost.optimizer_s))}</h3>",
        streams(line, filling(item.problem, item.outcome), limit),
        *_said(item, "memory"),
        peak(item.outcome.memory.parts_gib(), limit),
        *_said(item, "choice"),
        _figures(item),
        *_lost(item),
        *_said(item, "change"),
        _changes(item),
    ]


def _figures(item: Explanation) -> str:
    limit, chosen = item.limits.device_bytes, _point(item.outcome, item)
    points = [_point(other, item) for other in item.looked_at]
    far = sum(not near(point, chosen, limit) for point in points)
    left_out = f" {far} that are much slower or larger are left out." if far else ""
    caption = f"Choices on the same mesh: grey ones do not fit, the ring is the chosen one, the line joins those that no other beats in both.{left_out}"
    picture = front(points, chosen, limit)
    shown = [figure(caption, picture)] if picture else []
    return f'<div class="figures">{"".join([*shown, figure("Parts of the step.", _parts(item.outcome))])}</div>'


def _facts(item: Explanation) -> dict[str, str]:
    outcome, problem = item.outcome, item.problem
    step = outcome.cost.step_s
    tokens = problem.batch * problem.shape.num_visual_tokens(problem.config.patch_size)
    parts = outcome.cost.parts()
    waits = sum(parts.get(name, 0.0) for name in ("exchange_s", "gather_s", "copy_s"))
    facts = {
        f"a step of {problem.batch} sample{'' if problem.batch == 1 else 's'}": seconds(step),
        "visual tokens a second": f"{tokens / step:,.0f}",
        f"peak of {gib(item.limits.device_bytes / GIB)} that may be used": gib(outcome.memory.peak_bytes / GIB),
        "to spare": _spare(item),
        "of the step is recomputation": f"{parts['recompute_s'] / step:.0%}",
        "of the step waits for copies and collectives": f"{waits / step:.1%}",
    }
    if outcome.host_bytes:
        facts["host memory a rank"] = gib(outcome.host_bytes / GIB)
    return facts


def _spare(item: Explanation) -> str:
    return gib(item.spare_bytes / GIB) if item.spare_bytes >= 0 else f"-{gib(-item.spare_bytes / GIB)}"


def _said(item: Explanation, *names: str) -> list[str]:
    return [
        f"<h3>{SAID[name].capitalize()}</h3><ul>{''.join(f'<li>{text(line)}</li>' for line in item.said[name])}</ul>"
        for name in names
    ]


def _point(outcome: Outcome, item: Explanation) -> Point:
    chosen = item.outcome
    label = difference(outcome.layout, outcome.policies, chosen.layout, chosen.policies) or blocks_in_words(
        outcome.policies
    )
    return Point(label, outcome.cost.step_s, outcome.memory.peak_bytes, fits(outcome, item.limits))


def _parts(outcome: Outcome) -> str:
    rows = [
        (text(PART_NAMES.get(name, name)), text(seconds(value)), f"{value / outcome.cost.step_s:.1%}")
        for name, value in outcome.cost.parts().items()
        if value
    ]
    return table(("part", "time", "share"), rows)


def _lost(item: Explanation) -> list[str]:
    if not item.entry.runners_up:
        return []
    rows = [
        (text(other["choice"]), text(seconds(other["step_s"])), text(gib(other["peak_gib"])), text(other["why"]))
        for other in item.entry.runners_up
    ]
    return ["<h3>Why the others lost</h3>", table(("choice", "step", "peak", "why"), rows, words=(0, 3))]


def _changes(item: Explanation) -> str:
    rows = []
    for effect in item.effects:
        best = text(effect.winner or "this plan")
        then = "" if effect.winner_step_s is None else text(seconds(effect.winner_step_s))
        fit = "yes" if effect.fits else "no"
        rows.append((text(effect.change), text(seconds(effect.step_s)), f"{effect.ratio - 1:+.1%}", fit, then, best))
    return table(("change", "this plan's step", "change of it", "fits", "best step", "best then"), rows, words=(0, 5))


def _rests_on(plan: Plan, cluster: Cluster) -> list[str]:
    notes = dict.fromkeys(entry.predicted.confidence for entry in plan.entries)
    device = cluster.device
    rows = [(text(device.name), text(f"{device.memory_bytes / GIB:.0f} GiB"), text(device.source or "no source given"))]
    rows += [
        (text(link.name.replace("_", " ")), text(_rate(link)), text(link.source or "no source given"))
        for link in cluster.links
    ]
    return [
        "<h2>What it rests on</h2>",
        "<ul>", *(f"<li>{text(note)}</li>" for note in notes), "</ul>",
        table(("of the cluster file", "figure", "source"), rows, words=(0, 2)),
        f"<p><small>Plan {text(plan.digest())}, model {text(plan.model)}, device {text(plan.device)}.</small></p>",
    ]  # fmt: skip


def _rate(link: Link) -> str:
    return f"{link.bytes_per_s / 1e9:,.1f} GB/s, {1e6 * link.latency_s:.0f} us"
