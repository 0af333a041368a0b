"""A run that starts from another: which tensors it begins with, bit for bit, and what it refuses.

Run: pytest tests/test_carry.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_train import assert_same, clips, final, plan_of

from vchitect_fast import checkpoint
from vchitect_fast.carry import carry_over
from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import write_manifest
from vchitect_fast.train import train


@pytest.fixture
def first(tmp_path: Path) -> TrainConfig:
    """A run of four steps, trained."""
    write_manifest(clips(), tmp_path / "clips.jsonl")
    config = TrainConfig(
        manifest=str(tmp_path / "clips.jsonl"), plan=str(plan_of(tmp_path / "plan.json")), out=str(tmp_path / "first"),
        model="vchitect-nano", cache=str(tmp_path / "cache"), steps=4, warmup_steps=0, learning_rate=1e-2, validate_every=0,
    )  # fmt: skip
    train(config)
    return config


@pytest.mark.parametrize("carry_optimizer", [True, False])
def test_begins_with_the_tensors_of_the_other_run(first: TrainConfig, carry_optimizer: bool) -> None:
    """Into tensors of ones: what is carried is the other run's, what is not is left as it was."""
    whole = final(Path(first.out))
    tensors = {name: tensor.new_ones(tensor.shape) for name, tensor in whole.items()}
    state = checkpoint.read_state(checkpoint.latest(Path(first.out)))
    carry_over(replace(first, start_from=first.out, carry_optimizer=carry_optimizer), state, tensors)
    carried = {name for name in whole if carry_optimizer or not name.startswith("optimizer.")}
    assert_same({n: tensors[n] for n in carried}, {n: whole[n] for n in carried})
    assert all((tensors[name] == 1).all() for name in whole.keys() - carried)


def test_training_goes_on_from_there(first: TrainConfig) -> None:
    """At a rate of next to nothing the weights stay the other run's, the moments follow, and the average does not run away."""
    second = replace(first, out=first.out + "-on", start_from=first.out, steps=1, learning_rate=1e-30, weight_decay=0.0)
    assert train(second)["step"] == 1
    old, new = final(Path(first.out)), final(Path(second.out))
    weight = "proj_out.weight"
    assert (new[f"model.{weight}"] == old[f"model.{weight}"]).all()
    assert new[f"optimizer.step.{weight}"].item() == old[f"optimizer.step.{weight}"].item() + 1 == 5
    moved = (new[f"ema.{weight}"] - old[f"ema.{weight}"]).abs().max()
    distance = (old[f"model.{weight}"] - old[f"ema.{weight}"]).abs().max()
    assert 0 < moved < 2 * (1 - first.ema_decay) * distance, "0.999 from the first update on, not 0.1"
    assert train(second)["step"] == 1  # it goes on from its own checkpoint


def test_what_cannot_be_started_from_is_refused(first: TrainConfig, tmp_path: Path) -> None:
    state = checkpoint.read_state(checkpoint.latest(Path(first.out)))
    nowhere = replace(first, start_from=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere, which holds no checkpoint; name the folder of a run"):
        carry_over(nowhere, state, {})
    started = replace(first, start_from=first.out)
    with pytest.raises(UserError, match="holds a model of other sizes than 'vchitect-nano'"):
        carry_over(started, {**state, "model": {**state["model"], "num_layers": 3}}, {})
    with pytest.raises(UserError, match="was trained with codec dct, got vae; use the same"):
        carry_over(started, {**state, "decides": {**state["decides"], "codec": "vae"}}, {})
