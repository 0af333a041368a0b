"""Calibration against made-up truths: what one measured step tells, what it cannot, and what it must not be used for.

pytest tests/autotune/test_calibrate.py; figures made up, no torch. Real steps: tests/autotune/test_verify.py.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from ledgers import PARTS_GIB, pair, plan

from vchitect_fast.autotune.calibrate import Calibration, calibrate
from vchitect_fast.autotune.ledger import Pair
from vchitect_fast.autotune.memory import GIB, StepMemory
from vchitect_fast.errors import UserError
from vchitect_fast.plan import Plan

SMALL, LARGE, LARGEST = "2x32x32", "8x64x64", "16x96x96"
TRUE_BYTES, TRUE_ROWS = 3 * 2**20, 70.0  # what the made-up formulas leave out
SECONDS = {"forward_s": 3.0, "backward_s": 5.0, "optimizer_s": 2.0, "step_s": 10.0}  # predicted: 2, 6, 2


def row_bytes(shape: str) -> int:
    return pair(shape).expected.row_bytes


def true_peak_gib(shape: str) -> float:
    return 1.0 + (TRUE_BYTES + TRUE_ROWS * row_bytes(shape)) / GIB


def measured(shape: str = SMALL, *, standing: bool = True, **changes: float) -> Pair:
    figures = SECONDS | {"peak_gib": true_peak_gib(shape)}
    if standing:
        figures["standing_gib"] = PARTS_GIB["process"] + PARTS_GIB["states"] + TRUE_BYTES / GIB
    return pair(shape, **(figures | changes))


def predicted_peak_gib(calibration: Calibration, shape: str) -> float:
    plain = StepMemory(**{f"{name}_bytes": round(GIB * value) for name, value in PARTS_GIB.items()})
    return calibration.memory(plain, row_bytes(shape)).peak_bytes / GIB


def test_one_measured_step_predicts_other_shapes() -> None:
    found = calibrate([measured(SMALL)], "made up")
    assert found.extra_bytes == TRUE_BYTES
    assert found.extra_rows == pytest.approx(TRUE_ROWS)
    for shape in (LARGE, LARGEST):
        assert predicted_peak_gib(found, shape) == pytest.approx(true_peak_gib(shape), rel=1e-6)
    assert (found.num_points, found.peak_error, found.step_error) == (1, None, None)
    assert "no second point to test it on" in found.words()


def test_parts_still_sum_to_the_peak() -> None:
    plain = StepMemory(process_bytes=10, states_bytes=20, gradients_bytes=5, saved_bytes=40, working_bytes=7)
    found = replace(calibrate([measured()], "made up"), extra_bytes=100, extra_rows=2.5)
    assert found.memory(plain, row_bytes=4) == replace(plain, process_bytes=110, working_bytes=17)


def test_a_peak_alone_gives_the_constant_and_two_give_a_line() -> None:
    one = calibrate([measured(SMALL, standing=False)], "run")
    assert one.extra_rows == 0.0
    assert predicted_peak_gib(one, SMALL) == pytest.approx(true_peak_gib(SMALL), rel=1e-6)
    alike = calibrate([measured(SMALL, standing=False), measured(SMALL, standing=False)], "run")
    assert (alike.extra_rows, alike.peak_error) == (0.0, pytest.approx(0.0))
    two = calibrate([measured(SMALL, standing=False), measured(LARGE, standing=False)], "run")
    assert two.extra_rows == pytest.approx(TRUE_ROWS)
    assert predicted_peak_gib(two, LARGEST) == pytest.approx(true_peak_gib(LARGEST), rel=1e-6)


def test_seconds_have_a_factor_for_each_part() -> None:
    found = calibrate([measured(), measured(LARGE, forward_s=4.0), measured(LARGEST, forward_s=5.0)], "made up")
    assert found.forward == pytest.approx(4.0 / 2)  # the median
    assert found.backward == pytest.approx(5.0 / (5 + 1))  # the log's backward holds what is made again
    assert found.optimizer == pytest.approx(1.0)
    assert found.num_timed == 3
    assert found.step_s(measured().expected) == pytest.approx(2 * 2.0 + 6 * 5 / 6 + 2)


def test_figures_of_a_prediction_and_of_the_step_model_agree() -> None:
    found = calibrate([measured()], "made up")
    for shape in (SMALL, LARGE):
        assert found.peak_gib(pair(shape).expected) == pytest.approx(predicted_peak_gib(found, shape), rel=1e-6)
    waiting = pair(SMALL, predicted={"backward_s": 3.0, "copy_s": 2.0}).expected
    assert found.step_s(waiting) == pytest.approx(2 * 1.5 + 4 * 5 / 6 + 2 + 2.0)


def test_exposed_waiting_belongs_to_no_factor() -> None:
    exposed = {"backward_s": 3.0, "copy_s": 2.0}
    waiting = pair(SMALL, predicted=exposed, **SECONDS, peak_gib=1.1)
    found = calibrate([waiting], "made up")
    assert (found.forward, found.backward, found.optimizer, found.num_timed) == (1.0, 1.0, 1.0, 0)
    assert found.extra_bytes > 0  # its peak counts
    assert "seconds not calibrated" in found.words()
    both = calibrate([waiting, measured(LARGE)], "made up")
    assert (both.forward, both.num_timed, both.num_points) == (1.5, 1, 2)


def test_confidence_is_the_error_at_points_left_out() -> None:
    doubled = {"forward_s": 6.0, "backward_s": 10.0, "optimizer_s": 4.0, "step_s": 20.0}
    found = calibrate([measured(), measured(LARGE, **doubled)], "made up")
    assert found.step_error == pytest.approx((0.5 + 1.0) / 2)  # 10 of 20, and 20 of 10
    assert found.peak_error == pytest.approx(0.0, abs=1e-9)
    assert "step off by 75.0% on average at points left out" in found.words()
    off = calibrate([measured(peak_gib=2.0, standing_gib=0.5), measured(LARGE)], "made up")
    assert off.peak_error is not None and off.peak_error > 0.1


def test_calibrated_predictions_are_no_ground_for_another() -> None:
    made = calibrate([measured()], "made up")
    calibrated = measured()
    again = replace(calibrated.expected, predicted=replace(calibrated.expected.predicted, confidence=made.words()))
    assert calibrate([replace(calibrated, expected=again), measured()], "made up").num_points == 1
    with pytest.raises(UserError, match="not calibrated itself in made up, got 1 that were"):
        calibrate([replace(calibrated, expected=again)], "made up")
    with pytest.raises(UserError, match="got 0 that were; plan without --calibrate"):
        calibrate([], "made up")


@pytest.mark.parametrize(("what", "value"), [("model", "other"), ("device", "other"), ("dtype", "bfloat16")])
def test_refused_for_another(what: str, value: str) -> None:
    found = calibrate([measured()], "made up")
    here = {"model": found.model, "device": found.device, "dtype": found.dtype}
    found.check(**here)
    with pytest.raises(UserError, match=f"of {what} {here[what]}, this is planned for {value}"):
        found.check(**(here | {what: value}))
    other = measured()
    mixed = replace(other, expected=replace(other.expected, **{what: value}))
    with pytest.raises(UserError, match="measurements of one model on one device in one dtype"):
        calibrate([measured(), mixed], "made up")


def test_a_plan_keeps_it_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    found, path = calibrate([measured(), measured(LARGE)], "made up"), tmp_path / "plan.json"
    assert Calibration.of(plan()) is None
    replace(plan(), calibration=asdict(found)).save(path)
    assert Calibration.of(Plan.load(path)) == found
    for damage in ({"forwards": 1.0}, {"forward": "2"}, {"backward": 0.0}, {"extra_rows": float("nan")}):
        with pytest.raises(UserError, match="the Plan's calibration .*plan it again with --calibrate"):
            Calibration.of(replace(plan(), calibration=asdict(found) | damage))
    with pytest.raises(UserError, match="the Plan's calibration is damaged"):
        Calibration.of(replace(plan(), calibration={}))
