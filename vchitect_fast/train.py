"""Training, top to bottom: config -> Plan -> model -> data -> steps. One process; obeys the Plan.

Every random draw (noise level, noise, caption dropout) comes from a generator seeded by (seed, step, microbatch), so a run
that was stopped, even by kill -9, and resumed ends with the same parameters bit by bit, and no generator state is stored.
It never chooses a layout: what to keep, offload or recompute, how to split the batch and in which dtype is the Plan's.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
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
from vchitect_fast.clips import read_clips
from vchitect_fast.config import TrainConfig, describe_fields
from vchitect_fast.data import Batch, VideoData
from vchitect_fast.dry_run import outlook, print_outlooks, stage_of
from vchitect_fast.ema import EMA
from vchitect_fast.errors import UserError
from vchitect_fast.export import export_checkpoint
from vchitect_fast.machine import this_device
from vchitect_fast.manifest import Clip
from vchitect_fast.metrics import Log, measured, peak_bytes, reset_peak, rewind_log
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.model.flow import draw_sigma, drop_captions, flow_loss
from vchitect_fast.model.text import load_text_encoder
from vchitect_fast.model.vae import load_codec
from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.offload.policy import offload_budget_bytes
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.plan import Plan
from vchitect_fast.profiling.span import span, tell
from vchitect_fast.recipe import is_recipe
from vchitect_fast.resume import check_supported, only_process_in, resume, run_state, run_tensors
from vchitect_fast.sample import Pipeline
from vchitect_fast.train_console import Console, print_summary
from vchitect_fast.validate import Validation, generator_of
from vchitect_fast.workload import Workload


def train(config: TrainConfig) -> dict[str, Any]:
    """Run `config.steps` optimizer steps, or those that are left. Returns the summary that ends log.jsonl.

    Raises UserError for anything the user can mend, before the first step where it can be known then.
    """
    run, plan = Path(config.out), Plan.load(config.plan)
    check_supported(plan)
    clips = read_clips(config.manifest, config.cache)
    with only_process_in(run), stop_on_sigterm() as stop:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reset_peak(device.type)
        model = build_model(config, plan).to(device)
        model.saving = build_saving(plan, model.config, device)
        for entry in plan.entries:  # what a block cannot do is refused before the data is read
            model.set_policy(entry.policy)
            model.set_chunks(entry.num_chunks)
        betas, dtype = (config.beta1, config.beta2), getattr(torch, plan.compute_dtype)
        optimizer = MasterAdamW(model, weight_decay=config.weight_decay, betas=betas, dtype=dtype)
        ema = EMA(optimizer.masters, config.ema_decay, warm_up=config.start_from is None)
        tensors, state = run_tensors(model, optimizer, ema), run_state(config, plan, model.config, clips)
        done, changed = resume(config, state, tensors)
        if not done:
            carry_over(config, state, tensors)
        optimizer.copy_masters()
        tell(model=model, optimizer=optimizer, ema=ema)
        pipeline = build_pipeline(config, plan, model, ema, device)
        open_data = partial(build_data, config, plan, pipeline)
        with (
            open_data(clips) as data,
            open_log(config, done) as log,
            Console(config, plan, model.config, done) as console,
        ):
            data.require_windows()
            if changed:
                log.write("resumed", done, changed=changed)
                console.resumed(changed)
            validate = Validation(config, plan, pipeline, open_data, log) if config.validate_every else None
            step_once = Step(config, plan, model, optimizer, ema, pipeline.text_encoder.encode([""]))
            saved_at = done if done else None
            if validate and not done:
                console.validated(validate(0))
            while done < config.steps and not stop.requested:
                with span("step", done + 1):
                    with span("data/batch"):
                        batch = data.batch(done)
                    record = step_once(done, batch)
                done += 1
                log.write("step", done, **record)
                console.stepped(done, record)
                if validate and (done == config.steps or done % config.validate_every == 0):
                    console.validated(validate(done))
                if config.sample_every and done % config.sample_every == 0:
                    stem = run / "samples" / f"step-{done:08d}"
                    strip = pipeline.write_samples(data.captions(4), plan.entries[0].video_shape, stem, config)
                    log.write("sample", done, path=str(strip))
                if done == config.steps or (config.save_every and done % config.save_every == 0):
                    saved_at = console.saved(save(run, done, tensors, state, config, log))
            if saved_at != done:  # SIGTERM between two saves
                console.saved(save(run, done, tensors, state, config, log))
            newest = checkpoint.latest(run)
            summary = {"step": done, "measured": measured(run), "skipped": data.skipped, "checkpoint": str(newest)}
            log.write("done", done, **{name: value for name, value in summary.items() if name != "step"})
        if done >= config.steps and newest:
            summary["model"] = str(export_checkpoint(newest, run / "model"))
    return summary


def open_log(config: TrainConfig, done: int) -> Log:
    """The run's log, rewound to the checkpoint it goes on from; run.yaml beside it."""
    run = Path(config.out)
    rewind_log(run, done if done else -1)
    config.save(run / "run.yaml")
    log = Log(run, start=done, tensorboard=config.tensorboard, wandb_project=config.wandb_project)
    if not done:
        log.write("start", 0, config=asdict(config))
    return log


