"""Does a training whose blocks multiply in fp8 reach the loss of the same training in bf16? Real clips, four runs a seed.

    python -m vchitect_fast.benchmarks.fp8_parity                 vchitect-tiny, 400 steps, seeds 0 and 1
    python -m vchitect_fast.benchmarks.fp8_parity --steps 20 --seeds 1 --json

    bf16, by hand    the hand-written block: what the others are held against
    fp8, by hand     the same block, its linears in fp8 (TrainConfig.fp8_linears); emulated on a CPU, real on a GPU
    bf16, plain      the block of blocks.py: the same answer, summed and rounded in another order
    fp32, plain      what bf16 itself changes
Model, rates and schedule are the quickstart's, step and data are train's; eight seconds of its two videos, encoded by the codec
and cached once for all runs. A seed gives all four the same weights, clips, noise levels and noise. Curves are means over seeds.
The gates of blocks start at 0: what a block computes shows in the loss only after the first steps.

The bound, taken over before the first run: 0.25 % of the bf16 loss, smoothed by 0.9 (DeepSeek-V3, arXiv 2412.19437, 3.3 and
appendix B.1: 16 B and 230 B parameters). It is held against the mean of the last quarter of the steps, and against the
smoothed curve at every step; a bound that bf16 itself breaks tells nothing of fp8, so every run is judged by it.
Found (docs/recipe.md): fp8 falls short, at the quickstart's rate as bf16 itself does, at a quarter of it with a loss 0.8 % lower.
Draws a picture (`--figure`), appends Records (`--out`); an emulation's seconds are no speed. NEVER RUN on a GPU so far.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from vchitect_fast.architecture import preset
from vchitect_fast.benchmarks.figures import FIGURES, OTHER_COLORS, OURS_COLORS
from vchitect_fast.benchmarks.record import BOTH, Origin, Record, append, origin, results_file
from vchitect_fast.benchmarks.timing import Samples, summary
from vchitect_fast.config import TrainConfig
from vchitect_fast.ema import EMA
from vchitect_fast.errors import UserError
from vchitect_fast.machine import this_device
from vchitect_fast.manifest import Clip, write_manifest
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.parallel.mesh import ALONE
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction
from vchitect_fast.quickstart import SAMPLES_A_STEP, SHAPE, example_folder, train_config
from vchitect_fast.shapes import VideoShape
from vchitect_fast.step import Step
from vchitect_fast.train import build_data, build_model, build_pipeline

COMMAND = "python -m vchitect_fast.benchmarks.fp8_parity"
BOUND = 0.0025
SMOOTHING = 0.9
TAIL = 4  # the last one of so many parts of the steps
STARTS_S = {"bikes.mp4": (0.0, 1.5, 3.0, 4.5, 6.0, 7.5), "bigbuckbunny.mp4": (0.5, 3.0)}
SIZES = {"bikes.mp4": (640, 272), "bigbuckbunny.mp4": (1280, 720)}
CLIP_FPS = 25.0


@dataclass(frozen=True)
class Way:
    """How a run computes: who computes the blocks, None = blocks.py, and in which dtype."""

    name: str
    dtype: str
    by_hand: bool
    fp8: bool = False


REFERENCE = Way("bf16, by hand", "bfloat16", by_hand=True)
WAYS = (
    REFERENCE,
    Way("fp8, by hand", "bfloat16", by_hand=True, fp8=True),
    Way("bf16, plain", "bfloat16", by_hand=False),
    Way("fp32, plain", "float32", by_hand=False),
)


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    model: str = "vchitect-tiny"
    shape: VideoShape = SHAPE
    steps: int = 400
    seeds: int = 2
    rate: float | None = None  # learning rate at its peak; None = the quickstart's

    def __str__(self) -> str:
        rate = "" if self.rate is None else f", rate {self.rate:g}"
        return (
            f"{self.model} {self.shape}, {self.steps} steps x {self.seeds} seed{'' if self.seeds == 1 else 's'}{rate}"
        )


@dataclass(frozen=True)
class Curve:
    """Losses [seeds, steps] in fp64 and the seconds of every step of one Way."""

    losses: Tensor
    seconds: list[float]

    @property
    def mean(self) -> Tensor:
        """Over seeds, [steps]."""
        return self.losses.mean(dim=0)

    @property
    def tails(self) -> Tensor:
        """Of each seed the mean of the last quarter, at least of one step, [seeds]."""
        return self.losses[:, -max(1, self.losses.shape[1] // TAIL) :].mean(dim=1)


@dataclass(frozen=True)
class Difference:
    """A curve's from the reference's, in parts of it."""

    tail: float  # of the means of the last quarter
    tails: list[float]  # the same seed by seed
    smoothed: float  # the largest at any step, of the smoothed curves
    step: float  # mean over steps and seeds of what one loss differs, whatever its sign

    @property
    def verdict(self) -> str:
        """Whether the bound is held at the end, and all along."""
        words = ("held" if abs(found) <= BOUND else "falls short" for found in (self.tail, self.smoothed))
        return "{} / {}".format(*words)


def clips() -> list[Clip]:
    """Eight of one second each."""
    return [
        Clip(example_folder() / name, start, start + 1, round(CLIP_FPS), *SIZES[name], CLIP_FPS, f"{name} at {start} s")
        for name, starts in STARTS_S.items()
        for start in starts
    ]


def run(
    way: Way, setting: Setting, seed: int, folder: Path, tick: Any = lambda: None
) -> tuple[list[float], list[float]]:
    """Losses and seconds of every step; latents go to, or come from, `folder`."""
    config, plan = configured(way, setting, seed, folder)
    mesh = replace(ALONE, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = build_model(config, plan, mesh.device)
    if way.by_hand and not way.fp8:
        model.set_kernels("triton" if mesh.device.type == "cuda" else "reference")
    betas, dtype = (config.beta1, config.beta2), getattr(torch, way.dtype)
    optimizer = MasterAdamW(model, weight_decay=config.weight_decay, betas=betas, dtype=dtype)
    ema = EMA(optimizer.masters, config.ema_decay)
    optimizer.copy_masters()
    pipeline = build_pipeline(config, plan, model, ema, mesh)
    losses, seconds = [], []
    with build_data(config, plan, pipeline, mesh, clips()) as data:
        data.require_windows()
        step_once = Step(config, plan, model, optimizer, ema, pipeline.text_encoder.encode([""]), mesh)
        for step in range(setting.steps):
            record = step_once(step, data.batch(step))
            losses.append(record["loss"])
            seconds.append(sum(record[name] for name in ("forward_s", "backward_s", "optimizer_s")))
            tick()
    return losses, seconds


def configured(way: Way, setting: Setting, seed: int, folder: Path) -> tuple[TrainConfig, Plan]:
    """The quickstart's run with another length, and the Plan that it asks for: nothing recomputed."""
    model = preset(setting.model)
    entry = PlanEntry(
        str(setting.shape), (Policy.keep(),) * model.num_layers, SAMPLES_A_STEP, 1, Prediction(0.0, {}, 0.0, {}, "none")
    )
    device = this_device()
    plan = Plan(model.fingerprint(), device.fingerprint(), device.name, way.dtype, 16, (entry,))
    manifest = folder / "clips.jsonl"
    write_manifest(clips(), manifest)
    config = train_config(folder, manifest, setting.steps)
    rate = setting.rate or config.learning_rate
    return replace(config, model=setting.model, seed=seed, learning_rate=rate, fp8_linears=way.fp8), plan


