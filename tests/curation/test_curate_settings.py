"""Settings: what is refused, each in one sentence with the way out, and what the words mean.

pytest tests/curation/test_curate_settings.py
"""

from __future__ import annotations

import importlib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from vchitect_fast.curation.settings import DEFAULT, STAGES, load
from vchitect_fast.curation.stage import SignalStage
from vchitect_fast.errors import UserError

REFUSED = {  # of --set -> what the sentence says
    "motoin.backend=raft": "unknown section 'motoin'; did you mean 'motion'?",
    "=3": "unknown section ''; known are: aesthetic_proxy,",
    "motion": "--set takes section.name=value, got 'motion'; for example motion.backend=raft.",
    "static.diference=1": "unknown setting of static 'diference'; did you mean 'difference'?",
    "shots.min_content=1": "unknown setting of shots 'min_content'; did you mean 'min_content_val'?",
    "length.seconds=1": "unknown setting of length 'seconds'",
    "text.num_frames.more=1": "unknown setting of text 'num_frames.more'; did you mean 'num_frames'?",
    "motion.backend=rafts": "unknown motion.backend 'rafts'; did you mean 'raft'?",
    "motion.backend=[dis]": "unknown motion.backend",
    "text.backend=on": "unknown text.backend 'True'; known are: easyocr, rapidocr.",
    "shots.backend=transet": "unknown shots.backend 'transet'; did you mean 'transnet'?",
    "stitch.backend=clp": "unknown stitch.backend 'clp'; did you mean 'clip'?",
    "motion.backend=raft": "motion needs model, got none; give it as motion.model=...",
    "aesthetics.clip=/models/clip": "aesthetics needs head, got none; give it as aesthetics.head=...",
    "watermark=on": "watermark needs model, got none; give it as watermark.model=...",
    "stitch.backend=viclip": "stitch.backend=viclip needs stitch.weights, got none; give the model's folder.",
    "static.difference=much": "static.difference must be of type float, got 'much'",
    "static.difference=.nan": "static.difference must be of type float, got nan",
    "static.difference=true": "static.difference must be of type float, got True",
    "text.num_frames=8.5": "text.num_frames must be of type int, got 8.5",
    "text.num_frames=": "text.num_frames must be of type int, got None",
    "shots.gradual=1": "shots.gradual must be of type bool, got 1",
    "motion.backend={a: b}": "unknown motion.backend",
    "motion=raft": "motion must be a section of `name: value`, or off, got 'raft'",
    "motion=[1]": "motion must be a section of `name: value`, or off, got [1]",
    "shots=off": "shots must be a section of `name: value`, got False",
    "stitch=off": "stitch must be a section of `name: value`, got False",
    "rules=off": "rules must be a section of `name: value`, got False",
    "rules.static.shares=< 1": "unknown score in rules 'static.shares'; did you mean 'static.share'?",
    "rules.aesthetics.score=>= 5": "unknown score in rules 'aesthetics.score'; did you mean 'aesthetic_proxy.score'?",
    "rules.signature.bits=> 5": "unknown score in rules 'signature.bits'",  # text compares with no number
    "rules.static.share=0.5": "a rule for static.share is a comparison with a number, true or false, got '0.5'",
    "rules.static.share=< half": "got '< half'; for example \"> 5\".",
    "rules.static.share=< 0.5 or 1": "got '< 0.5 or 1'",
    "rules.static.share=[1, 2]": "got '[1, 2]'",
    "static.difference={": "'static.difference={' is not YAML",
}  # fmt: skip


