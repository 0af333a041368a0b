"""What a curation folder holds, read for its report, for what-if and for compare: DuckDB over the folder's Parquet files.

    clips.parquet       a row a clip: its span, caption, kept or dropped_by with the reason ("quarantine": by no stage,
                        one could not judge it), and a column a score
    stages.json         the cascade in order: backend, parameters, rules and score types of each stage
    sources.parquet     a row a video
    quarantine.parquet  videos and clips that could not be judged, with the reason; may be absent

It reads and counts only: nothing is written, decoded or judged here. A file that is missing or damaged, or that lacks what
is promised above, is a UserError. Needs DuckDB (extra `curation`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vchitect_fast.curation.rules import Rule
from vchitect_fast.errors import UserError, unknown_name

CLIP_COLUMNS: dict[str, str | None] = {
    "clip": "VARCHAR", "video": "VARCHAR", "path": "VARCHAR", "first": "BIGINT", "last": "BIGINT", "start": "DOUBLE",
    "end": "DOUBLE", "num_frames": "BIGINT", "width": "BIGINT", "height": "BIGINT", "fps": "DOUBLE", "caption": "VARCHAR",
    "kept": "BOOLEAN", "dropped_by": "VARCHAR", "reason": "VARCHAR",
}  # fmt: skip
SOURCE_COLUMNS: dict[str, str | None] = {
    "video": "VARCHAR", "path": "VARCHAR", "num_bytes": "BIGINT", "width": "BIGINT", "height": "BIGINT", "fps": "DOUBLE",
    "num_frames": "BIGINT", "seconds": "DOUBLE", "codec": "VARCHAR",
}  # fmt: skip
QUARANTINE_COLUMNS: dict[str, str | None] = {
    "video": "VARCHAR", "path": "VARCHAR", "clip": "VARCHAR", "stage": "VARCHAR", "reason": "VARCHAR", "attempts": "BIGINT",
}  # fmt: skip
# None: as it is.
SCORE_TYPES: dict[str, str | None] = {
    "float": "DOUBLE",
    "int": "BIGINT",
    "bool": "BOOLEAN",
    "str": "VARCHAR",
    "list": None,
}

LENGTH_S = '("end" - "start")'
HOURS = f"sum({LENGTH_S} / 3600)"
WORDS = r"len(regexp_extract_all(caption, '\S+'))"
_REMEDY = "run `vchitect-fast curate` on the folder again"


@dataclass(frozen=True)
class StageFacts:
    """A stage as stages.json describes it; the words are those of stage.py."""

    name: str
    backend: str
    version: int
    weights: str  # hash, "" without weights
    parameters: dict[str, Any]
    key: str
    main: str  # the score meant when only the stage is named, "" for what gives no score (cutting.json)
    rules: dict[str, str]  # score -> condition
    columns: dict[str, str]  # score -> float, int, bool, str or list

    @property
    def is_proxy(self) -> bool:
        """Whether it stands in for a model of the paper: a proxy carries the word in its name or its backend's."""
        return "proxy" in f"{self.name} {self.backend}".lower()

    def all_rules(self) -> list[Rule]:
        """Today's rules."""
        return [Rule.parse(self.name, score, text) for score, text in self.rules.items()]

    def numeric(self) -> list[str]:
        """Scores that a rule can compare and a histogram can show."""
        return [score for score, kind in self.columns.items() if kind in ("float", "int", "bool")]


@dataclass(frozen=True)
class FunnelRow:
    """One step of the cascade. Clips in = dropped + quarantined + out."""

    stage: str
    num_in: int
    num_dropped: int
    num_quarantined: int
    num_out: int
    hours_out: float
    by_rule: dict[str, int] = field(default_factory=dict)  # rule -> dropped clips that break it; one may break several


