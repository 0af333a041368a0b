"""`vchitect-fast memory explain`: what the blocks of one step keep, move and recompute, byte by byte, predicted and measured.

Predicted comes from the Plan's Policies by formula (offload/policy.py). Measured is one real forward and backward here, random
weights on noise, in which every saved storage is counted once by block and group; --no-run leaves it out, and then the column
says "not measured". Counted are the blocks only: embeddings, the output projection, weights and gradients are the Plan's peak.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vchitect_fast.architecture import PRESETS, TransformerConfig
from vchitect_fast.errors import UserError
from vchitect_fast.machine import available_memory_bytes, this_device
from vchitect_fast.offload.policy import GroupBytes, step_bytes
from vchitect_fast.plan import KEEP, OFFLOAD, RECOMPUTE, Plan, PlanEntry
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

EPILOG = """\
example: vchitect-fast memory explain --plan plan.json --model vchitect-tiny --picture memory.svg
example: vchitect-fast memory explain --plan plan.json --model vchitect-2b --shape 40x768x432 --no-run --json
"""


@dataclass(frozen=True)
class Row:
    """One group of one block; `measured_bytes` is None where nothing was run, or where it is computed again and not saved."""

    block: int
    group: str
    action: str
    predicted_bytes: int
    measured_bytes: int | None


@dataclass(frozen=True)
class Explanation:
    """One entry of a Plan with its rows and, after a run, what the engine did."""

    entry: PlanEntry
    dtype: str
    rows: tuple[Row, ...]
    engine: dict[str, int | float] | None

    def totals(self) -> dict[str, dict[str, int | None]]:
        """By action: predicted and measured bytes."""
        found: dict[str, dict[str, int | None]] = {}
        for action in (KEEP, OFFLOAD, RECOMPUTE):
            rows = [row for row in self.rows if row.action == action]
            measured = [row.measured_bytes for row in rows if row.measured_bytes is not None]
            ran = self.engine is not None and action != RECOMPUTE
            found[action] = {
                "predicted_bytes": sum(row.predicted_bytes for row in rows),
                "measured_bytes": sum(measured) if ran else None,
            }
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast memory`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("verb", choices=("explain",), metavar="VERB", help="explain")
    parser.add_argument("--plan", default="plan.json", help="the Plan to explain (default: %(default)s)")
    parser.add_argument(
        "--model",
        default="vchitect-2b",
        help=f"the Plan's model: {', '.join(PRESETS)}, or a folder with config.json (default: %(default)s)",
    )
    parser.add_argument("--shape", metavar="FxWxH", help="which of the Plan's shapes (default: its first)")
    parser.add_argument("--no-run", action="store_true", help="only predict; for shapes or devices that are not here")
    parser.add_argument("--picture", metavar="FILE", help="write a picture, .svg or .png (default: none)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError for what the user can mend."""
    from vchitect_fast.autotune.command import load_config

    if args.picture and Path(args.picture).suffix not in (".svg", ".png"):
        raise UserError(f"expected a picture that ends in .svg or .png, got {args.picture}; name it so.")
    plan, config = Plan.load(args.plan), load_config(args.model)
    if plan.model != config.fingerprint():
        raise UserError(
            f"the Plan {args.plan} is for model {plan.model}, {args.model} is {config.fingerprint()}; name its model."
        )
    entry = plan.entry(VideoShape.parse(args.shape)[0]) if args.shape else plan.entries[0]
    explanation = explain(plan, entry, config, measure=not args.no_run)
    if args.picture:
        from vchitect_fast.memory_picture import draw

        draw(explanation, args.picture)
    if args.json:
        print(json.dumps(to_json(explanation)))
        return 0
    from rich.console import Console

    from vchitect_fast.memory_picture import table

    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=120)).print(table(explanation))
    if args.picture:
        print(f"wrote {args.picture}")
    return 0


def explain(plan: Plan, entry: PlanEntry, config: TransformerConfig, *, measure: bool) -> Explanation:
    """Predict, and with `measure` also run one forward and backward of the entry's microbatch on this machine."""
    if len(entry.policy) != config.num_layers:
        raise UserError(
            f"expected a Policy for each of {config.num_layers} blocks, got {len(entry.policy)}; plan this model again."
        )
    work = Workload(config, entry.video_shape, entry.microbatch, plan.num_text_tokens)
    here = this_device()  # another machine is taken for a GPU: LayerNorm's statistics are fp32 there, in whole blocks
    kind = here.kind if measure or here.fingerprint() == plan.device else "cuda"
    predicted = step_bytes(work, entry.policy, plan.compute_dtype, device_kind=kind)
    measured, engine = _measure(plan, entry, work, predicted) if measure else (None, None)
    rows = []
    for item in predicted:
        found = None
        if measured is not None and item.action != RECOMPUTE:
            found = measured.get((item.block, item.group, item.action), 0)
        rows.append(Row(item.block, item.group, item.action, item.num_bytes, found))
    return Explanation(entry, plan.compute_dtype, tuple(rows), engine)


def to_json(explanation: Explanation) -> dict[str, Any]:
    """All of it, the rows as objects."""
    return {
        "shape": explanation.entry.shape,
        "microbatch": explanation.entry.microbatch,
        "dtype": explanation.dtype,
        "rows": [vars(row) for row in explanation.rows],
        "totals": explanation.totals(),
        "engine": explanation.engine,
    }


def _measure(
    plan: Plan, entry: PlanEntry, work: Workload, predicted: list[GroupBytes]
) -> tuple[dict[tuple[int, str, str], int], dict[str, int | float]]:
    import torch

    from vchitect_fast.model import VchitectTransformer
    from vchitect_fast.train import build_saving

    needed = sum(item.num_bytes for item in predicted) + 8 * work.config.num_parameters()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory_bytes()
    if needed > free:
        raise UserError(
            f"one step of {entry.shape} needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free; add --no-run to predict only."
        )
    torch.manual_seed(0)
    dtype, config, shape = getattr(torch, plan.compute_dtype), work.config, work.shape
    model = VchitectTransformer(config).to(device, dtype)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)  # it starts at zero, and the blocks would get zero gradients
    saving = model.saving = build_saving(plan, config, device)
    saving.count = True
    model.set_policy(entry.policy)
    model.set_chunks(entry.num_chunks)
    model.attention_backend = entry.attention
    sizes = [
        (work.batch, shape.num_frames, config.in_channels, shape.latent_height, shape.latent_width),
        (work.batch, work.num_text_tokens, config.joint_attention_dim),
        (work.batch, config.pooled_projection_dim),
        (work.batch,),
    ]
    steps = 2 if saving.engine else 1  # the first teaches the order of backward, the second is counted
    for _ in range(steps):
        saving.forget()
        saving.orders.num_ahead = saving.orders.num_late = 0
        with saving.step():
            model(*(torch.randn(size, device=device) for size in sizes)).square().mean().backward()
    figures: dict[str, int | float] = {"fetched_ahead": saving.orders.num_ahead, "fetched_late": saving.orders.num_late}
    if saving.engine:
        saving.engine.settle()
        figures |= saving.engine.stats()
    return dict(saving.bytes), figures
