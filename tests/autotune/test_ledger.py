"""The ledger on the disk: the prediction first, nothing changed afterwards, torn lines told of; and when errors drift.

pytest tests/autotune/test_ledger.py; no torch, figures made up.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ledgers import found, pair, plan

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.ledger import RECENT, Expectation, Ledger, beside, drift, expect, has_moved
from vchitect_fast.errors import UserError


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "deep" / "plan.ledger.jsonl")


def expectation() -> Expectation:
    made = plan()
    return expect(made, made.entries[0], preset("vchitect-nano"), stated_error=0.1, commit="abc")


def test_a_prediction_is_on_the_disk_before_its_measurement(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(ledger.path.read_bytes()), real(fd)))
    name = ledger.predict(expectation())
    assert len(synced) == 1 and name.encode() in synced[0]
    assert [item.shape for item in ledger.open()] == ["2x32x32"]
    assert ledger.pairs() == []
    ledger.measure(name, found(step_s=2.0))
    assert len(synced) == 2 and ledger.open() == []


def test_what_is_read_is_what_was_written(ledger: Ledger) -> None:
    expected = expectation()
    ledger.measure(ledger.predict(expected), found(step_s=8.0, peak_gib=2.0))
    [read] = ledger.pairs()
    assert replace(read.expected, time="") == expected
    assert read.expected.time and read.found.time >= read.expected.time
    assert read.found.measured["step_s"] == 8.0
    assert read.error("step_s") == pytest.approx(10 / 8 - 1)
    assert read.error("peak_gib") == pytest.approx(1 / 2 - 1)
    assert read.error("data_s") is None


def test_row_bytes_are_those_of_the_fullest_rank() -> None:
    config = preset("vchitect-nano")
    made = plan()
    frames, tokens, width = 2, (32 // 16) ** 2 + 4, config.hidden_dim
    assert expect(made, made.entries[0], config).row_bytes == 4 * frames * tokens * width
    halves = replace(made, mesh={"dp_replicate": 1, "dp_shard": 1, "sp": 2}, compute_dtype="bfloat16")
    assert expect(halves, made.entries[0], config).row_bytes == 2 * (frames // 2) * tokens * width


def test_the_ledger_lies_beside_the_plan() -> None:
    assert beside("runs/plan.json") == Path("runs/plan.ledger.jsonl")


def test_a_line_cut_short_is_told_of_and_costs_nothing_else(ledger: Ledger) -> None:
    first = ledger.predict(expectation())
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + whole[:40])
    assert [item.shape for item in ledger.open()] == ["2x32x32"]
    assert ledger.damaged == [f"line 2 of {ledger.path} was cut short and is passed over"]
    ledger.measure(first, found())  # goes on a line of its own
    second = ledger.predict(expectation())
    assert len(ledger.pairs()) == 1 and second != first
    assert len(ledger.damaged) == 1
    assert len(Ledger(ledger.path).open()) == 1


def test_a_prediction_that_was_edited_is_refused(ledger: Ledger) -> None:
    ledger.measure(ledger.predict(expectation()), found(step_s=8.0))
    text = ledger.path.read_text()
    assert '"step_s": 10.0' in text
    ledger.path.write_text(text.replace('"step_s": 10.0', '"step_s": 8.1'))
    with pytest.raises(UserError, match="line 1 of .* is a prediction that was changed after it was made"):
        ledger.pairs()


def test_a_prediction_is_measured_once(ledger: Ledger) -> None:
    name = ledger.predict(expectation())
    ledger.measure(name, found())
    with pytest.raises(UserError, match=f"prediction {name} .* was measured on 20"):
        ledger.measure(name, found())
    with pytest.raises(UserError, match="has no prediction 0123; predict with this ledger first"):
        ledger.measure("0123", found())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 1 of .* is not of a ledger of schema 1"),
        ('{"schema_version": 0, "kind": "prediction"}', "is not of a ledger of schema 1"),
        ('{"schema_version": 1, "kind": "guess"}', "neither a prediction nor a measurement"),
        ('{"schema_version": 1, "kind": "measurement", "name": "0123"}', "which is not there before it"),
    ],
)
def test_files_that_are_no_ledger(line: str, message: str, ledger: Ledger) -> None:
    ledger.path.parent.mkdir()
    ledger.path.write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        ledger.pairs()


def test_unknown_and_missing_fields_are_refused(ledger: Ledger) -> None:
    name = ledger.predict(expectation())
    line = {"kind": "measurement", "schema_version": 1, "name": name, "num_steps": 3, "measures": {}}
    with ledger.path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="line 2 of .* is not of a ledger .*measures"):
        ledger.pairs()


def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write the ledger"):
        Ledger(tmp_path / "file" / "ledger.jsonl").predict(expectation())
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot read the ledger"):
        Ledger(tmp_path / "folder").pairs()


STEADY = (10.1, 9.9, 10.0, 10.2, 9.8)


def test_errors_that_stay_are_no_drift() -> None:
    assert drift([pair(step_s=seconds) for seconds in STEADY * 4]) == []
    assert drift([pair(step_s=seconds) for seconds in (10.0, 30.0)]) == []  # too few to tell


def test_a_machine_that_changed_is_told_of_with_the_remedy() -> None:
    [sentence] = drift([pair(step_s=seconds) for seconds in STEADY + tuple(1.3 * s for s in STEADY)])
    assert "step_s of 2x32x32 on made-up CPU" in sentence
    assert "off by -2.0% to +2.0% in the first 5 measurements and is off by -23.1% in the last 5" in sentence
    assert "run `vchitect-fast autotune probe` again" in sentence
    peaks = [pair(step_s=10.0, peak_gib=peak) for peak in (1.0, 1.01, 1.02, 1.0, 1.01) + (1.4,) * 5]
    assert "peak_gib of 2x32x32" in drift(peaks)[0]


def test_one_bad_measurement_is_no_drift() -> None:
    assert drift([pair(step_s=seconds) for seconds in STEADY + STEADY[:3] + (50.0, 60.0)]) == []


def test_only_the_same_prediction_is_compared_with_itself() -> None:
    """Another shape, or a prediction made anew from a new probe, is off by something else; that is no drift."""
    old = [pair(step_s=seconds) for seconds in STEADY]
    assert drift(old + [pair(shape="4x32x32", step_s=2 * seconds) for seconds in STEADY]) == []
    assert drift(old + [pair(predicted_s=20.0, step_s=seconds) for seconds in STEADY]) == []


def test_predictions_worse_than_they_state() -> None:
    near = [pair(stated_error=0.25, shape=f"{n}x32x32", step_s=8.5) for n in range(1, 6)]
    assert drift(near) == []
    far = [pair(stated_error=0.05, shape=f"{n}x32x32", step_s=8.0) for n in range(1, 6)]
    [sentence] = drift(far)
    assert "the last 5 predictions are off by 25.0% (median) and state 5.0%" in sentence and "--calibrate" in sentence
    assert drift(far[:4]) == []
    assert drift([pair(stated_error=None, shape=f"{n}x32x32", step_s=8.0) for n in range(1, 6)]) == []


def test_noise_alarms_seldom_and_a_shift_is_found() -> None:
    """The figures beside MARGIN, by simulation."""
    random.seed(0)

    def alarms(draw: Callable[[], float], shift: float) -> float:
        runs = ([draw() + shift * (i >= RECENT) for i in range(2 * RECENT)] for _ in range(4000))
        return sum(map(has_moved, runs)) / 4000

    assert 0.01 < alarms(lambda: random.gauss(0, 1), 0.0) < 0.05
    assert 0.01 < alarms(lambda: random.lognormvariate(0, 1), 0.0) < 0.05
    assert alarms(lambda: random.gauss(0, 1), 5.0) > 0.97
