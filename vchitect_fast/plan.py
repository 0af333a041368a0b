"""Plan: every decision of a run, written by autotune and obeyed by train. The one contract between the two.

A Plan holds one mesh and, for each VideoShape, how the step is sharded, what each block keeps, recomputes or offloads,
the microbatch, the attention backends, what was predicted and why the runners-up lost. It names the model, the device and
the shapes it was made for by fingerprint; `Plan.check` refuses anything else and says which. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vchitect_fast.cluster import Device
from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.files import write_text
from vchitect_fast.shapes import VideoShape

SCHEMA_VERSION = 1
KEEP, RECOMPUTE, OFFLOAD = "keep", "recompute", "offload"
ACTIONS = (KEEP, RECOMPUTE, OFFLOAD)
_TORCH, _FLASH = ("sdpa", "math", "triton", "auto"), ("cudnn", "flash", "fa2", "fa3", "fa4")
ATTENTION_BACKENDS = {"spatial": (*_TORCH, *_FLASH), "temporal": _TORCH, "cross": (*_TORCH, *_FLASH)}  # attention.py
BRANCHES = tuple(ATTENTION_BACKENDS)
PARKABLE = ("optimizer", "average")  # AdamW's moments, the EMA


@dataclass(frozen=True)
class Policy:
    """What one block does with each activation group between forward and backward (docs/design.md names the groups)."""

    block_input: str = KEEP
    qkv: str = KEEP
    branch_out: str = KEEP
    mlp_pre: str = KEEP
    stats: str = KEEP

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) not in ACTIONS:
                raise unknown_name(f"policy of {item.name}", str(getattr(self, item.name)), ACTIONS)
        if self.block_input == RECOMPUTE:
            raise UserError("block_input cannot be recomputed, nothing comes before it; keep or offload it.")

    @classmethod
    def keep(cls) -> Policy:
        """Keep every group."""
        return cls()

    @classmethod
    def recompute(cls) -> Policy:
        """Keep the block's input, recompute the rest."""
        return cls(KEEP, RECOMPUTE, RECOMPUTE, RECOMPUTE, RECOMPUTE)


SHARDED: dict[str, dict[str, tuple[str, ...]]] = {  # axis -> what each branch may reshard to
    "batch": {"spatial": ("none",), "temporal": ("none",), "cross": ("none",)},
    "frames": {"spatial": ("none",), "temporal": ("tokens",), "cross": ("none",)},
    "tokens": {"spatial": ("heads", "frames"), "temporal": ("none",), "cross": ("none",)},
}


@dataclass(frozen=True)
class ShardSpec:
    """How one step is cut over the `sp` mesh axis, and how each branch reshards around that cut (parallel/sequence.py).

    Raises UserError for a name that is unknown, or a branch that does not fit the axis.
    """

    axis: str = "batch"  # batch (not cut) | frames | tokens
    spatial: str = "none"  # of tokens: heads | frames
    temporal: str = "none"  # of frames: tokens
    cross: str = "none"

    def __post_init__(self) -> None:
        if self.axis not in SHARDED:
            raise unknown_name("sharding axis", str(self.axis), tuple(SHARDED))
        for branch, allowed in SHARDED[self.axis].items():
            if getattr(self, branch) not in allowed:
                raise UserError(
                    f"expected the {branch} branch of a ShardSpec of axis {self.axis} to reshard to {' or '.join(allowed)}, "
                    f"got {getattr(self, branch)!r}; plan it again with `vchitect-fast autotune`."
                )


@dataclass(frozen=True)
class Prediction:
    """Time and memory of one step as predicted, each with its parts."""

    step_s: float
    step_parts_s: dict[str, float]
    peak_gib: float
    peak_parts_gib: dict[str, float]
    confidence: str  # in words, with what it rests on

    def against(self, measured: dict[str, float]) -> list[Comparison]:
        """Predicted and measured side by side, for every measured key that was predicted.

        `measured` has step_s, forward_s, backward_s, optimizer_s, peak_gib or some of them; other keys are passed over.
        Recomputation happens inside the measured backward, so its prediction is added there.
        """
        predicted = {"step_s": self.step_s, **self.step_parts_s, "peak_gib": self.peak_gib}
        if "backward_s" in predicted:
            predicted["backward_s"] += predicted.pop("recompute_s", 0.0)
        return [
            Comparison(name, value, measured[name])
            for name, value in predicted.items()
            if measured.get(name) is not None
        ]


