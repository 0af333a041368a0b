"""TrainConfig: YAML and overrides in, every mistake named, every field described.

pytest tests/test_config.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from vchitect_fast.config import TrainConfig, describe_fields
from vchitect_fast.errors import UserError
from vchitect_fast.shapes import VideoShape

BASE = {"manifest": "clips.jsonl", "plan": "plan.json"}


def run_file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_then_overrides(tmp_path: Path) -> None:
    path = run_file(tmp_path, "manifest: clips.jsonl\nplan: plan.json\nsteps: 20\nfps: 12\ncodec: sd3\n")
    config = TrainConfig.load(path, ["steps=30", "learning_rate=3e-4", "cache=null", "resume=false", "out=runs/a=b"])
    assert (config.manifest, config.codec, config.steps) == ("clips.jsonl", "sd3", 30)
    assert (config.cache, config.resume, config.out) == (None, False, "runs/a=b")
    assert config.warmup_steps == TrainConfig(**BASE).warmup_steps
    assert config.fps == 12.0 and isinstance(config.fps, float)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_yaml_reads_1e_4_as_text_and_it_is_a_number_here(tmp_path: Path, text: str) -> None:
    path = run_file(tmp_path, f"manifest: a\nplan: b\nlearning_rate: {text}\n")
    assert TrainConfig.load(path).learning_rate == 1e-4
    assert TrainConfig.load(path, [f"weight_decay={text}"]).weight_decay == 1e-4


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    other = {
        "str": "x: y",
        "int": 7,
        "float": 1e-05,
        "bool": True,
        "str | None": "a b",
        "Mixture | None": {"1x32x16": 2.0},
    }
    values = {field.name: other[str(field.type)] for field in dataclasses.fields(TrainConfig)}
    values |= {"ema_decay": 0.25, "caption_dropout": 0.5, "schedule": "cosine", "timestep_sampling": "uniform"}
    for config in (TrainConfig(**BASE), TrainConfig(**values)):
        config.save(tmp_path / "run.yaml")
        assert TrainConfig.load(tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("learning_rat", "unknown run field 'learning_rat'; did you mean 'learning_rate'?"),
        ("microbatch", "unknown run field 'microbatch'; "),
        (5, "unknown run field '5'; known are: "),
    ],
)
def test_an_unknown_field_gets_the_nearest(name: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig.from_dict({**BASE, name: 1})
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("steps", 1.5, "int"),
        ("steps", True, "int"),
        ("steps", "many", "int"),
        ("steps", None, "int"),
        ("learning_rate", "fast", "float"),
        ("learning_rate", False, "float"),
        ("learning_rate", [1e-4], "float"),
        ("learning_rate", None, "float"),
        ("resume", 1, "bool"),
        ("resume", "yes", "bool"),
        ("model", 2, "str"),
        ("cache", 2, "str | None"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: object, kind: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig.from_dict({**BASE, name: value})
    assert str(caught.value) == f"{name} must be of type {kind}, got {value!r}; correct it in the YAML."


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "mixture must map shapes to weights, got 3"),
        ({}, "mixture must map shapes to weights, got {}"),
        ({"eight": 1}, "a shape is frames x width x height like 32x512x384, got 'eight'"),
        ({"8x100x64": 1}, "mixture names the shape 8x100x64, the nearest is 8x96x64; write that"),
        ({"8x96x64": "much"}, "the weight of 8x96x64 in mixture must be of type float, got 'much'"),
        ({"8x96x64": -1, "1x96x64": 2}, "must be 0 or more and one above 0"),
        ({"8x96x64": 0}, "must be 0 or more and one above 0"),
    ],
)
def test_a_mixture_is_positive_weights_of_shapes(tmp_path: Path, value: object, said: str) -> None:
    path = run_file(tmp_path, "manifest: a\nplan: b\nmixture: {8x96x64: 3, 1x96x64: 0}\n")
    assert TrainConfig.load(path).mixture == {"8x96x64": 3.0, "1x96x64": 0.0}
    assert TrainConfig.load(path).weights == {VideoShape(8, 96, 64): 3.0, VideoShape(1, 96, 64): 0.0}
    assert TrainConfig(**BASE).weights is None
    with pytest.raises(UserError) as caught:
        TrainConfig.from_dict({**BASE, "mixture": value})
    assert said in str(caught.value)


def test_missing_fields_are_all_named() -> None:
    with pytest.raises(UserError, match="the run lacks manifest, plan; .*manifest=... on the command line"):
        TrainConfig.from_dict({})
    with pytest.raises(UserError, match="the run lacks plan;"):
        TrainConfig.from_dict({"manifest": "a"})


@pytest.mark.parametrize("name", ["steps", "log_every", "keep_last", "fps", "learning_rate", "clip_norm", "shift"])
def test_must_be_positive(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(UserError, match=f"{name} must be positive, got {value}"):
            TrainConfig.from_dict({**BASE, name: value})


@pytest.mark.parametrize("name", ["warmup_steps", "validate_every", "sample_every", "save_every", "weight_decay"])
def test_may_be_zero_but_not_less(name: str) -> None:
    assert getattr(TrainConfig.from_dict({**BASE, name: 0}), name) == 0
    with pytest.raises(UserError, match=f"{name} must be 0 or more, got -1"):
        TrainConfig.from_dict({**BASE, name: -1})


@pytest.mark.parametrize("name", ["ema_decay", "caption_dropout", "beta1", "beta2"])
def test_shares_lie_in_0_to_1(name: str) -> None:
    assert getattr(TrainConfig.from_dict({**BASE, name: 0}), name) == 0.0
    for value in (1.0, -0.1):
        with pytest.raises(UserError, match=rf"{name} must be in \[0, 1\), got {value}"):
            TrainConfig.from_dict({**BASE, name: value})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig) if field.type == "float"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_are_finite(name: str, value: str) -> None:
    with pytest.raises(UserError, match=name):
        TrainConfig.from_dict({**BASE, name: value})


@pytest.mark.parametrize(
    ("name", "value", "near"), [("schedule", "cosin", "cosine"), ("timestep_sampling", "lognormal", "logit_normal")]
)
def test_choices_are_named(name: str, value: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown {name} {value!r}; did you mean {near!r}"):
        TrainConfig.from_dict({**BASE, name: value})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"manifest: [", "is not YAML"),
        (b"\xff\xfe\x00\x00\xff", "is not YAML"),
        (b"- manifest", "must hold `name: value` lines, got list"),
        (b"", "must hold `name: value` lines, got NoneType"),
    ],
)
def test_a_file_that_is_no_run_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        TrainConfig.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the run file .*absent.yaml .No such file"):
        TrainConfig.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps", "an override is name=value, got 'steps'"),
        ("stepps=3", "unknown run field 'stepps'; did you mean 'steps'?"),
        ("steps=", "steps must be of type int, got None"),
        ("out=[a", "'out=[a' is not YAML"),
        ("out=%x", "'out=%x' is not YAML"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, said: str) -> None:
    path = run_file(tmp_path, "manifest: a\nplan: b\n")
    with pytest.raises(UserError) as caught:
        TrainConfig.load(path, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_describes_every_field_with_its_default_and_meaning() -> None:
    lines = {line.split()[0]: line for line in describe_fields().splitlines()}
    fields = dataclasses.fields(TrainConfig)
    assert list(lines) == [field.name for field in fields]
    for field in fields:
        default, meaning = lines[field.name][23:37].strip(), lines[field.name][37:].strip()
        assert meaning
        if field.default is dataclasses.MISSING:
            assert default == "required"
        else:  # as it can be written into the file
            config = TrainConfig.from_dict({**BASE, field.name: yaml.safe_load(default)})
            assert getattr(config, field.name) == field.default
