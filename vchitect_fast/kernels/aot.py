"""Compile every kernel for sm_80, sm_90 and sm_100 on a machine without a GPU, and read what it takes.

    python -m vchitect_fast.kernels.aot [--json] [--cc 90] [--op bias_gelu]
Prints registers, spilled bytes and shared memory of each variant and fails where one does not compile, spills or does not
fit. It says nothing about speed. An op joins by its row in OPS and its `aot_variants()`, which name the shipped tiles at the
released model's sizes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import _check

OPS = [
    "adaln",
    "bias_gelu",
    "cross",
    "fp8_rows",
    "gated_residual",
    "gated_weight",
    "spatial",
    "temporal",
]
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # CUDA programming guide, per thread block
THREADS_PER_WARP = 32


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel; a type is Triton's, with ":16" behind it where the value is a multiple of 16."""

    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]  # of every argument that is not a constexpr; a tuple for a tuple
    constexprs: dict[str, Any]
    num_warps: int
    label: str
    num_stages: int = 1
    first_cc: int = 80  # where its types exist


@dataclass(frozen=True)
class Usage:
    """What a compiled variant takes; spilled counts the stack, which holds nothing else in these kernels."""

    label: str
    cc: int
    num_registers: int
    spilled_bytes: int  # per thread
    shared_bytes: int  # per program
    num_warps: int

    def problem(self) -> str:
        """Why this variant must not be shipped, or nothing."""
        if self.shared_bytes > (limit := SHARED_LIMIT_BYTES[self.cc]):
            return f"{self.label} on sm_{self.cc}: {self.shared_bytes} bytes of shared memory, at most {limit}"
        if self.spilled_bytes and self.cc == 90:
            return f"{self.label} on sm_{self.cc}: {self.spilled_bytes} bytes a thread are spilled"
        return ""


def pointers(dtype: str, *names: str) -> dict[str, str]:
    """Signature entries name_ptr of one element type: pointers("bf16:16", "x") is {"x_ptr": "*bf16:16"}."""
    return {f"{name}_ptr": f"*{dtype}" for name in names}


def compile_variant(variant: Variant, cc: int) -> Usage:
    """Compile for one compute capability (80, 90, 100) and read the cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    types = {name: variant.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=variant.kernel,
        signature={name: _bare(kind) for name, kind in types.items()},
        constexprs=variant.constexprs,
        attrs={path: [["tt.divisibility", 16]] for i, name in enumerate(names) for path in _multiples(i, types[name])},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, THREADS_PER_WARP), options=options)
    num_registers, stack_bytes = _resources(compiled.asm["cubin"])
    return Usage(variant.label, cc, num_registers, stack_bytes, compiled.metadata.shared, variant.num_warps)


def _bare(kind: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """A type without its ":16"."""
    return tuple(one.removesuffix(":16") for one in kind) if isinstance(kind, tuple) else kind.removesuffix(":16")


def _multiples(i: int, kind: str | tuple[str, ...]) -> list[tuple[int, ...]]:
    """Paths to the values of argument i that are multiples of 16."""
    if isinstance(kind, tuple):
        return [(i, j) for j, one in enumerate(kind) if one.endswith(":16")]
    return [(i,)] if kind.endswith(":16") else []


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as the cuobjdump that comes with Triton reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def compile_all(ops: Iterable[str], capabilities: Iterable[int]) -> list[Usage]:
    """Every variant of the named ops for every capability."""
    if _check.interpreted():
        raise UserError(
            "expected TRITON_INTERPRET to be unset, got 1: an interpreted kernel cannot be compiled; unset it."
        )
    variants = [v for op in ops for v in importlib.import_module(f"vchitect_fast.kernels.{op}").aot_variants()]
    return [compile_variant(variant, cc) for variant in variants for cc in capabilities if cc >= variant.first_cc]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 where a variant must not be shipped."""
    parser = argparse.ArgumentParser(description="Compile all kernels ahead of time, without a GPU.")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("--cc", type=int, nargs="+", choices=sorted(SHARED_LIMIT_BYTES), help="default: all")
    parser.add_argument("--op", nargs="+", choices=OPS, help="default: all")
    args = parser.parse_args(arguments)
    try:
        usages = compile_all(args.op or OPS, args.cc or sorted(SHARED_LIMIT_BYTES))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    problems = [problem for usage in usages if (problem := usage.problem())]
    if args.json:
        print(json.dumps([asdict(usage) for usage in usages], indent=1))
    else:
        _print_table(usages)
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


def _print_table(usages: list[Usage]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("variant", "sm", "warps", "registers", "spilled bytes", "shared bytes")
    for usage in usages:
        numbers = (usage.cc, usage.num_warps, usage.num_registers, usage.spilled_bytes, usage.shared_bytes)
        table.add_row(usage.label, *map(str, numbers))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
