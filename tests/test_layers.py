"""The law of docs/design.md: imports point down only. The table below is that page's table; a new file needs a row, a row a file.

pytest tests/test_layers.py; every import counts, also one inside a function.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "vchitect_fast"
FOLDERS = {
    PACKAGE: PACKAGE,
    **{f"{PACKAGE}.{name}": name for name in ("autotune", "profiling", "curation", "benchmarks")},
}

# The longest name that fits decides; a package's row holds for what is in it.
LAYERS = {
    4: "train step recipe_run recipe_report dry_run resume carry validate train_console sample export quickstart report memory memory_picture doctor tune cli benchmarks",
    3: "parallel.apply checkpoint checkpoint_writer data metrics",
    2: "model parallel offload.hooks ema optimizer video buckets schedule cache",
    1: "kernels attention offload",
    0: "errors files page members webdataset clips shapes architecture workload cluster cluster_yaml machine config plan recipe manifest offload.policy _C profiling.span profiling.kinds",
}
NOT_BUILT: list[str] = []  # as that page says
LAYER_OF = {f"{PACKAGE}.{name}": layer for layer, names in LAYERS.items() for name in names.split()} | {PACKAGE: 0}

# Packages beside the layers: the highest layer each may import. probe and verify run the model, so they may see it.
SIDE = {
    "autotune": 0, "autotune.probe": 3, "autotune.verify": 4, "curation": 0,
    "profiling": 1, "profiling.session": 4, "profiling.command": 4, "profiling.records": 4,
}  # fmt: skip
SIDE_OF = {f"{PACKAGE}.{name}": layer for name, layer in SIDE.items()}

NO_TORCH = {0}  # layers whose modules do not import torch when they are imported
FORBIDDEN = [  # (importer, imported), each with what lies below it
    ("kernels", "offload", "kernels and offload do not know each other"),
    ("offload", "kernels", "kernels and offload do not know each other"),
    ("kernels", "kernels.reference", "an optimized op must not lean on its definition"),
    ("train", "autotune", "train takes a Plan"),
]
DISPATCH = f"{PACKAGE}.kernels.ops"  # impl="reference": the one place beside the definition that knows it


def sources() -> dict[str, str]:
    """Dotted name -> text of every module of ours."""
    found = {}
    for name, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path.read_text()
    return found


def row(module: str, table: dict[str, int]) -> str | None:
    """The table's row for a module: itself or its nearest parent, but the bare package only for itself."""
    parts = module.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts), 1, -1)]
    return next((name for name in names if name in table), PACKAGE if module == PACKAGE and module in table else None)


def within(module: str, name: str) -> bool:
    return f"{module}.".startswith(f"{PACKAGE}.{name}.")


def imports(module: str, text: str, is_package: bool, known: set[str]) -> list[tuple[str, bool]]:
    """(dotted name, runs on import) of everything a module imports."""
    tree = ast.parse(text)
    inner = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(scope)
    }
    typing = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    found = []
    for node in ast.walk(tree):
        eager = id(node) not in inner | typing
        if isinstance(node, ast.Import):
            found += [(alias.name, eager) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append(
                    (
                        full if full in known or row(full, LAYER_OF) == full or row(full, SIDE_OF) == full else base,
                        eager,
                    )
                )
    return found


def violations(modules: dict[str, str]) -> list[str]:
    """One line for each import that points up, sideways where it must not, or loads torch in layer 0."""
    found = []
    for module, text in modules.items():
        is_package = any(other.startswith(module + ".") for other in modules)
        own, side = row(module, LAYER_OF), row(module, SIDE_OF)
        if side and not (own and len(own) > len(side)):
            allowed = SIDE_OF[side]
        elif own:
            allowed = LAYER_OF[own]
        else:
            found.append(f"{module} has no layer: give it a row in tests/test_layers.py and docs/design.md")
            continue
        for name, eager in imports(module, text, is_package, set(modules)):
            if name == "torch" or name.startswith("torch."):
                if eager and own and LAYER_OF[own] in NO_TORCH:
                    found.append(f"{module} (layer 0) imports {name}")
                continue
            if not within(name + ".", "") and not name.startswith(PACKAGE):
                continue
            for importer, imported, why in FORBIDDEN:
                if within(module, importer) and within(name, imported) and module not in (name, DISPATCH):
                    found.append(f"{module} imports {name}: {why}")
            target, target_side = row(name, LAYER_OF), row(name, SIDE_OF)
            if target is None and target_side:
                same = module.split(".")[1:2] == name.split(".")[1:2]
                if not same and allowed < 4:
                    found.append(f"{module} (layer {allowed}) imports {name}, which stands beside the layers")
            elif target and LAYER_OF[target] > allowed:
                found.append(f"{module} (layer {allowed}) imports {name} (layer {LAYER_OF[target]})")
    return found


def without_file(names: list[str]) -> list[str]:
    """Rows of nothing that is there."""
    stems = (
        [ROOT / name.replace(".", "/") for name in names],
        [ROOT / PACKAGE / name.replace(".", "/") for name in names],
    )
    return sorted(
        name
        for name, *places in zip(names, *stems, strict=True)
        if not any(stem.with_suffix(end).exists() for stem in places for end in ("", ".py", ".pyi"))
    )


def test_every_row_has_its_file() -> None:
    rows = [name for names in LAYERS.values() for name in names.split()]
    assert without_file([*rows, *SIDE]) == NOT_BUILT
    assert without_file(["train", "latent_cache", "autotune.probe", "_C", "model"]) == ["latent_cache"]


def test_imports_point_down() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        ("shapes", "import vchitect_fast.model", "layer 0) imports vchitect_fast.model (layer 2"),
        ("shapes", "from vchitect_fast import train", "layer 0) imports vchitect_fast.train (layer 4"),
        (
            "model.blocks",
            "def f():\n    from vchitect_fast.data import Batch",
            "layer 2) imports vchitect_fast.data (layer 3",
        ),
        ("model.blocks", "from .. import sample", "layer 2) imports vchitect_fast.sample (layer 4"),
        ("plan", "import torch", "layer 0) imports torch"),
        ("kernels.adaln", "from vchitect_fast.kernels.reference import adaln", "must not lean on its definition"),
        ("kernels.adaln", "from vchitect_fast.offload import engine", "do not know each other"),
        ("train", "from vchitect_fast.autotune.search import plan", "train takes a Plan"),
        ("data", "import vchitect_fast.curation.store", "beside the layers"),
        (
            "autotune.search",
            "from vchitect_fast.model import VchitectTransformer",
            "layer 0) imports vchitect_fast.model",
        ),
        ("curation.store", "from vchitect_fast.autotune import search", "beside the layers"),
        ("novelty", "", "has no layer"),
    ],
)
def test_a_planted_violation_is_found(module: str, text: str, expected: str) -> None:
    [line] = violations({f"{PACKAGE}.{module}": text})
    assert expected in line


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("train", "from vchitect_fast.plan import Plan\nimport torch"),
        ("machine", "def f():\n    import torch"),
        ("autotune.probe", "import vchitect_fast.model"),
        ("autotune.command", "from vchitect_fast.autotune.probe import probe"),
        ("kernels.ops", "from vchitect_fast.kernels import reference"),
        ("model.blocks", "from .embed import PatchEmbed"),
        ("quickstart", "from vchitect_fast.autotune.command import run"),
    ],
)
def test_what_is_allowed_stays_allowed(module: str, text: str) -> None:
    assert violations({f"{PACKAGE}.{module}": text}) == []
