"""Loading and saving by the released names: strict, sharded, atomic; the start from SD3 against diffusers' own model.

Run: pytest tests/model/test_weights.py
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vchitect_fast.errors import UserError
from vchitect_fast.model import VchitectTransformer, preset
from vchitect_fast.model.weights import INDEX, STEM, save_pretrained

NANO = preset("vchitect-nano")


def random_model(seed: int = 0) -> VchitectTransformer:
    torch.manual_seed(seed)
    model = VchitectTransformer(NANO)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_round_trip_is_bitwise(tmp_path: Path, max_shard_bytes: int) -> None:
    model = random_model()
    model.save_pretrained(tmp_path / "m", max_shard_bytes=max_shard_bytes)
    sharded = (tmp_path / "m" / INDEX).exists()
    assert sharded == (max_shard_bytes == 20_000)
    again = VchitectTransformer.from_pretrained(tmp_path / "m")
    assert again.config == NANO
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_released_layout_loads(tmp_path: Path) -> None:
    """The release's extra config fields, its transformer/ subfolder and bf16 tensors."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    extra = {"tp_size": 1, "_class_name": "VchitectXLTransformerModel", "_diffusers_version": "0.30.0"}
    (folder / "config.json").write_text(json.dumps({**asdict(NANO), **extra}))
    state = {name: tensor.bfloat16() for name, tensor in random_model().state_dict().items()}
    save_file(state, folder / f"{STEM}.safetensors")
    model = VchitectTransformer.from_pretrained(tmp_path)
    assert torch.equal(model.proj_out.weight, state["proj_out.weight"].float())


def test_missing_unexpected_and_misshaped_names_are_all_listed(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path)
    file = tmp_path / f"{STEM}.safetensors"
    state = load_file(file)
    del state["proj_out.bias"]
    state["pos_embed.prj.bias"] = torch.zeros(1)
    state["context_embedder.weight"] = torch.zeros(3, 3)
    save_file(state, file)
    with pytest.raises(UserError) as error:
        VchitectTransformer.from_pretrained(tmp_path)
    for fragment in (
        "1 missing: proj_out.bias", "1 unexpected: pos_embed.prj.bias", "1 misshaped: context_embedder.weight (3, 3) instead of (16, 12)",
        "nothing was loaded",
    ):  # fmt: skip
        assert fragment in str(error.value)


def break_config(folder: Path, **change: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **change}))


@pytest.mark.parametrize(
    ("harm", "fragment"),
    [
        (lambda f: break_config(f, num_layer=3), "unknown config field 'num_layer'; did you mean 'num_layers'?"),
        (lambda f: break_config(f, num_layers=0), "'num_layers' must be a positive whole number, got 0"),
        (lambda f: break_config(f, caption_projection_dim=17), "num_attention_heads x attention_head_dim = 16, got 17"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json lacks attention_head_dim"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "must hold a JSON object, got list"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda f: (f / INDEX).write_text('{"metadata": {}}'), "lacks the weight_map"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), "lacks the weight_map"),
        (lambda f: (f / INDEX).write_text("[]"), "must hold a JSON object, got list"),
        (lambda f: (f / "config.json").unlink(), "cannot read"),
        (
            lambda f: (f / f"{STEM}-00002-of-00007.safetensors").unlink(),
            "lacks 1 of 7 shards (diffusion_pytorch_model-00002-of-00007",
        ),
        (lambda f: (f / f"{STEM}-00002-of-00007.safetensors").write_bytes(b"\0" * 99), "is damaged"),
        (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "found neither"),
    ],
)
def test_rejects(tmp_path: Path, harm, fragment: str) -> None:
    folder = tmp_path / "m"
    random_model().save_pretrained(folder, max_shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) == 7
    harm(folder)
    with pytest.raises(UserError) as error:
        VchitectTransformer.from_pretrained(folder)
    assert fragment in str(error.value)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path)
    (tmp_path / f"{STEM}.safetensors").unlink()
    torch.save(random_model().state_dict(), tmp_path / f"{STEM}.bin")
    with pytest.raises(UserError, match="found neither"):
        VchitectTransformer.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(0).save_pretrained(tmp_path / "m")
    import safetensors.torch

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match="No space left on device.*untouched"):
        random_model(1).save_pretrained(tmp_path / "m")
    monkeypatch.undo()
    loaded = VchitectTransformer.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded.proj_out.weight, random_model(0).proj_out.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["thesis.txt", "run.yaml", ".git/config", "config.json/mine", "model.safetensors"])
def test_a_folder_that_holds_anything_else_is_never_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "m" / name).parent.mkdir(parents=True)
    (tmp_path / "m" / name).write_text("years of work")
    with pytest.raises(UserError, match=r"is not a model's folder, it holds .*nothing was written, choose a new"):
        random_model().save_pretrained(tmp_path / "m")
    assert files(tmp_path) == {f"m/{name}": b"years of work"}


def test_where_a_model_may_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new folder, an empty one, one of a sharded model with its pipeline, and the folder one stands in."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        random_model().save_pretrained(tmp_path / "file")
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path / "m")
    save_pretrained(NANO, random_model(0).state_dict(), Path(), 20_000, {"pipeline.json": "{}"})
    assert len(list((tmp_path / "m").iterdir())) == 7 + 3
    random_model(1).save_pretrained(tmp_path / "new" / ".." / "m")
    assert sorted(files(tmp_path / "m")) == ["config.json", f"{STEM}.safetensors"]
    loaded = VchitectTransformer.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded.proj_out.weight, random_model(1).proj_out.weight)


def test_init_from_sd3_is_sd3_on_an_image(tmp_path: Path) -> None:
    """T = 1 with silent new branches equals diffusers' SD3Transformer2DModel once its to_out carries our factor 1.1."""
    from diffusers import SD3Transformer2DModel

    fields = {n: v for n, v in asdict(NANO).items() if n != "rope_scaling_factor"}
    torch.manual_seed(0)
    sd3 = SD3Transformer2DModel(**fields).eval()
    for parameter in sd3.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    sd3.save_pretrained(tmp_path)
    ours = VchitectTransformer.init_from_sd3(tmp_path)
    with torch.no_grad():
        for block in sd3.transformer_blocks:
            block.attn.to_out[0].weight *= 1.1
            if block.attn.to_add_out is not None:
                block.attn.to_add_out.weight *= 1.1
        z, text, pooled, t = (
            torch.randn(2, 16, 6, 4),
            torch.randn(2, 5, 12),
            torch.randn(2, 20),
            torch.tensor([3.0, 700.0]),
        )
        theirs = sd3(z, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False)[0]
        mine = ours(z[:, None], text, pooled, t)[:, 0]
    assert (mine - theirs).norm() / theirs.norm() < 1e-5
    attn = ours.transformer_blocks[0].attn
    assert torch.equal(attn.to_q_temp.weight, attn.to_q.weight)
    assert attn.to_out_temporal.weight.abs().max() == 0
    assert attn.to_out_context.weight.abs().max() == 0


def test_init_from_sd35_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**asdict(NANO), "qk_norm": "rms_norm"}))
    with pytest.raises(UserError, match=r"SD3\.5.*use SD3-medium"):
        VchitectTransformer.init_from_sd3(tmp_path)
