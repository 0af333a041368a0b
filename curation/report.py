"""report.html of a curation folder: why each clip stayed or went, and what the set that stays is made of.

One file that can be mailed: the funnel, every score's histogram with its rule, clips that stayed and went with their
frames, the paper's Table I for this data, quarantine and settings. It shows what curation stored; the only thing it
computes from the videos are the small pictures, and a video that is gone by then costs a picture, not the report.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from vchitect_fast.curation import report_figures as figures
from vchitect_fast.curation.dataset import HOURS, LENGTH_S, WORDS, Dataset, StageFacts, counted, duration, read_stages
from vchitect_fast.curation.frames import BadVideo, clip_frames
from vchitect_fast.curation.report_page import bar, cards, figure, foreign, page, table, text
from vchitect_fast.curation.rules import Rule
from vchitect_fast.curation.stage import ClipSpan, Want
from vchitect_fast.files import write_text

NUM_KEPT_SHOWN = 24
NUM_DROPPED_SHOWN = 6  # a stage
NUM_FRAMES = 6
SHORT_SIDE = 72  # pixels of a small picture
JPEG_QUALITY = 72
NUM_QUARANTINE_SHOWN = 200
NUM_DOMAINS_SHOWN = 20

# By the short side in pixels; a class reaches up to the next.
RESOLUTIONS = {"below 336p": 0, "336p": 336, "480p": 480, "720p": 720, "1080p": 1080, "4k": 2160}
SHORT = "least(width, height)"
_CASES = " ".join(f"WHEN {SHORT} >= {low} THEN '{name}'" for name, low in reversed(RESOLUTIONS.items()))
RESOLUTION_CLASS = f"CASE {_CASES} END"


@dataclass(frozen=True)
class Shown:
    """A clip to show: its pictures as JPEG, or why there are none."""

    span: ClipSpan
    caption: str
    reason: str | None  # why it was dropped
    pictures: list[bytes]
    problem: str = ""


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html and return its path; UserError for a folder that cannot be read or written."""
    data = Dataset(folder)
    path = data.folder / "report.html"
    title = f"Curation of {data.folder.resolve().name}"
    lead = (
        f"Videos cut into clips, and each clip judged by {len(data.stages)} stages, cheapest first. A clip is dropped by "
        "the first stage whose rule it breaks; dear stages judge only what those before them keep."
    )
    body = [
        f"<h1>{foreign(title)}</h1>", f'<p class="lead">{text(lead)}</p>', _facts(data),
        "<h2>Funnel</h2>", *_funnel(data),
        *_filmstrips(data),
        "<h2>Scores and rules</h2>", *_scores(data),
        "<h2>The set that stays</h2>", *_set(data),
        *_quarantine(data),
        "<h2>Settings</h2>", _settings(_cutting(data.folder) + data.stages),
        "<h2>Next</h2>", f"<pre>{'<br>'.join(text(line) for line in commands(data))}</pre>",
    ]  # fmt: skip
    write_text(path, page(title, body))
    return path


def commands(data: Dataset) -> list[str]:
    """What to type next, ready to copy; the threshold to try is the median of what a rule's score is today."""
    folder = shlex.quote(str(data.folder))
    lines = []
    for stage in data.stages:
        for rule in stage.all_rules():
            values = data.scores(rule.stage, rule.score)
            if isinstance(rule.value, bool) or not len(values):
                continue
            name = shlex.quote(stage.name if rule.score == stage.main else f"{stage.name}.{rule.score}")
            lines = [f'vchitect-fast curate what-if {folder} --{name} "{rule.sign} {float(np.median(values)):.3g}"']
    return [
        *lines,
        f"vchitect-fast curate export {folder} --to {shlex.quote(str(data.folder / 'shards'))} --form shards",
        f"vchitect-fast train run.yaml manifest={shlex.quote(str(data.folder / 'manifest.parquet'))}",
    ]


