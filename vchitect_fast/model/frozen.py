"""Frozen models from a folder: the codec's and the text encoders' weights, loaded strictly and told apart.

diffusers and transformers fill tensors that a folder lacks with random numbers and only log it; a codec like that would
train to nonsense. Here every file is opened, every tensor must arrive, and a mistake is a UserError before any step.
Only safetensors: no pickle is read, nothing is downloaded, no weight is ever trained or written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vchitect_fast.errors import UserError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def load_frozen(model_class: Any, folder: Path, *, stem: str, dtype_option: str, **options: Any) -> nn.Module:
    """`model_class.from_pretrained(folder)` in the weights' own dtype, in eval mode, without gradients, on the CPU.

    stem          name of the weights file before ".safetensors" (or ".safetensors.index.json" when sharded)
    dtype_option  what from_pretrained calls the dtype: "torch_dtype" (diffusers) or "dtype" (transformers)
    options       passed on

    Raises UserError where config.json or a weights file is absent or unreadable, or a tensor is missing or misshaped.
    """
    require_config(folder)
    dtype = _weights_dtype(_weight_files(folder, stem))
    options = {dtype_option: dtype, "use_safetensors": True, "local_files_only": True, **options}
    try:
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{folder} does not load as {model_class.__name__}: {first_line.rstrip('.')}; copy the checkpoint again."
        ) from error
    absent = sorted(str(name) for name in [*info["missing_keys"], *info["mismatched_keys"]])
    if absent:
        shown = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
        raise UserError(
            f"{folder} must hold every tensor of {model_class.__name__}, missing or misshaped are {shown}; "
            f"copy the checkpoint again."
        )
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def require_config(folder: Path) -> None:
    """UserError unless `folder` holds a config.json."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} needs a config.json, found none; copy the whole folder of the checkpoint.")


def fingerprint(models: Mapping[str, nn.Module], facts: Iterable[bytes]) -> str:
    """Sixteen hex digits that change with any weight of `models` or any of `facts` (configs, tokenizer files).

    Reads every weight once: about as long as copying the models in memory.
    """
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(hashlib.sha256(fact).digest())
    for prefix, model in models.items():
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{prefix}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _weight_files(folder: Path, stem: str) -> list[Path]:
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
        got = f"only pickled {', '.join(pickles)} (never loaded)" if pickles else "none"
        raise UserError(
            f"{folder} needs weights in {single.name}, found {got}; use the checkpoint's safetensors files."
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} is not an index of safetensors shards ({error}); copy the checkpoint again."
        ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise UserError(f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}; copy them too.")
    return [folder / name for name in names]


def _weights_dtype(files: list[Path]) -> torch.dtype:
    """The dtype of the first floating tensor; opening every file catches a truncated one before anything is built."""
    from safetensors import SafetensorError, safe_open

    dtypes = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                dtypes += [weights.get_slice(name).get_dtype() for name in weights.keys()]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is not a whole safetensors file ({error}); copy it again.") from error
    known = [_DTYPES[name] for name in dtypes if name in _DTYPES]
    if not known:
        raise UserError(
            f"{files[0]} must hold floating-point weights ({', '.join(_DTYPES)}), found {sorted(set(dtypes))}."
        )
    return known[0]
