"""Checkpoints: one torch.distributed.checkpoint folder a step, whole or absent, the last few kept.

    <run>/checkpoint-00000200/   tensors (model., optimizer., ema.), state.json (step, sizes of all files, what made it)
    <run>/latest                 the name of the newest whole checkpoint

There is no random state to store: every draw of a run is a function of (seed, step), see train.py, so step and seed are
the data position too. A folder is filled under a temporary name, synced, then renamed; `latest` follows. Loading verifies
that each file is there with its size before a tensor is touched.

On many ranks each writes its shards into the one folder, which all must see, and rank 0 names it when all are on the disk.
A checkpoint knows no ranks: it is read with any other sharding, by one process too. checkpoint_writer.py writes while the
steps go on.

Load checkpoints of your own runs only: torch's .metadata is a pickle. It is read with the few classes that torch writes
into it and the tensors with weights_only, so that a foreign one is refused rather than run, but a pickle was not made for
strangers. What comes from outside is read as safetensors (model/weights.py).
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_folder, write_text
from vchitect_fast.parallel.mesh import on_all, on_first

STATE_FILE = "state.json"
LATEST = "latest"
# What torch 2.11 to 2.14 writes into .metadata, beside dtypes; pathlib._local is Python 3.13's name of pathlib.
_METADATA_CLASSES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"), ("torch", "Size"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}  # fmt: skip


def save(
    run: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep_last: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `checkpoint-<step>`, point `latest` to it, remove all but the `keep_last` newest.

    tensors  flat names to tensors of any device and dtype; DTensors are written in shards, by the ranks that have them
    state    JSON values to find again in `read_state`
    group    a gloo group whose ranks all call this with the same names; None = this process alone

    Raises UserError, on all ranks, when the disk of any refuses; the checkpoints that were there stay whole.
    """
    folder = run / f"checkpoint-{step:08d}"

    def finish() -> None:
        files = {item.name: item.stat().st_size for item in sorted(partial.iterdir())}
        if absent := sorted(_named_files(partial) - files.keys()):
            raise UserError(
                f"{', '.join(absent)} of other ranks not seen by rank 0: {run} must lie on a shared file system"
            )
        (partial / STATE_FILE).write_text(json.dumps({"step": step, **state, "files": files}, indent=1))
        stack.close()  # synced and renamed
        write_text(run / LATEST, folder.name + "\n")

    try:
        with ExitStack() as stack:
            partial = on_first(group, lambda: stack.enter_context(whole_folder(folder)))
            writer = dcp.FileSystemWriter(partial, single_file_per_rank=True)
            if group is None:
                _alone(dcp.save, dict(tensors), storage_writer=writer)
            else:
                dcp.save(dict(tensors), storage_writer=writer, process_group=group)
            on_first(group, finish)
    except (OSError, UserError, dcp.api.CheckpointException) as error:
        good = latest(run)
        kept = f"the last good checkpoint is {good}" if good else "there was none before"
        raise UserError(
            f"could not write {folder} ({_first_line(error)}); {kept}; free some space and start the same command again."
        ) from None
    on_first(group, lambda: _remove_older(run, folder, keep_last))
    return folder


def _named_files(folder: Path) -> set[str]:
    """The files that the metadata says hold the tensors of all ranks."""
    return {place.relative_path for place in (_Reader(folder).read_metadata().storage_data or {}).values()}


