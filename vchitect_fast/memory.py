"""`vchitect-fast memory explain`: what one step keeps, moves to host memory and recomputes, byte by byte, predicted and measured.

Predicted comes from the Plan's Policies by formula (offload/policy.py), and of parked states from the model's sizes. Measured
is one real forward and backward here, random weights on noise, in which every saved storage is counted once by block and group;
--no-run leaves it out, and then the column says "not measured". Of a Plan for many ranks all is the first rank's, which has
most; it is measured where the ranks are, under torchrun. Counted are the blocks and what is parked: embeddings, the output
projection, weights, gradients and states that stay are the Plan's peak.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vchitect_fast.architecture import PRESETS, TransformerConfig
from vchitect_fast.errors import UserError
from vchitect_fast.machine import available_memory_bytes, this_device
from vchitect_fast.offload.policy import GroupBytes, share_of, step_bytes
from vchitect_fast.plan import KEEP, OFFLOAD, RECOMPUTE, Plan, PlanEntry
from vchitect_fast.shapes import VideoShape

if TYPE_CHECKING:
    from vchitect_fast.parallel.mesh import Mesh

MODULE = "vchitect_fast.cli memory explain"
STATE_BYTES = {"optimizer": 8, "average": 4}  # of a parameter: two fp32 moments, one fp32 average

EPILOG = """\
example: vchitect-fast memory explain --plan plan.json --model vchitect-tiny --picture memory.svg
example: vchitect-fast memory explain --plan plan.json --model vchitect-2b --shape 40x768x432 --no-run --json
example: torchrun --nproc-per-node=8 -m vchitect_fast.cli memory explain --plan plan.json --model vchitect-2b
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
class ParkedRow:
    """A part of the run's state that lies in host memory during forward and backward; `measured_bytes` None: nothing was run."""

    name: str  # of plan.PARKABLE
    predicted_bytes: int
    measured_bytes: int | None


@dataclass(frozen=True)
class Explanation:
    """One entry of a Plan with its rows and, after a run, what the engine did."""

    entry: PlanEntry
    dtype: str
    rows: tuple[Row, ...]
    engine: dict[str, int | float] | None
    parked: tuple[ParkedRow, ...] = ()
    num_ranks: int = 1  # of which this is the first

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
    with nullcontext() if args.no_run else _ranks(plan) as mesh:
        explanation = explain(plan, entry, config, mesh)
        if mesh is not None and not mesh.is_first:
            return 0
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


def _ranks(plan: Plan) -> AbstractContextManager[Mesh]:
    """The ranks that the Plan is for; UserError in one process that has a part of them only."""
    from vchitect_fast.parallel.mesh import launched, read_launch

    num_ranks = prod(plan.mesh.values())
    if num_ranks > 1 and read_launch(os.environ) is None:
        raise UserError(
            f"this Plan is for {num_ranks} ranks and one process cannot run its part alone; add --no-run to predict only, or start "
            f"`torchrun --nproc-per-node={num_ranks} -m {MODULE} ...`."
        )
    return launched(plan.mesh, plan.fsdp_group)


def explain(plan: Plan, entry: PlanEntry, config: TransformerConfig, mesh: Mesh | None) -> Explanation:
    """Predict, and with a `mesh` (ALONE for one process) also run one forward and backward of the entry's microbatch on it."""
    if len(entry.policy) != config.num_layers:
        raise UserError(
            f"expected a Policy for each of {config.num_layers} blocks, got {len(entry.policy)}; plan this model again."
        )
    here = this_device()  # another machine is taken for a GPU: LayerNorm's statistics are fp32 there, in whole blocks
    kind = here.kind if mesh is not None or here.fingerprint() == plan.device else "cuda"
    work = share_of(plan, entry, config)
    predicted = step_bytes(work, entry.policy, plan.compute_dtype, device_kind=kind, shard=entry.shard)
    num_shards = plan.mesh["dp_shard"] * plan.mesh["sp"] if plan.fsdp_group != "none" else 1
    states = {name: STATE_BYTES[name] * config.num_parameters(num_shards) for name in plan.parked}
    measured = None if mesh is None else _measure(plan, entry, config, mesh, _needed(predicted, states, config))
    rows = []
    for item in predicted:
        found = None
        if measured is not None and item.action != RECOMPUTE:
            found = measured.saved.get((item.block, item.group, item.action), 0)
        rows.append(Row(item.block, item.group, item.action, item.num_bytes, found))
    parked = [ParkedRow(name, size, measured.parked[name] if measured else None) for name, size in states.items()]
    engine = measured.engine if measured else None
    return Explanation(entry, plan.compute_dtype, tuple(rows), engine, tuple(parked), prod(plan.mesh.values()))