def save(
    run: Path, done: int, tensors: dict[str, Tensor], state: dict[str, Any], config: TrainConfig, log: Log
) -> Path:
    """Write the checkpoint of a step and log it."""
    with span("checkpoint/save"):
        folder = checkpoint.save(run, done, tensors, state, config.keep_last)
    log.write("checkpoint", done, path=str(folder))
    return folder


def build_model(config: TrainConfig, plan: Plan) -> VchitectTransformer:
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
    return model


def build_saving(plan: Plan, config: TransformerConfig, device: torch.device) -> Saving:
    """With the engine and the pool that the Plan's Policies need; without one where nothing is offloaded."""
    budget = 0
    for entry in plan.entries:
        work = Workload(config, entry.video_shape, entry.microbatch, plan.num_text_tokens)
        needed = offload_budget_bytes(work, entry.policy, plan.compute_dtype)
        if entry.offload_bytes and entry.offload_bytes < needed:
            raise UserError(
                f"the Plan's {entry.shape} offloads {needed} bytes a microbatch and its offload_bytes is {entry.offload_bytes}; "
                "set it to 0 (as much as is needed), or offload less."
            )
        budget = max(budget, entry.offload_bytes, needed)
    return Saving(Engine(budget, device)) if budget else Saving()


def build_pipeline(
    config: TrainConfig, plan: Plan, model: VchitectTransformer, ema: EMA, device: torch.device
) -> Pipeline:
    """Codec, text encoder and the averaged model; refuses a text encoder that the Plan was not made for."""
    width, pooled_width = model.config.joint_attention_dim, model.config.pooled_projection_dim
    codec = load_codec(config.codec, device=device, mini_batch=plan.entries[0].vae_mini_batch)
    text_encoder = load_text_encoder(config.text_encoder, width=width, pooled_width=pooled_width, device=device)
    if text_encoder.num_tokens != plan.num_text_tokens:
        raise UserError(
            f"this Plan is for {plan.num_text_tokens} text tokens, the text encoder {config.text_encoder!r} gives "
            f"{text_encoder.num_tokens}; plan again with `vchitect-fast autotune --model ... --shapes ... --text-tokens {text_encoder.num_tokens}`."
        )

    def velocity(*inputs: Tensor) -> Tensor:
        weights = {name: tensor.to(model.proj_out.weight.dtype) for name, tensor in ema.average.items()}
        return functional_call(model, weights, inputs)

    return Pipeline(velocity, model.config, codec, text_encoder, device)