class Dataset:
    """A curation folder, open for queries. The views `clips`, `sources` and `quarantine` have the columns above.

    In `clips`, dropped_by names a stage only: of a clip that is in quarantine or not judged to the end it is NULL.
    """

    def __init__(self, folder: str | Path) -> None:
        """Check the files and their columns; UserError names the one that is missing or damaged."""
        try:
            import duckdb
        except ImportError as error:
            raise UserError(
                f"reading a curation folder needs DuckDB ({error}); pip install 'vchitect-fast[curation]'."
            ) from None
        self.folder = Path(folder)
        if not (self.folder / "clips.parquet").is_file():
            raise UserError(
                f"{folder} must be a folder that `vchitect-fast curate VIDEOS --out DIR` filled, found no clips.parquet in "
                "it; curate first, or name that folder."
            )
        # A damaged file ends in errors of many classes, the bare one too; these three would be mistakes of ours.
        self._errors, self._ours = (
            duckdb.Error,
            (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException),
        )
        # Nothing is fetched: a file that asks for an extension fails instead.
        offline: dict[str, Any] = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
        self._connection = duckdb.connect(config=offline)
        self.stages = read_stages(self.folder / "stages.json")
        scores = {
            f"{stage.name}.{name}": SCORE_TYPES[kind] for stage in self.stages for name, kind in stage.columns.items()
        }
        self._view("clips", CLIP_COLUMNS | scores)
        self._view("sources", SOURCE_COLUMNS)
        self._view("quarantine", QUARANTINE_COLUMNS)

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query over the views; UserError when the file under one turns out to be damaged."""
        try:
            return self._connection.execute(sql, parameters).fetchall()
        except self._errors as error:
            raise self._damaged(error) from None

    def arrays(self, sql: str) -> dict[str, np.ndarray]:
        """The columns of a query; a NULL is masked away by the query, not here."""
        try:
            return self._connection.execute(sql).fetchnumpy()
        except self._errors as error:
            raise self._damaged(error) from None

    def stage(self, name: str) -> StageFacts:
        """The stage of that name; UserError with the nearest one."""
        found = {stage.name: stage for stage in self.stages}
        if name not in found:
            raise unknown_name("stage", name, found)
        return found[name]

    def scores(self, stage: str, score: str, where: str = "true") -> np.ndarray:
        """float64 [N]: a score of the clips that have one and meet the SQL condition; finite ones, false and true as 0 and 1."""
        column = quoted(f"{stage}.{score}")
        sql = f"SELECT {column}::DOUBLE AS x FROM clips WHERE isfinite({column}::DOUBLE) AND ({where})"
        return np.asarray(self.arrays(sql)["x"], dtype=np.float64)

    def funnel(self) -> list[FunnelRow]:
        """The cascade in order. Steps that are not stages but dropped or quarantined clips (a length, say) come first."""
        ends = self.rows(
            f"SELECT coalesce(dropped_by, q.stage) AS stage, dropped_by IS NULL, count(*), {HOURS} FROM clips "
            f"LEFT JOIN {QUARANTINED} AS q USING (clip) WHERE NOT kept AND coalesce(dropped_by, q.stage) IS NOT NULL "
            "GROUP BY ALL"
        )
        names = [stage.name for stage in self.stages]
        num_in, hours = self.rows(f"SELECT count(*), coalesce({HOURS}, 0) FROM clips")[0]
        table = []
        for name in [*sorted({row[0] for row in ends} - set(names)), *names]:
            dropped = sum(num for stage, quarantined, num, _ in ends if stage == name and not quarantined)
            quarantined = sum(num for stage, is_quarantined, num, _ in ends if stage == name and is_quarantined)
            hours -= sum(row[3] for row in ends if row[0] == name)
            num_out = num_in - dropped - quarantined
            rules = self._by_rule(name) if dropped and name in names else {}
            table.append(FunnelRow(name, num_in, dropped, quarantined, num_out, max(0.0, hours), rules))
            num_in = num_out
        return table

    def num_waiting(self) -> int:
        """Clips that are neither kept, dropped nor quarantined: curating was stopped before it came to them."""
        sql = f"SELECT count(*) FROM clips LEFT JOIN {QUARANTINED} AS q USING (clip) WHERE {UNDECIDED} AND q.stage IS NULL"
        return int(self.rows(sql)[0][0])

    def _by_rule(self, stage: str) -> dict[str, int]:
        rules = self.stage(stage).all_rules()
        if not rules:
            return {}
        counts = ", ".join(f"count(*) FILTER (NOT {rule.sql()})" for rule in rules)
        return dict(
            zip(
                map(str, rules),
                self.rows(f"SELECT {counts} FROM clips WHERE dropped_by = ?", [stage])[0],
                strict=True,
            )
        )

    def _view(self, name: str, columns: dict[str, str | None]) -> None:
        """A view with exactly these columns in these types; quarantine may lack its file, its attempts or all rows."""
        path = self.folder / f"{name}.parquet"
        if not path.is_file():
            if name != "quarantine":
                raise UserError(f"{path} is missing; {_REMEDY}.")
            nothing = ", ".join(f"NULL::{kind} AS {quoted(column)}" for column, kind in columns.items())
            self._connection.execute(f"CREATE TEMP VIEW {name} AS SELECT {nothing} WHERE false")
            return
        source = f"read_parquet({_literal_path(path)})"
        got = {row[0] for row in self.rows(f"DESCRIBE SELECT * FROM {source}")}
        if missing := [column for column in columns if column not in got and column != "attempts"]:
            raise UserError(
                f"{path} must have the column {missing[0]!r}, got {printable(', '.join(sorted(got)))}; {_REMEDY}."
            )
        selected = [
            f"{quoted(column) if column in got else 'NULL'}{f'::{kind}' if kind else ''} AS {quoted(column)}"
            for column, kind in columns.items()
        ]
        table = f"SELECT {', '.join(selected)} FROM {source}"
        if name == "clips":
            table = f"SELECT * REPLACE (nullif(dropped_by, 'quarantine') AS dropped_by) FROM ({table})"
        self._connection.execute(f"CREATE TEMP VIEW {name} AS {table}")

    def _damaged(self, error: Exception) -> Exception:
        if isinstance(error, self._ours):
            return error
        first = str(error).strip().splitlines()[0]
        return UserError(f"the tables in {self.folder} are damaged ({printable(first)}); {_REMEDY}.")


# A clip's line in quarantine, if any: one stage a clip, however often it was tried.
QUARANTINED = "(SELECT clip, any_value(stage) AS stage FROM quarantine WHERE clip IS NOT NULL GROUP BY clip)"
UNDECIDED = "NOT kept AND dropped_by IS NULL"


def quoted(column: str) -> str:
    """A column's name in SQL."""
    return '"' + column.replace('"', '""') + '"'


