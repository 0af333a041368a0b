"""What a run writes down: lines that survive kills, medians without the warm-up, the peak of memory, other writers.

pytest tests/test_metrics.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from vchitect_fast.errors import UserError
from vchitect_fast.metrics import Log, measured, peak_bytes, read_log, reset_peak, rewind_log


def step(number: int, shape: str = "8x96x64", **changes: Any) -> dict[str, Any]:
    record = {
        "forward_s": 1.0,
        "backward_s": 2.0,
        "optimizer_s": 0.5,
        "data_s": 9.0,
        "encode_s": 4.0,
        "peak_gib": 1.0,
        "mfu": 0.25,
    }
    return {"kind": "step", "step": number, "shape": shape, **record, **changes}  # fmt: skip


def write_log(run: Path, *events: dict[str, Any], torn: str = "") -> Path:
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + torn)
    return run


def test_every_event_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with Log(run) as log:
        log.write("step", 1, loss=0.5, mfu=None)
        assert read_log(run) == [{"kind": "step", "step": 1, "loss": 0.5, "mfu": None}]
        log.write("validation", 1, by_sigma={"0.5": 1.25})
    with Log(run) as log:  # a resumed run goes on in the same file
        log.write("step", 2, text="é\n")
    assert [event["step"] for event in read_log(run)] == [1, 1, 2]
    assert read_log(run, "validation") == [{"kind": "validation", "step": 1, "by_sigma": {"0.5": 1.25}}]
    assert len(log.path.read_text().splitlines()) == 3


@pytest.mark.parametrize("cut", [0, 1, 20, -1])
def test_rewinding_drops_later_events_and_a_torn_last_line(tmp_path: Path, cut: int) -> None:
    events = [step(1), {"kind": "validation", "step": 1, "loss": 1.0}, step(2), step(3)]
    write_log(tmp_path, *events, torn=json.dumps(step(4))[:cut])
    assert read_log(tmp_path) == events  # a report of a killed run works
    rewind_log(tmp_path, 2)
    assert read_log(tmp_path) == events[:3]
    with Log(tmp_path) as log:
        log.write("step", 3, loss=1.0)
    assert [event["step"] for event in read_log(tmp_path)] == [1, 1, 2, 3]


def test_a_whole_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    write_log(tmp_path, step(1), torn=json.dumps(step(2)))
    rewind_log(tmp_path, 2)
    with Log(tmp_path) as log:
        log.write("step", 3)
    assert [event["step"] for event in read_log(tmp_path)] == [1, 2, 3]


def test_rewinding_to_before_the_start_and_without_a_log(tmp_path: Path) -> None:
    rewind_log(tmp_path, 5)
    assert not list(tmp_path.iterdir())
    write_log(tmp_path, {"kind": "start", "step": 0}, step(1))
    rewind_log(tmp_path, -1)
    assert read_log(tmp_path) == []


def test_measured_is_the_median_by_shape_without_the_first_step(tmp_path: Path) -> None:
    slow = {"forward_s": 100.0, "peak_gib": 7.0}
    events = [
        step(1, **slow), step(2, "1x64x64", **slow), {"kind": "validation", "step": 2, "loss": 1.0},
        step(3, forward_s=1.0, backward_s=5.0), step(4, forward_s=2.0, backward_s=1.0), step(5, forward_s=4.0, backward_s=1.5),
        step(6, "1x64x64", forward_s=3.0, mfu=None),
    ]  # fmt: skip
    found = measured(write_log(tmp_path, *events))
    assert found.keys() == {"8x96x64", "1x64x64"}
    assert found["8x96x64"] == {
        "forward_s": 2.0, "backward_s": 1.5, "optimizer_s": 0.5, "data_s": 9.0, "encode_s": 4.0, "mfu": 0.25,
        "step_s": 6.0,  # the median of the sums 6.5, 3.5 and 6.0, without data and encode; not the sum of the medians
        "peak_gib": 7.0,  # of all steps: the first counts
    }  # fmt: skip
    assert found["1x64x64"]["forward_s"] == 3.0
    assert "mfu" not in found["1x64x64"]  # not measured, and not 0


def test_a_single_step_is_better_than_none(tmp_path: Path) -> None:
    assert measured(write_log(tmp_path, step(1, forward_s=3.0)))["8x96x64"]["step_s"] == 5.5
    assert measured(write_log(tmp_path, {"kind": "start", "step": 0})) == {}


def test_the_peak_grows_by_what_was_touched_and_starts_again_after_a_reset() -> None:
    """In a process of its own: the test process has its peak from elsewhere."""
    code = """