@pytest.mark.parametrize("override", REFUSED)
def test_refuses_with_the_way_out(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, [override])
    assert REFUSED[override] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"- a\n- b\n", "must hold `stage: {...}` lines, got list"),
        (b"motion: [\n", "is not YAML"),
        (b"\xff\xfe\xfd", "is not YAML"),
        (b"1: {}\n", "unknown section '1'"),
        (b"motion: {1: 2}\n", "unknown setting of motion '1'"),
        (b"rules: {5: '> 1'}\n", "unknown score in rules '5'"),
    ],
)
def test_refuses_files(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "settings.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "settings.yaml")
    assert says in str(caught.value)


def test_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the settings .*No such file or directory.; give a YAML file"):
        load(tmp_path / "settings.yaml")


def test_an_empty_file_and_an_empty_section_mean_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    for content in ("", "text:\nshots:\nrules:\n", "text: on\n", "text: {}\n"):
        path.write_text(content)
        assert load(path) == load()
    assert [stage.name for stage in load().stages] == list(DEFAULT)


def test_a_section_switches_a_stage_on_and_off() -> None:
    off = load(None, ["text=off", "motion=off"])
    assert {stage.name for stage in load().stages} - {stage.name for stage in off.stages} == {"text", "motion"}
    assert not any(rule.stage in ("text", "motion") for rule in off.rules)
    on = load(None, ["text=off", "caption.url=http://localhost:1/v1", "caption.model=m"])
    assert [stage.name for stage in on.caption_stages] == ["caption"]
    assert on.stages[-1].name == "caption"


def test_rules_are_replaced_added_and_lifted() -> None:
    rules = {
        str(rule)
        for rule in load(
            None, ["rules.static=<0.5", "rules.motion.dynamic=off", "rules.looks.monochrome=== false", "rules.motion=> 1e-1"]
        ).rules
    }  # fmt: skip
    assert rules == {
        "length.seconds >= 1", "static.share < 0.5", "looks.monochrome == false", "motion.degree > 0.1",
        "text.significant_frames <= 1",
    }  # fmt: skip


def test_overrides_come_after_the_file(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("static: {difference: 2}\ntext: off\nshots: {min_content_val: 7}\n")
    settings = load(tmp_path / "settings.yaml", ["static.difference=3", "text.num_frames=4"])
    assert {stage.name: stage.parameters() for stage in settings.stages}["static"] == {"difference": 3.0}
    assert {stage.name: stage.parameters() for stage in settings.stages}["text"]["num_frames"] == 4
    assert settings.shots.min_content_val == 7.0


def test_rules_are_no_part_of_a_key_and_parameters_are() -> None:
    keys = load().keys()
    assert load(None, ["rules.static.share=< 0.7", "shots.min_content_val=3"]).keys() == keys
    other = load(None, ["static.difference=1"]).keys()
    assert {name for name in keys if keys[name] != other[name]} == {"static"}
    raft = load(None, ["motion.backend=dis", "looks.shaky_above=3"]).keys()
    assert {name for name in keys if keys[name] != raft[name]} == {"looks"}


@pytest.mark.parametrize(("name", "backend"), [(name, backend) for name in STAGES for backend in STAGES[name]])
def test_every_backend_is_what_its_name_says(name: str, backend: str) -> None:
    module, _, cls = STAGES[name][backend].partition(":")
    stage = getattr(importlib.import_module(f"vchitect_fast.curation.{module}"), cls)
    assert (stage.name, stage.backend) == (name, backend)
    assert stage.main in stage.columns
    assert stage.rules.keys() <= stage.columns.keys()
    needed = {f.name: "x" for f in fields(stage) if f.default is MISSING and f.default_factory is MISSING}
    settings = load(None, [f"{name}.backend={backend}", *(f"{name}.{field}=x" for field in needed)])
    assert type(next(s for s in settings.stages if s.name == name)) is stage


def test_stages_that_read_signals_come_first_and_cheap_ones_before_dear_ones() -> None:
    stages = load(None, ["watermark.model=x", "aesthetics.clip=x", "aesthetics.head=y"]).stages
    kinds = [isinstance(stage, SignalStage) for stage in stages]
    assert kinds == sorted(kinds, reverse=True)
    order = [stage.name for stage in stages]
    for stage in stages:
        assert all(order.index(read) < order.index(stage.name) for read in stage.reads if read in order)
    for group in (load().signal_stages, load(None, ["watermark.model=x"]).frame_stages):
        costs = [stage.cost for stage in group if not stage.reads]
        assert costs == sorted(costs)
