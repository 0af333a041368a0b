"""From a training checkpoint to a model folder: config.json, safetensors under the released names, pipeline.json.

The averaged (EMA) weights are exported unless the raw ones are asked for. pipeline.json names the codec, the text encoder,
the shape and the frame rate of the run, so that `vchitect-fast sample` needs no further flags.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from vchitect_fast import checkpoint
from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.errors import UserError
from vchitect_fast.files import write_text
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.model.weights import check_names, save_pretrained
from vchitect_fast.sample import PIPELINE_FILE

MAX_SHARD_BYTES = 5 * 10**9


def export_checkpoint(folder: Path, out: Path, weights: str = "ema") -> Path:
    """Write the model of checkpoint `folder` to `out`; weights: "ema" or "model" (the raw masters), in fp32."""
    state = checkpoint.read_state(folder)
    config = TransformerConfig.from_dict(state["model"])
    tensors = checkpoint.load_prefix(folder, "model.")
    if weights == "ema":
        tensors.update(checkpoint.load_prefix(folder, "ema."))
    with torch.device("meta"):
        expected = VchitectTransformer(config).state_dict()
    check_names(expected, tensors, str(folder))
    save_pretrained(config, {name: tensors[name] for name in expected}, out, MAX_SHARD_BYTES)
    run = state["config"]
    settings = {key: run[key] for key in ("codec", "text_encoder", "fps", "shift")}
    write_text(
        out / PIPELINE_FILE,
        json.dumps({**settings, "shape": state["shape"], "step": state["step"], "weights": weights}, indent=1),
    )
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast export`."""
    parser.epilog = "example: vchitect-fast export --run runs/train --out my-model"
    parser.add_argument(
        "--run", required=True, type=Path, help="folder of a training run, or one checkpoint-<step> in it"
    )
    parser.add_argument("--out", required=True, type=Path, help="model folder to write")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="averaged or raw weights (default ema)"
    )


def run(args: argparse.Namespace) -> int:
    """`vchitect-fast export`."""
    folder = args.run if args.run.name.startswith("checkpoint-") else checkpoint.latest(args.run)
    if folder is None:
        raise UserError(f"{args.run} holds no checkpoint; train first, or give another --run.")
    print(f"{folder} -> {export_checkpoint(folder, args.out, args.weights)}")
    return 0
