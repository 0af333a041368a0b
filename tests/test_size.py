"""The law: a source file has at most 400 lines and a function at most 80, so that the rule is kept and not remembered."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
FOLDERS = ("vchitect_fast", "autotune", "profiling", "curation", "benchmarks", "examples", "tests", "csrc")
ENDINGS = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}


def too_long(name: str, text: str) -> list[str]:
    """What is over a limit in one file, one line each."""
    found = []
    if (num_lines := len(text.splitlines())) > MAX_FILE_LINES:
        found.append(f"{name} has {num_lines} lines, at most {MAX_FILE_LINES}: split it by subject")
    if name.endswith(".py"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    found.append(
                        f"{name}:{node.lineno} {node.name} has {num_lines} lines, at most {MAX_FUNCTION_LINES}"
                    )
    return found


def test_files_and_functions_are_short() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS]
    assert len(paths) > 20
    assert [line for path in paths for line in too_long(str(path.relative_to(ROOT)), path.read_text())] == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.cpp", "\n" * 401, "a.cpp has 401 lines"),
        ("b.py", "def f():\n" + "    x = 1\n" * 80, "b.py:1 f has 81 lines"),
    ],
)
def test_a_planted_violation_is_found(name: str, text: str, expected: str) -> None:
    [line] = too_long(name, text)
    assert expected in line
