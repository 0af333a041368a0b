"""Checkpoints: bitwise, whole or absent, refused by name when damaged; a full disk and kill -9 cost at most the newest.

pytest tests/test_checkpoint.py
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vchitect_fast import checkpoint
from vchitect_fast.errors import UserError

STATE = {"seed": 3, "model": {"num_layers": 2}}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Several dtypes, a scalar, values that are no numbers, one tensor that is not contiguous, one that needs gradients."""
    g = torch.Generator().manual_seed(seed)
    special = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45])
    return {
        "model.weight": nn.Parameter(torch.randn(7, 5, generator=g)),
        "model.half": torch.randn(33, generator=g).bfloat16(),
        "model.special": special.roll(seed),
        "optimizer.step.weight": torch.tensor(float(seed)),
        "optimizer.exp_avg.weight": torch.randn(5, 7, generator=g).T,
        "ema.weight": torch.randn(7, 5, generator=g),
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8)
    )


def assert_loads(folder: Path, seed: int) -> None:
    into, expected = tensors(seed + 100), tensors(seed)
    places = {name: tensor.data_ptr() for name, tensor in into.items()}
    state = checkpoint.load(folder, into)
    assert (state["step"], state["seed"], state["model"]) == (seed, 3, {"num_layers": 2})
    for name, tensor in into.items():
        assert same_bits(tensor, expected[name]), name
        assert tensor.data_ptr() == places[name], name  # in place: the model and the optimizer own this storage


def save(run: Path, step: int, keep_last: int = 2) -> Path:
    return checkpoint.save(run, step, tensors(step), STATE, keep_last)


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run))


def test_what_was_saved_is_loaded_bit_by_bit(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") is None
    folder = save(tmp_path / "run", 7)
    assert folder == tmp_path / "run" / "checkpoint-00000007" == checkpoint.latest(tmp_path / "run")
    assert_loads(folder, 7)
    assert names(tmp_path / "run") == ["checkpoint-00000007", "latest"]


def test_a_part_is_loaded_by_its_prefix(tmp_path: Path) -> None:
    found = checkpoint.load_prefix(save(tmp_path, 7), "ema.")
    assert found.keys() == {"weight"}
    assert same_bits(found["weight"], tensors(7)["ema.weight"])
    assert checkpoint.load_prefix(tmp_path / "checkpoint-00000007", "model.", only={"half", "absent"}).keys() == {
        "half"
    }


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 100, 20_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-00000100", "checkpoint-20000000", "latest"]
    assert_loads(tmp_path / "checkpoint-00000100", 100)


def test_a_run_set_back_by_hand_keeps_what_it_writes(tmp_path: Path) -> None:
    """What the error of a damaged checkpoint proposes: go on from an older one; the newer ones must not displace it."""
    for step in (100, 200):
        save(tmp_path, step)
    (tmp_path / "latest").write_text("checkpoint-00000100\n")
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-00000100"
    save(tmp_path, 150, keep_last=1)
    newest = checkpoint.latest(tmp_path)
    assert newest == tmp_path / "checkpoint-00000150"
    assert_loads(newest, 150)


def test_an_old_one_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def refuse(path: Path, **_options: object) -> None:
        if path.name == "checkpoint-00000001":
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    with pytest.raises(
        UserError, match=r"saved .*-00000002, but could not remove the older .*-00000001 .*denied.*remove it"
    ):
        save(tmp_path, 2, keep_last=1)
    assert_loads(tmp_path / "checkpoint-00000002", 2)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-00000002"


def test_a_run_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="expected the folder of a run .*Not a directory"):
        checkpoint.latest(tmp_path / "run")
    with pytest.raises(UserError, match="could not write|expected the folder of a run"):
        save(tmp_path / "run", 1)
    assert (tmp_path / "run").read_text() == "mine"


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 1), tmp_path / "copy")
    (tmp_path / "checkpoint-00000001" / "stray").write_text("x")
    save(tmp_path, 1)
    assert names(tmp_path / "checkpoint-00000001") == names(tmp_path / "copy")
    assert_loads(tmp_path / "checkpoint-00000001", 1)


