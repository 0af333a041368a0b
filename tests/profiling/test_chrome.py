"""Reading PyTorch's traces: what is in them arrives in the columns, and what is no trace is refused in one sentence."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_trace import document, event, launched, op, span, write, write_big
from torch.profiler import ProfilerActivity, profile, record_function

from vchitect_fast.errors import UserError
from vchitect_fast.profiling import chrome
from vchitect_fast.profiling.chrome import read_chrome
from vchitect_fast.profiling.trace import Kind

EVENTS = [
    span("step/0", 0, 100),
    op("aten::mm", 5, 10, **{"Input Dims": [[2, 3], [3, 4]], "Input type": ["float", "float"], "Sequence number": 7}),
    op("MmBackward0", 50, 10, tid=2, **{"Sequence number": 7, "Fwd thread id": 1}),
    *launched(31, 7, 'sgemm<"a\nb}, {">', 20, 30, External_id=4),
    *launched(32, 60, "Memcpy DtoH (Device -> Pinned)", 65.5, 20.25, 9, "gpu_memcpy", bytes=4096),
    event("gpu_memset", "Memset (Device)", 90, 1, 9, bytes=8),
    event("python_function", "forward", 0, 100),
    {"ph": "s", "id": 1, "pid": 1, "tid": 1, "ts": 1.0, "cat": "fwdbwd", "name": "fwdbwd"},
    {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 1, "tid": 1, "ts": event("", "", 8, 0)["ts"],
     "args": {"Bytes": -64, "Addr": 77, "Device Type": 1, "Device Id": 0, "Total Allocated": 128, "Total Reserved": 256}},
]  # fmt: skip


def rows(trace: object) -> list[tuple[object, ...]]:
    t = trace
    return [
        (Kind(k), t.names[n], round(s, 3), d, t.lanes[la].thread, c, b)
        for k, n, s, d, la, c, b in zip(
            t.kind, t.name, t.start_us.tolist(), t.dur_us.tolist(), t.lane, t.correlation, t.bytes, strict=True
        )
    ]


def test_every_event_arrives_with_its_time_lane_and_ids(tmp_path: Path) -> None:
    trace = read_chrome(write(tmp_path / "t.json", EVENTS, distributedInfo={"rank": 3}))
    assert rows(trace) == [
        (Kind.SPAN, "step/0", 0, 100, "1", -1, -1),
        (Kind.OP, "aten::mm", 5, 10, "1", -1, -1),
        (Kind.RUNTIME, "cudaLaunchKernel", 7, 2, "1", 31, -1),
        (Kind.KERNEL, 'sgemm<"a\nb}, {">', 20, 30, "7", 31, -1),
        (Kind.OP, "MmBackward0", 50, 10, "2", -1, -1),
        (Kind.RUNTIME, "cudaMemcpyAsync", 60, 2, "1", 32, -1),
        (Kind.COPY, "Memcpy DtoH (Device -> Pinned)", 65.5, 20.25, "9", 32, 4096),
        (Kind.FILL, "Memset (Device)", 90, 1, "9", -1, 8),
    ]
    assert trace.rank == 3 and trace.tool == "torch" and trace.has_device
    assert trace.sequence.tolist() == [-1, 7, -1, -1, 7, -1, -1, -1] and trace.backward.tolist()[4] == 1
    assert trace.external.tolist()[3] == 4 and trace.shapes == ("([[2, 3], [3, 4]], ['float', 'float'])",)
    memory = trace.memory
    assert (memory.bytes.tolist(), memory.address.tolist(), memory.device.tolist()) == ([-64], [77], [0])
    assert (memory.allocated_bytes.tolist(), memory.reserved_bytes.tolist()) == ([128], [256])
    assert memory.at_us[0] == pytest.approx(8, abs=1e-3)


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 1000])
@pytest.mark.parametrize("form", ["object", "lines", "array", "open array", "events last", "gz"])
def test_where_the_pieces_are_cut_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int, form: str
) -> None:
    whole = rows(read_chrome(write(tmp_path / "whole.json", EVENTS)))
    monkeypatch.setattr(chrome, "PIECE_BYTES", piece_bytes)
    path = tmp_path / "t.json"
    text = {
        "object": json.dumps({**document(EVENTS), "after": {"traceEvents": [1]}}),
        "lines": json.dumps(document(EVENTS), indent=2),
        "array": json.dumps(EVENTS),
        "open array": json.dumps(EVENTS)[:-1] + ",\n",
        "events last": json.dumps({"a": [{}, {}], **document(EVENTS)}),
        "gz": json.dumps(document(EVENTS)),
    }[form]
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if form == "gz" else text.encode())
    assert rows(read_chrome(path)) == whole


def test_the_rank_of_the_file_name_counts_where_the_trace_has_none(tmp_path: Path) -> None:
    assert read_chrome(write(tmp_path / "trace-rank12.json", EVENTS)).rank == 12
    assert read_chrome(write(tmp_path / "trace.json", EVENTS)).rank is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; record it again"),
        (b"\x89PNG\r\n\x1a\n", 'must be a Chrome trace (JSON with "traceEvents"), it is not; name a trace'),
        (b'{"nodes": []}', 'must be a Chrome trace (JSON with "traceEvents"), it is not; name a trace'),
        (b'{"a": nonsense, "traceEvents": []}', "is not JSON before its events"),
        (b'{"traceEvents": []}', "must have events of PyTorch's profiler (cpu_op, kernel), its categories are: none"),
        (b'{"traceEvents": [{"ph": "X", "cat": "blink", "ts": 1, "dur": 1}]}', "its categories are: blink; name"),
        (gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 40, "cannot read the trace"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_chrome(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the trace .*No such file"):
        read_chrome(tmp_path / "none.json")


def test_a_cut_off_file_is_refused_wherever_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chrome, "PIECE_BYTES", 300)
    text = json.dumps(document(EVENTS)).encode()
    path = tmp_path / "t.json"
    for end in range(text.index(b"[") + 1, len(text), 7):
        path.write_bytes(text[:end])
        with pytest.raises(UserError, match="ends in the middle, after [0-9]+ events; record it again"):
            read_chrome(path)
    packed = gzip.compress(text, mtime=0)
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match="ends in the middle"):
        read_chrome(path)


def test_a_garbled_file_is_refused_with_the_place(tmp_path: Path) -> None:
    text = json.dumps(document(EVENTS * 3))
    middle = text.index("cudaLaunchKernel")
    (tmp_path / "t.json").write_text(text[:middle] + '" oops ' + text[middle:])
    with pytest.raises(UserError, match="is not JSON after its first 0 events .*char"):
        read_chrome(tmp_path / "t.json")


def test_hostile_values_do_no_harm(tmp_path: Path) -> None:
    hostile = [
        op("ok", 0, 1),
        {"ph": "X", "cat": "cpu_op", "name": None, "ts": "yesterday", "dur": 1},
        {"ph": "X", "cat": "cpu_op", "name": "no time", "args": []},
        {"ph": "X", "cat": "cpu_op", "name": "NaN", "ts": float("nan"), "dur": 1},
        {"ph": "X", "cat": ["cpu_op"], "name": "list", "ts": 1, "dur": 1},
        {**op("odd", 2, -5), "args": {"External id": 2**80, "correlation": "x", "bytes": [1]}},
        17,
        None,
    ]
    assert rows(read_chrome(write(tmp_path / "t.json", hostile))) == [
        (Kind.OP, "ok", 0, 1, "1", -1, -1),
        (Kind.OP, "odd", 2, 0, "1", -1, -1),
    ]


def test_a_trace_that_torch_profiler_writes(tmp_path: Path) -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profiler:
        with record_function("forward/mlp"):
            loss = (torch.randn(4, 8) @ weight).sum()
        loss.backward()
    profiler.export_chrome_trace(str(tmp_path / "t.json"))
    trace = read_chrome(tmp_path / "t.json")
    names = np.array(trace.names)[trace.name]
    assert "forward/mlp" in names[trace.where(Kind.SPAN)] and {"aten::mm", "MmBackward0"} <= set(names)
    forward, backward = np.flatnonzero(names == "aten::mm")[0], np.flatnonzero(names == "MmBackward0")[0]
    assert trace.sequence[forward] == trace.sequence[backward] >= 0
    assert not trace.backward[forward] and trace.backward[backward]
    assert not trace.has_device and trace.memory.bytes.sum() != 0
    assert any("[4, 8], [8, 8]" in shapes for shapes in trace.shapes)


@pytest.mark.soak
@pytest.mark.parametrize("on_gpu", [True, False])
def test_half_a_gigabyte_is_analysed_within_a_minute_and_two_gibibytes(tmp_path: Path, on_gpu: bool) -> None:
    path = tmp_path / "big.json"
    num_events = write_big(path, 500 * 10**6, on_gpu=on_gpu)
    code = (
        "import json, resource, sys, time\n"
        "from vchitect_fast.profiling.analysis import analyse\n"
        "from vchitect_fast.profiling.reading import read_traces\n"
        "[trace] = read_traces(sys.argv[1])\n"
        "[rank] = analyse([trace]).ranks\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "print(json.dumps([len(trace) + len(trace.memory), len(rank.steps), time.process_time(), peak]))"
    )
    # A process of its own, so that its peak is that of the analysis. CPU time: the wall belongs to whoever shares it.
    result = subprocess.run([sys.executable, "-P", "-c", code, str(path)], capture_output=True, text=True, check=True)
    events, num_steps, cpu_s, peak_bytes = json.loads(result.stdout)
    print(f"{path.stat().st_size / 1e6:.0f} MB, {events} events: {cpu_s:.1f} s of CPU, {peak_bytes / 2**30:.2f} GiB")
    assert events == num_events and num_steps > 100
    assert cpu_s < 60 and peak_bytes < 2 * 2**30
