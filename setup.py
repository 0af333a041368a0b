"""Packaging that pyproject.toml cannot express: the folder mapping and the CMake build of `vchitect_fast._C`.

autotune/, profiling/, curation/ and benchmarks/ stand at the top of the repository but install inside `vchitect_fast`:
`profiling` alone would hide a package of Python 3.15. VCHITECT_FAST_EXT=0 leaves the C++ module out on purpose; a build
that fails is an error, never a silent fallback. VCHITECT_FAST_CUDA=1 builds the CUDA copier (needs nvcc; never run yet).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MAPPED = {f"vchitect_fast.{name}": name for name in ("autotune", "profiling", "curation", "benchmarks")}


def packages() -> list[str]:
    """Every package under its installed name; a bare find_packages() would ship top-level `tests` and `profiling`."""
    names = find_packages(include=["vchitect_fast", "vchitect_fast.*"])
    for target, folder in MAPPED.items():
        names += [target, *(f"{target}.{sub}" for sub in find_packages(folder))]
    return names


def cmake_command() -> str:
    """The cmake of this Python when there is one (its folder need not be on PATH), else the system's."""
    try:
        import cmake
    except ImportError:
        found = shutil.which("cmake")
        if not found:
            raise SystemExit(
                "expected CMake >= 3.24, found none; `pip install cmake`, or VCHITECT_FAST_EXT=0."
            ) from None
        return found
    return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")


class CMakeBuild(build_ext):
    """Build in a tree that persists, then copy the module to where setuptools wants it.

    Handing CMake an output folder instead would cache pip's temporary folder.
    """

    def build_extension(self, ext: Extension) -> None:
        """Configure, compile, copy."""
        import pybind11

        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = cmake_command()
        cuda = "ON" if os.environ.get("VCHITECT_FAST_CUDA") == "1" else "OFF"
        subprocess.run(
            [cmake, "-S", str(ROOT), "-B", str(tree), "-DCMAKE_BUILD_TYPE=Release", "-DVF_TESTS=OFF", "-DVF_PYTHON=ON",
             f"-DVF_CUDA={cuda}",
             f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"],
            check=True,
        )  # fmt: skip
        subprocess.run([cmake, "--build", str(tree), "--parallel"], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tree / target.name, target)


skip_extension = os.environ.get("VCHITECT_FAST_EXT") == "0"
setup(
    packages=packages(),
    package_dir=MAPPED,
    package_data={
        "vchitect_fast": ["py.typed", "*.pyi", "kernels/tuned/*.json", "clusters/*.yaml"],
        "vchitect_fast.benchmarks": ["results/*.jsonl"],
    },
    ext_modules=[] if skip_extension else [Extension("vchitect_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
