"""The parity of fp8 and bf16: four runs that differ in what they should and in nothing else, the bound, the picture, refusals.

pytest tests/benchmarks/test_bench_fp8_parity.py; a few steps of the nano model on one real clip.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vchitect_fast.benchmarks import fp8_parity
from vchitect_fast.benchmarks.fp8_parity import BOUND, REFERENCE, WAYS, Curve, difference, main, smoothed
from vchitect_fast.benchmarks.record import load
from vchitect_fast.model import fp8_steps, handwritten

NANO = ["--model", "vchitect-nano", "--shape", "4x32x16", "--steps", "5", "--seeds", "1", "--rate", "0.02"]


def test_four_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fp8_parity, "STARTS_S", {"bikes.mp4": (0.0, 1.5)})
    calls = {"fp8": 0, "16 bits": 0}

    def counted(name: str, steps_of: object) -> object:
        def of(impl: str) -> object:
            calls[name] += 1
            return steps_of(impl)  # type: ignore[operator]

        return of

    monkeypatch.setattr(handwritten, "fp8_steps_of", counted("fp8", fp8_steps.fp8_steps_of))
    monkeypatch.setattr(handwritten, "steps_of", counted("16 bits", fp8_steps.steps_of))
    out, figure = tmp_path / "results.jsonl", tmp_path / "drawn" / "parity.png"
    assert main([*NANO, "--out", str(out), "--figure", str(figure), "--json"]) == 0
    assert calls == {"fp8": 10, "16 bits": 10}  # a block and step
    losses = {name: curves[0] for name, curves in json.loads(capsys.readouterr().out)["losses"].items()}
    assert list(losses) == [way.name for way in WAYS]
    assert all(
        losses["fp8, by hand"][0] == pytest.approx(found[0], rel=1e-3) for found in losses.values()
    )  # same draws
    assert len({tuple(found) for found in losses.values()}) == 4
    records = {record.provider.split(",")[0] + record.dtype: record for record in load(out)}
    assert all(
        record.command.endswith("--rate 0.02") and record.shape.endswith("1 seed, rate 0.02") for record in load(out)
    )
    assert len(load(out)) == 4 and load(out)[0].loss == losses[REFERENCE.name][-1]
    assert records["fp8bfloat16"].loss_error == pytest.approx(
        losses["fp8, by hand"][-1] / losses[REFERENCE.name][-1] - 1
    )
    assert figure.read_bytes().startswith(b"\x89PNG")


def curve(*losses: list[float]) -> Curve:
    return Curve(torch.tensor(losses, dtype=torch.float64), [1.0])


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [
        ([1 + 0.9 * BOUND] * 40, "held / held"),
        ([1 - 1.1 * BOUND] * 40, "falls short / falls short"),
        ([1.0] * 10 + [1 + 20 * BOUND] * 10 + [1.0] * 20, "held / falls short"),
        ([1.0] * 39 + [1 + 5 * BOUND], "held / held"),  # a spike of one step is noise
    ],
)
def test_the_bound(factors: list[float], verdict: str) -> None:
    assert difference(curve(factors), curve([1.0] * 40)).verdict == verdict


def test_seeds_are_seen_one_by_one() -> None:
    found = difference(curve([1.1] * 8, [0.9] * 8), curve([1.0] * 8, [1.0] * 8))
    assert found.tail == pytest.approx(0) and found.tails == pytest.approx([0.1, -0.1])
    assert found.step == pytest.approx(0.1) and found.smoothed == pytest.approx(0)


def test_smoothing_begins_with_the_plain_mean() -> None:
    assert smoothed(torch.tensor([1.0, 2.0])).tolist() == pytest.approx([1.0, (0.9 + 2) / 1.9])


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--seeds", "-1"], ["--model", "vchitect-tini"], ["--shape", "8x"]]
)
def test_bad_arguments_are_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("error: ") == 1