def _literal_path(path: Path) -> str:
    """A path in SQL that names this file only: DuckDB takes *, ? and [] for patterns, but not within brackets."""
    return "'" + re.sub(r"[*?[]", r"[\g<0>]", str(path)).replace("'", "''") + "'"


def read_stages(path: Path) -> tuple[StageFacts, ...]:
    """The stages of stages.json in their order; UserError names what is wrong in it."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {_REMEDY}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {_REMEDY}.") from None
    kinds = {name: str(kind).partition("[")[0] for name, kind in StageFacts.__annotations__.items()}
    types = {"str": str, "int": int, "dict": dict}
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{path} must hold a list of stages, one object each; {_REMEDY}.")
    stages: list[StageFacts] = []
    for number, item in enumerate(items, 1):
        for name, kind in kinds.items():
            if not isinstance(item.get(name), types[kind]):
                raise UserError(
                    f"stage {number} of {path} must have {name!r} as {kind}, got {item.get(name)!r}; {_REMEDY}."
                )
        stage = StageFacts(**{name: item[name] for name in kinds})
        unknown = [f"type {kind!r}" for kind in stage.columns.values() if kind not in SCORE_TYPES]
        unknown += [
            f"score {score!r}"
            for score in (*stage.rules, *([stage.main] if stage.columns else []))
            if score not in stage.columns
        ]
        if unknown or stage.name in {other.name for other in stages}:
            wrong = f"the unknown {unknown[0]}" if unknown else "the name of an earlier stage"
            raise UserError(f"stage {number} of {path} ({stage.name}) has {wrong}; {_REMEDY}.")
        stage.all_rules()
        stages.append(stage)
    return tuple(stages)


def printable(text: str) -> str:
    """Text without power over a page or a terminal: control, direction and line-break characters become \\u escapes."""
    return "".join(c if _is_plain(c) else "\\n" if c == "\n" else f"\\u{ord(c):04x}" for c in text)


def _is_plain(c: str) -> bool:
    # The two joiners of Persian words and of emoji have the category of direction marks but move nothing.
    return c in "\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")


def counted(num: int, noun: str) -> str:
    """ "1 clip", "1,200 clips"."""
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def duration(hours: float) -> str:
    """Hours in the unit that a person would use: "8.4 s", "12.3 min", "52,000 h"."""
    seconds = 3600 * hours
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if hours < 1.995 else f"{hours:,.1f} h" if hours < 9999.95 else f"{hours:,.0f} h"