def build_data(config: TrainConfig, plan: Plan, pipeline: Pipeline, clips: list[Clip]) -> VideoData:
    """The batches of the Plan's shapes from `clips`."""
    batches = {entry.video_shape: entry.microbatch * entry.accumulation for entry in plan.entries}
    return VideoData(
        clips, batches, seed=config.seed, fps=config.fps, codec=pipeline.codec, text_encoder=pipeline.text_encoder,
        cache=Path(config.cache) if config.cache else None, device=pipeline.device, mixture=config.weights,
    )  # fmt: skip


@dataclass
class Step:
    """One optimizer step on one batch: microbatches forward and backward, clip, update, average."""

    config: TrainConfig
    plan: Plan
    model: VchitectTransformer
    optimizer: MasterAdamW
    ema: EMA
    empty: tuple[Tensor, Tensor]  # text and pooled embeddings of the empty caption

    def __call__(self, step: int, batch: Batch) -> dict[str, Any]:
        """Returns the step's log record; UserError when the loss is not finite."""
        config, entry = self.config, self.plan.entry(batch.shape)
        self.model.set_policy(entry.policy)
        self.model.set_chunks(entry.num_chunks)
        self.model.attention_backend = entry.attention
        clock = Clock(batch.latents.device)
        losses: list[Tensor] = []
        for micro in range(entry.accumulation):
            with span("data/noise"):
                rows = slice(micro * entry.microbatch, (micro + 1) * entry.microbatch)
                latents = batch.latents[rows]
                generator = generator_of(config.seed, step, micro)
                sigma = draw_sigma(config.timestep_sampling, len(latents), config.shift, generator)
                noise = torch.randn(latents.shape, generator=generator).to(latents)
                text, pooled = drop_captions(
                    batch.text_embeds[rows], batch.pooled[rows], self.empty, config.caption_dropout, generator
                )
            with self.model.saving.step():
                with span("forward/model"):
                    loss = flow_loss(self.model, latents, text, pooled, sigma, noise).mean() / entry.accumulation
                    clock.lap("forward_s")
                with span("backward/model"):
                    loss.backward()
                    clock.lap("backward_s")
            losses.append(loss.detach())
        total = float(torch.stack(losses).sum())
        rate = learning_rate(config, step)
        with span("optimizer/step"):
            norm = float(self.optimizer.step(rate, config.clip_norm)) if math.isfinite(total) else math.nan
        if not math.isfinite(norm):
            clips = ", ".join(str(clip.path) for clip in batch.clips)
            raise UserError(
                f"step {step + 1} has loss {total} and gradient norm {norm} (clips: {clips}), and was not taken; "
                "lower learning_rate or look at these clips."
            )
        with span("optimizer/average"):
            self.ema.update(step)
            clock.lap("optimizer_s")
        seconds = {"data_s": batch.data_s, "encode_s": batch.encode_s, **clock.seconds}
        step_s = sum(seconds.values())
        work = Workload(self.model.config, batch.shape, entry.microbatch, self.plan.num_text_tokens)
        flops = work.train_flops() * entry.accumulation
        return {
            "loss": total, "grad_norm": norm, "learning_rate": rate, "shape": str(batch.shape), "step_s": step_s, **seconds,
            "tokens_per_s": work.visual_rows * entry.accumulation / step_s, "model_flops": flops,
            "mfu": flops / step_s / self.plan.peak_flops if self.plan.peak_flops else None,
            "peak_gib": peak_bytes(batch.latents.device.type) / 2**30,
        }  # fmt: skip


class Clock:
    """Adds up the seconds between laps by name; waits for the GPU so that a lap holds the work it is named after."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant or half a cosine down to 0 at `config.steps`."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant" or step < config.warmup_steps:
        return config.learning_rate * warm
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


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
    summary = train(config)
    if args.json:
        print(json.dumps(summary))
    else:
        print_summary(config, Plan.load(config.plan), summary)
    return 0


if __name__ == "__main__":  # torchrun -m vchitect_fast.train run.yaml
    from vchitect_fast.cli import main

    raise SystemExit(main(["train", *sys.argv[1:]]))
