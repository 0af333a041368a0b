"""Checkpoints of many ranks: whole or absent, written while the steps go on, read with any other sharding.

pytest tests/parallel/test_checkpoint_sharded.py; what the ranks do is in checkpoint_cases.py
"""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import checkpoint_cases
import pytest
import ranks as harness
import torch
from ranks import RankError, ranks

from vchitect_fast import checkpoint
from vchitect_fast.checkpoint_writer import Writer
from vchitect_fast.errors import UserError

STEPS, MORE = 2, 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By four ranks, sharded over dp_shard 2 x sp 2, while they went on."""
    run = tmp_path_factory.mktemp("run")
    return ranks(4).run("checkpoint_cases:train_and_save", (1, 2, 2), str(run), STEPS, MORE)[0]


def assert_goes_on(found: dict[str, Any], saved: dict[str, Any]) -> None:
    assert found["state"]["step"] == STEPS and found["state"]["seed"] == 3
    assert found["loaded"].keys() == saved["saved"].keys()
    different = [name for name, x in found["loaded"].items() if not torch.equal(x, saved["saved"][name])]
    assert not different, different
    assert found["losses"] == pytest.approx(saved["losses"], rel=1e-10, abs=0)


def test_what_is_written_in_the_background_is_of_the_step_it_was_saved_at(saved: dict[str, Any]) -> None:
    assert saved["moved"] > 200  # the steps that ran meanwhile changed the run's own tensors
    assert len(saved["losses"]) == MORE and saved["losses"][0] != saved["losses"][1]
    names = {path.name for path in Path(saved["folder"]).iterdir()}
    assert names == {".metadata", "state.json", *(f"__{rank}_0.distcp" for rank in range(4))}


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1, 1), (2, 1, 3)])
def test_another_sharding_loads_the_same_bits_and_follows_the_same_losses(
    shape: tuple[int, int, int], saved: dict[str, Any]
) -> None:
    world_size = shape[0] * shape[1] * shape[2]
    for found in ranks(world_size).run("checkpoint_cases:load_and_train", shape, saved["folder"], MORE):
        assert_goes_on(found, saved)


def test_one_process_loads_it_without_torch_distributed(saved: dict[str, Any]) -> None:
    assert_goes_on(checkpoint_cases.load_and_train(None, saved["folder"], MORE), saved)
    parts = checkpoint.load_prefix(Path(saved["folder"]), "ema.")
    assert parts and all(torch.equal(x, saved["saved"][f"ema.{name}"]) for name, x in parts.items())


def test_ranks_load_what_one_process_saved(tmp_path: Path) -> None:
    training = checkpoint_cases.Run(checkpoint_cases.ALONE)
    training.step(0)
    folder = checkpoint.save(tmp_path, 1, training.tensors, {"seed": 3}, 1)
    expected = training.whole()
    found = ranks(2).run("checkpoint_cases:load_and_train", (1, 2, 1), str(folder), 1)[0]
    assert all(torch.equal(found["loaded"][name], x) for name, x in expected.items())
    assert found["losses"] == pytest.approx([training.step(1)], rel=1e-10, abs=0)


def test_replicas_are_written_once(tmp_path: Path) -> None:
    """Four ranks that hold two copies of two shards write what two ranks with one copy write, half each."""
    sizes = []
    for shape in ((2, 1, 2), (1, 1, 2)):
        run = tmp_path / "-".join(map(str, shape))
        found = ranks(shape[0] * 2).run("checkpoint_cases:train_and_save", shape, str(run), 1, 0)[0]
        sizes.append([path.stat().st_size for path in Path(found["folder"]).glob("*.distcp")])
    assert [len(files) for files in sizes] == [4, 2]
    assert 0.95 < sum(sizes[0]) / sum(sizes[1]) < 1.05
    assert max(sizes[0]) < 0.7 * max(sizes[1])


def value_of(folder: Path) -> tuple[float, float]:
    """The two tensors of checkpoint_cases.small, whole and constant."""
    parts = {**checkpoint.load_prefix(folder, "model."), **checkpoint.load_prefix(folder, "optimizer.")}
    assert parts["weight"].shape == (4, 6) and (parts["weight"] == parts["weight"][0, 0]).all()
    return float(parts["weight"][0, 0]), float(parts["step"])


@pytest.mark.parametrize("failing", [0, 1])
def test_a_write_that_fails_on_one_rank_is_said_on_all_at_the_next_save(tmp_path: Path, failing: int) -> None:
    for found in ranks(2).run("checkpoint_cases:a_rank_cannot_write", str(tmp_path), failing):
        [said] = found["said"]
        assert said.startswith(f"UserError: could not write {tmp_path}/checkpoint-00000002 ([Errno 28] No space left")
        assert said.endswith(
            f"the last good checkpoint is {tmp_path}/checkpoint-00000001; free some space and start the same command again."
        )
        assert found["newest"] == f"{tmp_path}/checkpoint-00000003"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000001", "checkpoint-00000003", "latest"]
    assert value_of(tmp_path / "checkpoint-00000001") == (1.0, 1.0)
    assert value_of(tmp_path / "checkpoint-00000003") == (3.0, 3.0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_in_the_midst_of_a_write_leaves_the_one_before(
    tmp_path: Path, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "GRACE_S", 1.0)
    own = harness.Ranks(2)
    with pytest.raises(RankError, match=f"rank {victim} of 2 .*ended without an answer"):
        own.run("checkpoint_cases:killed_while_writing", str(tmp_path), victim)
    own.stop()
    newest, torn = checkpoint.newest_whole(tmp_path)
    assert newest == tmp_path / "checkpoint-00000001" and torn == []
    assert value_of(newest) == (1.0, 1.0)
    assert not (tmp_path / "checkpoint-00000002").exists()
    # and the run goes on over what the dead left behind
    (tmp_path / ".checkpoint-00000007.partial").mkdir()
    checkpoint.save(tmp_path, 3, {"model.weight": torch.full((4, 6), 3.0), "optimizer.step": torch.tensor(3.0)}, {}, 1)
    assert value_of(tmp_path / "checkpoint-00000003") == (3.0, 3.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000003", "latest"]


def test_folders_that_are_not_shared_are_noticed(tmp_path: Path) -> None:
    for said in ranks(2).run("checkpoint_cases:no_shared_folder", str(tmp_path)):
        assert "__1_0.distcp of other ranks not seen by rank 0" in said and "must lie on a shared file system" in said
    assert not (tmp_path / "latest").exists() and not (tmp_path / "checkpoint-00000001").exists()


def test_what_one_rank_cannot_read_no_rank_goes_on_with(saved: dict[str, Any], tmp_path: Path) -> None:
    tensors = {"model.weight": torch.zeros(4, 6), "optimizer.step": torch.tensor(0.0)}
    folder = checkpoint.save(tmp_path, 1, tensors, {}, 1)
    for said in ranks(2).run("checkpoint_cases:one_rank_cannot_read", str(folder)):
        assert "is of another model: 1 tensors missing" in said and "model.extra" in said


def test_a_writer_of_one_process_saves_copies(tmp_path: Path) -> None:
    tensor = torch.zeros(3)
    with Writer(tmp_path, 2) as writer:
        assert writer.wait() is None
        writer.save(1, {"model.x": tensor}, {})
        tensor.fill_(7.0)
        writer.save(2, {"model.x": tensor}, {})
        assert writer.wait() == tmp_path / "checkpoint-00000002"
    for step, value in ((1, 0.0), (2, 7.0)):
        found = checkpoint.load_prefix(tmp_path / f"checkpoint-0000000{step}", "model.")
        assert found["x"].tolist() == [value] * 3
    with Writer(tmp_path, 2, in_background=False) as writer:
        writer.save(3, {"model.x": tensor}, {})
        assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-00000003"


def fail_in(run: Path, error: Exception | None) -> None:
    """Save once, then leave the writer's block, by an error if there is one."""
    with Writer(run, 2) as writer:
        writer.save(3, {"model.x": torch.zeros(3)}, {})
        if error:
            raise error


def test_the_end_of_a_writer_raises_what_failed_or_adds_it_to_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp.FileSystemWriter, "write_data", refuse)
    with pytest.raises(UserError, match="could not write .*No space left on device.*; there was none before"):
        fail_in(tmp_path, None)
    with pytest.raises(KeyError) as caught:
        fail_in(tmp_path, KeyError("a step failed"))
    assert any("was not written: could not write" in note for note in caught.value.__notes__)


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, plain = Event(), checkpoint.dcp.FileSystemWriter.finish

    def finish(*args: Any, **options: Any) -> None:
        assert go_on.wait(30)
        plain(*args, **options)

    monkeypatch.setattr(checkpoint.dcp.FileSystemWriter, "finish", finish)
    with Writer(tmp_path, 2) as writer:
        writer.save(1, {"model.x": torch.zeros(3)}, {})
        assert checkpoint.latest(tmp_path) is None  # returned before it was written
        go_on.set()
        assert writer.wait() == checkpoint.latest(tmp_path) == tmp_path / "checkpoint-00000001"