def measure(setting: Setting, *, quiet: bool) -> dict[Way, Curve]:
    """Every Way for every seed; a bar on standard error."""
    found: dict[Way, Curve] = {}
    with (
        TemporaryDirectory() as folder,
        Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress,
    ):
        for way in WAYS:
            bar = progress.add_task(way.name, total=setting.steps * setting.seeds)

            def tick(bar: Any = bar) -> None:
                progress.advance(bar)

            runs = [run(way, setting, seed, Path(folder), tick) for seed in range(setting.seeds)]
            losses = torch.tensor([losses for losses, _ in runs], dtype=torch.float64)
            found[way] = Curve(losses, [second for _, seconds in runs for second in seconds])
    return found


def smoothed(values: Tensor) -> Tensor:
    """Exponential mean over the steps, as long as it is short over those that there are."""
    means, total, weight = [], 0.0, 0.0
    for value in values.tolist():
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        means.append(total / weight)
    return torch.tensor(means, dtype=torch.float64)


def difference(curve: Curve, reference: Curve) -> Difference:
    """`curve` from `reference`."""
    return Difference(
        float(curve.tails.mean() / reference.tails.mean() - 1),
        (curve.tails / reference.tails - 1).tolist(),
        float((smoothed(curve.mean) / smoothed(reference.mean) - 1).abs().max()),
        float((curve.losses / reference.losses - 1).abs().mean()),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, also where fp8 falls short, which is a finding; 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    of = Setting()
    parser.add_argument(
        "--steps", type=int, default=of.steps, metavar="N", help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=of.seeds, metavar="N", help="runs of each (default: %(default)s)")
    parser.add_argument("--model", default=of.model, metavar="PRESET", help="(default: %(default)s)")
    parser.add_argument("--shape", default=str(of.shape), metavar="FxWxH", help="of the clips (default: %(default)s)")
    parser.add_argument(
        "--figure", metavar="FILE", help="the picture (default: benchmarks/figures/DEVICE-fp8-parity.png)"
    )
    parser.add_argument("--out", metavar="FILE", help="where Records go (default: benchmarks/results/DEVICE.jsonl)")
    parser.add_argument("--json", action="store_true", help="print curves and Records instead of a table")
    parser.add_argument("--rate", type=float, metavar="RATE", help="peak learning rate (default: the quickstart's)")
    args = parser.parse_args(arguments)
    try:
        if min(args.steps, args.seeds) < 1:
            raise UserError(
                f"--steps and --seeds are numbers from 1 up, got {args.steps} and {args.seeds}; correct them."
            )
        setting = Setting(args.model, VideoShape.parse(args.shape)[0], args.steps, args.seeds, args.rate)
        found, about = measure(setting, quiet=args.json), origin(command_of(setting))
        records = [record_of(way, setting, found, about) for way in found]
        out = Path(args.out or results_file(about.device))
        for record in records:
            append(out, record)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figure = Path(args.figure or FIGURES / f"{results_file(about.device).stem}-fp8-parity.png")
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw(found, setting, about).savefig(figure, dpi=110, metadata={"Software": None})
    if args.json:
        curves = {way.name: found[way].losses.tolist() for way in found}
        off = {way.name: asdict(difference(found[way], found[REFERENCE])) for way in found}
        print(
            json.dumps(
                {
                    "losses": curves,
                    "differences": off,
                    "records": [asdict(record) for record in records],
                    "figure": str(figure),
                }
            )
        )
    else:
        console = Console(highlight=False)
        (console if console.is_terminal else Console(highlight=False, width=140)).print(table(found, setting))
        print(f"picture {figure}, Records {out}")
    return 0


def command_of(setting: Setting) -> str:
    """As a person would type it."""
    usual = vars(Setting())
    changed = [f" --{name} {value}" for name, value in vars(setting).items() if value != usual[name]]
    return COMMAND + "".join(changed)


def record_of(way: Way, setting: Setting, found: Mapping[Way, Curve], about: Origin) -> Record:
    """Of one Way; its time is that of a step without data, of an emulation no speed."""
    samples: Samples = summary(found[way].seconds)
    emulated = ", emulated" if way.fp8 and not torch.cuda.is_available() else ""
    return Record(
        "fp8 parity", f"{way.name}{emulated} (ours)", str(setting), way.dtype, BOTH, **asdict(samples), rate=None,
        unit=None, error_vs_fp64=None, ceiling=None, saved_bytes=None, **asdict(about),
        loss=float(found[way].tails.mean()), loss_error=difference(found[way], found[REFERENCE]).tail,
    )  # fmt: skip


def table(found: Mapping[Way, Curve], setting: Setting) -> Table:
    """A row a Way."""
    title = f"{setting}; bound {BOUND:.2%} of {REFERENCE.name}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    headings = (
        "run",
        "first",
        "last",
        f"last 1/{TAIL}",
        "difference",
        "by seed",
        "largest, smoothed",
        "a step",
        "end / all along",
    )
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in (headings[0], headings[-1]) else "right")
    for way, curve in found.items():
        off = difference(curve, found[REFERENCE])
        ends = [f"{value:.4f}" for value in (curve.mean[0], curve.mean[-1], curve.tails.mean())]
        if way == REFERENCE:
            shown.add_row(way.name, *ends)
        else:
            seeds = " ".join(f"{value:+.2%}" for value in off.tails)
            shown.add_row(
                way.name, *ends, f"{off.tail:+.3%}", seeds, f"{off.smoothed:.3%}", f"{off.step:.3%}", off.verdict
            )
    return shown


