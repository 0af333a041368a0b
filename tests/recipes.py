"""Recipes of the nano model on real clips, with made-up Plans: for tests of running them and of dry runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from real_video import bikes_clips

from vchitect_fast.architecture import preset
from vchitect_fast.machine import this_device
from vchitect_fast.manifest import write_manifest
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction

NANO = preset("vchitect-nano")


def plan_of(path: Path, *shapes: str, step_s: tuple[float, ...] = (1.0,), peak_gib: float = 1.0, **change: Any) -> Path:
    """A Plan of the shapes for the nano model on this machine, two samples a step; nothing of it was measured."""
    entries = tuple(
        PlanEntry(
            shape=shape,
            policy=(Policy.keep(),) * NANO.num_layers,
            microbatch=2,
            accumulation=1,
            predicted=Prediction(seconds, {"forward_s": seconds}, peak_gib, {}, "made up for a test"),
        )
        for shape, seconds in zip(shapes, step_s * len(shapes) if len(step_s) == 1 else step_s, strict=True)
    )
    here = this_device()
    values = {
        "model": NANO.fingerprint(),
        "device": here.fingerprint(),
        "device_name": here.name,
        "num_text_tokens": 16,
    }
    values |= {"compute_dtype": "float32", "device_threads": here.num_threads, "device_gib": here.memory_gib, **change}
    Plan(entries=entries, **values).save(path)
    return path


def write_recipe(folder: Path, **change: Any) -> Path:
    """recipe.yaml of three stages with Plans and six real clips, everything in the folder."""
    write_manifest(bikes_clips(), folder / "clips.jsonl")
    plan_of(folder / "image.json", "1x32x16")
    plan_of(folder / "short.json", "4x32x16")
    plan_of(folder / "long.json", "12x32x16", "8x32x16")
    shared = {
        "out": str(folder / "out"), "model": "vchitect-nano", "manifest": str(folder / "clips.jsonl"),
        "cache": str(folder / "cache"), "learning_rate": 1e-2, "warmup_steps": 0, "ema_decay": 0.9, "validate_every": 0,
        "save_every": 5,
    }  # fmt: skip
    stages = [
        {"name": "image", "shapes": ["1x32x16"], "batch": 2, "steps": 12, "plan": str(folder / "image.json")},
        {"name": "short", "shapes": ["4x32x16"], "batch": 2, "steps": 8, "plan": str(folder / "short.json")},
        {"name": "long", "shapes": ["12x32x16", "8x32x16"], "batch": 2, "steps": 6, "plan": str(folder / "long.json")},
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**shared, **change, "stages": stages}, sort_keys=False))
    return path


def edited(path: Path, stage: int | None, **change: Any) -> Path:
    """The recipe with fields of a stage (or run-wide ones) changed; None takes a field out."""
    values = yaml.safe_load(path.read_text())
    target = values if stage is None else values["stages"][stage]
    for name, value in change.items():
        target[name] = value
        if value is None:
            del target[name]
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
