"""Recipe: one YAML file with the stages of a training, each a run of its own that starts from the one before.

    fields of TrainConfig   run-wide: what every stage has unless it says otherwise
    stages:                 a list; each item has
        name      lower-case letters, digits and dashes; the stage trains into OUT/NN-name
        shapes    the VideoShapes of the stage, all that its Plan plans
        batch     samples an optimizer step over all ranks, of each shape
        mesh      ranks by axis, as {dp_shard: 8, sp: 4}; left out, whatever its Plan says
        and fields of TrainConfig, of the stage alone

Model, codec, text encoder, seed and `out` hold for all stages. Stage k draws with seed + k - 1, so that no stage repeats
the noise of another. Refuses what it does not know with the nearest name, and reads no Plan and no data. No torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vchitect_fast.config import TrainConfig, read_yaml
from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.plan import Plan
from vchitect_fast.shapes import VideoShape

ONLY_RUN_WIDE = {"out", "model", "init_from_sd3", "codec", "text_encoder", "seed"}
DECIDED_HERE = {"start_from", "resume"}  # a stage starts from the one before, and always goes on
NEEDED = ("name", "shapes", "batch", "steps")
STAGE_FIELDS = {"name", "shapes", "batch", "mesh"}  # beside those of TrainConfig
AXES = ("dp_replicate", "dp_shard", "sp")
CONFIG_FIELDS = {field.name for field in fields(TrainConfig)} - DECIDED_HERE


@dataclass(frozen=True)
class Stage:
    """One run of a recipe."""

    name: str
    shapes: tuple[VideoShape, ...]
    batch: int  # samples an optimizer step, over all ranks
    config: TrainConfig  # with its own folder, and the folder of the stage before in start_from
    mesh: dict[str, int] | None = None  # ranks by axis, all three; None takes the Plan's

    @property
    def folder(self) -> Path:
        """Where it trains into."""
        return Path(self.config.out)

    def check(self, plan: Plan) -> None:
        """UserError where the Plan is not for this stage's shapes, batch and mesh, with what to plan."""
        planned, wanted = {entry.shape for entry in plan.entries}, {str(shape) for shape in self.shapes}
        if planned != wanted:
            raise UserError(
                f"stage {self.name} has the shapes {_listed(wanted)}, its Plan {self.config.plan} {_listed(planned)}; "
                "plan these shapes with `vchitect-fast autotune`, or correct the recipe."
            )
        if self.mesh not in (None, plan.mesh):
            raise UserError(
                f"stage {self.name} has the mesh {_sizes(self.mesh)}, its Plan {self.config.plan} {_sizes(plan.mesh)}; "
                "plan with `vchitect-fast autotune --mesh`, or correct the recipe."
            )
        for entry in plan.entries:
            if (samples := samples_a_step(plan, entry.shape)) != self.batch:
                raise UserError(
                    f"stage {self.name} has batch {self.batch}, its Plan {self.config.plan} takes {samples} samples of "
                    f"{entry.shape} a step; plan with `vchitect-fast autotune --batch`, or correct the recipe."
                )