import mmap
from vchitect_fast.metrics import peak_bytes, reset_peak
def touch(size):
    with mmap.mmap(-1, size) as memory:
        for at in range(0, size, 4096):
            memory[at] = 1
peaks = []
for size in (300 << 20, 100 << 20):
    reset_peak("cpu")
    start = peak_bytes("cpu")
    touch(size)
    peaks.append(peak_bytes("cpu") - start)
print(*peaks)
"""
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    first, second = (int(part) / 2**20 for part in ended.stdout.split())
    assert 290 < first < 320
    if not _can_reset():
        pytest.skip("this system does not let a process reset its peak (/proc/self/clear_refs)")
    assert 90 < second < 110


def _can_reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.gpu
def test_the_peak_of_a_gpu_is_what_torch_allocated() -> None:
    torch.empty(2**26, device="cuda")
    reset_peak("cuda")
    start = peak_bytes("cuda")
    torch.empty(2**25, device="cuda")
    assert peak_bytes("cuda") - start == 2**27


def test_a_log_that_cannot_be_written_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"could not write .*log\.jsonl \(.*File exists"):
        Log(tmp_path / "file")
    write_log(tmp_path, step(1), step(2))

    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        rewind_log(tmp_path, 1)
    assert len(read_log(tmp_path)) == 2
    with pytest.raises(UserError, match="cannot read the log of"):
        read_log(tmp_path / "absent")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_one_sentence_while_running(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"could not write .*log\.jsonl .*No space left"), Log(tmp_path) as log:
        log.write("step", 1, loss=0.5)


def test_tensorboard_drops_what_a_killed_run_wrote_ahead(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, (0, 1, 2, 3)), (1, (2, 3))):  # killed after step 3, resumed at the checkpoint of step 1
        with Log(tmp_path, start=start, tensorboard=True) as log:
            for number in steps:
                log.write("step", number, loss=10.0 * start + number)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(0, 0), (1, 1), (2, 12), (3, 13)]


def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Log(tmp_path, tensorboard=True) as log:
        for number in range(3):
            log.write("step", number, loss=1.0 / (number + 1), mfu=None, shape="8x96x64")
        log.write("validation", 2, loss=0.5)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["step/loss", "validation/loss"]
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [
        (0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3, rel=2**-24)),
    ]  # fmt: skip
    assert len(read_log(tmp_path)) == 4


def test_weights_and_biases_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in of the module: the service itself is on the internet."""
    calls: list[tuple[Any, ...]] = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append(()))
    wandb = types.SimpleNamespace(init=lambda **options: calls.append((options["project"], options["dir"])) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with Log(tmp_path / "a", wandb_project="videos") as log:
        log.write("step", 3, loss=0.5, shape="8x96x64", mfu=None)
    assert calls == [("videos", str(tmp_path / "a")), ({"step/loss": 0.5}, 3), ()]


def test_weights_and_biases_tells_folders_of_one_name_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[tuple[str, str]] = []
    run = types.SimpleNamespace(finish=lambda: None)
    wandb = types.SimpleNamespace(init=lambda **options: names.append((options["name"], options["id"])) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.chdir(tmp_path)
    for folder in (Path("a", "train"), Path("b", "train"), tmp_path / "a" / "train"):
        Log(folder, wandb_project="videos").__exit__()
    assert [name for name, _ in names] == ["train"] * 3
    first, second, again = (identity for _, identity in names)
    assert first == again != second


@pytest.mark.parametrize(
    ("module", "option", "extra"),
    [
        ("torch.utils.tensorboard", {"tensorboard": True}, "tensorboard"),
        ("wandb", {"wandb_project": "a"}, "wandb"),
    ],
)
def test_a_writer_that_is_not_installed_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, option: dict[str, Any], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'vchitect-fast\[{extra}\]'"):
        Log(tmp_path, **option)
