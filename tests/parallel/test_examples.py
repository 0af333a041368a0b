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


@pytest.mark.soak
def test_an_example_runs_under_torchrun(tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command, environ = [*start, str(example_cases.EXAMPLES / f"{NAMES[0]}.py")], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stderr
    check_output(done.stdout, num_ranks=2)


def test_the_slurm_script_starts_train_with_its_arguments_and_processors(tmp_path: Path) -> None:
    """A made-up srun tells what it was asked for."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@" "$SRUN_CPUS_PER_TASK $OMP_NUM_THREADS"\nexit 7\n')
    srun.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "12"}
    script = example_cases.EXAMPLES / "train.slurm"
    done = subprocess.run(["bash", str(script), "my run.yaml", "steps=5"], capture_output=True, text=True, env=environ)
    assert done.returncode == 7, done.stderr  # the job fails with its ranks
    *options, command, verb, run_file, override, processors = done.stdout.splitlines()
    assert {"--kill-on-bad-exit=1", "--distribution=block:block"} == set(options)
    assert [command, verb, run_file, override, processors] == [
        "vchitect-fast",
        "train",
        "my run.yaml",
        "steps=5",
        "12 12",
    ]


def check_output(text: str, num_ranks: int) -> None:
    losses = [float(loss) for loss in re.findall(r"step \d+  loss (\S+)", text)]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert f"dp_shard {num_ranks}" in text
