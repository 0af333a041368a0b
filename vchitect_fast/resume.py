"""How a run starts and goes on: one run a folder, from its newest whole checkpoint, with what it was made of.

A checkpoint names what decides the following steps (data, sampling, schedule, batch). What would make it another model is
refused; any other difference is allowed and said, since nobody else would notice it: another sharding changes nothing,
another number of samples a step does. A torn checkpoint is passed over, and said. Decides nothing about a step.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from vchitect_fast import checkpoint
from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.config import TrainConfig
from vchitect_fast.ema import EMA
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import Clip
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.parallel.mesh import ALONE, Mesh, on_all, on_first
from vchitect_fast.plan import Plan, ShardSpec

LOCK = ".lock"
# Fields that change no further step: where things are written, how often, under which name they are found, where it began.
WITHOUT_EFFECT = {
    "manifest", "plan", "out", "cache", "log_every", "validate_every", "validation_manifest", "sample_every", "save_every",
    "keep_last", "resume", "tensorboard", "wandb_project", "model", "init_from_sd3", "start_from", "carry_optimizer",
}  # fmt: skip
NEVER_CHANGES = ("seed", "codec", "text_encoder", "compute_dtype")  # another latent space or another stream of draws


@contextmanager
def only_process_in(run: Path, mesh: Mesh = ALONE) -> Iterator[None]:
    """Hold the run's folder for the time of the block, for all ranks of the mesh; UserError when another run has it.

    The lock is the kernel's (flock), so a killed process leaves none behind.
    """
    with ExitStack() as stack:
        on_first(mesh.host_group, lambda: stack.enter_context(_locked(run)))
        yield


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("w")
    except OSError as error:
        raise UserError(f"cannot write into the run's folder {run} ({error.strerror}); choose another out=.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process trains into {run}; wait for it, or choose another out=.") from None
        yield


def check_supported(plan: Plan, mesh: Mesh = ALONE) -> None:
    """Refuse what this version would not obey; parallel.apply.check has what concerns the ranks."""
    if mesh.axes is None and plan.fsdp_group != "none":
        raise UserError(
            f"one process shards no parameters, the Plan has fsdp_group {plan.fsdp_group!r}; set it to none, or plan a mesh."
        )
    for entry in plan.entries:
        wants = {
            "shard": mesh.axes is None and entry.shard != ShardSpec(),
            "vae_mini_batch (one for all shapes)": entry.vae_mini_batch != plan.entries[0].vae_mini_batch,
        }
        unsupported = ", ".join(name for name, wanted in wants.items() if wanted)
        if unsupported:
            raise UserError(
                f"this version does not do what the Plan's {entry.shape} sets: {unsupported}; "
                "plan it with `vchitect-fast autotune`."
            )


def run_tensors(model: VchitectTransformer, optimizer: MasterAdamW, ema: EMA) -> dict[str, Tensor]:
    """All that a checkpoint holds, by flat name, sharing storage with the run."""
    return {
        **{f"model.{name}": tensor for name, tensor in model.named_buffers()},
        **{f"model.{name}": tensor.detach() for name, tensor in optimizer.masters.items()},
        **{f"optimizer.{name}": tensor for name, tensor in optimizer.state().items()},
        **{f"ema.{name}": tensor for name, tensor in ema.average.items()},
    }


def run_state(
    config: TrainConfig, plan: Plan, model: TransformerConfig, clips: list[Clip], mesh: Mesh = ALONE
) -> dict[str, Any]:
    """What a checkpoint says of the run: enough to export it, and what decides its following steps."""
    decides: dict[str, Any] = {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}
    if config.schedule == "constant":
        del decides["steps"]
    decides["clips"] = hashlib.sha256(repr(clips).encode()).hexdigest()[:12]
    decides["compute_dtype"] = plan.compute_dtype
    ranks = (
        [mesh.num_dp] if mesh.num_dp > 1 else []
    )  # that see other samples: of how they share the work nothing depends
    decides["samples_a_step"] = {entry.shape: [entry.microbatch, entry.accumulation, *ranks] for entry in plan.entries}
    kept = asdict(config)
    for name, embedded in (("codec", "dct"), ("text_encoder", "hash")):  # export may run from elsewhere
        kept[name] = kept[name] if kept[name] == embedded else str(Path(kept[name]).resolve())
    return {"model": model.to_dict(), "config": kept, "shape": plan.entries[0].shape, "decides": decides}


def resume(
    config: TrainConfig, state: dict[str, Any], tensors: dict[str, Tensor], mesh: Mesh = ALONE
) -> tuple[int, dict[str, str]]:
    """Load the newest whole checkpoint of `config.out`, if any, into `tensors`; every rank of the mesh calls it.

    Returns the steps already done, and what differs from the run that wrote it: "old -> new" by name. "checkpoint" is among
    them where newer ones are torn, with the reason.
    """
    run = Path(config.out)
    newest, torn = on_first(mesh.host_group, lambda: checkpoint.newest_whole(run))
    if newest is None:
        return 0, {}
    if not config.resume:
        raise UserError(f"resume=false, but {run} holds {newest.name}; choose another out= or remove that folder.")
    stored = on_all(mesh.host_group, lambda: checkpoint.read_state(newest))
    if stored["model"] != state["model"]:
        raise UserError(f"{newest} holds a model of other sizes than {config.model!r}; use that model or another out=.")
    old = {"fp8_linears": False, **stored["decides"]}  # checkpoints from before there was a choice do not say
    new = state["decides"]
    changed = {n: f"{old.get(n)} -> {new.get(n)}" for n in sorted(old | new) if old.get(n) != new.get(n)}
    for name in NEVER_CHANGES:
        if name in changed:
            raise UserError(
                f"{newest} was trained with {name} {old[name]}, got {new[name]}; use the same or another out=."
            )
    if torn:
        changed["checkpoint"] = f"{'; '.join(torn)} -> {newest.name}"
    checkpoint.load(newest, tensors, mesh.host_group)
    return int(stored["step"]), changed