@dataclass(frozen=True)
class Recipe:
    """The stages in order."""

    out: Path
    stages: tuple[Stage, ...]

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe, then apply `name=value` (run-wide) and `stage.name=value` (of one stage) overrides."""
        values = _content(path)
        try:
            stages = {str(stage["name"]): dict(stage) for stage in values["stages"]}
            repeated = len(stages) < len(values["stages"])
        except (TypeError, KeyError, ValueError):
            stages, repeated = {}, False
        if not stages or repeated:
            raise UserError(f"stages in {path} must be a list of mappings, each with a name of its own; correct it.")
        for override in overrides:
            name, equals, text = override.partition("=")
            stage, dot, field = name.strip().rpartition(".")
            if not equals or (dot and stage not in stages):
                raise UserError(
                    f"an override of a recipe is name=value or stage.name=value, got {override!r}; stages are {', '.join(stages)}."
                )
            (stages[stage] if dot else values)[field] = read_yaml(repr(override), text)
        shared = {name: value for name, value in values.items() if name != "stages"}
        for name in shared:
            if name not in CONFIG_FIELDS:
                raise unknown_name("field of a recipe", str(name), [*CONFIG_FIELDS, "stages"])
        out = shared.get("out", TrainConfig.out)
        built: list[Stage] = []
        for number, own in enumerate(stages.values()):
            built.append(_stage(number, own, {**shared, "out": out}, built[-1].config.out if built else None))
        return cls(Path(out), tuple(built))


def is_recipe(path: str | Path) -> bool:
    """Whether a run file has stages; False as well for what cannot be read, which `TrainConfig.load` says best."""
    try:
        return "stages" in _content(path)
    except UserError:
        return False


def samples_a_step(plan: Plan, shape: str) -> int:
    """Samples an optimizer step of a planned shape has: microbatch x accumulation x data-parallel ranks."""
    entry = plan.entry(VideoShape.parse(shape)[0])
    ranks = plan.mesh.get("dp_replicate", 1) * plan.mesh.get("dp_shard", 1)
    return entry.microbatch * entry.accumulation * ranks


def _content(path: str | Path) -> dict[str, Any]:
    try:
        values = read_yaml(str(path), Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the recipe {path} ({error.strerror}); examples/ has two to start from.") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path} must hold `name: value` lines, got {type(values).__name__}; see `vchitect-fast train --help`."
        )
    return values


def _stage(number: int, own: dict[str, Any], shared: dict[str, Any], before: str | None) -> Stage:
    name = own["name"]
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise UserError(f"a stage's name is lower-case letters, digits and dashes, got {name!r}; correct it.")
    for field in own:
        if field in ONLY_RUN_WIDE:
            raise UserError(f"stage {name} sets {field}, which holds for all stages; write it above `stages`.")
        if field not in CONFIG_FIELDS and field not in STAGE_FIELDS:
            raise unknown_name(f"field of the stage {name}", str(field), (CONFIG_FIELDS - ONLY_RUN_WIDE) | STAGE_FIELDS)
    for field in NEEDED:
        if field not in own:
            raise UserError(f"stage {name} lacks {field}; add it.")
    shapes, batch = _shapes(name, own["shapes"]), own["batch"]
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise UserError(f"batch of the stage {name} must be a whole number from 1 up, got {batch!r}; correct it.")
    values = {**shared, **{field: value for field, value in own.items() if field not in STAGE_FIELDS}}
    values |= {"out": str(Path(shared["out"], f"{number + 1:02d}-{name}")), "start_from": before}
    try:
        config = TrainConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"stage {name}: {error}") from None
    if config.mixture is not None and set(config.mixture) != {str(shape) for shape in shapes}:
        raise UserError(
            f"stage {name} has the shapes {_listed(map(str, shapes))}, its mixture weighs {_listed(config.mixture)}; "
            "give every shape a weight and no other."
        )
    return Stage(
        name, shapes, batch, dataclasses.replace(config, seed=config.seed + number), _mesh(name, own.get("mesh"))
    )


def _shapes(name: str, listed: Any) -> tuple[VideoShape, ...]:
    if not isinstance(listed, list) or not listed or len(set(map(str, listed))) < len(listed):
        raise UserError(f"shapes of the stage {name} must be a list of different FxWxH, got {listed!r}; correct it.")
    shapes = []
    for text in map(str, listed):
        shape, note = VideoShape.parse(text)
        if note:  # as the Plan will name it
            raise UserError(f"stage {name} has the shape {text}, the nearest is {shape}; write that.")
        shapes.append(shape)
    return tuple(shapes)


def _mesh(name: str, sizes: Any) -> dict[str, int] | None:
    if sizes is None:
        return None
    if not isinstance(sizes, dict) or not all(type(size) is int and size > 0 for size in sizes.values()):
        raise UserError(
            f"mesh of the stage {name} must map axes to whole numbers from 1 up, got {sizes!r}; correct it."
        )
    for axis in sizes:
        if axis not in AXES:
            raise unknown_name(f"mesh axis of the stage {name}", str(axis), AXES)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def _sizes(mesh: dict[str, int] | None) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in (mesh or {}).items() if size > 1) or "of one rank"


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))
