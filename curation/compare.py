"""`curate compare`: the distributions of two or more sets of clips side by side, after the paper's Fig. 4.

A set is a curation folder (its clips that stay) or a manifest (all its clips). What both have is overlaid as shares, so
that a small set compares with a large one; medians and the Kolmogorov-Smirnov distance to the first set say in numbers
how far apart they are. Scores of different backends or parameters are shown, and marked as not comparable. No set is
judged better than another here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vchitect_fast.curation import report_figures as figures
from vchitect_fast.curation.dataset import LENGTH_S, WORDS, Dataset, StageFacts, duration, printable
from vchitect_fast.curation.report_page import SET_COLOURS, bar, figure, foreign, page, table, text
from vchitect_fast.errors import UserError
from vchitect_fast.files import write_text
from vchitect_fast.manifest import SUFFIXES, read_rows

# What every set has: name -> (SQL over `clips`, whole numbers).
BASE = {
    "length, s": (LENGTH_S, False),
    "short side, pixels": ("least(width, height)", True),
    "frames a second": ("fps", False),
    "words in the caption": (WORDS, True),
}
APART = "computed in different ways, not comparable"
EPILOG = """\
example:
  vchitect-fast curate compare clips other/manifest.parquet --out compare.html
"""


@dataclass(frozen=True)
class ClipSet:
    """One set of clips: float64 [N] a feature (clips without a value left out), and how its scores were computed."""

    name: str
    num_clips: int
    num_videos: int
    hours: float
    features: dict[str, np.ndarray]
    whole: frozenset[str]  # features that are whole numbers
    truths: frozenset[str]  # features that are true or false, as 1 and 0
    made_by: dict[str, str]  # score -> key and backend of its stage; "" where a manifest does not say


@dataclass(frozen=True)
class FeatureRow:
    """One feature over all sets, in their order."""

    feature: str
    label: str  # the feature with its unit, for people
    num_clips: list[int]  # that have a value
    medians: list[float | None]  # for what is true or false, the share that is true
    distances: list[float | None]  # Kolmogorov-Smirnov distance to the first set, 0 to 1
    note: str = ""  # why the values do not compare


def compare(sources: Sequence[str | Path], out: str | Path = "compare.html") -> Path:
    """Write the page that shows these sets side by side; returns its path.

    Raises UserError for fewer than two sets or more than six, and for one that cannot be read or has no clips.
    """
    sets = read_sets(sources)
    rows = feature_rows(sets)
    path = Path(out)
    write_text(path, page(f"{len(sets)} sets of clips compared", _body(sets, rows)))
    return path


def read_sets(sources: Sequence[str | Path]) -> list[ClipSet]:
    """The sets, under names that differ; UserError as `compare`."""
    if not 2 <= len(sources) <= SET_COLOURS:
        raise UserError(f"compare shows 2 to {SET_COLOURS} sets, got {len(sources)}; name folders or manifests.")
    sets: list[ClipSet] = []
    for number, source in enumerate(map(Path, sources), 1):
        name = source.resolve().parent.name if source.suffix in SUFFIXES else source.resolve().name
        if name in {other.name for other in sets}:
            name = f"{name} ({number})"
        found = _of_manifest(name, source) if source.suffix in SUFFIXES else _of_folder(name, source)
        if not found.num_clips:
            raise UserError(f"{source} must have clips to compare, got none that stays; loosen its rules.")
        sets.append(found)
    return sets


def feature_rows(sets: Sequence[ClipSet]) -> list[FeatureRow]:
    """Every feature that any set has, those of all sets first."""
    names = list(dict.fromkeys(name for one in sets for name in one.features))
    rows = []
    for name in names:
        values = [one.features.get(name, np.empty(0)) for one in sets]
        makers = {one.made_by[name] for one in sets if name in one.made_by}
        note = ""
        if len(makers - {""}) > 1:
            note = f"{APART}: " + " against ".join(sorted(makers - {""}))
        elif "" in makers:
            note = "a manifest does not say how it was computed"
        is_truth = any(name in one.truths for one in sets)
        middle = np.mean if is_truth else np.median
        label = f"{name}, share true" if is_truth else name
        medians = [float(middle(v)) if len(v) else None for v in values]
        distances = [ks_distance(values[0], v) for v in values]
        rows.append(FeatureRow(name, label, [len(v) for v in values], medians, distances, note))
    return sorted(rows, key=lambda row: row.num_clips.count(0))


def ks_distance(a: np.ndarray, b: np.ndarray) -> float | None:
    """Two-sample Kolmogorov-Smirnov statistic: the largest gap between the shares at or below a value; None if one is empty."""
    if not len(a) or not len(b):
        return None
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    gap = np.searchsorted(a, at, side="right") / len(a) - np.searchsorted(b, at, side="right") / len(b)
    return float(np.abs(gap).max())


def _of_folder(name: str, folder: Path) -> ClipSet:
    data = Dataset(folder)
    num_clips, num_videos, hours = data.rows(
        f"SELECT count(*), count(DISTINCT video), coalesce(sum({LENGTH_S}), 0) / 3600 FROM clips WHERE kept"
    )[0]
    features = {
        feature: data.arrays(f"SELECT ({sql})::DOUBLE AS x FROM clips WHERE kept AND ({sql}) IS NOT NULL")["x"]
        for feature, (sql, _) in BASE.items()
    }
    whole = {feature for feature, (_, is_whole) in BASE.items() if is_whole}
    truths: set[str] = set()
    made_by = {}
    for stage in data.stages:
        for score in stage.numeric():
            values = data.scores(stage.name, score, "kept")
            if len(values):
                feature = f"{stage.name}.{score}"
                features[feature], made_by[feature] = values, _maker(stage)
                whole |= {feature} if stage.columns[score] != "float" else set()
                truths |= {feature} if stage.columns[score] == "bool" else set()
    return ClipSet(name, num_clips, num_videos, hours, features, frozenset(whole), frozenset(truths), made_by)


def _maker(stage: StageFacts) -> str:
    return f"{stage.backend} ({stage.key})"


def _of_manifest(name: str, path: Path) -> ClipSet:
    rows = read_rows(path)
    columns: dict[str, list[Any]] = {
        "length, s": [row["end"] - row["start"] for row in rows],
        "short side, pixels": [min(row["width"], row["height"]) for row in rows],
        "frames a second": [row["fps"] for row in rows],
        "words in the caption": [len(row["caption"].split()) for row in rows],
    }
    # Only "stage.score" columns are scores: a manifest may hold other numbers (a frame's index, an id).
    scores = [column for column in dict.fromkeys(key for row in rows for key in row) if "." in column]
    for column in scores:
        values = [row.get(column) for row in rows]
        given = [value for value in values if value is not None]
        if given and all(isinstance(value, (bool, int, float)) for value in given):
            columns[column] = given
    features = {column: np.asarray(values, dtype=np.float64) for column, values in columns.items()}
    features = {column: values[np.isfinite(values)] for column, values in features.items()}
    whole = {"short side, pixels", "words in the caption"}
    whole |= {
        column for column in scores if column in columns and not any(isinstance(v, float) for v in columns[column])
    }
    truths = {column for column in scores if columns.get(column) and all(isinstance(v, bool) for v in columns[column])}
    hours = sum(columns["length, s"]) / 3600
    made_by = {column: "" for column in features if column not in BASE}
    return ClipSet(
        name,
        len(rows),
        len({row["path"] for row in rows}),
        hours,
        features,
        frozenset(whole),
        frozenset(truths),
        made_by,
    )


def _body(sets: Sequence[ClipSet], rows: Sequence[FeatureRow]) -> list[str]:
    key = "".join(_key(k, one.name) for k, one in enumerate(sets))
    parts = []
    for row in rows:
        if not any(row.num_clips):
            continue
        tone = "why" if row.note.startswith(APART) else "soft"
        note = f'<br><span class="{tone}">{text(row.note)}</span>' if row.note else ""
        if row.label != row.feature:
            shares = [(_key(k, one.name), m) for k, (one, m) in enumerate(zip(sets, row.medians, strict=True))]
            lines = (bar(key, "none" if m is None else f"{100 * m:.1f} %", m or 0) for key, m in shares)
            parts.append(figure(f"<b>{text(row.label)}</b>{note}", "".join(lines)))
            continue
        values = [one.features.get(row.feature, np.empty(0)) for one in sets]
        medians = "".join(_key(k, "none" if m is None else f"{m:.4g}") for k, m in enumerate(row.medians))
        caption = f'<b>{text(row.feature)}</b><br><span class="soft">median {medians}</span>{note}'
        whole = all(row.feature in one.whole for one in sets if row.feature in one.features)
        parts.append(figure(caption, figures.shares(values, row.medians, whole)))
    return [
        f"<h1>{len(sets)} sets of clips compared</h1>",
        '<p class="lead">Each line is one set\'s shares, each adding up to 100 %, so that sets of different sizes compare; '
        "the stroke on top is its median. Only clips that stay are counted.</p>",
        f"<p>{key}</p>",
        table(
            ("set", "clips", "videos", "total length"),
            [
                (_key(k, one.name), f"{one.num_clips:,}", f"{one.num_videos:,}", duration(one.hours))
                for k, one in enumerate(sets)
            ],
        ),
        "<h2>Distributions</h2>",
        f'<div class="figures">{"".join(parts)}</div>',
        "<h2>In numbers</h2>",
        f"<p>Median of each set; in brackets the Kolmogorov-Smirnov distance to {foreign(sets[0].name)}: the largest gap between "
        "the shares of clips at or below any value, 0 for the same distribution and 1 for no overlap.</p>",
        table(
            ("", *(one.name for one in sets)),
            [
                (text(row.label) + (f"<br><small>{text(row.note)}</small>" if row.note else ""), *_cells(row))
                for row in rows
            ],
            wide=0,
        ),
    ]  # fmt: skip


def _key(number: int, label: str) -> str:
    """A label with its set's colour."""
    return f'<span class="key"><i class="s{number}"></i>{foreign(label)}</span>'