def _facts(data: Dataset) -> str:
    sources = data.rows("SELECT count(*), coalesce(sum(seconds), 0) / 3600 FROM sources")[0]
    clips = data.rows(
        f"SELECT count(*), coalesce({HOURS}, 0), count(*) FILTER (kept), coalesce({HOURS} FILTER (kept), 0) FROM clips"
    )[0]
    quarantined = data.rows("SELECT count(*) FILTER (clip IS NULL), count(clip) FROM quarantine")[0]
    facts = {
        f"videos, {duration(sources[1])}": f"{sources[0]:,}",
        f"clips found, {duration(clips[1])}": f"{clips[0]:,}",
        f"clips stay, {_percent(clips[2], clips[0])}": f"{clips[2]:,}",
        f"of video stay, {_percent(clips[3], clips[1])}": duration(clips[3]),
        f"in quarantine: {counted(quarantined[0], 'video')}, {counted(quarantined[1], 'clip')}": f"{sum(quarantined):,}",
    }
    return cards(facts)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"


def _badge(stage: StageFacts) -> str:
    return ' <span class="badge">proxy, not the paper\'s model</span>' if stage.is_proxy else ""


def _funnel(data: Dataset) -> list[str]:
    total = data.rows(f"SELECT count(*), coalesce({HOURS}, 0) FROM clips")[0]
    by_name = {stage.name: stage for stage in data.stages}
    lines = [bar("<b>clips found</b>", f"{counted(total[0], 'clip')}, {duration(total[1])}", float(total[0] > 0))]
    for row in data.funnel():
        lost = row.num_dropped + row.num_quarantined
        what = f"{row.num_out:,} stay, {duration(row.hours_out)}; {row.num_dropped:,} dropped ({_percent(row.num_dropped, row.num_in)})"
        what += f", {row.num_quarantined:,} quarantined" if row.num_quarantined else ""
        below = []
        if stage := by_name.get(row.stage):
            weights = f", weights {stage.weights}" if stage.weights else ""
            rules = ", ".join(map(stage_rule, stage.all_rules()))
            below = [text(f"{stage.backend}{weights}; {f'keeps {rules}' if rules else 'no rule, drops nothing'}")]
            if len(row.by_rule) > 1:
                below.append("dropped by " + text(", ".join(f"{rule}: {num:,}" for rule, num in row.by_rule.items())))
            name = f"<div><b>{text(row.stage)}</b>{_badge(stage)}</div>"
        else:
            name = f"<b>{text(row.stage)}</b>"
        small = "".join(f"<div><small>{line}</small></div>" for line in below)
        lines.append(bar(name, what, row.num_out / max(1, total[0]), lost / max(1, total[0]), small))
    waiting = data.num_waiting()
    key = '<p><span class="key"><i class="keep"></i>goes on</span><span class="key"><i class="drop"></i>dropped here</span></p>'
    note = (
        f"<p>{counted(waiting, 'clip')} of those that stay not judged to the end yet: curate again to go on.</p>"
        if waiting
        else ""
    )
    return [key, f'<div class="bars">{"".join(lines)}</div>', note]


def stage_rule(rule: Rule) -> str:
    """A rule without its stage's name."""
    return str(rule).removeprefix(f"{rule.stage}.")


def _filmstrips(data: Dataset) -> Iterable[str]:
    # One clip a video first, then a second: a long film must not fill the page. md5 is a fixed shuffle.
    sql = (
        'SELECT clip, path, "first", "last", "start", "end", width, height, fps, caption, reason FROM (SELECT *, '
        "row_number() OVER (PARTITION BY video ORDER BY md5(clip)) AS n FROM clips WHERE {}) ORDER BY n, md5(clip) LIMIT {}"
    )
    groups = [("Clips that stay", "kept", NUM_KEPT_SHOWN, "")]
    for row in data.funnel():
        if row.num_dropped:
            quote = "'" + row.stage.replace("'", "''") + "'"
            groups.append((row.stage, f"dropped_by = {quote}", NUM_DROPPED_SHOWN, counted(row.num_dropped, "clip")))
    found = [data.rows(sql.format(where, limit)) for _, where, limit, _ in groups]
    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        shown = [list(pool.map(_show, rows)) for rows in found]
    yield f"<h2>{groups[0][0]}</h2><p>A sample of {len(shown[0])}, at most one clip of a video before a second of any.</p>"
    yield f'<div class="clips">{"".join(map(_clip, shown[0]))}</div>' if shown[0] else "<p>No clip stays.</p>"
    if len(groups) > 1:
        yield "<h2>Clips that went, and why</h2>"
    for (name, _, _, num), items in zip(groups[1:], shown[1:], strict=True):
        yield f'<h3>{text(name)} <small>{len(items)} of {num}</small></h3><div class="clips">{"".join(map(_clip, items))}</div>'


