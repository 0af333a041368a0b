"""The law of the command line: one module a command, one sentence an error, exit codes 0, 2 and 130."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import types

import pytest
import torch

from vchitect_fast import __version__, cli
from vchitect_fast.errors import UserError


def plant(monkeypatch: pytest.MonkeyPatch, outcome: object) -> None:
    """A command `probe` that returns the outcome, or raises it."""
    module = types.ModuleType("planted_command")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--count", type=int, default=1, help="how many (default: 1)")
        parser.epilog = "example:\n  vchitect-fast planted --count 2"

    def run(args: argparse.Namespace) -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        print(f"count {args.count}")
        return 0

    module.add_arguments, module.run = add_arguments, run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "planted_command", module)
    monkeypatch.setitem(cli.COMMANDS, "planted", ("planted_command", "a command of this test"))


def test_runs_the_chosen_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plant(monkeypatch, 0)
    assert cli.main(["planted", "--count", "3"]) == 0
    assert capsys.readouterr().out == "count 3\n"


def test_a_user_error_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, UserError("expected a,\ngot b; use a."))
    assert cli.main(["planted"]) == 2
    assert capsys.readouterr().err == "vchitect-fast planted: expected a, got b; use a.\n"


def test_control_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plant(monkeypatch, KeyboardInterrupt())
    assert cli.main(["planted"]) == 130
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of\n79 GiB"
            ),
            "the GPU's memory ran out (CUDA out of memory. Tried to allocate 20.00 GiB); plan a smaller --batch",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "main memory ran out; plan",
        ),
        (MemoryError(), "main memory ran out; plan a smaller --batch"),
    ],
)
def test_memory_that_ran_out_is_one_line_and_exit_code_2(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, error)
    assert cli.main(["planted"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"vchitect-fast planted: {said}")
    assert "vchitect-fast autotune" in line
    assert line.count("\n") == 1


def test_an_error_without_torch_does_not_import_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, KeyError("a bug"))
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would be an ImportError
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["planted"])


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["planted"])


def test_an_unknown_command_gets_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "vchitect-fast: unknown command 'trian'; did you mean 'train'?\n"


def test_an_unknown_option_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plant(monkeypatch, 0)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["planted", "--cuont", "3"])
    assert stopped.value.code == 2
    assert "--cuont" in capsys.readouterr().err


def test_help_shows_the_example_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, 0)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["planted", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "A command of this test." in text
    assert "example:\n  vchitect-fast planted --count 2" in text


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, summary) in cli.COMMANDS.items():
        assert f"  {name:<12}{summary}" in text
    assert cli.main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vchitect-fast {__version__}\n"


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help_with_an_example(command: str) -> None:
    path = cli.COMMANDS[command][0]
    assert importlib.util.find_spec(path), f"{command}: there is no module {path}"
    parser, module = cli.parser_of(command)
    assert callable(module.run)  # type: ignore[attr-defined]
    assert f"vchitect-fast {command}" in (parser.epilog or ""), "the epilog needs an example to copy"
    lacking = [action.option_strings or action.dest for action in parser._actions if not action.help]
    assert lacking == []


def test_a_reader_that_leaves_is_no_traceback() -> None:
    """`vchitect-fast ... | head`: the pipe is closed before much is written."""
    lines = (
        "import sys, types",
        "from vchitect_fast import cli",
        "m = types.ModuleType('talks')",
        "m.add_arguments = lambda parser: None",
        "m.run = lambda args: [print('x' * 70) for _ in range(9999)] and 0",
        "sys.modules['talks'] = m",
        "cli.COMMANDS['talk'] = ('talks', 'talks')",
        "sys.exit(cli.main(['talk']))",
    )
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", "\n".join(lines)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout and child.stderr
    assert child.stdout.readline().startswith("xxx")
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == ("", 141)
