"""TransformerConfig: read from the release's config.json, contradictions refused, a fingerprint of every size.

pytest tests/test_architecture.py
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest

from vchitect_fast.architecture import IGNORED_FIELDS, PRESETS, TransformerConfig, preset
from vchitect_fast.errors import UserError

# The 2B release's fields as model_spec lists them.
RELEASED = {
    "_class_name": "VchitectXLTransformerModel", "_diffusers_version": "0.29.0", "tp_size": 1, "sample_size": 128, "patch_size": 2,
    "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
    "rope_scaling_factor": 1.0,
}  # fmt: skip
NANO = preset("vchitect-nano")


def test_the_released_config_is_the_2b_preset() -> None:
    config = TransformerConfig.from_dict(RELEASED)
    assert config == preset("vchitect-2b")
    assert config.hidden_dim == 24 * 64
    assert config.num_parameters() == 2_424_947_776


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_config_json(name: str) -> None:
    written = json.loads(json.dumps(preset(name).to_dict()))
    assert TransformerConfig.from_dict(written) == preset(name)
    assert written["_class_name"] == "VchitectTransformer"


def test_an_unknown_preset_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown model preset 'vchitect-2B'; did you mean 'vchitect-2b'"):
        preset("vchitect-2B")


@pytest.mark.parametrize("name", sorted(IGNORED_FIELDS))
def test_fields_without_a_size_are_ignored(name: str) -> None:
    assert TransformerConfig.from_dict({**asdict(NANO), name: "anything"}) == NANO


def test_an_unknown_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown config field 'num_layer'; did you mean 'num_layers'"):
        TransformerConfig.from_dict({**asdict(NANO), "num_layer": 3})


def test_every_missing_field_is_named_but_the_one_with_a_default() -> None:
    values = {n: v for n, v in asdict(NANO).items() if n not in {"sample_size", "patch_size", "rope_scaling_factor"}}
    with pytest.raises(UserError, match="config.json lacks patch_size, sample_size;"):
        TransformerConfig.from_dict(values)
    values |= {"sample_size": NANO.sample_size, "patch_size": NANO.patch_size}
    assert TransformerConfig.from_dict(values).rope_scaling_factor == 1.0


@pytest.mark.parametrize("name", [field.name for field in fields(TransformerConfig)])
@pytest.mark.parametrize("value", [0, -2, "2", None, True, float("nan")])
def test_sizes_are_positive_numbers(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{name!r} must be a positive "):
        TransformerConfig.from_dict({**asdict(NANO), name: value})


@pytest.mark.parametrize("name", [field.name for field in fields(TransformerConfig) if field.type == "int"])
def test_counts_are_whole(name: str) -> None:
    with pytest.raises(UserError, match=f"{name!r} must be a positive whole number, got 2.0"):
        TransformerConfig.from_dict({**asdict(NANO), name: 2.0})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"caption_projection_dim": 24}, "caption_projection_dim must equal .* = 16, got 24;"),
        ({"attention_head_dim": 5, "caption_projection_dim": 10}, "head dim must be even .* got 5 and 10"),
        (
            {"attention_head_dim": 2, "num_attention_heads": 3, "caption_projection_dim": 6},
            "multiple of 4 .* got 2 and 6",
        ),
        ({"out_channels": 32}, "in_channels and out_channels must agree .* got 16, 32"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(NANO, **changes)


def test_the_fingerprint_follows_every_size() -> None:
    changed = {field.name: {field.name: 2 * getattr(NANO, field.name)} for field in fields(NANO)}
    changed["in_channels"]["out_channels"] = changed["out_channels"]["in_channels"] = 32  # these agree
    changed["attention_head_dim"]["caption_projection_dim"] = changed["num_attention_heads"][
        "caption_projection_dim"
    ] = 32
    changed["caption_projection_dim"]["num_attention_heads"] = 4
    prints = {name: replace(NANO, **values).fingerprint() for name, values in changed.items()}
    assert NANO.fingerprint() not in prints.values()
    assert prints["attention_head_dim"] != prints["num_attention_heads"]  # 2 x 16 and 4 x 8 are both 32 wide
    assert NANO.fingerprint() == TransformerConfig.from_dict(NANO.to_dict()).fingerprint()
    assert len(NANO.fingerprint()) == 12
