"""A SQLite export as Nsight Systems writes it: the tables of NVIDIA's "SQLite Export Schema Reference" that profiling reads.

Rows come as tuples in the order of each table's columns below; texts are put into StringIds. Times are nanoseconds.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROCESS = 77 << 24  # globalPid of process 77; PROCESS + 11 is the globalTid of its thread 11

SCHEMA = """
CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
  streamId INTEGER NOT NULL, correlationId INTEGER, demangledName INTEGER NOT NULL, globalPid INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
  streamId INTEGER NOT NULL, correlationId INTEGER, copyKind INTEGER NOT NULL, globalPid INTEGER, bytes INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
  streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, bytes INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, globalTid INTEGER,
  correlationId INTEGER, nameId INTEGER NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, text TEXT, textId INTEGER,
  globalTid INTEGER);
"""


def export(
    path: Path,
    kernels: Iterable[tuple[Any, ...]] = (),
    copies: Iterable[tuple[Any, ...]] = (),
    fills: Iterable[tuple[Any, ...]] = (),
    calls: Iterable[tuple[Any, ...]] = (),
    ranges: Iterable[tuple[Any, ...]] = (),
) -> Path:
    """Write the database; returns its path."""
    strings: dict[str, int] = {}

    def numbered(row: tuple[Any, ...], column: int) -> tuple[Any, ...]:
        text = row[column]
        number = None if text is None else strings.setdefault(text, len(strings) + 1)
        return (*row[:column], number, *row[column + 1 :])

    database = sqlite3.connect(path)
    database.executescript(SCHEMA)
    for table, rows, column in (
        ("CUPTI_ACTIVITY_KIND_KERNEL", kernels, 5),
        ("CUPTI_ACTIVITY_KIND_MEMCPY", copies, None),
        ("CUPTI_ACTIVITY_KIND_MEMSET", fills, None),
        ("CUPTI_ACTIVITY_KIND_RUNTIME", calls, 4),
        ("NVTX_EVENTS", ranges, 4),
    ):
        for row in rows:
            values = row if column is None else numbered(row, column)
            database.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", values)
    database.executemany("INSERT INTO StringIds VALUES (?, ?)", [(n, text) for text, n in strings.items()])
    database.commit()
    database.close()
    return path
