"""`curate what-if`: which clips would stay under other rules, answered from the stored scores in about a second.

A rule changes what is done with a score, never the score, so nothing is decoded or judged. Where an earlier stage dropped
a clip before a later one judged it, the later score does not exist: such a clip is counted as not judged, never guessed.
One condition a score; "off" lifts a rule, as in the settings. Near-duplicates stay judged among today's clips. Nothing in
the folder changes: to keep the answer, curate again with the rules.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vchitect_fast.curation.dataset import (
    LENGTH_S,
    UNDECIDED,
    Dataset,
    StageFacts,
    counted,
    duration,
    printable,
    quoted,
)
from vchitect_fast.curation.rules import Rule
from vchitect_fast.errors import UserError, unknown_name

LIFTED = "off"
EPILOG = """\
rules:
  --STAGE CONDITION         of the stage's main score
  --STAGE.SCORE CONDITION   of another one
  a condition is a comparison like "> 5", "<= 0.3" or "== true" (in quotes: < and > mean files to a shell); "off" lifts
  the rule. Rules that are not named stay as they are.

example:
  vchitect-fast curate what-if clips --aesthetics "> 5" --static.share "< 0.5"
"""


@dataclass(frozen=True)
class StageAnswer:
    """What one stage would do. A clip counts as dropped by the first stage whose rules it breaks."""

    stage: str
    rules_today: list[str]
    rules_then: list[str]
    num_dropped_today: int
    num_dropped_then: int
    num_not_judged: int  # clips that would come to it and have no score, an earlier stage having dropped them


@dataclass(frozen=True)
class Change:
    """A clip that would fare differently."""

    clip: str
    path: str
    start: float  # seconds
    end: float
    today: str  # "kept", or the reason why it was dropped
    then: str


@dataclass(frozen=True)
class Answer:
    """Today's set against the one under the new rules; `num_undecided` clips stay only if stages yet to judge them agree."""

    num_clips: int
    num_today: int
    hours_today: float
    num_then: int  # that certainly stay
    hours_then: float
    num_undecided: int
    hours_undecided: float
    num_gained: int
    num_lost: int
    num_unfinished: int  # quarantined, or curating was stopped before them: no rule speaks of them
    stages: list[StageAnswer]
    changes: list[Change]  # the first of them: gained, then lost, then undecided


def what_if(folder: str | Path, conditions: Mapping[str, str], num_changes: int = 10) -> Answer:
    """What would stay if the scores named in `conditions` had to meet these, e.g. {"aesthetics": "> 5"}.

    Raises UserError for an unknown stage or score, a condition that cannot be read or does not fit the score's type, and
    whatever is wrong with the folder.
    """
    data = Dataset(folder)
    then = rules_then(data, conditions)
    today = {stage.name: stage.all_rules() for stage in data.stages}
    data.rows(f"CREATE OR REPLACE TEMP TABLE verdict AS {_verdicts(data.stages, then)}")
    total = data.rows(
        "SELECT count(*), count(*) FILTER (kept), coalesce(sum(hours) FILTER (kept), 0), "
        "count(*) FILTER (stays), coalesce(sum(hours) FILTER (stays), 0), "
        "count(*) FILTER (undecided), coalesce(sum(hours) FILTER (undecided), 0), "
        "count(*) FILTER (stays AND NOT kept), count(*) FILTER (kept AND NOT stays), count(*) FILTER (unfinished) FROM verdict"
    )[0]
    dropped_today = dict(data.rows("SELECT dropped_by, count(*) FROM clips WHERE NOT kept GROUP BY ALL"))
    dropped_then = dict(data.rows("SELECT breaks, count(*) FROM verdict GROUP BY ALL"))
    lacking = data.rows(
        "SELECT " + ", ".join(f"count(*) FILTER (NOT judged_{k})" for k in range(len(data.stages))) + " FROM verdict "
        "WHERE stays OR undecided"
    )[0]
    stages = [
        StageAnswer(
            stage.name, [str(rule) for rule in today[stage.name]], [str(rule) for rule in then[stage.name]],
            dropped_today.get(stage.name, 0), dropped_then.get(k, 0), lacking[k],
        )
        for k, stage in enumerate(data.stages)
    ]  # fmt: skip
    numbers: dict[str, Any] = dict(zip(Answer.__dataclass_fields__, total, strict=False))  # in the order of the fields
    return Answer(**numbers, stages=stages, changes=_changes(data, then, num_changes))


