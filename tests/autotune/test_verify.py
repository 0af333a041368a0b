"""verify on this machine: the prediction is on the disk first, each shape has its own peak, ranks measure one step together.

pytest tests/autotune/test_verify.py; the command around it: test_command.py. Real steps of the smallest preset.
"""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ledgers import plan as made_up_plan
from ranks import ranks

from vchitect_fast.architecture import preset
from vchitect_fast.autotune import verify as module
from vchitect_fast.autotune.calibrate import calibrate
from vchitect_fast.autotune.ledger import Ledger
from vchitect_fast.autotune.verify import GIB, give_back, run_pairs, standing_bytes, verify
from vchitect_fast.errors import UserError
from vchitect_fast.machine import this_device
from vchitect_fast.plan import Plan, ShardSpec

NANO = preset("vchitect-nano")
MESH = {"dp_replicate": 1, "dp_shard": 1, "sp": 1}


def plan(*shapes: str, **changes: object) -> Plan:
    """Made-up predictions, for this machine."""
    made = made_up_plan()
    entries = tuple(replace(made.entries[0], shape=shape) for shape in shapes)
    return replace(made, device=this_device().fingerprint(), entries=entries, **changes)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def test_each_prediction_is_written_before_its_first_step(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, told = [], []
    measure = module.measure_entry

    def watched(step_once, entry, num_steps):
        seen.append((entry.shape, [item.shape for item in ledger.open()], len(ledger.pairs())))
        return measure(step_once, entry, num_steps)

    monkeypatch.setattr(module, "measure_entry", watched)
    found = verify(
        plan("2x32x32", "1x32x32"),
        NANO,
        num_steps=2,
        ledger=ledger,
        stated_error=0.1,
        tell=lambda line: told.append(line),
    )
    assert seen == [("2x32x32", ["2x32x32"], 0), ("1x32x32", ["1x32x32"], 1)]
    assert told == ["2x32x32 (1 of 2): 3 steps", "1x32x32 (2 of 2): 3 steps"]
    pairs = ledger.pairs()
    assert [pair.found.measured for pair in pairs] == list(found.values())
    assert [pair.expected.stated_error for pair in pairs] == [0.1, 0.1]
    names = {"forward_s", "backward_s", "optimizer_s", "step_s", "peak_gib", "standing_gib"}
    assert all(pair.found.measured.keys() == names and pair.found.num_steps == 2 for pair in pairs)
    assert all(0 <= spread for pair in pairs for spread in pair.found.spread.values())
    for values in found.values():
        assert 0 < values["standing_gib"] < values["peak_gib"] + 1 / 1024  # the kernel counts pages in batches
    assert calibrate(pairs, "here").num_points == 2


def test_a_killed_measurement_leaves_an_open_prediction(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "measure_entry", killed)
    with pytest.raises(KeyboardInterrupt):
        verify(plan("2x32x32"), NANO, ledger=ledger)
    assert [item.shape for item in ledger.open()] == ["2x32x32"]
    assert ledger.pairs() == []


def test_what_was_freed_before_is_not_in_the_peak() -> None:
    """As after a larger shape: freed pieces between held ones stay in the heap, and the peak would begin with them."""
    if not give_back("cpu"):
        pytest.skip("this C library cannot give freed memory back")
    pieces = [torch.ones(2**14) for _ in range(2000)]  # 64 KiB each: from the heap
    held = pieces[::2]
    del pieces
    found = verify(plan("1x32x32"), NANO, num_steps=1)["1x32x32"]
    assert found["peak_gib"] - found["standing_gib"] < sum(t.nbytes for t in held) / GIB / 4


def test_standing_bytes_are_what_is_held_not_what_was_freed() -> None:
    if not give_back("cpu"):
        pytest.skip("this C library cannot give freed memory back")
    gc.collect()
    before = standing_bytes("cpu")
    freed = [torch.ones(2**14) for _ in range(1000)]  # 64 KiB each: from the heap
    held = [torch.ones(2**14) for _ in range(1000)]
    del freed
    after = standing_bytes("cpu")
    assert before is not None and after is not None
    assert after - before == pytest.approx(sum(t.nbytes for t in held), rel=0.05)


def test_another_model_or_machine_is_refused() -> None:
    with pytest.raises(UserError, match="this Plan is for model"):
        verify(plan("2x32x32"), preset("vchitect-tiny"))
    with pytest.raises(UserError, match="this Plan is for device"):
        verify(replace(plan("2x32x32"), device="0123"), NANO)
    with pytest.raises(UserError, match="is for 2 ranks, here is 1"):
        verify(plan("2x32x32", mesh=MESH | {"dp_shard": 2}, fsdp_group="global"), NANO)


def test_ranks_of_a_mesh_measure_one_step_together(ledger: Ledger) -> None:
    """One run on four ranks: parameters in shards over all, each sample's frames shared by two."""
    whole = plan("3x32x32", mesh=MESH | {"dp_shard": 2, "sp": 2}, fsdp_group="global")
    frames = replace(whole.entries[0], shard=ShardSpec("frames", temporal="tokens"))
    whole = replace(whole, entries=(frames,), device="of the ranks")
    results = ranks(4).run("verify_calls:verified", whole, str(ledger.path))
    assert all(result.keys() == {"3x32x32"} for result in results)
    peaks = {result["3x32x32"]["peak_gib"] for result in results}
    standing = {result["3x32x32"]["standing_gib"] for result in results}
    assert len(peaks) == len(standing) == 1  # of the fullest rank, on every rank
    [pair] = ledger.pairs()
    assert pair.expected.mesh == {"dp_replicate": 1, "dp_shard": 2, "sp": 2}
    assert pair.expected.row_bytes == 4 * 2 * (4 + 4) * NANO.hidden_dim  # 2 of the 3 frames


def test_the_log_of_a_run_is_ground_for_a_calibration(tmp_path: Path) -> None:
    event = {"kind": "step", "shape": "2x32x32", "data_s": 1.0, "encode_s": 1.0, "peak_gib": 1.5, "mfu": None}
    steps = [
        event | {"step": i, "forward_s": s, "backward_s": 2 * s, "optimizer_s": 1.0}
        for i, s in enumerate((9.0, 4.0, 4.0))
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    [pair] = run_pairs(plan("2x32x32"), NANO, tmp_path)
    assert pair.found.measured == {
        "forward_s": 4.0, "backward_s": 8.0, "optimizer_s": 1.0, "step_s": 13.0, "peak_gib": 1.5,
    }  # fmt: skip
    assert pair.found.num_steps == 3
    found = calibrate([pair], "run")
    assert (found.extra_bytes, found.extra_rows, found.forward) == (GIB // 2, 0.0, 2.0)
    with pytest.raises(UserError, match="this Plan has no entry for 2x32x32"):
        run_pairs(plan("1x32x32"), NANO, tmp_path)


@pytest.mark.gpu
def test_on_a_gpu_the_peak_and_what_stands_are_the_allocators() -> None:
    found = verify(plan("2x32x32"), NANO, num_steps=1)["2x32x32"]
    assert 0 < found["standing_gib"] < found["peak_gib"]
    assert found["peak_gib"] == torch.cuda.max_memory_allocated() / GIB
