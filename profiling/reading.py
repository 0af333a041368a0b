"""Opens what people have: PyTorch's traces and Nsight Systems' exports, told apart by their first bytes, not their names.

    read_traces(path)    the Traces in one file: one, or one a process of a SQLite export
A report of Nsight Systems that was not exported (.nsys-rep) is refused with the command that exports it.
"""

from __future__ import annotations

from pathlib import Path

from vchitect_fast.errors import UserError
from vchitect_fast.profiling.chrome import read_chrome
from vchitect_fast.profiling.nsight import is_sqlite, read_nsight
from vchitect_fast.profiling.trace import Trace


def read_traces(path: str | Path) -> list[Trace]:
    """Every process in the file; UserError where it is absent, broken, cut off, empty, or neither kind of trace."""
    path = Path(path)
    if path.suffix in (".nsys-rep", ".qdrep"):
        raise UserError(
            f"{path} must be exported first; run `nsys export --type sqlite {path.name}` and name that file."
        )
    return read_nsight(path) if is_sqlite(path) else [read_chrome(path)]


def trace_files(place: str | Path) -> list[Path]:
    """The file itself, or every trace in a profile's folder, by rank; UserError for a folder without any."""
    place = Path(place)
    if not place.is_dir():
        return [place]
    found = [file for end in (".json.gz", ".json", ".sqlite") for file in place.glob(f"*rank*{end}")]
    traces = [file for file in found if not file.name.startswith("memory-")]
    if not traces:
        raise UserError(f"{place} must hold traces of `vchitect-fast profile`, it holds none; name the trace itself.")
    return sorted(traces, key=lambda file: (file.suffix, int("0" + "".join(filter(str.isdigit, file.name)))))
