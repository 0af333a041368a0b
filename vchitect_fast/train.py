"""Training, top to bottom: config -> Plan -> ranks -> model -> data -> steps. One process, or as many as the Plan's mesh has.

    vchitect-fast train run.yaml
    torchrun --nproc-per-node=8 -m vchitect_fast.train run.yaml       every rank runs this file; rank 0 prints and logs

Every random draw is a function of (seed, step), so a run that was stopped, even by kill -9, and resumed ends with the same
parameters bit by bit, and no generator state is stored. It never chooses a layout: what to keep, offload or recompute, how
to split batch, sequence and parameters and in which dtype is the Plan's. step.py is what happens inside a step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from vchitect_fast import checkpoint
from vchitect_fast.architecture import PRESETS, TransformerConfig, preset
from vchitect_fast.carry import carry_over
from vchitect_fast.checkpoint_writer import Writer
from vchitect_fast.clips import read_clips
from vchitect_fast.config import TrainConfig, describe_fields
from vchitect_fast.data import VideoData
from vchitect_fast.dry_run import outlook, print_outlooks, stage_of
from vchitect_fast.ema import EMA
from vchitect_fast.errors import UserError
from vchitect_fast.export import export_checkpoint
from vchitect_fast.machine import this_device
from vchitect_fast.manifest import Clip
from vchitect_fast.metrics import Log, NoLog, measured, reset_peak, rewind_log
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.model.fp8_steps import check_device
from vchitect_fast.model.text import load_text_encoder
from vchitect_fast.model.vae import load_codec
from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.offload.policy import offload_budget_bytes, share_of
from vchitect_fast.offload.states import States
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.parallel.apply import parallelize
from vchitect_fast.parallel.mesh import Mesh, agreed, launched, on_all, on_first, over_ranks, read_launch
from vchitect_fast.parallel.shard import local_shard
from vchitect_fast.plan import Plan
from vchitect_fast.profiling.span import span, tell
from vchitect_fast.recipe import is_recipe
from vchitect_fast.resume import check_supported, only_process_in, resume, run_state, run_tensors
from vchitect_fast.sample import BY_FRAMES, Pipeline
from vchitect_fast.step import Step
from vchitect_fast.train_console import Console, print_summary
from vchitect_fast.validate import Validation


def train(config: TrainConfig) -> dict[str, Any]:
    """Run `config.steps` optimizer steps, or those that are left. Returns the summary that ends log.jsonl.

    Raises UserError for anything the user can mend, before the first step where it can be known then.
    """
    plan = Plan.load(config.plan)
    with launched(plan.mesh, plan.fsdp_group) as mesh:
        return train_on(mesh, config, plan)


def train_on(mesh: Mesh, config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """This rank's part of the run; every rank of the mesh calls it, and gets the summary."""
    run = Path(config.out)
    check_supported(plan, mesh)
    if mesh.axes is not None:  # the first indexes what nobody has read yet
        on_first(mesh.host_group, lambda: len(read_clips(config.manifest, config.cache)))
    everywhere = partial(on_all, mesh.host_group)  # an error of one rank is the error of all, which would wait for it
    clips = everywhere(lambda: read_clips(config.manifest, config.cache))
    with only_process_in(run, mesh), stop_on_sigterm() as stop:
        reset_peak(mesh.device.type)
        model = everywhere(lambda: build_model(config, plan, mesh.device))
        model.saving = everywhere(lambda: build_saving(plan, model.config, mesh.device))
        parallelize(model, plan, mesh)  # what a block or a rank cannot do is refused before the data is read
        betas, dtype = (config.beta1, config.beta2), getattr(torch, plan.compute_dtype)
        optimizer = MasterAdamW(model, weight_decay=config.weight_decay, betas=betas, dtype=dtype)
        ema = EMA(optimizer.masters, config.ema_decay, warm_up=config.start_from is None)
        tensors, state = run_tensors(model, optimizer, ema), run_state(config, plan, model.config, clips, mesh)
        done, changed = resume(config, state, tensors, mesh)
        if not done:
            carry_over(config, state, tensors, mesh)
        optimizer.copy_masters()
        tell(model=model, optimizer=optimizer, ema=ema)
        states = everywhere(lambda: park(plan, optimizer, ema, mesh.device))
        pipeline = everywhere(lambda: build_pipeline(config, plan, model, ema, mesh))
        open_data = partial(build_data, config, plan, pipeline, mesh)
        with (
            everywhere(lambda: open_data(clips)) as data,
            everywhere(lambda: open_log(config, done, mesh)) as log,
            Console(config, plan, model.config, done, mesh) as console,
            Writer(run, config.keep_last, mesh, in_background=mesh.device.type == "cuda") as writer,
        ):
            data.require_windows()
            if changed:
                log.write("resumed", done, changed=changed)
                console.resumed(changed)
            validate = Validation(config, plan, pipeline, open_data, log, mesh) if config.validate_every else None
            step_once = Step(config, plan, model, optimizer, ema, pipeline.text_encoder.encode([""]), mesh, states)

            def save() -> None:
                with span("checkpoint/save"), states.here():
                    writer.save(done, tensors, state)
                folder = run / f"checkpoint-{done:08d}"
                log.write("checkpoint", done, path=str(folder))
                console.saved(folder, writer.in_background)

            saved_at = done if done else None
            if validate and not done:
                with states.here("average"):
                    console.validated(validate(0))
            while done < config.steps and not any_rank(mesh, stop.requested):
                with span("step", done + 1):
                    with span("data/batch"):
                        batch = agreed(mesh, partial(data.batch, done))
                    record = step_once(done, batch)
                done += 1
                agreed(mesh, partial(report, log, console, done, record))
                if validate and (done == config.steps or done % config.validate_every == 0):
                    with states.here("average"):
                        console.validated(validate(done))
                if config.sample_every and done % config.sample_every == 0:
                    stem = run / "samples" / f"step-{done:08d}"
                    with states.here("average"):
                        strip = pipeline.write_samples(data.captions(4), plan.entries[0].video_shape, stem, config)
                    log.write("sample", done, path=str(strip))
                if done == config.steps or (config.save_every and done % config.save_every == 0):
                    save()
                    saved_at = done
            if saved_at != done:  # SIGTERM between two saves
                save()
            newest = writer.wait() or checkpoint.latest(run)
            summary = {
                "step": done,
                "measured": measured(run) if mesh.is_first else {},
                "skipped": data.skipped,
                "checkpoint": str(newest),
            }
            log.write("done", done, **{name: value for name, value in summary.items() if name != "step"})
        if done >= config.steps and newest and mesh.is_first:
            summary["model"] = str(export_checkpoint(newest, run / "model"))
    return summary


