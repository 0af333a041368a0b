"""What a training run prints: a header, a progress bar on a terminal (plain lines elsewhere), validations, checkpoints.

The header says before the first step what the Plan predicts; the end sets it against what was measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.config import TrainConfig
from vchitect_fast.parallel.mesh import ALONE, Mesh
from vchitect_fast.plan import Plan


class Console:
    """Context manager around the loop; called with each record as it comes. Rank 0 prints."""

    def __init__(
        self, config: TrainConfig, plan: Plan, model: TransformerConfig, start: int, mesh: Mesh = ALONE
    ) -> None:
        self._config, self._start = config, start
        self._rich = RichConsole(highlight=False, soft_wrap=True, quiet=not mesh.is_first)
        if mesh.world_size > 1:
            self._rich.print(mesh.table())
            for entry in plan.entries:
                self._rich.print(f"{entry.shape}: {mesh.equation(entry.microbatch, entry.accumulation)}")
        entries = ", ".join(
            f"{e.shape} (batch {e.microbatch} x {e.accumulation}, {e.num_recomputed} of {len(e.policy)} blocks recomputed, "
            f"predicted {e.predicted.step_s:.2f} s and {e.predicted.peak_gib:.2f} GiB)"
            for e in plan.entries
        )
        self._rich.print(f"model    {model.num_parameters():,} parameters, {plan.compute_dtype} on {plan.device_name}")
        self._rich.print(f"shapes   {entries}")
        if config.fp8_linears:
            emulated = (
                "" if mesh.device.type == "cuda" else ", emulated on a CPU: what it does to the loss, not its speed"
            )
            self._rich.print(f"linears  fp8 in the blocks{emulated}; the Plan predicts {plan.compute_dtype}")
        self._rich.print(
            f"data     {config.manifest} at {config.fps:g} frames/s; codec {config.codec}, text {config.text_encoder}"
        )
        todo = (
            f"steps {start} to {config.steps}"
            if start < config.steps
            else f"{start} steps are done, {config.steps} asked for: nothing to do"
        )
        self._rich.print(f"run      {config.out}: {todo}{' (resumed)' if start else ''}")
        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        self._progress = Progress(*columns, console=self._rich, transient=True, disable=not self._rich.is_terminal)
        self._task = self._progress.add_task("training", total=config.steps, completed=start, note="")

    def __enter__(self) -> Console:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()

    def stepped(self, step: int, record: dict[str, Any]) -> None:
        """Advance the bar; print a line every `log_every` steps."""
        self._progress.update(self._task, completed=step, note=f"loss {record['loss']:.4f}")
        if step % self._config.log_every == 0 or step == self._start + 1:
            self._rich.print(line(step, record))

    def validated(self, record: dict[str, Any]) -> None:
        """Print a validation: mean loss and the loss at each noise level."""
        levels = "  ".join(f"s={float(s):.2f}: {value:.4f}" for s, value in record["by_sigma"].items())
        self._rich.print(f"step {record['step']:6d}  validation loss {record['loss']:.4f}   {levels}")

    def saved(self, folder: Path, in_background: bool) -> None:
        """Print where a checkpoint went, or goes."""
        self._rich.print(f"{'saving' if in_background else 'saved ':8} {folder}")

    def resumed(self, changed: dict[str, str]) -> None:
        """Say what differs from the run that wrote the checkpoint."""
        for name, change in changed.items():
            self._rich.print(f"changed  {name}: {change}, from here on")


def line(step: int, record: dict[str, Any]) -> str:
    """One step as one line, every figure with its unit."""
    parts = "/".join(
        f"{1000 * record[name]:.0f}" for name in ("data_s", "encode_s", "forward_s", "backward_s", "optimizer_s")
    )
    mfu = "not measured" if record["mfu"] is None else f"{100 * record['mfu']:.1f} %"
    uneven = "" if record["imbalance"] is None else f"  imbalance {100 * record['imbalance']:.1f} %"
    return (
        f"step {step:6d}  loss {record['loss']:.4f}  grad norm {record['grad_norm']:.3f}  lr {record['learning_rate']:.1e}  "
        f"{1000 * record['step_s']:.0f} ms (data/encode/fwd/bwd/opt {parts})  {record['tokens_per_s']:,.0f} tokens/s  "
        f"{record['model_flops'] / record['step_s'] / 1e12:.3g} TFLOP/s  MFU {mfu}  peak {record['peak_gib']:.2f} GiB{uneven}"
    )


def print_summary(config: TrainConfig, plan: Plan, summary: dict[str, Any]) -> None:
    """At the end: predicted against measured for each shape that ran, what was skipped, where things are."""
    console = RichConsole(highlight=False, soft_wrap=True)
    for shape, measured in summary["measured"].items():
        table = Table(
            title=f"{shape}: predicted before, measured in this run (median step)",
            title_justify="left",
            box=box.SIMPLE,
            pad_edge=False,
        )
        for heading in ("one step", "predicted", "measured", "error"):
            table.add_column(heading, justify="left" if heading == "one step" else "right")
        entry = next(entry for entry in plan.entries if entry.shape == shape)
        for row in entry.predicted.against(measured):
            unit, scale = ("GiB", 1.0) if row.name.endswith("_gib") else ("ms", 1000.0)
            error = "not measured" if row.error is None else f"{100 * row.error:+.0f} %"
            table.add_row(row.name, f"{scale * row.predicted:.2f} {unit}", f"{scale * row.measured:.2f} {unit}", error)
        console.print(table)
    for path, reason in summary["skipped"].items():
        console.print(f"skipped  {path}: {reason}")
    console.print(f"log      {config.out}/log.jsonl\nsaved    {summary['checkpoint']}")
    if "model" in summary:
        guidance = "" if config.caption_dropout else " --guidance 1"  # the empty caption was never trained
        console.print(
            f"model    {summary['model']}  (vchitect-fast sample --model {summary['model']} --prompt '...'{guidance} --out x.mp4)"
        )
