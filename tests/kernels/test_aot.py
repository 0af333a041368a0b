"""Every kernel compiles ahead of time without a GPU; the shipped tiles fit and spill nothing on sm_90.

pytest tests/kernels/test_aot.py compiles for sm_90; with -m soak for sm_80 and sm_100, which take twice as long. In a process of its
own: here the kernels may be interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vchitect_fast.kernels.aot import OPS, SHARED_LIMIT_BYTES, Usage, main


@pytest.mark.parametrize(
    "cc", [90, *(pytest.param(cc, marks=pytest.mark.soak) for cc in sorted(SHARED_LIMIT_BYTES) if cc != 90)]
)
def test_all_variants_compile_and_fit(cc: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "vchitect_fast.kernels.aot", "--json", "--cc", str(cc)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    usages = [Usage(**usage) for usage in json.loads(done.stdout)]
    assert {usage.cc for usage in usages} == {cc}
    assert cc < 89 or {usage.label.split()[0] for usage in usages} >= set(OPS)  # sm_80 has no fp8
    assert all(0 < usage.num_registers <= 255 for usage in usages)
    assert [usage.problem() for usage in usages if usage.problem()] == []


@pytest.mark.parametrize(
    ("usage", "fragment"),
    [
        (Usage("a", 90, 255, 8, 0, 4), "8 bytes a thread are spilled"),
        (Usage("a", 80, 64, 0, 163 * 1024 + 1, 4), "at most 166912"),
    ],
)
def test_a_planted_problem_is_found(usage: Usage, fragment: str) -> None:
    assert fragment in usage.problem()


def test_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--op", OPS[0]]) == 2 and "TRITON_INTERPRET" in capsys.readouterr().err