def largest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def cut(folder: Path) -> None:
    os.truncate(largest(folder), largest(folder).stat().st_size - 1)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: largest(folder).unlink(), r"distcp is missing"),
    (lambda folder: (folder / ".metadata").unlink(), r"\.metadata is missing"),
    (cut, r"distcp has \d+ bytes instead of \d+"),
    (lambda folder: (folder / "state.json").unlink(), "is not a whole checkpoint"),
    (lambda folder: (folder / "state.json").write_text('{"step": 2'), "is not a whole checkpoint"),
    (lambda folder: (folder / "state.json").write_text("[]"), "is not a whole checkpoint"),
    (lambda folder: (folder / "state.json").write_text('{"step": 2}'), "is not a whole checkpoint"),
    (shutil.rmtree, "is not a whole checkpoint"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_another_is_named(
    tmp_path: Path, damage: Callable[[Path], Any], said: str
) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    damage(folder)
    into = tensors(50)
    for call in (lambda: checkpoint.load(folder, into), lambda: checkpoint.load_prefix(folder, "ema.")):
        with pytest.raises(UserError, match=f"{said}.*go on from checkpoint-00000001, write that name into .*latest"):
            call()
    assert all(same_bits(into[name], tensor) for name, tensor in tensors(50).items())  # nothing was touched


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_the_newest_whole_checkpoint_is_found_behind_a_damaged_one(
    tmp_path: Path, damage: Callable[[Path], Any], said: str
) -> None:
    assert checkpoint.newest_whole(tmp_path) == (None, [])
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=3)
    assert checkpoint.newest_whole(tmp_path) == (tmp_path / "checkpoint-00000003", [])
    for step in (3, 2):
        damage(tmp_path / f"checkpoint-0000000{step}")
    newest, torn = checkpoint.newest_whole(tmp_path)
    assert newest == tmp_path / "checkpoint-00000001"
    assert "checkpoint-00000003" in torn[0] and re.search(said, torn[0])
    assert len(torn) == (1 if damage is shutil.rmtree else 2)  # what is gone and not named by `latest` is not missed
    damage(newest)
    with pytest.raises(UserError, match=f"{said}.*; no checkpoint in .* is whole, start again in a new folder"):
        checkpoint.newest_whole(tmp_path)


def test_a_checkpoint_that_latest_was_set_back_from_is_not_taken(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "latest").write_text("checkpoint-00000001\n")
    assert checkpoint.newest_whole(tmp_path) == (tmp_path / "checkpoint-00000001", [])


def test_a_damaged_only_checkpoint_says_so(tmp_path: Path) -> None:
    cut(save(tmp_path, 1))
    with pytest.raises(UserError, match="there is no other checkpoint"):
        checkpoint.read_state(tmp_path / "checkpoint-00000001")