def _show(row: tuple[Any, ...]) -> Shown:
    *span_values, caption, reason = row
    span = ClipSpan(*span_values)
    try:
        frames = clip_frames(span, [Want(time, SHORT_SIDE) for time in span.spread(NUM_FRAMES)])
    except (BadVideo, OSError) as error:
        return Shown(span, caption or "", reason, [], str(error))
    return Shown(span, caption or "", reason, [_jpeg(frame) for frame in frames])


def _jpeg(frame: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _clip(shown: Shown) -> str:
    span = shown.span
    sources = (f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" for picture in shown.pictures)
    pictures = "".join(f'<img alt="frame {k}" src="{source}">' for k, source in enumerate(sources, 1))
    top = (
        f'<div class="strip">{pictures}</div>'
        if pictures
        else f'<p class="gone">no pictures: {text(shown.problem)}</p>'
    )
    facts = f"{span.start:.2f} to {span.end:.2f} s, {span.num_frames} frames, {span.width}x{span.height}, {span.fps:.4g} fps"
    why = f'<p class="why">{text(shown.reason)}</p>' if shown.reason else ""
    caption = f'<p class="caption">{foreign(shown.caption)}</p>' if shown.caption else ""
    name = f'<p><b title="{text(span.path)}">{foreign(_name(span.path))}</b> <span class="soft">{facts}</span></p>'
    return f"<figure>{top}{why}{name}{caption}</figure>"


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path


def _scores(data: Dataset) -> Iterable[str]:
    parts, without = [], []
    for stage in data.stages:
        rules = {rule.score: rule for rule in stage.all_rules()}
        for score, kind in stage.columns.items():
            name = f"{stage.name}.{score}"
            if score not in stage.numeric():
                without.append(name)
                continue
            rule = rules.get(score)
            keeps = data.scores(stage.name, score, rule.sql() if rule else "true")
            drops = data.scores(stage.name, score, f"NOT {rule.sql()}") if rule else np.empty(0)
            if not len(keeps) + len(drops):
                without.append(f"{name} (no clip has it)")
                continue
            facts = f"{counted(len(keeps) + len(drops), 'clip')} judged" + (
                f", {len(drops):,} break the rule" if rule else ", no rule"
            )
            caption = f'<b>{text(name)}</b>{_badge(stage)}<br><span class="soft">{facts}</span>'
            picture = (
                _truth(keeps, drops, rule) if kind == "bool" else figures.histogram(keeps, drops, rule, kind == "int")
            )
            parts.append(figure(caption, picture))
    yield "<p>Dashed: the rule. Shaded: the side that it drops. The outermost bars hold the 1 % that lies beyond.</p>"
    yield f'<div class="figures">{"".join(parts)}</div>'
    if without:
        yield f'<p class="soft">Without a histogram: {text(", ".join(without))}.</p>'


def _truth(keeps: np.ndarray, drops: np.ndarray, rule: Rule | None) -> str:
    """Bars of a score that is true or false."""
    total, lines = len(keeps) + len(drops), []
    for value, name in ((1.0, "true"), (0.0, "false")):
        num_kept, num_dropped = int((keeps == value).sum()), int((drops == value).sum())
        lines.append(
            bar(f"<b>{name}</b>", counted(num_kept + num_dropped, "clip"), num_kept / total, num_dropped / total)
        )
    return "".join(lines) + (f"<small>keeps {text(stage_rule(rule))}</small>" if rule else "")


def _set(data: Dataset) -> Iterable[str]:
    num = int(data.rows("SELECT count(*) FROM clips WHERE kept")[0][0])
    if not num:
        yield "<p>It is empty: no clip stays.</p>"
        return
    classes = ", ".join(f"count(*) FILTER ({RESOLUTION_CLASS} = '{name}')" for name in RESOLUTIONS)
    rows = data.rows(
        f"SELECT regexp_replace(path, '/?[^/]*$', '') AS folder, count(*), {HOURS}, sum({WORDS}), "
        f"count(*) FILTER (caption <> ''), {classes} FROM clips WHERE kept GROUP BY folder ORDER BY 3 DESC, 1"
    )
    yield "<p>The columns of the paper's Table I, a row a folder. Only clips that stay; the class is by the short side.</p>"
    yield _domains(rows)
    parts = []
    for label, sql in (
        ("length, s", LENGTH_S), ("short side, pixels", SHORT), ("words in the caption", f"CASE WHEN caption <> '' THEN {WORDS} END"),
    ):  # fmt: skip
        values = data.arrays(f"SELECT ({sql})::DOUBLE AS x FROM clips WHERE kept AND ({sql}) IS NOT NULL")["x"]
        if len(values):
            caption = f'<b>{label}</b><br><span class="soft">{counted(len(values), "clip")}, median {np.median(values):.4g}</span>'
            parts.append(figure(caption, figures.histogram(values, np.empty(0), whole=label != "length, s")))
    yield f'<div class="figures">{"".join(parts)}</div>'


def _domains(rows: Sequence[tuple[Any, ...]]) -> str:
    parts = [row[0].split("/") for row in rows]
    shared = list(takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))) if len(rows) > 1 else []
    named = [("/".join(part[len(shared) :]) or ".", *row[1:]) for part, row in zip(parts, rows, strict=True)]
    named = named[:NUM_DOMAINS_SHOWN]
    groups = [(foreign(row[0]), [row]) for row in named]
    if rest := rows[NUM_DOMAINS_SHOWN:]:
        groups.append((f"{len(rest):,} more folders", list(rest)))
    if len(rows) > 1:
        groups.append(("<b>all</b>", list(rows)))
    body = []
    for name, group in groups:
        num, hours, words, captioned = (sum(row[k] for row in group) for k in range(1, 5))
        classes = [sum(row[5 + k] for row in group) for k in range(len(RESOLUTIONS))]
        per_caption = f"{words / captioned:.1f}" if captioned else "no captions"
        body.append(
            [name, f"{num:,}", f"{3600 * hours / num:.1f} s", duration(hours), per_caption]
            + [f"{count:,}" if count else "-" for count in classes]
        )
    heads = ["folder", "clips", "mean length", "total length", "mean words", *RESOLUTIONS]
    return table(heads, body)


