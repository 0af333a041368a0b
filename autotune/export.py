"""`vchitect-fast autotune export`: a Plan as the configuration of LiteGen, torchtitan, FastVideo or NeMo Automodel.

    --format NAME   litegen, fastvideo, automodel: YAML to merge into yours; torchtitan: flags, one a line
    --plan FILE     the Plan
    --to FILE       where it goes; by default NAME.yaml or NAME.flags

What the target cannot be told (formats.py) stands on top of the file and on the terminal. A Plan whose shapes differ in what
they ask becomes a file a shape, NAME-SHAPE. Nothing that this command did not write is overwritten.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vchitect_fast.autotune.formats import TARGETS, Said
from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.files import write_text
from vchitect_fast.plan import Plan

MADE = "# made by `vchitect-fast autotune export`"  # how a file that may be overwritten begins
FLAGS = "torchtitan"  # the one format that is not YAML
USE = "use: ./run_train.sh $(grep -v '^#' {name}), with NGPU, MODULE and CONFIG set"
WIDTH = 118


@dataclass(frozen=True)
class File:
    """One file to write."""

    path: Path
    shapes: tuple[str, ...]  # that it holds for
    unsaid: tuple[str, ...]
    text: str


def add_arguments(group: Any) -> None:
    """Options of the verb; --plan and --json are the command's."""
    group.add_argument(
        "--format", choices=tuple(TARGETS), help="export: litegen, fastvideo or automodel (YAML), or torchtitan (flags)"
    )
    group.add_argument("--to", metavar="FILE", help="export: where it goes (default: FORMAT.yaml, or torchtitan.flags)")


def run(args: argparse.Namespace) -> int:
    """Write the files and say what they leave out. Exit code 0; UserError for what the user can mend."""
    if args.format is None:
        raise UserError(f"which format to export to is missing; give --format {', '.join(TARGETS)}.")
    files = export(Plan.load(args.plan), args.format, args.to)
    for file in files:
        _check_place(file.path)
    for file in files:
        write_text(file.path, file.text)
    if args.json:
        rows = [{**asdict(file), "path": str(file.path)} for file in files]
        print(json.dumps([{name: value for name, value in row.items() if name != "text"} for row in rows]))
        return 0
    for file in files:
        print(f"wrote {file.path} for {', '.join(file.shapes)}")
        if file.unsaid:
            print("  what it does not say:")
        for sentence in file.unsaid:
            print(textwrap.fill(sentence, WIDTH, initial_indent="  - ", subsequent_indent="    "))
    return 0


def export(plan: Plan, target: str, to: str | Path | None = None) -> list[File]:
    """The files for one target, not yet written: one, or one a shape where shapes ask for different things.

    target  of TARGETS
    to      the file's path; a shape is put before its suffix where there are several

    Raises UserError for an unknown target, and for a mesh that the target refuses.
    """
    if target not in TARGETS:
        raise unknown_name("export format", target, TARGETS)
    path = Path(to) if to else Path(f"{target}.{'flags' if target == FLAGS else 'yaml'}")
    said = {entry.shape: TARGETS[target](plan, entry) for entry in plan.entries}
    first = next(iter(said.values()))
    if all(other == first for other in said.values()):
        return [_file(plan, target, path, tuple(said), first)]
    return [
        _file(plan, target, path.with_name(f"{path.stem}-{shape}{path.suffix}"), (shape,), one)
        for shape, one in said.items()
    ]


def _file(plan: Plan, target: str, path: Path, shapes: tuple[str, ...], said: Said) -> File:
    about = (
        f"for {target} from the Plan {plan.digest()}: {', '.join(shapes)}, {plan.compute_dtype}, on {plan.device_name}"
    )
    lines = [MADE, *_comment(about)]
    if target == FLAGS:
        lines += _comment(USE.format(name=path.name))
    lines += _comment("what it does not say:" if said.unsaid else "it says all that the Plan decides")
    for sentence in said.unsaid:
        lines += _comment(sentence, "- ")
    return File(path, shapes, said.unsaid, "\n".join([*lines, _body(target, said.values), ""]))


def _body(target: str, values: dict[str, Any]) -> str:
    if target == FLAGS:
        return "\n".join(name if value is None else f"{name} {value}" for name, value in values.items())
    import yaml

    return yaml.safe_dump(values, sort_keys=False).rstrip()


def _comment(text: str, bullet: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"# {bullet}", subsequent_indent="# " + " " * len(bullet))


def _check_place(path: Path) -> None:
    """UserError where something stands that no export wrote."""
    if not path.exists():
        return
    try:
        ours = path.is_file() and path.read_text(encoding="utf-8").startswith(MADE)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise UserError(f"{path} is there and was not made by this command, it is left as it was; choose another --to.")