def any_rank(mesh: Mesh, flag: bool) -> bool:
    """Whether it holds on any rank, the same answer on all; a scheduler tells its ranks to stop one after the other."""
    return bool(over_ranks(mesh, [], [float(flag)])[1][0])


def report(log: Log, console: Console, done: int, record: dict[str, Any]) -> None:
    """What a step was, to the file and to the person."""
    log.write("step", done, **record)
    console.stepped(done, record)


def open_log(config: TrainConfig, done: int, mesh: Mesh) -> Log:
    """The run's log, rewound to the checkpoint it goes on from; run.yaml beside it. Rank 0 writes, the others write nothing."""
    if not mesh.is_first:
        return NoLog()
    run = Path(config.out)
    rewind_log(run, done if done else -1)
    config.save(run / "run.yaml")
    log = Log(run, start=done, tensorboard=config.tensorboard, wandb_project=config.wandb_project)
    if not done:
        log.write("start", 0, config=asdict(config))
    return log


def build_model(config: TrainConfig, plan: Plan, on: torch.device) -> VchitectTransformer:
    """From SD3, from a folder, or a preset with random weights; in fp32."""
    torch.manual_seed(config.seed)
    device = this_device()
    if config.init_from_sd3:
        model = VchitectTransformer.init_from_sd3(config.init_from_sd3)
    elif config.model in PRESETS:
        plan.check(model=preset(config.model).fingerprint(), device=device)  # before 2 B parameters are drawn
        model = VchitectTransformer(preset(config.model))
    elif Path(config.model).is_dir():
        model = VchitectTransformer.from_pretrained(config.model)
    else:
        raise UserError(f"{config.model!r} is neither a model folder nor a preset; presets are {', '.join(PRESETS)}.")
    plan.check(model=model.config.fingerprint(), device=device)
    model = model.to(on)
    if config.fp8_linears:
        compute_in_fp8(model, plan, on)
    return model


def compute_in_fp8(model: VchitectTransformer, plan: Plan, device: torch.device) -> None:
    """The hand-written block with its linears in fp8, on whatever the device has; UserError where it has nothing.

    Validation and samples of the run compute so too; exported weights are those of any run.
    """
    cut = "cuts sequences" if plan.mesh["sp"] > 1 else ""
    if cut or any(entry.num_chunks > 1 for entry in plan.entries):
        raise UserError(
            f"fp8_linears are of blocks that are computed whole, the Plan {cut or 'has chunks'}; plan without, or set fp8_linears "
            "to false."
        )
    check_device(device, getattr(torch, plan.compute_dtype), model.config.hidden_dim)
    model.set_kernels("triton" if device.type == "cuda" else "reference", fp8=True)


