"""Memory by owner against traces written by hand, where every byte's owner is known, and against torch's own allocations.

Run: pytest tests/profiling/test_memory.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vchitect_fast.errors import UserError
from vchitect_fast.profiling.chrome import read_chrome
from vchitect_fast.profiling.memory import Owned, Part, analyse_memory, read_owned
from vchitect_fast.profiling.owners import Owners
from vchitect_fast.profiling.span import TorchSink, recording, span
from vchitect_fast.profiling.trace import Columns, Kind, Lane, Trace

MAIN = Lane("1", "1", False)
WEIGHT, INPUT, SAVED, SHORT, GRADIENT, STATE = (1000 * n for n in range(1, 7))  # addresses


def a_step(device: int = -1, totals: int = -1) -> Trace:
    """One step of 100 us: data, forward with a branch, backward, optimizer, with one allocation of every owner."""
    columns = Columns()
    for name, start, end in (
        ("step/3", 0, 100), ("data/batch", 0, 10), ("forward/model", 10, 40), ("forward/qkv", 12, 20),
        ("backward/model", 40, 80), ("optimizer/step", 80, 100),
    ):  # fmt: skip
        columns.add(Kind.SPAN, name, start, end - start, MAIN)
    for at, size, address in (
        (5, 64, INPUT), (15, 512, SAVED), (16, 32, SHORT), (18, -32, SHORT), (50, 256, GRADIENT), (60, 128, SHORT),
        (70, -512, SAVED), (75, -128, SHORT), (85, 16, STATE), (95, -256, GRADIENT), (98, -64, INPUT),
    ):  # fmt: skip
        columns.add_memory(at, size, address, totals, -1, device)
    return columns.finish("hand-made", "torch", 0)


OWNED = Owned(
    held=((WEIGHT, 256, "weights", "w"),), gradients=(((GRADIENT, 256, "gradients", "w"),),),
)  # fmt: skip


def test_every_byte_has_its_owner_and_the_peak_its_parts() -> None:
    found = analyse_memory(a_step(), OWNED)
    assert found is not None
    assert (found.peak_bytes, found.peak_us) == (256 + 64 + 512 + 256 + 128, 60)
    assert (found.peak_step, found.peak_span) == ("step/3", "backward/model")
    assert set(found.parts) == {
        Part("activations", "forward/qkv", 1, 512, ""),
        Part("weights", "", 1, 256, "w"),
        Part("gradients", "backward/model", 1, 256, "w"),
        Part("workspace", "backward/model", 1, 128, ""),
        Part("batch", "data/batch", 1, 64, ""),
    }
    assert [part.num_bytes for part in found.parts] == sorted((part.num_bytes for part in found.parts), reverse=True)
    assert found.explained() == (
        "The peak of 0.0 MiB is in backward/model of step/3: weights 0.0 MiB, gradients 0.0 MiB, batch 0.0 MiB, "
        "activations 0.0 MiB, workspace 0.0 MiB."
    )


def test_each_owner_over_time() -> None:
    found = analyse_memory(a_step(), OWNED)
    assert found is not None
    at = {
        owner: dict(zip(found.at_us.tolist(), sizes.tolist(), strict=True)) for owner, sizes in found.by_owner.items()
    }
    assert set(at["weights"].values()) == {256}
    assert (at["activations"][15], at["activations"][60], at["activations"][70]) == (512, 512, 0)
    assert (at["workspace"][16], at["workspace"][18], at["workspace"][60]) == (32, 0, 128)
    assert (at["gradients"][50], at["gradients"][95]) == (256, 0)
    assert (at["optimizer"][75], at["optimizer"][85], at["optimizer"][98]) == (0, 16, 16)


def test_without_owners_gradients_are_workspace_and_weights_are_not_there() -> None:
    found = analyse_memory(a_step())
    assert found is not None
    assert found.peak_of("gradients") == found.peak_of("weights") == 0
    assert found.peak_of("workspace") == 256 + 128


def test_a_gpu_knows_what_was_held_before() -> None:
    found = analyse_memory(a_step(device=0, totals=10_000), OWNED)
    assert found is not None and found.device == 0
    assert found.peak_of("held before") == 10_000 - 64 - 256  # before the first event, without the weight
    assert not found.notes
    on_cpu = analyse_memory(a_step(), OWNED)
    assert on_cpu is not None and on_cpu.device == -1 and "not known" in on_cpu.notes[0]


def test_memory_in_use_again_at_once_is_no_peak() -> None:
    columns = Columns()
    columns.add(Kind.SPAN, "forward/model", 0, 100, MAIN)
    for at, size, address in ((10, 100, 1), (20, -100, 1), (20, 100, 2), (30, -100, 2)):
        columns.add_memory(at, size, address)
    found = analyse_memory(columns.finish("hand-made", "torch", None))
    assert found is not None and found.peak_bytes == 100


def test_a_free_that_was_not_recorded_ends_where_the_address_is_used_again() -> None:
    columns = Columns()
    columns.add(Kind.SPAN, "forward/model", 0, 100, MAIN)
    for at, size, address in ((10, 100, 1), (20, 40, 1), (30, -7, 9)):
        columns.add_memory(at, size, address)
    found = analyse_memory(columns.finish("hand-made", "torch", None))
    assert found is not None
    assert (found.peak_bytes, found.num_unknown_frees) == (100, 1)
    assert sum(int(sizes[-1]) for sizes in found.by_owner.values()) == 40


def test_a_trace_without_memory_has_no_analysis() -> None:
    columns = Columns()
    columns.add(Kind.SPAN, "forward/model", 0, 100, MAIN)
    assert analyse_memory(columns.finish("hand-made", "torch", None)) is None


def test_real_tensors_of_a_real_trace(tmp_path: Path) -> None:
    """torch's profiler and addresses: a product that backward needs, one that it does not, and the weight's gradient."""
    layer = torch.nn.Linear(64, 32, bias=False)
    owners = Owners()
    owners.told({"model": layer})
    x = torch.randn(1000, 64)
    with torch.profiler.profile(profile_memory=True) as profiler, recording(TorchSink()):
        owners.hold()
        with span("step", 1):
            with span("forward/model"):
                y = layer(x)  # not saved
                z = y.exp()  # saved
                del y
                loss = z.sum()
                del z
            with span("backward/model"):
                loss.backward()
            with span("optimizer/step"):
                owners.see_gradients()
                layer.weight.grad = None
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    (tmp_path / "memory.json").write_text(json.dumps(owners.to_json()))
    found = analyse_memory(read_chrome(tmp_path / "trace.json"), read_owned(tmp_path / "memory.json"))
    assert found is not None
    rows = 1000 * 32 * 4
    assert set(found.by_owner["weights"].tolist()) == {64 * 32 * 4}
    assert int(found.by_owner["gradients"].max()) == 64 * 32 * 4
    assert int(found.by_owner["activations"].max()) == rows + 4  # z and the loss itself
    assert int(found.by_owner["workspace"].max()) >= rows
    assert int(found.by_owner["gradients"][-1]) == 0


@pytest.mark.parametrize(
    "text", ["", "[]", '{"held": [[1, 2]], "gradients": []}', '{"held": [[1, 2, "me", "x"]], "gradients": []}']
)
def test_a_broken_file_of_owners_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "memory-rank0.json"
    path.write_text(text)
    with pytest.raises(UserError, match="memory-rank0.json must say whose memory is whose"):
        read_owned(path)
    assert read_owned(tmp_path / "absent.json") == Owned()


def test_the_total_is_the_sum_of_what_is_alive() -> None:
    """Random blocks against counting them one by one."""
    random = np.random.default_rng(0)
    columns, alive, expected = Columns(), {}, []
    columns.add(Kind.SPAN, "forward/model", 0, 10_000, MAIN)
    for at in range(1, 500):
        if alive and random.random() < 0.5:
            address = list(alive)[random.integers(len(alive))]
            columns.add_memory(at, -alive.pop(address), address)
        else:
            address = int(random.choice([a for a in range(50, 2000) if a not in alive]))
            alive[address] = int(random.integers(1, 1000))
            columns.add_memory(at, alive[address], address)
        expected.append(sum(alive.values()))
    found = analyse_memory(columns.finish("hand-made", "torch", None))
    assert found is not None
    assert sum(found.by_owner.values()).tolist() == expected
    assert found.peak_bytes == max(expected)