def _quarantine(data: Dataset) -> Iterable[str]:
    num = int(data.rows("SELECT count(*) FROM quarantine")[0][0])
    if not num:
        return
    rows = data.rows(
        "SELECT path, clip, stage, reason, attempts FROM quarantine ORDER BY path, clip LIMIT ?", [NUM_QUARANTINE_SHOWN]
    )
    yield "<h2>Quarantine</h2>"
    yield f"<p>What could not be judged is in no set: {counted(num, 'line')}. Mend the file, then curate again with --retry.</p>"
    yield table(
        ("file", "clip", "stage", "reason", "attempts"),
        (
            (foreign(path), foreign(clip) if clip else "whole video", text(stage), text(reason), str(attempts or "-"))
            for path, clip, stage, reason, attempts in rows
        ),
        words=(0, 1, 2, 3),
        wide=3,
    )
    if num > len(rows):
        yield f"<p>The first {len(rows)} of {num:,}; the rest is in quarantine.parquet.</p>"


def _cutting(folder: Path) -> tuple[StageFacts, ...]:
    """How videos became clips; nothing for a folder that does not say."""
    path = folder / "cutting.json"
    return read_stages(path) if path.exists() else ()


def _settings(stages: Sequence[StageFacts]) -> str:
    return table(
        ("stage", "backend", "version", "weights", "parameters", "rules", "key"),
        (
            (
                text(stage.name) + _badge(stage), text(stage.backend), str(stage.version), text(stage.weights or "none"),
                text(_parameters(stage) or "none"), text(", ".join(map(stage_rule, stage.all_rules())) or "none"),
                f"<code>{text(stage.key)}</code>",
            )
            for stage in stages
        ),
        words=(0, 1, 3, 4, 5),
        wide=4,
    )  # fmt: skip


def _parameters(stage: StageFacts) -> str:
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in stage.parameters.items())