def build_saving(plan: Plan, config: TransformerConfig, device: torch.device) -> Saving:
    """With the engine and the pool that the Plan's Policies need; without one where nothing is offloaded."""
    budget = 0
    for entry in plan.entries:
        work = share_of(plan, entry, config)
        needed = offload_budget_bytes(work, entry.policy, plan.compute_dtype, shard=entry.shard)
        if entry.offload_bytes and entry.offload_bytes < needed:
            raise UserError(
                f"the Plan's {entry.shape} offloads {needed} bytes a microbatch and its offload_bytes is {entry.offload_bytes}; "
                "set it to 0 (as much as is needed), or offload less."
            )
        budget = max(budget, entry.offload_bytes, needed)
    return Saving(Engine(budget, device)) if budget else Saving()


@torch.no_grad()  # where to_local gives the shard itself
def park(plan: Plan, optimizer: MasterAdamW, ema: EMA, device: torch.device) -> States:
    """AdamW's moments and the average leave for host memory, as far as the Plan parks them: on each rank its own shards."""
    moments = {name: tensor for name, tensor in optimizer.state().items() if not name.startswith("step.")}
    parts = {"optimizer": moments, "average": ema.average}
    return States({p: {name: local_shard(tensor) for name, tensor in parts[p].items()} for p in plan.parked}, device)


def build_pipeline(config: TrainConfig, plan: Plan, model: VchitectTransformer, ema: EMA, mesh: Mesh) -> Pipeline:
    """Codec, text encoder and the averaged model; refuses a text encoder that the Plan was not made for."""
    width, pooled_width = model.config.joint_attention_dim, model.config.pooled_projection_dim
    codec = load_codec(config.codec, device=mesh.device, mini_batch=plan.entries[0].vae_mini_batch)
    text_encoder = load_text_encoder(config.text_encoder, width=width, pooled_width=pooled_width, device=mesh.device)
    if text_encoder.num_tokens != plan.num_text_tokens:
        raise UserError(
            f"this Plan is for {plan.num_text_tokens} text tokens, the text encoder {config.text_encoder!r} gives "
            f"{text_encoder.num_tokens}; plan again with `vchitect-fast autotune --model ... --shapes ... --text-tokens {text_encoder.num_tokens}`."
        )

    def velocity(*inputs: Tensor) -> Tensor:
        if mesh.fsdp is not None:  # shards cannot be called with other parameters
            with ema.standing_in():
                return model(*inputs)
        weights = {name: tensor.to(model.proj_out.weight.dtype) for name, tensor in ema.average.items()}
        return functional_call(model, weights, inputs)

    cut = partial(model.set_shard, BY_FRAMES, mesh.sp_group)
    return Pipeline(velocity, model.config, codec, text_encoder, mesh.device, mesh, cut)


def build_data(config: TrainConfig, plan: Plan, pipeline: Pipeline, mesh: Mesh, clips: list[Clip]) -> VideoData:
    """The batches of the Plan's shapes from `clips`, this rank's part of them."""
    batches = {entry.video_shape: entry.microbatch * entry.accumulation for entry in plan.entries}
    return VideoData(
        clips, batches, seed=config.seed, fps=config.fps, codec=pipeline.codec, text_encoder=pipeline.text_encoder,
        cache=Path(config.cache) if config.cache else None, device=pipeline.device, mixture=config.weights, mesh=mesh,
    )  # fmt: skip


@dataclass
class StopRequest:
    """Set by SIGTERM; the loop saves after the step it is in and ends."""

    requested: bool = field(default=False)


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """SIGTERM (a scheduler's notice) becomes a request instead of a death, for the time of the block."""
    stop = StopRequest()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        stop.requested = True

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast train`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"fields of the run file, with defaults:\n{describe_fields()}\n\n"
        "example run.yaml:\n  manifest: clips.jsonl\n  plan: plan.json\n  model: vchitect-tiny\n"
        "example: vchitect-fast train run.yaml steps=500 learning_rate=3e-4\n"
        "example: vchitect-fast train examples/vchitect-2b.yaml --dry-run"
    )
    parser.add_argument("run_file", help="YAML with the fields below, or a recipe of several stages (docs/recipe.md)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="name=value",
        help="fields that replace those of the file; of a stage: stage.name=value",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: print what fits, step times, device-hours and what is missing",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    """`vchitect-fast train`: exit code 0 also when SIGTERM asked for a save and a stop; 1 when a dry run has doubts."""
    if is_recipe(args.run_file):
        from vchitect_fast.recipe_run import run_file  # which imports this file

        return run_file(args.run_file, args.overrides, dry_run=args.dry_run, as_json=args.json)
    config = TrainConfig.load(args.run_file, args.overrides)
    if args.dry_run:
        return print_outlooks([outlook(stage_of(config))], as_json=args.json)
    launch, summary = read_launch(os.environ), train(config)
    if launch is not None and launch.rank > 0:
        return 0
    if args.json:
        print(json.dumps(summary))
    else:
        print_summary(config, Plan.load(config.plan), summary)
    return 0


if __name__ == "__main__":  # torchrun -m vchitect_fast.train run.yaml
    from vchitect_fast.cli import main

    raise SystemExit(main(["train", *sys.argv[1:]]))