@dataclass(frozen=True)
class Comparison:
    """One predicted figure beside the measured one, both in the unit that the name ends with."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float | None:
        """Predicted / measured - 1: positive when the prediction was too high; None where nothing was measured."""
        return self.predicted / self.measured - 1 if self.measured else None


@dataclass(frozen=True)
class PlanEntry:
    """The decisions for one VideoShape.

    Raises UserError for a count that is not a positive whole number, or attention that is not of the three branches.
    """

    shape: str  # VideoShape, "frames x width x height"
    policy: tuple[Policy, ...]  # one a block
    microbatch: int  # samples a forward
    accumulation: int  # microbatches a step
    predicted: Prediction
    shard: ShardSpec = ShardSpec()
    offload_bytes: int = 0
    prefetch_depth: int = 1  # blocks of which anything is offloaded, fetched ahead of use in backward
    num_chunks: int = 1
    vae_mini_batch: int = 8  # frames encoded at once
    attention: dict[str, str] = field(default_factory=lambda: dict.fromkeys(BRANCHES, "auto"))
    runners_up: tuple[dict[str, Any], ...] = ()  # {choice, step_s, peak_gib, why}

    def __post_init__(self) -> None:
        for name in ("microbatch", "accumulation", "prefetch_depth", "num_chunks", "vae_mini_batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(
                    f"{name} of the Plan's {self.shape} must be a whole number from 1 up, got {value!r}; "
                    "plan it again with `vchitect-fast autotune`."
                )
        if not isinstance(self.attention, dict) or self.attention.keys() != set(BRANCHES):
            raise UserError(
                f"attention of the Plan's {self.shape} must name a backend for each of {', '.join(BRANCHES)}, "
                f"got {self.attention!r}; plan it again with `vchitect-fast autotune`."
            )
        for branch, backend in self.attention.items():
            if backend not in ATTENTION_BACKENDS[branch]:
                raise unknown_name(
                    f"attention backend of the {branch} branch", str(backend), ATTENTION_BACKENDS[branch]
                )
        grouped = any(policy != Policy.keep() and policy.branch_out != RECOMPUTE for policy in self.policy)
        if grouped and "fa4" in self.attention.values():
            raise UserError(
                f"the Plan's {self.shape} keeps or offloads branch_out and its attention is fa4, which is no torch op, so "
                "that its output cannot be saved by its group; recompute branch_out there, or choose another backend."
            )

    @property
    def video_shape(self) -> VideoShape:
        """The entry's shape, parsed."""
        return VideoShape.parse(self.shape)[0]

    @property
    def num_recomputed(self) -> int:
        """Blocks of which anything is recomputed."""
        return sum(RECOMPUTE in asdict(policy).values() for policy in self.policy)