def zeros(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def halved(path: Path) -> None:
    """The second half of the file again in place of the first: right size, some sense in it."""
    half = path.read_bytes()[-(path.stat().st_size // 2) :]
    path.write_bytes((half + half)[: path.stat().st_size].ljust(path.stat().st_size, b"."))


@pytest.mark.parametrize(("name", "damage"), [(".metadata", zeros), (".metadata", halved), ("__0_0.distcp", zeros)])
def test_other_content_of_the_right_size_is_refused(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    damage(folder / name)
    said = r"checkpoint-00000002 cannot be read \(.+\); to go on from checkpoint-00000001, write that name into"
    for call in (lambda: checkpoint.load(folder, tensors(50)), lambda: checkpoint.load_prefix(folder, "ema.")):
        with pytest.raises(UserError, match=said):
            call()


class Harm:
    """Unpickled without care, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("harm", ["class", "function"])
def test_a_pickle_that_runs_something_is_refused(tmp_path: Path, harm: str) -> None:
    folder = save(tmp_path, 1)
    content = pickle.dumps(Harm(tmp_path / "harmed")) if harm == "class" else b"cos\nsystem\n(S'exit'\ntR."
    (folder / ".metadata").write_bytes(content)
    state = json.loads((folder / "state.json").read_text())
    state["files"][".metadata"] = len(content)
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="is not part of a checkpoint"):
        checkpoint.load_prefix(folder, "ema.")
    assert not (tmp_path / "harmed").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    more = {**tensors(50), "model.extra": torch.zeros(2)}
    with pytest.raises(UserError, match=r"1 tensors missing, 0 misshaped \(first: model.extra\)"):
        checkpoint.load(folder, more)
    wider = {**tensors(50), "ema.weight": torch.zeros(7, 6)}
    with pytest.raises(UserError, match=r"0 tensors missing, 1 misshaped \(first: ema.weight\)"):
        checkpoint.load(folder, wider)
    assert same_bits(wider["model.weight"], tensors(50)["model.weight"])


# What a save of step 2 runs into. Files over 1 MB: in the midst of the tensors; over 1500 bytes: of whatever comes first.
FULL_DISKS = ["limit(1_000_000)", "limit(1_500)"]
KILLS = [
    "checkpoint.dcp.FileSystemWriter.finish = die",  # tensors written, metadata not
    "files._sync = die",  # all written, nothing synced
    "Path.rename = die",  # before the folder has its name
    "checkpoint.write_text = die",  # the folder has its name, `latest` is still the old one
    "checkpoint.shutil.rmtree = lambda path, **_: die() if path.name.endswith('1') else None",  # before the old one goes
]
CHILDREN = """
import os, resource, signal, sys, torch
from pathlib import Path
from vchitect_fast import checkpoint, files

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def limit(num_bytes):  # the kernel refuses to write more into any file
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

for index, fault in enumerate(sys.argv[2:]):
    child = os.fork()
    if child == 0:
        run = Path(sys.argv[1]) / str(index)
        exec(fault)
        try:
            checkpoint.save(run, 2, {"model.weight": torch.ones(1_000_000)}, {}, 1)
        except checkpoint.UserError as error:
            print(error, flush=True)
        os._exit(0)
    print("status", os.waitpid(child, 0)[1], flush=True)
"""


def faulty_saves(folder: Path, faults: list[str]) -> tuple[list[Path], list[str]]:
    """A run a fault with a good step 1 and a step 2 that met the fault; the lines printed. One process loads torch for all."""
    runs = [folder / str(index) for index in range(len(faults))]
    for run in runs:
        save(run, 1)
    ended = subprocess.run(
        [sys.executable, "-P", "-c", CHILDREN, str(folder), *faults], capture_output=True, text=True, check=True
    )
    return runs, ended.stdout.splitlines()


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    runs, lines = faulty_saves(tmp_path, FULL_DISKS)
    assert lines[1::2] == ["status 0"] * len(runs)
    for run, message in zip(runs, lines[::2], strict=True):
        good = run / "checkpoint-00000001"
        assert message.startswith(f"could not write {run / 'checkpoint-00000002'} ([Errno 27] File too large); ")
        assert message.endswith(
            f"the last good checkpoint is {good}; free some space and start the same command again."
        )
        assert names(run) == ["checkpoint-00000001", "latest"]
        assert checkpoint.latest(run) == good
        assert_loads(good, 1)


def test_a_kill_at_any_moment_of_a_save_leaves_latest_loadable(tmp_path: Path) -> None:
    runs, lines = faulty_saves(tmp_path, KILLS)
    assert lines == [f"status {int(signal.SIGKILL)}"] * len(runs)
    newest = [checkpoint.latest(run) for run in runs]
    assert [path and path.name[-1] for path in newest] == ["1", "1", "1", "1", "2"]
    for run, path in zip(runs, newest, strict=True):
        assert path is not None
        if path.name.endswith("1"):
            assert_loads(path, 1)
        else:
            assert torch.equal(checkpoint.load_prefix(path, "model.")["weight"], torch.ones(1_000_000))
        save(run, 2, keep_last=1)  # the run goes on
        assert_loads(run / "checkpoint-00000002", 2)
        assert names(run) == ["checkpoint-00000002", "latest"]  # and nothing is left behind


def test_state_is_json_with_the_sizes_of_all_files(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    state = json.loads((folder / "state.json").read_text())
    assert state.keys() == {"step", "files", *STATE}
    assert state["files"] == {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "state.json"}
