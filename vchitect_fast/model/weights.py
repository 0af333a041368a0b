"""Weights by name: strict loading and saving of config.json + safetensors, and the start from SD3-medium.

Strict means that every missing, unexpected and misshaped name is listed and nothing is loaded. Only safetensors are read:
a pickle can run code. Writing goes to a temporary folder that takes the place of the old one when complete; a folder that
holds anything but a model is never replaced.
Source of the names: model_spec, "State-dict names".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_folder

if TYPE_CHECKING:
    from vchitect_fast.model.transformer import VchitectTransformer

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
PIPELINE_FILE = "pipeline.json"  # codec, text encoder, shape and frame rate of the run, written by export
WRITTEN = ("config.json", PIPELINE_FILE, INDEX, f"{STEM}*.safetensors")


def load_pretrained(cls: type[VchitectTransformer], folder: Path, dtype: torch.dtype) -> VchitectTransformer:
    """The model in `folder` (or its `transformer/` subfolder) on the CPU in `dtype`; UserError lists what does not match."""
    folder = _model_folder(folder)
    config = TransformerConfig.from_dict(read_json(folder / "config.json"))
    return _build(cls, config, read_state(folder), dtype, str(folder))


def init_from_sd3(cls: type[VchitectTransformer], folder: Path, dtype: torch.dtype) -> VchitectTransformer:
    """A model whose image path is SD3-medium's and whose new branches start silent.

    Released names are SD3's, so they load as they are. The temporal and cross query/key/value projections, which SD3 lacks,
    start as copies of the spatial ones; to_out_temporal, to_add_out_temporal and to_out_context start at zero, so that at
    the first step the model is SD3 frame by frame, up to the 1.1 on the spatial branch.
    """
    folder = _model_folder(folder)
    sd3 = read_json(folder / "config.json")
    if sd3.get("qk_norm") or sd3.get("dual_attention_layers"):
        raise UserError(
            f"expected an SD3-medium transformer, {folder} has qk_norm or dual attention (SD3.5); use SD3-medium's weights."
        )
    names = [name for name in TransformerConfig.__dataclass_fields__ if name != "rope_scaling_factor"]
    config = TransformerConfig.from_dict({name: sd3[name] for name in names if name in sd3})
    state = read_state(folder)
    D = config.hidden_dim
    for i in range(config.num_layers):
        attn = f"transformer_blocks.{i}.attn."
        for kind in ("weight", "bias"):
            for new, old in (
                ("to_q_temp", "to_q"),
                ("to_k_temp", "to_k"),
                ("to_v_temp", "to_v"),
                ("to_q_cross", "to_q"),
            ):
                source = f"{attn}{old}.{kind}"
                if source in state:  # an absent one is reported by name below
                    state[f"{attn}{new}.{kind}"] = state[source].clone()
            for new in ("to_out_temporal", "to_add_out_temporal", "to_out_context"):
                state[f"{attn}{new}.{kind}"] = torch.zeros(D, D) if kind == "weight" else torch.zeros(D)
    return _build(cls, config, state, dtype, str(folder))


def save_pretrained(
    config: TransformerConfig,
    state: Mapping[str, Tensor],
    folder: Path,
    max_shard_bytes: int,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write the folder: complete under a temporary name, synced, then renamed over the old one.

    extra  further files, name to text; of the names in WRITTEN, so that the folder can be written again

    Raises UserError where `folder` holds anything that is not of a model, and when the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = folder.resolve()
    _refuse_foreign(folder)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += num_bytes

    try:
        with whole_folder(folder) as partial:
            weight_map = {}
            for number, shard in enumerate(shards, 1):
                single = len(shards) == 1
                file = f"{STEM}.safetensors" if single else f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
                save_file(shard, partial / file, metadata={"format": "pt"})
                weight_map.update(dict.fromkeys(shard, file))
            if len(shards) > 1:
                total = sum(t.numel() * t.element_size() for t in state.values())
                _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            _write_json(partial / "config.json", config.to_dict())
            for name, text in (extra or {}).items():
                (partial / name).write_text(text)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"could not write the model to {folder} ({error}); free some space and save again, what stood there is untouched."
        ) from None


def _refuse_foreign(folder: Path) -> None:
    """What takes the place of a folder removes it, so only a model may be there, or nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"expected a folder to write the model to, {folder} is a file; choose another place.")
    entries = sorted(folder.iterdir()) if folder.exists() else []
    foreign = [path.name for path in entries if path.is_dir() or not any(fnmatch(path.name, name) for name in WRITTEN)]
    if foreign:
        raise UserError(
            f"{folder} is not a model's folder, it holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}; "
            "nothing was written, choose a new or an empty folder."
        )


def read_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file or of a sharded set with its index; UserError names an absent or broken shard."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    single = folder / f"{STEM}.safetensors"
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{folder / INDEX} lacks the weight_map that names the file of each tensor; copy it again.")
        files = sorted(set(weight_map.values()))
    elif single.exists():
        files = [single.name]
    else:
        raise UserError(
            f"expected {single.name} or {INDEX} in {folder}, found neither; point to a diffusers folder with safetensors."
        )
    absent = [file for file in files if not (folder / file).exists()]
    if absent:
        raise UserError(
            f"the checkpoint {folder} lacks {len(absent)} of {len(files)} shards ({', '.join(absent)}); copy it again."
        )
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state.update(load_file(folder / file))
        except SafetensorError as error:
            raise UserError(f"{folder / file} is damaged ({error}); copy it again.") from None
    return state


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError when the file is absent or is not one."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); point to a diffusers folder with config.json and safetensors."
        ) from None
    except ValueError as error:  # neither JSON nor UTF-8
        raise UserError(f"{path} is not JSON ({error}); copy it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(content).__name__}; copy it again.")
    return content


def _build(
    cls: type[VchitectTransformer], config: TransformerConfig, state: dict[str, Tensor], dtype: torch.dtype, origin: str
) -> VchitectTransformer:
    with torch.device("meta"):
        model = cls(config)
    check_names(model.state_dict(), state, origin)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return model.requires_grad_(True)


def check_names(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], origin: str) -> None:
    """UserError that lists every missing, unexpected and misshaped name (the first five of each)."""
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "misshaped": shapes,
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in faults.items()
        if names
    ]
    if found:
        raise UserError(
            f"the weights in {origin} do not fit their config.json; {'; '.join(found)}; nothing was loaded, check that both belong together."
        )


def _model_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"expected a model folder, {folder} does not exist; give a diffusers folder or a preset name.")
    return folder / "transformer" if (folder / "transformer" / "config.json").exists() else folder


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
