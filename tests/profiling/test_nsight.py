"""Reading Nsight Systems' SQLite exports, on databases made here after NVIDIA's schema reference; foreign ones are refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from made_up_nsight import PROCESS, export

from vchitect_fast.errors import UserError
from vchitect_fast.profiling.nsight import read_nsight
from vchitect_fast.profiling.trace import Kind, Trace

KERNEL = (1_000_000, 1_030_000, 0, 7, 31, "gemm<float>", PROCESS)


def rows(trace: Trace) -> list[tuple[object, ...]]:
    return [
        (Kind(k), trace.names[n], s, d, trace.lanes[la].thread, c, b)
        for k, n, s, d, la, c, b in zip(
            trace.kind, trace.name, trace.start_us.tolist(), trace.dur_us.tolist(), trace.lane,
            trace.correlation.tolist(), trace.bytes.tolist(), strict=True,
        )
    ]  # fmt: skip


def test_every_table_arrives(tmp_path: Path) -> None:
    path = export(
        tmp_path / "run-rank2.sqlite",
        kernels=[KERNEL],
        copies=[(1_010_000, 1_020_500, 0, 9, 32, 2, PROCESS, 4096)],
        fills=[(1_050_000, 1_051_000, 0, 7, 33, PROCESS, 8)],
        calls=[(990_000, 992_000, PROCESS + 11, 31, "cudaLaunchKernel_v7000")],
        ranges=[
            (980_000, 1_100_000, 59, "step/0", None, PROCESS + 11),
            (985_000, 995_000, 60, None, "forward/mlp", PROCESS + 11),
            (986_000, 994_000, 59, "aten::mm, seq = 12, op_id = 3, sizes = [[2, 2]]", None, PROCESS + 11),
            (986_000, None, 34, "a mark", None, PROCESS + 11),
            (986_000, None, 75, "vchitect_fast", None, PROCESS + 11),
        ],
    )
    [trace] = read_nsight(path)
    assert rows(trace) == [
        (Kind.SPAN, "step/0", 0, 120, "11", -1, -1),
        (Kind.SPAN, "forward/mlp", 5, 10, "11", -1, -1),
        (Kind.OP, "aten::mm", 6, 8, "11", -1, -1),
        (Kind.RUNTIME, "cudaLaunchKernel", 10, 2, "11", 31, -1),
        (Kind.KERNEL, "gemm<float>", 20, 30, "7", 31, -1),
        (Kind.COPY, "Memcpy DtoH", 30, 10.5, "9", 32, 4096),
        (Kind.FILL, "Memset", 70, 1, "7", 33, 8),
    ]
    assert (trace.tool, trace.rank, trace.sequence.max()) == ("nsys", 2, 12)


def test_each_process_is_a_trace_of_its_own(tmp_path: Path) -> None:
    other = 78 << 24
    path = export(tmp_path / "two.sqlite", kernels=[KERNEL, (*KERNEL[:6], other), (*KERNEL[:6], other)])
    traces = read_nsight(path)
    assert [(trace.source, len(trace)) for trace in traces] == [
        ("two.sqlite (process 77)", 1),
        ("two.sqlite (process 78)", 2),
    ]


def test_a_table_or_a_column_that_this_nsys_does_not_write_is_no_error(tmp_path: Path) -> None:
    call = (990_000, 992_000, PROCESS + 11, 31, "cudaLaunchKernel_v7000")
    path = export(tmp_path / "t.sqlite", kernels=[KERNEL], calls=[call])
    with sqlite3.connect(path) as database:
        database.execute("ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN globalPid")
        database.execute("DROP TABLE CUPTI_ACTIVITY_KIND_MEMCPY")
    [trace] = read_nsight(path)
    assert rows(trace) == [
        (Kind.RUNTIME, "cudaLaunchKernel", 0, 2, "11", 31, -1),
        (Kind.KERNEL, "gemm<float>", 10, 30, "7", 31, -1),
    ]


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    for content, message in (
        (b"", "must be a SQLite export of Nsight Systems, it is not; name a file that `nsys export"),
        (b"\0nsys-rep", "must be a SQLite export"),
        (b"SQLite format 3\0" + b"x" * 200, "is damaged or of another kind"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_nsight(path)
        assert message in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(UserError, match="must be a SQLite export"):
        read_nsight(tmp_path / "none.sqlite")


def test_foreign_empty_and_cut_off_databases_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE people (name TEXT)")
    with pytest.raises(UserError, match="is a database without the table StringIds of Nsight Systems"):
        read_nsight(foreign)
    with pytest.raises(UserError, match="has no CUDA and no NVTX events; record with"):
        read_nsight(export(tmp_path / "empty.sqlite"))
    whole = export(tmp_path / "t.sqlite", kernels=[KERNEL] * 5000).read_bytes()
    (tmp_path / "cut.sqlite").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged or of another kind"):
        read_nsight(tmp_path / "cut.sqlite")
