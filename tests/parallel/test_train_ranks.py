"""The training loop on several ranks and real clips: the same as one process, and what a killed or stopped rank does.

pytest tests/parallel/test_train_ranks.py; what is killed was started by torchrun, the rest runs on ranks.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from ranks import ranks
from test_train import NANO, assert_same, clips, final, plan_of

from vchitect_fast.cli import main
from vchitect_fast.config import TrainConfig
from vchitect_fast.manifest import write_manifest
from vchitect_fast.metrics import read_log
from vchitect_fast.plan import Plan, ShardSpec

FRAMES = ShardSpec("frames", temporal="tokens")
TOKENS = ShardSpec("tokens", spatial="frames")
EXIT_S = 60.0  # within which all ranks must be gone after one was killed
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
REDUCED = 256  # 4D of the nano model, its longest dot product


def run_file(
    folder: Path, name: str, mesh: tuple[int, int, int], accumulation: int, shard: ShardSpec, **fields
) -> Path:
    """A run of four samples a step, one a microbatch, on dp_replicate x dp_shard x sp ranks."""
    write_manifest(clips(), folder / "clips.jsonl")
    sizes = dict(zip(("dp_replicate", "dp_shard", "sp"), mesh, strict=True))
    sharded = "global" if mesh[1] * mesh[2] > 1 else "none"
    path = plan_of(
        folder / f"{name}-plan.json", mesh=sizes, fsdp_group=sharded, microbatch=1, accumulation=accumulation
    )
    plan = Plan.load(path)
    replace(plan, entries=(replace(plan.entries[0], shard=shard),)).save(path)
    values = {
        "manifest": str(folder / "clips.jsonl"), "plan": str(path), "out": str(folder / name), "model": "vchitect-nano",
        "warmup_steps": 2, "learning_rate": 1e-2, "ema_decay": 0.9, "validate_every": 2, "save_every": 2, "log_every": 1,
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    TrainConfig.from_dict(values | fields).save(file)
    return file


def torchrun(file: Path, num_ranks: int, *overrides: str) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node=N -m vchitect_fast.train FILE`, as the user page says."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return subprocess.Popen(
        [sys.executable, "-P", *command, "-m", "vchitect_fast.train", str(file), *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | ONE_THREAD,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    """What a run printed that must end well."""
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that torchrun started, in their order."""
    children = psutil.Process(process.pid).children()
    return sorted((child for child in children if "train" in " ".join(child.cmdline())), key=lambda child: child.pid)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Plans are for a device of one thread, as torchrun's ranks are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_ranks_compute_what_one_process_does_also_after_another_mesh_takes_over(
    tmp_path: Path, one_thread: None
) -> None:
    assert main(["train", str(run_file(tmp_path, "one", (1, 1, 1), 4, ShardSpec(), steps=4))]) == 0
    four = run_file(tmp_path, "ranks", (1, 2, 2), 2, FRAMES, steps=2)
    assert ranks(4).run("train_calls:trained", str(four)) == [2] * 4
    assert (tmp_path / "ranks" / "model" / "config.json").exists()
    two = run_file(tmp_path, "ranks", (1, 1, 2), 4, TOKENS, steps=4)
    assert ranks(2).run("train_calls:trained", str(two)) == [4] * 2
    assert "samples_a_step" in read_log(tmp_path / "ranks", "resumed")[0]["changed"]

    expected, found = (read_log(tmp_path / name, "step") for name in ("one", "ranks"))
    assert [event["step"] for event in found] == [1, 2, 3, 4]
    eps = torch.finfo(torch.float32).eps
    for one, many in zip(expected, found, strict=True):
        for name in ("loss", "grad_norm"):
            assert abs(many[name] - one[name]) <= (eps + eps * REDUCED**0.5) * one[name], (one["step"], name)
        assert one["imbalance"] is None and many["imbalance"] >= 0
        assert many["model_flops"] == one["model_flops"]
    for one, many in zip(
        read_log(tmp_path / "one", "validation"), read_log(tmp_path / "ranks", "validation"), strict=True
    ):
        assert abs(many["loss"] - one["loss"]) <= (eps + eps * REDUCED**0.5) * one["loss"]