def draw(found: Mapping[Way, Curve], setting: Setting, about: Origin) -> Any:
    """Smoothed curves, and beside them how far each is from the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    colors = dict(zip(WAYS, ("black", OURS_COLORS[0], OTHER_COLORS[3], OTHER_COLORS[1]), strict=True))
    reference, steps = smoothed(found[REFERENCE].mean), range(1, setting.steps + 1)
    right.axhspan(-BOUND, BOUND, color="#eeeeee", label=f"within {BOUND:.2%}")
    for way in reversed(list(found)):
        curve, style = smoothed(found[way].mean), "--" if way == REFERENCE else "-"
        left.plot(steps, curve, style, color=colors[way], linewidth=1.4, label=way.name)
        right.plot(steps, curve / reference - 1, style, color=colors[way], linewidth=1.4)
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set_ylabel(f"loss, smoothed by {SMOOTHING}, mean over seeds (log)", fontsize=8)
    right.set_ylabel(f"difference from {REFERENCE.name}", fontsize=8)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, right):
        axes.set_xlabel("step", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False)
    emulated = "" if torch.cuda.is_available() else ", fp8 emulated"
    figure.suptitle(f"{setting}, real clips; {about.device}{emulated}", fontsize=10)
    return figure


if __name__ == "__main__":
    sys.exit(main())
