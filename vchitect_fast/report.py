"""report.html: one page about one run that a person can mail: the plan, predicted against measured, loss, filmstrips.

Self-contained: pictures are embedded, nothing is fetched, no script runs. The page shows what the run wrote (log.jsonl,
the Plan, the samples) and computes nothing that is not there; a figure that was not measured reads "not measured".
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vchitect_fast.files import write_text
from vchitect_fast.metrics import TIMINGS, read_log
from vchitect_fast.plan import Plan, PlanEntry
from vchitect_fast.sample import filmstrip

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1c2330; background: #f6f7f9; margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
p.lead { font-size: 1.05rem; color: #47526a; margin-top: 0; max-width: 48rem; }
.cards { display: grid; grid-template-columns: repeat(3, 1fr); gap: .8rem; margin: 1.4rem 0; }
.card { background: #fff; border: 1px solid #e1e5ec; border-radius: 10px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; } .card span { color: #5b667c; font-size: .88rem; }
table { border-collapse: collapse; background: #fff; border: 1px solid #e1e5ec; border-radius: 10px; width: 100%; }
th, td { padding: .42rem .8rem; text-align: right; font-variant-numeric: tabular-nums; border-top: 1px solid #edf0f4; }
th { color: #5b667c; font-weight: 600; font-size: .88rem; border-top: 0; } th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; } td.text, th.text { text-align: left; white-space: normal; }
figure { margin: 1rem 0 1.6rem; } figcaption { font-weight: 600; margin-bottom: .35rem; }
figure img { width: 100%; image-rendering: auto; background: #fff; border: 1px solid #e1e5ec; border-radius: 10px; }
.strip { display: grid; grid-template-columns: 8.5rem 1fr; gap: .25rem .8rem; align-items: center; font-size: .88rem; color: #47526a; }
.strip img { border: 0; border-radius: 4px; }
pre { background: #1c2330; color: #e8ecf3; padding: 1rem 1.2rem; border-radius: 10px; overflow-x: auto; font-size: .88rem; }
small { color: #5b667c; }
"""


@dataclass(frozen=True)
class ClipResult:
    """One training clip, its way through the codec and back, and the sample of its caption; uint8 [T, H, W, 3] each."""

    caption: str
    original: Tensor
    reconstruction: Tensor
    sample: Tensor
    reconstruction_psnr_db: float  # against the original
    sample_psnr_db: float  # against the original


def write_report(
    path: Path, *, title: str, run: Path, plan: Plan, results: list[ClipResult], facts: dict[str, str], commands: str
) -> Path:
    """Write the page. `facts` are the cards on top, value by label; `commands` is what to try next."""
    log = read_log(run)
    measured = next(event["measured"] for event in reversed(log) if event["kind"] == "done")
    cards = "".join(
        f'<div class="card"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for label, value in facts.items()
    )
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="lead">Trained on {_text(plan.device_name)} in {_text(plan.compute_dtype)}. '
        "Every figure below was measured in this run, except those marked predicted, which were written down before it.</p>",
        f'<div class="cards">{cards}</div>',
        "<h2>What it learnt</h2>",
        "<p>Each clip: the original, the original through the latent codec and back, and the model's own sample of the caption "
        "from pure noise. PSNR is against the original; the codec's is the best that any sample could reach.</p>",
        *(_clip(result) for result in results),
        "<h2>Loss</h2>",
        _picture(_loss_plot(log), "Training loss, and the averaged model's loss at fixed noise levels on fixed noise"),
        "<h2>The plan, and whether it was right</h2>",
        *(_plan_entry(entry, measured.get(entry.shape)) for entry in plan.entries),
        "<h2>Where a step's time went</h2>",
        *(_picture(_time_bar(values), shape) for shape, values in measured.items()),
        "<h2>Next</h2>",
        f"<pre>{_text(commands)}</pre>",
    ]
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style></head>'
    write_text(path, f"{page}<body><main>{''.join(body)}</main></body></html>")
    return path


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _clip(result: ClipResult) -> str:
    rows = (
        ("original", result.original),
        (f"codec, {result.reconstruction_psnr_db:.1f} dB", result.reconstruction),
        (f"sample, {result.sample_psnr_db:.1f} dB", result.sample),
    )
    strips = "".join(f'<span>{label}</span><img alt="{label}" src="{_strip(frames)}">' for label, frames in rows)
    return f'<figure><figcaption>{_text(result.caption)}</figcaption><div class="strip">{strips}</div></figure>'


