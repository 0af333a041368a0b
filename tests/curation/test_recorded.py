"""The engine that records: what its traces hold, that it changes no outcome, and NVTX ranges under Nsight Systems.

pytest tests/curation/test_recorded.py; a short real clip, tasks in this process. Worker processes: test_curate_command.py.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from curated import CHEAP, Here, carphone, curate
from made_up_task import MadeUpTask

from vchitect_fast.curation.engines import Outcome
from vchitect_fast.curation.engines.recorded import UNDER_NSYS, RecordedEngine
from vchitect_fast.errors import UserError
from vchitect_fast.profiling.analysis import analyse
from vchitect_fast.profiling.reading import read_traces, trace_files

WITH_PROXY = [word for word in CHEAP if word != "aesthetic_proxy=off"]  # a stage that looks at frames
SIGNALS = {"curate/length", "curate/static", "curate/looks", "curate/motion", "curate/signature"}


class FakeNvtx:
    """The package, as far as NvtxSink asks: notes the messages of ranges that begin."""

    def __init__(self) -> None:
        self.pushed: list[str] = []

    def get_domain(self, name: str) -> FakeNvtx:
        return self

    def get_event_attributes(self, message: str, **_: Any) -> str:
        return message

    def push_range(self, message: str) -> None:
        self.pushed.append(message)

    def pop_range(self) -> None:
        pass


def outcomes(engine: Any, *tasks: MadeUpTask) -> list[Outcome]:
    with closing(engine):
        return [replace(outcome, cpu_s=0.0) for outcome in engine.run(tasks)]


def test_a_curation_is_the_same_and_its_decoding_and_stages_are_in_the_trace(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces/trace-rank7.json.gz").write_text("of an earlier run with more workers")
    engine = RecordedEngine(Here(), tmp_path / "traces")
    with closing(engine):
        recorded = curate(tmp_path / "a", [carphone()], engine=engine, overrides=WITH_PROXY)
    plain = curate(tmp_path / "b", [carphone()], overrides=WITH_PROXY)
    assert recorded == plain
    [path] = trace_files(tmp_path / "traces")
    [trace] = read_traces(path)
    [rank] = analyse([trace]).ranks
    [step] = rank.steps
    times = {item.name: item for item in step.by_span}
    assert times.keys() >= SIGNALS | {
        "curate/probe",
        "curate/shots",
        "curate/stitch",
        "curate/aesthetic_proxy",
        "curate/flow",
    }
    assert times["curate/signals"].num_calls == 120  # a frame each; the end of the file is one more turn of the decoder
    assert times["data/decode"].num_calls == 120 + 1 + 1  # and the judges' frames of the one clip
    assert {lane.thread for lane in trace.lanes} == {"MainThread", "decode", "flow_0"}
    assert step.attributed == 1 and 0 < step.compute_us <= step.wall_us
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {event["ph"] for event in events} == {"X"} and min(event["ts"] for event in events) >= 0
    assert rank.rank == 0 and len(rank.notes) == 1 and "Spans alone" in rank.notes[0]


def test_what_fails_comes_out_as_it_would_without(tmp_path: Path) -> None:
    tasks = [MadeUpTask(1), MadeUpTask(2, "bad"), MadeUpTask(3, "raise")]
    assert outcomes(RecordedEngine(Here(), tmp_path), *tasks) == outcomes(Here(), *tasks)
    assert list(tmp_path.iterdir()) == []  # no span, no trace


def test_a_run_that_is_stopped_leaves_whole_traces(tmp_path: Path) -> None:
    class Stopped(Here):
        def run(self, *args: Any, **how: Any) -> Any:
            yield from super().run(*args, **how)
            raise KeyboardInterrupt

    engine = RecordedEngine(Stopped(), tmp_path / "traces")
    with pytest.raises(KeyboardInterrupt), closing(engine):
        curate(tmp_path / "a", [carphone()], engine=engine)
    [path] = trace_files(tmp_path / "traces")
    assert "curate/probe" in read_traces(path)[0].names


def test_under_nsight_systems_the_spans_are_nvtx_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNDER_NSYS, "/of/nsys/libToolsInjection64.so")
    monkeypatch.setitem(sys.modules, "nvtx", fake := FakeNvtx())
    with closing(RecordedEngine(Here(), None)) as engine:
        curate(tmp_path / "a", [carphone()], engine=engine)
    assert set(fake.pushed) >= {"curate/probe", "data/decode", "curate/signals", "curate/motion"}
    assert not list(tmp_path.glob("**/trace-*"))
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(UserError, match="pip install 'vchitect-fast"):
        RecordedEngine(Here(), None)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write traces to"):
        RecordedEngine(Here(), tmp_path / "file")


def test_workers_load_no_torch_for_their_spans() -> None:
    code = "import vchitect_fast.curation.engines.recorded, vchitect_fast.curation.tasks, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True).stdout == "False\n"
