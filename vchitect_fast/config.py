"""TrainConfig: everything a run takes besides its Plan, as one flat YAML file with `name=value` overrides.

What depends on the hardware (microbatch, recomputation, dtype, sharding) is the Plan's; what depends on the experiment is
here. Each field has its unit and meaning beside it, and `vchitect-fast train --help` prints them. No torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.files import write_text
from vchitect_fast.shapes import VideoShape

Mixture = dict[str, float]  # weight by VideoShape


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    manifest: str  # clips to train on: .parquet, .jsonl or .csv, or WebDataset .tar files (a folder, or shards/*.tar)
    plan: str  # plan.json of `vchitect-fast autotune`; names shapes, microbatch, recomputation, dtype
    out: str = "runs/train"  # folder of log.jsonl, checkpoints, samples and the exported model
    model: str = "vchitect-2b"  # a preset, or a folder with config.json and safetensors
    init_from_sd3: str | None = None  # folder of an SD3-medium transformer to start from, instead of `model`
    start_from: str | None = None  # a run's folder: start from its newest weights and average; sizes as `model`
    carry_optimizer: bool = True  # with start_from: AdamW's moments too; false starts them at 0
    codec: str = "dct"  # "dct" (embedded, no weights) or a folder with SD3's AutoencoderKL
    text_encoder: str = "hash"  # "hash" (embedded, no weights) or a folder with SD3's three text encoders
    cache: str | None = None  # folder for latents and text embeddings, computed once; null encodes every step
    fps: float = 8.0  # frames a second at which clips are read
    mixture: Mixture | None = None  # weights of the shapes in steps: {1x320x240: 1, 8x320x240: 3}; null = by clips
    steps: int = 1000  # optimizer steps in all
    seed: int = 0  # every random draw is a function of (seed, step)
    learning_rate: float = 1e-4  # at its peak
    warmup_steps: int = 100  # linear from 0
    schedule: str = "constant"  # after warm-up: "constant", or "cosine" down to 0 at `steps`
    weight_decay: float = 0.01  # of matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.99  # AdamW
    clip_norm: float = 1.0  # global gradient norm
    ema_decay: float = 0.999  # of the averaged weights that validation, samples and exports use
    timestep_sampling: str = "logit_normal"  # or "uniform"
    shift: float = 1.0  # resolution shift of the noise levels, in training and sampling; SD3 uses 3
    fp8_linears: bool = False  # the blocks' linears in fp8: a GPU from sm_89 on and a bfloat16 Plan; a CPU emulates it
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for guidance
    log_every: int = 10  # steps between printed lines; log.jsonl has every step
    validate_every: int = 200  # steps; also before the first and after the last; 0 = never
    validation_manifest: str | None = None  # null validates on the first clips of `manifest`
    sample_every: int = 0  # steps between samples of the first captions; 0 = only on request
    save_every: int = 200  # steps between checkpoints; also at the end and on SIGTERM
    keep_last: int = 2  # checkpoints kept
    resume: bool = True  # go on from the newest checkpoint in `out`; false refuses a folder that has one
    tensorboard: bool = False  # also write TensorBoard events into `out`/tensorboard
    wandb_project: str | None = None  # also log to this Weights & Biases project

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "keep_last", "fps", "learning_rate", "clip_norm", "shift"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}; correct it in the run's YAML.")
        for name in ("warmup_steps", "validate_every", "sample_every", "save_every", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 or more, got {getattr(self, name)}; correct it in the run's YAML.")
        for name in ("ema_decay", "caption_dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}; correct it in the run's YAML.")
        for name, known in (("schedule", ("constant", "cosine")), ("timestep_sampling", ("logit_normal", "uniform"))):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)

    @property
    def weights(self) -> dict[VideoShape, float] | None:
        """The mixture by VideoShape; None where the clips decide."""
        if self.mixture is None:
            return None
        return {VideoShape.parse(name)[0]: weight for name, weight in self.mixture.items()}

    def save(self, path: str | Path) -> None:
        """Write the YAML that `load` reads."""
        import yaml

        write_text(path, yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML file, then apply `name=value` overrides (values are YAML too)."""
        try:
            values = read_yaml(str(path), Path(path).read_bytes())
        except OSError as error:
            raise UserError(
                f"cannot read the run file {path} ({error.strerror}); write one as `vchitect-fast train --help` shows."
            ) from None
        if not isinstance(values, dict):
            raise UserError(
                f"{path} must hold `name: value` lines, got {type(values).__name__}; see `vchitect-fast train --help`."
            )
        for override in overrides:
            name, equals, text = override.partition("=")
            if not equals:
                raise UserError(f"an override is name=value, got {override!r}; for example steps=500.")
            values[name.strip()] = read_yaml(repr(override), text)
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Checked for unknown names (with the nearest), missing ones and types."""
        known = {field.name: field for field in fields(cls)}
        for name in values:
            if name not in known:
                raise unknown_name("run field", str(name), known)
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in values]
        if missing:
            raise UserError(
                f"the run lacks {', '.join(missing)}; add it to the YAML or as {missing[0]}=... on the command line."
            )
        return cls(**{name: typed(name, str(known[name].type), value) for name, value in values.items()})


def read_yaml(origin: str, content: str | bytes) -> Any:
    """Plain values of YAML text; UserError naming `origin` when it is none."""
    import yaml

    try:
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise UserError(f"{origin} is not YAML ({' '.join(str(error).split())}); correct it.") from None


def typed(name: str, kind: str, value: Any) -> Any:
    """The value as the field's type; YAML reads 1e-4 as text and 8 as an int, which both mean a float here."""
    if value is None and "None" in kind:
        return None
    if kind.startswith("Mixture"):
        return checked_mixture(value)
    base = {"str": str, "int": int, "float": float, "bool": bool}[kind.split(" |")[0]]
    if base is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, base) and not (base is int and isinstance(value, bool)):
        return value
    raise UserError(f"{name} must be of type {kind}, got {value!r}; correct it in the YAML.")


def checked_mixture(value: Any) -> Mixture:
    """The weights as floats by shape, as written; UserError for what is no shape or no weight, or when all are 0."""
    if not isinstance(value, dict) or not value:
        raise UserError(
            f"mixture must map shapes to weights, got {value!r}; write it like {{1x320x240: 1, 8x320x240: 3}}."
        )
    mixture = {}
    for name, weight in value.items():
        shape, note = VideoShape.parse(str(name))
        if note:
            raise UserError(f"mixture names the shape {name}, the nearest is {shape}; write that.")
        mixture[str(shape)] = typed(f"the weight of {shape} in mixture", "float", weight)
    if min(mixture.values()) < 0 or not sum(mixture.values()):
        raise UserError(f"the weights of mixture must be 0 or more and one above 0, got {value!r}; correct them.")
    return mixture


def describe_fields() -> str:
    """One line a field for --help: name, default, meaning with unit; read from the comments above."""
    lines = []
    for line in inspect.getsource(TrainConfig).splitlines():
        found = re.match(r"    (\w+): ([\w| ]+?)(?: = (.+?))?  # (.+)", line)
        if found:
            name, _, default, meaning = found.groups()
            default = {None: "required", "None": "null", "True": "true", "False": "false"}.get(
                default, default
            )  # as YAML
            lines.append(f"  {name:20s} {default:14s} {meaning}")
    return "\n".join(lines)