def to_json(explanation: Explanation) -> dict[str, Any]:
    """All of it, the rows as objects."""
    return {
        "shape": explanation.entry.shape,
        "microbatch": explanation.entry.microbatch,
        "dtype": explanation.dtype,
        "num_ranks": explanation.num_ranks,
        "rows": [vars(row) for row in explanation.rows],
        "parked": [vars(row) for row in explanation.parked],
        "totals": explanation.totals(),
        "engine": explanation.engine,
    }


@dataclass(frozen=True)
class _Measured:
    saved: dict[tuple[int, str, str], int]  # bytes by block, group and action
    parked: dict[str, int]
    engine: dict[str, int | float]


def _needed(predicted: list[GroupBytes], states: dict[str, int], config: TransformerConfig) -> int:
    """About the bytes of a forward and backward: parameters and gradients, what is saved, and states to be parked."""
    return sum(item.num_bytes for item in predicted) + 8 * config.num_parameters() + sum(states.values())


def _measure(plan: Plan, entry: PlanEntry, config: TransformerConfig, mesh: Mesh, needed_bytes: int) -> _Measured:
    import torch

    from vchitect_fast.ema import EMA
    from vchitect_fast.model import VchitectTransformer
    from vchitect_fast.offload.hooks import Saving
    from vchitect_fast.offload.states import States
    from vchitect_fast.optimizer import MasterAdamW
    from vchitect_fast.parallel.apply import obey, parallelize
    from vchitect_fast.parallel.mesh import on_all
    from vchitect_fast.parallel.vae import own_frames
    from vchitect_fast.train import build_saving, park

    device = mesh.device

    def saving_with_room() -> Saving:
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory_bytes()
        if needed_bytes > free:
            raise UserError(
                f"one step of {entry.shape} needs about {needed_bytes / 2**30:.1f} GiB and {free / 2**30:.1f} are free; add --no-run to predict only."
            )
        return build_saving(plan, config, device)

    saving = on_all(mesh.host_group, saving_with_room)
    torch.manual_seed(0)
    dtype, shape = getattr(torch, plan.compute_dtype), entry.video_shape
    model = VchitectTransformer(config).to(device)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)  # it starts at zero, and the blocks would get zero gradients
    model.saving, saving.count = saving, True
    parallelize(model, plan, mesh)
    if plan.parked:  # as in train; moments of zeros are as large as others
        optimizer = MasterAdamW(model, weight_decay=0.0, betas=(0.9, 0.95), dtype=dtype)
        states = park(plan, optimizer, EMA(optimizer.masters, 0.99), device)
    else:
        states, model = States({}), model.to(dtype) if mesh.fsdp is None else model
    obey(model, entry, mesh)
    num_frames = len(range(shape.num_frames)[own_frames(shape.num_frames, mesh.sp_group)])
    sizes = [
        (entry.microbatch, num_frames, config.in_channels, shape.latent_height, shape.latent_width),
        (entry.microbatch, plan.num_text_tokens, config.joint_attention_dim),
        (entry.microbatch, config.pooled_projection_dim),
        (entry.microbatch,),
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
    return _Measured(dict(saving.bytes), states.parked_bytes(), figures)
