"""vchitect-fast: the table of commands. Only the module of the chosen command is imported.

A command is a module with `add_arguments(parser)` and `run(args) -> int`; `SUBCOMMANDS`, where it has them, are functions that take
the words after their name. Exit codes: 0 done, 1 done but with a doubt that
the command names, 2 a mistake that the user can mend, memory that ran out included (one sentence on stderr), 130 stopped
with Ctrl-C, 141 when whoever reads its output left.
"""

from __future__ import annotations

import argparse
import importlib
import os
import select
import signal
import sys

from vchitect_fast import __version__
from vchitect_fast.errors import UserError, unknown_name

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("vchitect_fast.quickstart", "real videos to a plan, a training run, a sample and a report"),
    "doctor": ("vchitect_fast.doctor", "what this machine has, what each part can do with it, what to install"),
    "curate": (
        "vchitect_fast.curation.command",
        "raw videos to a training set: clips, scores, verdicts with reasons, a report",
    ),
    "autotune": ("vchitect_fast.autotune.command", "measure this machine and write the Plan that train obeys"),
    "tune": (
        "vchitect_fast.tune",
        "measure tiles and backends of attention on this GPU, for a table that launches look up",
    ),
    "memory": ("vchitect_fast.memory", "what a step keeps, moves to host memory and recomputes, byte by byte"),
    "train": ("vchitect_fast.train", "train a transformer by a Plan"),
    "sample": ("vchitect_fast.sample", "make a video from a prompt"),
    "bench": ("vchitect_fast.benchmarks.command", "measure every op beside its alternatives; compare two results"),
    "profile": (
        "vchitect_fast.profiling.command",
        "where the time and the memory of a step went, and what to change; for any trace; two beside each other",
    ),
    "export": ("vchitect_fast.export", "write a checkpoint as a folder under the released names"),
}


def overview() -> str:
    """The text of `vchitect-fast --help`."""
    lines = [f"  {name:<12}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vchitect-fast COMMAND [options]",
            "",
            "Train Vchitect-2.0-like video diffusion transformers as fast as the hardware allows.",
            "",
            "commands:",
            *lines,
            "",
            "vchitect-fast COMMAND --help   every option with unit, default and an example",
            "vchitect-fast --version",
        ]
    )


def parser_of(command: str) -> tuple[argparse.ArgumentParser, object]:
    """The parser of a command and its module; UserError with the nearest name for an unknown one."""
    if command not in COMMANDS:
        raise unknown_name("command", command, COMMANDS)
    path, summary = COMMANDS[command]
    module = importlib.import_module(path)
    # Raw: the example in a command's epilog must be copyable as it stands.
    parser = argparse.ArgumentParser(
        prog=f"vchitect-fast {command}",
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser, module


def main(arguments: list[str] | None = None) -> int:
    """Run one command; `arguments` are those of the process when None. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"vchitect-fast {__version__}")
        return 0
    prefix = "vchitect-fast"
    try:
        parser, module = parser_of(arguments[0])
        prefix = parser.prog
        if verb := getattr(module, "SUBCOMMANDS", {}).get(arguments[1] if len(arguments) > 1 else None):
            code: int = verb(arguments[2:])
        else:
            code = module.run(parser.parse_args(arguments[1:]))  # type: ignore[attr-defined]
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{prefix}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 128 + signal.SIGPIPE
        if not (reason := _out_of_memory(error)):
            raise
        print(
            f"{prefix}: {reason}; plan a smaller --batch or smaller --shapes with `vchitect-fast autotune`, "
            "or end what else uses this memory.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"{prefix}: stopped.", file=sys.stderr)
        return 130


def _reader_left() -> bool:
    """Whether nobody reads standard output any more (`| head`); what is still to be written then goes nowhere."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)  # errors are reported without being asked for
    if not watch.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _out_of_memory(error: Exception) -> str:
    """Which memory ran out, or "" for any other error. torch is looked up, not imported: without it nothing is its."""
    torch = sys.modules.get("torch")
    if isinstance(error, getattr(torch, "OutOfMemoryError", ())):
        return f"the GPU's memory ran out ({' '.join(str(error).split()).split('. GPU ')[0]})"
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return "main memory ran out" if on_cpu or isinstance(error, MemoryError) else ""


if __name__ == "__main__":
    sys.exit(main())