def rules_then(data: Dataset, conditions: Mapping[str, str]) -> dict[str, list[Rule]]:
    """The rules of every stage, those named in `conditions` replaced, added or lifted; UserError as `what_if`."""
    texts = {stage.name: dict(stage.rules) for stage in data.stages}
    named: dict[tuple[str, str], str] = {}
    for name, condition in conditions.items():
        stage_name, _, score = name.partition(".")
        stage = data.stage(stage_name)
        score = score or stage.main
        if score not in stage.columns:
            raise unknown_name(f"score of {stage_name}", score, stage.columns)
        if (stage_name, score) in named:
            raise UserError(f"{named[stage_name, score]} and {name} are the same score; give one condition for it.")
        named[stage_name, score] = name
        if condition.strip().lower() == LIFTED:
            texts[stage_name].pop(score, None)
            continue
        rule = Rule.parse(stage_name, score, condition)
        _check_type(rule, stage.columns[score])
        texts[stage_name][score] = condition
    return {stage: [Rule.parse(stage, *item) for item in rules.items()] for stage, rules in texts.items()}


def _check_type(rule: Rule, kind: str) -> None:
    name = f"{rule.stage}.{rule.score}"
    if kind in ("float", "int") and not isinstance(rule.value, bool):
        return
    if kind == "bool" and isinstance(rule.value, bool) and rule.sign in ("==", "!="):
        return
    remedy = {
        "float": 'compare it with a number, for example "> 5"',
        "int": 'compare it with a number, for example "> 5"',
        "bool": 'write "== true" or "== false"',
    }.get(kind, "no rule can compare it")
    raise UserError(f"{name} holds {kind} values, got the condition {rule}; {remedy}.")