@dataclass(frozen=True)
class Plan:
    """Every decision of a run or of one stage of a recipe. Raises UserError for states that cannot be parked."""

    model: str  # TransformerConfig.fingerprint()
    device: str  # Device.fingerprint()
    device_name: str
    compute_dtype: str  # "float32" | "bfloat16": of activations and matmuls; masters and optimizer are fp32
    num_text_tokens: int
    entries: tuple[PlanEntry, ...]
    peak_flops: float | None = None  # measured matmul FLOP/s in compute_dtype, the denominator of MFU
    mesh: dict[str, int] = field(default_factory=lambda: {"dp_replicate": 1, "dp_shard": 1, "sp": 1})
    fsdp_group: str = "none"  # none | node | global
    parked: tuple[str, ...] = ()  # of PARKABLE: states that lie in host memory between their uses (offload/states.py)
    device_threads: int | None = None  # with the name all that Device.fingerprint() is made of, so that `check` can
    device_gib: int | None = None  # say what differs
    limit_bytes: int | None = None  # device memory that the search allowed; None: 0.9 of the device's
    calibration: dict[str, Any] | None = None  # fields of the autotune.calibrate.Calibration behind the predictions

    def __post_init__(self) -> None:
        for name in self.parked:
            if name not in PARKABLE:
                raise unknown_name("parked state of a Plan", str(name), PARKABLE)
        if len(set(self.parked)) < len(self.parked):
            raise UserError(
                f"expected each parked state of a Plan once, got {', '.join(self.parked)}; plan it again with `vchitect-fast autotune`."
            )
        limit = self.limit_bytes
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise UserError(
                f"limit_bytes of a Plan must be a whole number from 1 up, got {limit!r}; plan it again with `vchitect-fast autotune`."
            )

    def digest(self) -> str:
        """Hash of the inputs: model, device, dtype, text tokens, shapes."""
        inputs = [
            self.model,
            self.device,
            self.compute_dtype,
            self.num_text_tokens,
            [entry.shape for entry in self.entries],
        ]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]

    def check(self, *, model: str, device: Device | str) -> None:
        """Refuse to run under another model or device than planned for; the message says which differs.

        model   its fingerprint
        device  the Device, so that the message can say in what it differs, or its fingerprint
        """
        if self.model != model:
            raise UserError(
                f"this Plan is for model {self.model}, the run has model {model}; run `vchitect-fast autotune --model ...` for this model."
            )
        if self.device != (device.fingerprint() if isinstance(device, Device) else device):
            raise self._other_device(device)

    def _other_device(self, here: Device | str) -> UserError:
        remedy = "run `vchitect-fast autotune` on this machine."
        if isinstance(here, str) or self.device_threads is None or self.device_gib is None:
            here = here if isinstance(here, str) else here.fingerprint()
            return UserError(f"this Plan is for device {self.device_name!r} ({self.device}), this is {here}; {remedy}")
        if (self.device_name, self.device_gib) == (here.name, here.memory_gib):
            remedy = f"set OMP_NUM_THREADS={self.device_threads}, or {remedy}"
        return UserError(
            f"this Plan is for device {self.device_name!r} with {self.device_gib} GiB and {_threads(self.device_threads)}, "
            f"this is {here.name!r} with {here.memory_gib} GiB and {_threads(here.num_threads)}; {remedy}"
        )

    def entry(self, shape: VideoShape) -> PlanEntry:
        """The entry of a shape; UserError listing the planned shapes otherwise."""
        for entry in self.entries:
            if entry.shape == str(shape):
                return entry
        planned = ", ".join(entry.shape for entry in self.entries)
        raise UserError(
            f"this Plan has no entry for {shape}, only {planned}; plan it with `vchitect-fast autotune --shapes {shape}`."
        )

    def save(self, path: str | Path) -> None:
        """Write the Plan as JSON: to a temporary name, synced, then renamed. UserError as `check_place`."""
        check_place(path)
        content = {"schema_version": SCHEMA_VERSION, "hash": self.digest(), **asdict(self)}
        write_text(path, json.dumps(content, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a Plan; UserError when it is absent, of another schema, or its inputs do not match its hash."""
        try:
            content = json.loads(Path(path).read_bytes())
        except OSError as error:
            place = f" --out {path}" if isinstance(error, FileNotFoundError) else ""
            raise UserError(
                f"cannot read the Plan {path} ({error.strerror}); make one with `vchitect-fast autotune{place}`."
            ) from None
        except ValueError as error:  # neither JSON nor UTF-8
            raise UserError(
                f"the Plan {path} is not JSON ({error}); name the plan.json that `vchitect-fast autotune` wrote."
            ) from None
        version = content.pop("schema_version", None) if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"expected a Plan of schema {SCHEMA_VERSION}, got {version} in {path}; make it again with `vchitect-fast autotune`."
            )
        stored = content.pop("hash", None)
        try:
            content["entries"] = tuple(_entry(values) for values in content["entries"])
            content["parked"] = _names(content.get("parked", []))
            plan = cls(**content)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a Plan ({error}); name the plan.json that `vchitect-fast autotune` wrote."
            ) from None
        if plan.digest() != stored:
            raise UserError(
                f"the inputs of the Plan {path} were edited (hash {stored}, expected {plan.digest()}); make it again with `vchitect-fast autotune`."
            )
        return plan


def _threads(number: int) -> str:
    return f"{number} thread{'' if number == 1 else 's'}"


def check_place(path: str | Path) -> None:
    """UserError where a Plan would overwrite something else; a Plan, also of another schema, may be overwritten."""
    path = Path(path)
    if not path.exists():
        return
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or not {"schema_version", "hash", "entries"} <= content.keys():
        raise UserError(f"{path} is there and is not a Plan, it is left as it was; choose another --out or remove it.")


def _names(values: object) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"parked must be a list of names, got {values!r}")
    return tuple(values)


def _entry(values: dict[str, Any]) -> PlanEntry:
    parsed = {
        "policy": tuple(Policy(**policy) for policy in values["policy"]),
        "shard": ShardSpec(**values["shard"]),
        "predicted": Prediction(**values["predicted"]),
        "runners_up": tuple(values["runners_up"]),
    }
    return PlanEntry(**{**values, **parsed})
