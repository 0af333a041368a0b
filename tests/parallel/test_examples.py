"""The examples that bring diffusers' models into shards: alone they take the steps of the plain loop, two ranks the same.

pytest tests/parallel/test_examples.py
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import example_cases
import pytest
import torch
from ranks import ranks

from vchitect_fast.parallel.mesh import ALONE

NAMES = ("diffusers_transformer", "diffusers_unet")


@pytest.mark.parametrize("name", NAMES)
def test_the_steps_are_those_of_the_plain_loop(name: str) -> None:
    """Alone bit by bit, with blocks recomputed and offloaded; on two ranks as far as diffusers' fp32 parts allow."""
    expected = example_cases.losses(name, ALONE, plain=True)
    assert len(set(expected)) == example_cases.STEPS
    assert example_cases.losses(name, ALONE) == expected
    for found in ranks(2).run("example_cases:losses_on", name):
        # diffusers computes norms and embeddings in fp32, whatever the model's dtype
        assert found == pytest.approx(expected, rel=example_cases.STEPS * torch.finfo(torch.float32).eps, abs=0)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_at_most_a_hundred_lines(name: str) -> None:
    assert len((example_cases.EXAMPLES / f"{name}.py").read_text().splitlines()) <= 100


def test_an_example_runs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example_cases.EXAMPLES / f"{NAMES[1]}.py"), run_name="__main__")
    check_output(capsys.readouterr().out, num_ranks=1)


def test_an_example_runs_under_torchrun(tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command, environ = [*start, str(example_cases.EXAMPLES / f"{NAMES[0]}.py")], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stderr
    check_output(done.stdout, num_ranks=2)


def check_output(text: str, num_ranks: int) -> None:
    losses = [float(loss) for loss in re.findall(r"step \d+  loss (\S+)", text)]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert f"dp_shard {num_ranks}" in text