def _verdicts(stages: tuple[StageFacts, ...], then: dict[str, list[Rule]]) -> str:
    """A query: clip, kept, hours, judged_K a stage, breaks (number of the first stage it fails), stays, undecided, unfinished."""
    reached = "CASE WHEN kept THEN {last} {dropped} ELSE -1 END".format(
        last=len(stages),
        dropped=" ".join(f"WHEN dropped_by = {_literal(stage.name)} THEN {k}" for k, stage in enumerate(stages)),
    )
    # Scores may be there from a run under laxer rules although today's rules drop the clip earlier: they count.
    judged = [
        " OR ".join([f"reached >= {k}", *(f"{quoted(f'{stage.name}.{name}')} IS NOT NULL" for name in stage.columns)])
        for k, stage in enumerate(stages)
    ]
    passes = [" AND ".join(rule.sql() for rule in then[stage.name]) or "true" for stage in stages]
    breaks = " ".join(f"WHEN judged_{k} AND NOT ({test}) THEN {k}" for k, test in enumerate(passes))
    waits = " OR ".join(f"NOT judged_{k}" for k, stage in enumerate(stages) if then[stage.name]) or "false"
    # Dropped by something that is no stage of this cascade (a length, say): no rule here brings the clip back.
    out = f"({UNDECIDED} OR NOT kept AND dropped_by NOT IN ({', '.join(_literal(s.name) for s in stages) or 'NULL'}))"
    out = out if stages else "NOT kept"
    return f"""
        WITH a AS (SELECT *, {reached} AS reached FROM clips),
             b AS (SELECT *, {"".join(f"({test}) AS judged_{k}, " for k, test in enumerate(judged))} {out} AS out FROM a),
             c AS (SELECT *, {f"CASE {breaks} END" if breaks else "NULL::INTEGER"} AS breaks, ({waits}) AS waits FROM b)
        SELECT clip, kept, {LENGTH_S} / 3600 AS hours, {"".join(f"judged_{k}, " for k in range(len(stages)))}
               breaks, breaks IS NULL AND NOT out AND NOT waits AS stays, breaks IS NULL AND NOT out AND waits AS undecided,
               {UNDECIDED} AS unfinished FROM c"""


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _changes(data: Dataset, then: dict[str, list[Rule]], limit: int) -> list[Change]:
    rules = [rule for stage in data.stages for rule in then[stage.name]]
    judges = [k for k, stage in enumerate(data.stages) if then[stage.name]]
    columns = ["clip", "path", '"start"', '"end"', "clips.kept", "reason", "stays", "undecided"]
    columns += [f"judged_{k}" for k in judges] + [quoted(f"{rule.stage}.{rule.score}") for rule in rules]
    found = data.rows(
        f"SELECT {', '.join(columns)} FROM clips JOIN verdict USING (clip) WHERE clips.kept <> stays OR undecided "
        'ORDER BY CASE WHEN stays THEN 0 WHEN undecided THEN 2 ELSE 1 END, path, "start", clip LIMIT ?', [limit],
    )  # fmt: skip
    changes = []
    for clip, path, start, end, kept, reason, stays, undecided, *rest in found:
        judged, values = rest[: len(judges)], rest[len(judges) :]
        if stays:
            text = "kept"
        elif undecided:
            waiting = [data.stages[k].name for k, done in zip(judges, judged, strict=True) if not done]
            text = f"not judged by {', '.join(waiting)}"
        else:
            # Kept today: every stage has judged it, so the first rule that fails is the one that drops it.
            rule, value = next((r, v) for r, v in zip(rules, values, strict=True) if not r.keeps(v))
            text = f"{rule}, got {_shown(value)}"
        changes.append(Change(clip, path, start, end, "kept" if kept else reason or "dropped", text))
    return changes


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def run_what_if(words: list[str]) -> int:
    """`curate what-if`: print the answer as tables, or as one JSON object with --json. Returns the exit code."""
    conditions, rest = _split(words)
    parser = argparse.ArgumentParser(
        prog="vchitect-fast curate what-if", allow_abbrev=False, epilog=EPILOG,
        description="Count what would stay under other rules, from the stored scores.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that curate filled")
    parser.add_argument(
        "--show", type=int, default=10, metavar="N", help="changed clips to list (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args(rest)
    if args.show < 0:
        raise UserError(f"--show must be 0 or more, got {args.show}; the default is 10.")
    answer = what_if(args.folder, conditions, args.show)
    if args.json:
        print(json.dumps(asdict(answer), indent=2))
    else:
        _print(answer)
    return 0


def _split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The rules among the words, and the words that argparse reads."""
    conditions: dict[str, str] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, condition = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name in ("show", "json", "help", ""):
            rest.append(word)
            continue
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise UserError(f'{word} needs a condition after it, for example {word} "> 5".')
            condition = queue.pop(0)
        if name in conditions:
            raise UserError(f"--{name} is given twice; give one condition for a score.")
        conditions[name] = condition
    return conditions, rest


def _print(answer: Answer) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("rules today", overflow="fold")
    table.add_column("rules then", overflow="fold")
    for heading in ("drops today", "drops then", "not judged"):
        table.add_column(heading, justify="right")
    for row in answer.stages:
        changed = row.rules_today != row.rules_then
        today, then = (
            "\n".join(rule.removeprefix(f"{row.stage}.") for rule in rules) or "-"
            for rules in (row.rules_today, row.rules_then)
        )
        table.add_row(
            Text(printable(row.stage)), Text(today), Text(then, style="bold" if changed else ""),
            f"{row.num_dropped_today:,}", f"{row.num_dropped_then:,}", f"{row.num_not_judged:,}",
        )  # fmt: skip
    console.print(table)
    console.print()
    console.print(
        f"stay: {counted(answer.num_then, 'clip')}, {duration(answer.hours_then)}; today {counted(answer.num_today, 'clip')}, "
        f"{duration(answer.hours_today)} (+{answer.num_gained:,}, -{answer.num_lost:,})"
    )
    if answer.num_undecided:
        console.print(
            f"{counted(answer.num_undecided, 'more clip')}, {duration(answer.hours_undecided)}, may stay: dropped by an earlier "
            "stage, not judged by a later one yet. Curate again with these rules to know."
        )
    if answer.num_unfinished:
        console.print(f"left out: {counted(answer.num_unfinished, 'clip')} in quarantine or not judged to the end.")
    if answer.changes:
        table = Table("clip", "seconds", "today", "then", box=None, pad_edge=False)
        for change in answer.changes:
            cells = (Path(change.path).name, f"{change.start:.1f}-{change.end:.1f}", change.today, change.then)
            table.add_row(*(Text(printable(cell)) for cell in cells))
        console.print()
        console.print(table)
