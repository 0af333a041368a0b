"""The law of packaging: our folders exist only inside `vchitect_fast`, light imports stay light, the wheel ships nothing else.

`profiling` is a standard-library package from Python 3.15 on, so a bare `import profiling` must never find ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = ("autotune", "profiling", "curation", "benchmarks")


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that does not have the repository's root on its path."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_folders_are_importable_only_inside_the_package(tmp_path: Path) -> None:
    bare = [name for name in MAPPED if name != "profiling" or sys.version_info < (3, 15)]
    code = f"""
import importlib, importlib.util
for name in {MAPPED!r}: importlib.import_module("vchitect_fast." + name)
print([name for name in {bare!r} if importlib.util.find_spec(name)])
"""
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_bare_profiling_says_why_it_refuses() -> None:
    result = python("import profiling", ROOT, PYTHONSAFEPATH="")
    assert result.returncode == 1
    assert "hides Python's own 'profiling' package" in result.stderr


def test_light_imports_load_no_torch(tmp_path: Path) -> None:
    code = """
import sys
import vchitect_fast, vchitect_fast.cli, vchitect_fast.machine, vchitect_fast.cluster, vchitect_fast.workload
print(sorted({"torch", "numpy", "av", "diffusers", "matplotlib", "rich"} & set(sys.modules)))
"""
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_wheel_holds_only_our_package(tmp_path: Path) -> None:
    """Built as in a release, without the C++ module and without network."""
    pytest.importorskip("build")
    # From an sdist: the checkout's own build/ folder could otherwise lend files to the wheel.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    environment = {**os.environ, "VCHITECT_FAST_EXT": "0"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    [path] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        [top_level] = [wheel.read(name).decode() for name in names if name.endswith("top_level.txt")]
    assert top_level.split() == ["vchitect_fast"]
    assert all(name.startswith(("vchitect_fast/", "vchitect_fast-")) for name in names)
    for name in MAPPED:
        assert f"vchitect_fast/{name}/__init__.py" in names
    assert "vchitect_fast/py.typed" in names
    shipped = [f"vchitect_fast/clusters/{file.name}" for file in (ROOT / "vchitect_fast" / "clusters").glob("*.yaml")]
    assert len(shipped) >= 8 and [name for name in shipped if name not in names] == []
    ours = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "vchitect_fast").rglob("*.py"))
    assert [name for name in ours if name not in names] == []
