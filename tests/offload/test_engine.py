"""The engine of tensors: views come back as they were, a storage moves once, what cannot be moved is refused by name.

pytest tests/offload/test_engine.py
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from offloading import MIB, assert_no_leaks

from vchitect_fast.errors import UserError
from vchitect_fast.offload.engine import Engine, Handle

pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")


def base() -> torch.Tensor:
    return torch.randn(6, 8, 10)


VIEWS = {
    "whole": lambda x: x,
    "transposed": lambda x: x.permute(2, 0, 1),
    "expanded": lambda x: x[:, :1].expand(-1, 50, -1),
    "slice of the last dim": lambda x: x[..., 2:5],
    "rows": lambda x: x[1:3],
    "every third row": lambda x: x[::3],
    "one column, not packable": lambda x: x[:, 1:4, 3],
    "other dtype": lambda x: x.view(torch.int32),
    "overlapping": lambda x: x.flatten().as_strided((5, 4), (2, 1)),
    "scalar": lambda x: x[2, 3, 4],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("in_flight_bytes", [0, MIB], ids=["moved", "still in flight"])
def test_a_view_comes_back_bitwise(name: str, in_flight_bytes: int) -> None:
    engine = Engine(MIB, max_in_flight_bytes=in_flight_bytes, delay_us_max=200)
    view = VIEWS[name](base())
    expected = view.clone()
    handle = engine.offload(view, name).handle(view)
    del view
    back = engine.restore(handle)
    assert torch.equal(back, expected) and back.dtype == expected.dtype
    del handle, back
    assert_no_leaks(engine)


def test_a_small_view_of_a_large_storage_is_packed_and_a_large_one_takes_it_along() -> None:
    engine, x = Engine(MIB), base()
    small, large = x[..., 2:5], x[..., :8]
    assert engine.offload(small, "small").num_bytes == small.numel() * 4
    assert engine.offload(large, "large").num_bytes == x.numel() * 4


def test_views_and_aliases_of_a_storage_move_once() -> None:
    engine, x = Engine(MIB), base()
    entries = [engine.offload(view, "x") for view in (x, x.permute(2, 1, 0), x.detach(), x.view(-1), x[1:])]
    assert len({id(entry) for entry in entries}) == 1
    engine.settle()  # copies count when they are done
    assert engine.stats()["offload_num_copies"] == 1 and engine.stats()["num_slots"] == 1
    handles = [entries[0].handle(view) for view in (x, x.t() if x.ndim == 2 else x.permute(2, 1, 0))]
    restored = [engine.restore(handle) for handle in handles]
    assert restored[0].data_ptr() == restored[1].data_ptr()
    assert engine.stats()["prefetch_num_copies"] == 1


def test_a_dead_storage_is_never_taken_for_a_new_one_at_its_address() -> None:
    """R12's other half: memory is reused at once, a key made of addresses would hand back old bytes."""
    engine = Engine(8 * MIB, max_in_flight_bytes=0)
    held, addresses = [], []
    for value in range(5000):  # as a rule the second has the address of the first
        x = torch.full((100,), float(value))
        addresses.append(x.data_ptr())
        held.append((engine.offload(x, "x").handle(x), value))
        del x
        if value > 50 and len(set(addresses)) < len(addresses):
            break
    assert len(set(addresses)) < len(addresses), "no address was used twice: the test shows nothing"
    for handle, value in held:
        assert (engine.restore(handle) == value).all()


def test_memory_is_freed_when_the_copy_out_is_done_and_not_before() -> None:
    engine = Engine(MIB, max_in_flight_bytes=MIB, delay_us_max=20000, seed=3)
    x = base()
    alive = weakref.ref(x.untyped_storage())
    source = x.untyped_storage().data_ptr()
    entry = engine.offload(x, "x")
    handle = entry.handle(x)
    assert entry.source is not None and entry.source.data_ptr() == source
    del x
    engine.mover.wait(entry.ticket)
    engine._drop_sources()
    assert entry.source is None and alive() is None
    del entry, handle
    assert_no_leaks(engine)


def test_more_than_the_allowed_bytes_are_never_in_flight() -> None:
    engine = Engine(MIB, max_in_flight_bytes=10_000, delay_us_max=2000)
    handles = []
    for _ in range(30):
        x = torch.randn(1000)
        handles.append(engine.offload(x, "x").handle(x))
        del x
        assert engine.stats()["in_flight_bytes"] <= 10_000
    del handles


def test_what_is_wanted_before_it_left_is_not_copied_back() -> None:
    engine = Engine(MIB, delay_us_max=50000, seed=1)
    x = base()
    handle = engine.offload(x, "x").handle(x)
    engine.fetch(handle.entry)
    engine.settle()  # the copy out is done by now, and the source still there
    assert engine.restore(handle).data_ptr() == x.data_ptr()
    assert engine.stats()["prefetch_num_copies"] == 0
    del handle
    assert_no_leaks(engine)


def test_a_change_after_saving_is_an_error_that_names_the_group() -> None:
    for in_flight_bytes in (0, MIB):
        engine, x = Engine(MIB, max_in_flight_bytes=in_flight_bytes), base()
        handle = engine.offload(x, "qkv of block 3").handle(x)
        x.view(-1)[0] += 1  # through a view
        with pytest.raises(UserError, match="qkv of block 3 was changed in place after it was saved"):
            engine.restore(handle)
        again = engine.offload(x, "qkv of block 3").handle(x)  # the new value is another entry
        assert torch.equal(engine.restore(again), x)


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.randn(3).as_subclass(Sub), "plain strided tensor, got Sub"),
        (torch.randn(3).to_sparse(), "layout torch.sparse_coo"),
        (torch.randn(3, dtype=torch.complex64).conj(), "plain strided tensor"),
        (torch.empty(3, device="meta"), "expected a tensor on cpu, got one on meta"),
        (torch.empty(0), "has no bytes"),
    ],
)
def test_refuses_by_name(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=f"cannot offload mlp_pre.*{message}"):
        Engine(MIB).offload(tensor, "mlp_pre")


def test_a_budget_too_small_says_how_much_is_needed_and_loses_nothing() -> None:
    engine, x, y = Engine(4096), torch.randn(700), torch.randn(700)
    handle = engine.offload(x, "x").handle(x)
    with pytest.raises(UserError, match="no room to offload y: .* give it at least 5632 bytes"):
        engine.offload(y, "y")
    assert torch.equal(engine.restore(handle), x)
    del handle
    assert_no_leaks(engine)
    assert isinstance(engine.offload(y, "y").handle(y), Handle)  # there is room again


def test_a_pool_larger_than_memory_is_refused_before_anything_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vchitect_fast.offload.engine.available_memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match="pool needs 4096 bytes .* of main memory 1000 are free"):
        Engine(4096)


def test_a_gpu_needs_the_cuda_copier() -> None:
    from vchitect_fast import _C

    if _C.build_info()["cuda"]:
        pytest.skip("this build has the CUDA copier")
    with pytest.raises(UserError, match="VCHITECT_FAST_CUDA=1"):
        Engine(4096, "cuda")


def test_handles_that_die_in_any_order_give_everything_back() -> None:
    engine = Engine(MIB, delay_us_max=500)
    handles = []
    for i in range(200):
        x = torch.randn(1 + 7 * i)
        handles.append(engine.offload(x, "x").handle(x))
        if i % 3 == 0:
            engine.fetch(handles[-1].entry)
        if i % 5 == 0:
            engine.restore(handles[i // 2 % len(handles)])
        if len(handles) > 40:
            del handles[i % 40]
    del handles
    gc.collect()
    assert_no_leaks(engine)