@pytest.mark.soak
def test_each_rank_parks_its_shards_and_the_run_stays_bitwise_the_same(tmp_path: Path, one_thread: None) -> None:
    """Through validation, which swaps the average in, a checkpoint, and a resume."""
    pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")
    kept = run_file(tmp_path, "kept", (1, 2, 1), 2, ShardSpec(), steps=2, save_every=1, validate_every=1)
    assert ranks(2).run("train_calls:trained", str(kept)) == [2] * 2
    for steps in (1, 2):
        away = run_file(tmp_path, "away", (1, 2, 1), 2, ShardSpec(), steps=steps, save_every=1, validate_every=1)
        plan = tmp_path / "away-plan.json"
        replace(Plan.load(plan), parked=("optimizer", "average")).save(plan)
        found = ranks(2).run("train_calls:parked", str(away))
        # the same after every microbatch
        parked, on_device = (sum(num_bytes) for num_bytes in zip(*(bytes_of for [bytes_of] in found), strict=True))
        assert (parked, on_device) == (12 * NANO.num_parameters(), 0)
    assert_same(final(tmp_path / "kept"), final(tmp_path / "away"))
    losses = [[event["loss"] for event in read_log(tmp_path / name, "validation")] for name in ("kept", "away")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_what_one_rank_cannot_do_ends_all_with_its_words(tmp_path: Path, one_thread: None) -> None:
    """And at once: the others would wait for it in their next exchange."""
    file = run_file(tmp_path, "run", (1, 1, 2), 2, FRAMES, steps=2)
    names = {
        "train:read_clips": 1, "train:build_model": 1, "train:build_saving": 1, "train:park": 1, "train:load_codec": 1,
        "train:build_data": 1, "train:open_log": 0, "data:VideoData._decode_step": 1, "train:report": 0,
    }  # fmt: skip
    expected = [f"{name.partition(':')[2]} failed on rank {rank} on purpose" for name, rank in names.items()]
    assert ranks(2).run("train_calls:failing", str(file), names, timeout_s=60) == [expected] * 2
    assert ranks(2).run("train_calls:trained", str(file)) == [2] * 2
    [said], [also] = ranks(2).run("train_calls:failing", str(file), {"checkpoint:read_state": 1}, timeout_s=60)
    assert said == also == "read_state failed on rank 1 on purpose"


@pytest.mark.soak
def test_a_killed_rank_ends_all_and_is_named_and_the_run_goes_on_exactly(tmp_path: Path, one_thread: None) -> None:
    whole = run_file(tmp_path, "whole", (1, 1, 2), 2, FRAMES, steps=4)
    assert ranks(2).run("train_calls:trained", str(whole)) == [4] * 2
    file = run_file(tmp_path, "killed", (1, 1, 2), 2, FRAMES, steps=4, save_every=1)
    process = torchrun(file, 2)
    log = tmp_path / "killed" / "log.jsonl"
    while not log.exists() or not any(event["kind"] == "checkpoint" for event in read_log(tmp_path / "killed")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    family = ranks_of(process)
    assert len(family) == 2
    os.kill(family[1].pid, signal.SIGKILL)
    killed_at = time.monotonic()
    printed, _ = process.communicate(timeout=EXIT_S)
    assert time.monotonic() - killed_at < EXIT_S
    assert process.returncode != 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family)
    assert re.search(r"rank\s+: 1 ", printed) and "SIGKILL" in printed, printed[-3000:]
    assert ranks(2).run("train_calls:trained", str(file)) == [4] * 2
    assert_same(final(tmp_path / "whole"), final(tmp_path / "killed"))


@pytest.mark.soak
def test_sigterm_to_one_rank_saves_and_ends_all(tmp_path: Path, one_thread: None) -> None:
    file = run_file(tmp_path, "stopped", (1, 1, 2), 2, FRAMES, steps=1000, validate_every=0, save_every=0)
    process = torchrun(file, 2)
    log = tmp_path / "stopped" / "log.jsonl"
    while not log.exists() or not read_log(tmp_path / "stopped", "step"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    ranks_of(process)[1].send_signal(signal.SIGTERM)
    printed = finished(process)
    assert "2 ranks on 1 node: dp_replicate 1 x dp_shard 1 x sp 2" in printed
    assert "samples a step 2 = microbatch 1 x accumulation 2 x dp_replicate 1 x dp_shard 1" in printed
    assert printed.count("saved    ") == 2  # rank 0 alone prints: the checkpoint, and where it is at the end
    last = read_log(tmp_path / "stopped", "step")[-1]["step"]
    assert last < 1000
    assert (tmp_path / "stopped" / "latest").read_text().strip() == f"checkpoint-{last:08d}"
