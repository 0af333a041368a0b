"""From a training checkpoint to a model folder: config.json, safetensors under the released names, pipeline.json.

The averaged (EMA) weights are exported unless the raw ones are asked for. pipeline.json names the codec, the text encoder,
the shape and the frame rate of the run, so that `vchitect-fast sample` needs no further flags, from any folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from vchitect_fast import checkpoint
from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.errors import UserError
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.model.weights import PIPELINE_FILE, check_names, save_pretrained

MAX_SHARD_BYTES = 5 * 10**9
EMBEDDED = ("dct", "hash")  # codec and text encoder that are no folders


def export_checkpoint(folder: Path, out: Path, weights: str = "ema") -> Path:
    """Write the model of checkpoint `folder` to `out`; weights: "ema" or "model" (the raw masters), in fp32.

    Raises UserError as checkpoint.load_prefix and weights.save_pretrained do. Holds one copy of the model.
    """
    state = checkpoint.read_state(folder)
    config = TransformerConfig.from_dict(state["model"])
    with torch.device("meta"):
        model = VchitectTransformer(config)
    expected, buffers = model.state_dict(), {name for name, _ in model.named_buffers()}
    tensors = checkpoint.load_prefix(folder, "model.", only=buffers if weights == "ema" else None)
    if weights == "ema":
        tensors.update(checkpoint.load_prefix(folder, "ema."))
    check_names(expected, tensors, str(folder))
    run = state["config"]
    # A path of the run counts from the folder that the run was started in; the model may be used from another.
    folders = {key: _absolute(run[key]) for key in ("codec", "text_encoder")}
    settings = {**folders, "fps": run["fps"], "shift": run["shift"], "shape": state["shape"], "step": state["step"]}
    pipeline = json.dumps({**settings, "weights": weights}, indent=1)
    state_dict = {name: tensors[name] for name in expected}
    save_pretrained(config, state_dict, out, MAX_SHARD_BYTES, {PIPELINE_FILE: pipeline})
    return out


def _absolute(spec: str) -> str:
    return spec if spec in EMBEDDED else str(Path(spec).expanduser().resolve())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast export`."""
    parser.epilog = "example: vchitect-fast export --run runs/train --out my-model"
    parser.add_argument(
        "--run", required=True, type=Path, help="folder of a training run, or one checkpoint-<step> in it"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="model folder to write: a new one, an empty one, or one of a model to replace",
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="averaged or raw weights (default ema)"
    )


def run(args: argparse.Namespace) -> int:
    """`vchitect-fast export`."""
    folder = args.run if (args.run / checkpoint.STATE_FILE).exists() else checkpoint.latest(args.run)
    if folder is None:
        raise UserError(f"{args.run} holds no checkpoint; train first, or give another --run.")
    print(f"{folder} -> {export_checkpoint(folder, args.out, args.weights)}")
    return 0