def _remove_older(run: Path, folder: Path, keep_last: int) -> None:
    for left in run.glob(".checkpoint-????????.partial"):  # by a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    # Newer ones, there when the user has set `latest` back, must not displace this one; the run overwrites them in time.
    written = sorted(path for path in run.glob("checkpoint-????????") if path.name <= folder.name)
    for old in written[:-keep_last]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            raise UserError(
                f"saved {folder}, but could not remove the older {old} ({error}); remove it and start the same command again."
            ) from None


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None; UserError where `run` is not a folder that can be read."""
    try:
        name = (run / LATEST).read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"expected the folder of a run in {run}, cannot read it ({error}); choose another one."
        ) from None
    return run / name


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint, at or before `latest`, whose files are all there, and why those after it were passed over.

    None where the run has none yet. UserError where it has some and none is whole: nothing starts anew over them.
    """
    named = latest(run)
    if named is None:
        return None, []
    older = sorted((path for path in run.glob("checkpoint-????????") if path.name < named.name), reverse=True)
    torn: list[str] = []
    for folder in (named, *older):
        try:
            _whole_state(folder)
        except _TornError as error:
            torn.append(str(error))
        else:
            return folder, torn
    raise UserError(f"{torn[0]}; no checkpoint in {run} is whole, start again in a new folder.")


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are all there; UserError names what is missing or cut short."""
    try:
        return _whole_state(folder)
    except _TornError as error:
        raise UserError(f"{error}; {_others(folder)}") from None


class _TornError(Exception):
    """A checkpoint that lacks something."""


def _whole_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_bytes())
        sizes = dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _TornError(f"{folder} is not a whole checkpoint ({_first_line(error)})") from None
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise _TornError(f"checkpoint {folder}: {name} {what}")
    return state


def load(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Fill the given tensors in place from a checkpoint and return its state; every name must be there with its shape.

    Each rank reads what its shards need, however the checkpoint was sharded; with a group, a failure of one is raised by all.
    """
    return on_all(group, lambda: _load(folder, tensors))


def _load(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    state = read_state(folder)
    stored = _stored(folder)
    absent = sorted(tensors.keys() - stored.keys())
    misshaped = sorted(n for n in tensors.keys() & stored.keys() if stored[n].size != tensors[n].shape)
    if absent or misshaped:
        raise UserError(
            f"checkpoint {folder} is of another model: {len(absent)} tensors missing, {len(misshaped)} misshaped "
            f"(first: {(absent + misshaped)[0]}); resume with the model it was made with."
        )
    with torch.no_grad(), _undamaged(folder):
        _alone(dcp.load, tensors, storage_reader=_Reader(folder))
    return state


def load_prefix(folder: Path, prefix: str, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors whose name is `prefix` and then one of `only` (any by default), without the prefix, on the CPU."""
    read_state(folder)
    stored = _stored(folder)
    with _undamaged(folder):
        tensors = {
            name: torch.empty(meta.size, dtype=meta.properties.dtype)
            for name, meta in stored.items()
            if name.startswith(prefix) and (only is None or name.removeprefix(prefix) in only)
        }
        _alone(dcp.load, tensors, storage_reader=_Reader(folder))
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    with _undamaged(folder):
        stored = _Reader(folder).read_metadata().state_dict_metadata
        return {name: meta for name, meta in stored.items() if isinstance(meta, TensorStorageMetadata)}


@contextmanager
def _undamaged(folder: Path) -> Iterator[None]:
    """Files of the right size with other content: whatever unpickling or torch makes of them is one UserError."""
    try:
        yield
    except (Exception, dcp.api.CheckpointException) as error:
        raise UserError(f"checkpoint {folder} cannot be read ({_first_line(error)}); {_others(folder)}") from None


class _Reader(dcp.FileSystemReader):
    """Reads .metadata with the classes of _METADATA_CLASSES and no others."""

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint")


def _alone(call: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Save in one process, or load what one rank needs, which is meant: torch warns of it each time, though told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        call(*args, no_dist=True, **options)


def _others(folder: Path) -> str:
    others = sorted(path.name for path in folder.parent.glob("checkpoint-????????") if path != folder)
    if not others:
        return "there is no other checkpoint, start again in a new folder."
    return f"to go on from {others[-1]}, write that name into {folder.parent / LATEST}."


def _first_line(error: BaseException) -> str:
    """The reason in one line. torch wraps it twice: a rank's exception, raised while the system's was handled."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and error.__context__:
        error = error.__context__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
