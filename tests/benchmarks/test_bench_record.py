"""A Record comes back as it was written, runs that share a file do not mix, and nothing else is taken for a Record.

pytest tests/benchmarks/test_bench_record.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_record import RECORD

from vchitect_fast.benchmarks.record import append, latest, load, origin, results_file
from vchitect_fast.errors import UserError


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.jsonl"
    later = replace(RECORD, median_s=1.6e-3)
    other = replace(RECORD, direction="backward", error_vs_fp64=None)
    for record in (RECORD, other, later):
        append(path, record)
    assert load(path) == [RECORD, other, later]
    assert latest(load(path)) == {RECORD.key: later, other.key: other}
    assert path.read_text().count("\n") == 3 and json.loads(path.read_text().splitlines()[0])["rate"] == 88.5


def test_processes_that_share_a_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "shared.jsonl"
    code = (
        "import sys, json; from vchitect_fast.benchmarks.record import Record, append\n"
        f"record = Record.from_line({RECORD.to_line()!r}, '')\n"
        "for _ in range(200): append(sys.argv[1], record)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=tmp_path) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert load(path) == [RECORD] * 400


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 1 of .* is not JSON"),
        ('{"bench": "cross"}', "line 1 of .* is not a Record .*missing"),
        (RECORD.to_line().replace('"rate"', '"speed"'), "is not a Record .*'speed'"),
        (replace(RECORD).to_line().replace('"n": 20', '"n": 0'), "needs samples and p10 <= median <= p90"),
        (RECORD.to_line().replace("0.00175", "0.00145"), "needs samples and p10 <= median <= p90"),
        ("[1, 2]", "is not a Record"),
    ],
)
def test_anything_else_is_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=message):
        load(path)


def test_a_file_that_is_not_there_is_the_users(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read .*No such file"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="could not write .*; choose another place with --out"):
        append(tmp_path, RECORD)


def test_origin_names_versions_and_no_place() -> None:
    import platform

    import torch

    found = origin("vchitect-fast bench --quick")
    assert found.torch == torch.__version__ and found.command == "vchitect-fast bench --quick"
    fields = (found.machine, found.device, found.commit or "")
    assert not any(platform.node() in field or str(Path.cwd()) in field for field in fields)
    assert results_file("NVIDIA H100 80GB HBM3").as_posix() == "benchmarks/results/nvidia-h100-80gb-hbm3.jsonl"