def _cells(row: FeatureRow) -> list[str]:
    """Median and distance of each set, as plain text."""
    cells = []
    for k, (median, distance) in enumerate(zip(row.medians, row.distances, strict=True)):
        distance_text = f" ({distance:.2f})" if k and distance is not None else ""
        cells.append("-" if median is None else f"{median:.4g}{distance_text}")
    return cells


def run_compare(words: list[str]) -> int:
    """`curate compare`: write the page and print the numbers, or one JSON object with --json. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="vchitect-fast curate compare", allow_abbrev=False, epilog=EPILOG,
        description="Show the distributions of two or more sets of clips side by side.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("sets", nargs="+", type=Path, metavar="SET", help="folder that curate filled, or a manifest")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="page to write (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(words)
    sets = read_sets(args.sets)
    rows = feature_rows(sets)
    write_text(args.out, page(f"{len(sets)} sets of clips compared", _body(sets, rows)))
    if args.json:
        facts = [
            {"name": one.name, "num_clips": one.num_clips, "num_videos": one.num_videos, "hours": one.hours}
            for one in sets
        ]
        print(json.dumps({"sets": facts, "features": [asdict(row) for row in rows], "page": str(args.out)}, indent=2))
    else:
        _print(sets, rows, args.out)
    return 0


def _print(sets: Sequence[ClipSet], rows: Sequence[FeatureRow], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    view = Table(box=None, pad_edge=False)
    view.add_column("")
    for one in sets:
        view.add_column(Text(printable(one.name)), justify="right")
    view.add_row("clips", *(f"{one.num_clips:,}" for one in sets))
    view.add_row("videos", *(f"{one.num_videos:,}" for one in sets))
    view.add_row("total length", *(duration(one.hours) for one in sets))
    for row in rows:
        view.add_row(Text(row.label + (" *" if row.note else "")), *_cells(row))
    console.print(view)
    console.print("median of each set (Kolmogorov-Smirnov distance to the first, 0 same to 1 no overlap)")
    for note in dict.fromkeys(row.note for row in rows if row.note):
        noted = [row.feature for row in rows if row.note == note]
        console.print(Text(f"* {note}: {', '.join(noted)}"))
    console.print(Text(f"-> {out}"))