def _strip(frames: Tensor) -> str:
    buffer = io.BytesIO()
    filmstrip({"": frames}, caption_height=0).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _picture(svg: str, caption: str) -> str:
    source = base64.b64encode(svg.encode()).decode()
    return f'<figure><figcaption>{_text(caption)}</figcaption><img alt="{_text(caption)}" src="data:image/svg+xml;base64,{source}"></figure>'


def _plan_entry(entry: PlanEntry, measured: dict[str, float] | None) -> str:
    lead = (
        f"<p><b>{entry.shape}</b>: {entry.microbatch} x {entry.accumulation} samples a step, "
        f"{entry.num_recomputed} of {len(entry.policy)} blocks recomputed. <small>{_text(entry.predicted.confidence)}</small></p>"
    )
    rows = "".join(
        f"<tr><td>{_name(row.name)}</td><td>{_quantity(row.name, row.predicted)}</td><td>{_quantity(row.name, row.measured)}</td>"
        f"<td>{'not measured' if row.error is None else f'{100 * row.error:+.0f} %'}</td></tr>"
        for row in entry.predicted.against(measured or {})
    )
    head = "<tr><th>one step</th><th>predicted</th><th>measured</th><th>error</th></tr>"
    losers = "".join(
        f"<tr><td>{_text(str(other['choice']))}</td><td>{other['step_s']:.3f} s</td><td>{other['peak_gib']:.2f} GiB</td>"
        f'<td class="text">{_text(str(other["why"]))}</td></tr>'
        for other in entry.runners_up
    )
    rest = f'<p>What lost:</p><table><tr><th>choice</th><th>step</th><th>peak</th><th class="text">why</th></tr>{losers}</table>'
    return f"{lead}<table>{head}{rows}</table>{rest if losers else ''}"


def _name(field: str) -> str:
    return {"step_s": "whole step (without data and encode)", "peak_gib": "peak memory"}.get(
        field, field.removesuffix("_s")
    )


def _quantity(field: str, value: float) -> str:
    return f"{value:.2f} GiB" if field.endswith("_gib") else f"{1000 * value:.1f} ms"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def _loss_plot(log: list[dict[str, Any]]) -> str:
    figure, axes = _figure(9, 3.6)
    steps = [event for event in log if event["kind"] == "step"]
    axes.plot(
        [e["step"] for e in steps],
        [e["loss"] for e in steps],
        color="#b9c3d6",
        linewidth=0.8,
        label="training, each step",
    )
    checks = [event for event in log if event["kind"] == "validation"]
    colours = ("#0b7285", "#1c7ed6", "#7048e8", "#c2255c", "#e8590c")
    for colour, sigma in zip(colours, checks[0]["by_sigma"] if checks else (), strict=False):
        values = [event["by_sigma"][sigma] for event in checks]
        axes.plot(
            [e["step"] for e in checks],
            values,
            color=colour,
            marker="o",
            markersize=3,
            label=f"at noise level {float(sigma):.2f}",
        )
    axes.set(xlabel="step", ylabel="mean squared error of the velocity", yscale="log")
    axes.grid(axis="y", which="both", color="#edf0f4")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _svg(figure)


def _time_bar(values: dict[str, float]) -> str:
    figure, axes = _figure(9, 1.3)
    left = 0.0
    for name, colour in zip(TIMINGS, ("#ffa94d", "#ffd43b", "#4dabf7", "#1971c2", "#69db7c"), strict=True):
        width = 1000 * values[name]
        axes.barh(0, width, left=left, color=colour, label=f"{name.removesuffix('_s')} {width:.1f} ms")
        left += width
    axes.set(yticks=[], xlabel="ms, median step", xlim=(0, left))
    axes.spines["left"].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
    return _svg(figure)
