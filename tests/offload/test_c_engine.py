"""The C++ engine through its binding: bytes come back as they left, errors are Python's, threads do not disturb each other.

pytest tests/offload/test_c_engine.py; the laws inside C++ are held by csrc/tests (ctest).
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

_C = pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")

MIB = 2**20


def random_bytes(num_bytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 3 * MIB])
@pytest.mark.parametrize("alignment", [256, 4096])
def test_round_trip_is_bitwise(num_bytes: int, alignment: int) -> None:
    engine = _C.Engine(budget_bytes=4 * MIB, alignment=alignment)
    original = random_bytes(num_bytes, seed=num_bytes)
    source, target = original.copy(), np.zeros_like(original)
    ticket = engine.offload(source.ctypes.data, num_bytes)
    engine.wait(ticket)
    source[:] = 0  # the engine holds its own copy from here on
    engine.prefetch(ticket, target.ctypes.data)
    engine.wait(ticket)
    np.testing.assert_array_equal(target, original)
    engine.release(ticket)
    assert engine.stats()["num_slots"] == 0


def test_rows_leave_packed_and_come_back_packed_or_apart() -> None:
    engine = _C.Engine(budget_bytes=MIB, delay_us_max=300, seed=1)
    source = random_bytes(40 * 50, seed=3).reshape(50, 40)
    packed, apart = np.zeros((50, 24), np.uint8), np.zeros((50, 40), np.uint8)
    ticket = engine.offload(source.ctypes.data, 24, 50, 40)
    engine.prefetch(ticket, packed.ctypes.data)
    engine.prefetch(ticket, apart.ctypes.data, 40)
    engine.wait(ticket)
    np.testing.assert_array_equal(packed, source[:, :24])
    np.testing.assert_array_equal(apart[:, :24], source[:, :24])
    assert not apart[:, 24:].any() and engine.stats()["requested_bytes"] == 24 * 50
    assert engine.done(ticket)
    with pytest.raises(ValueError, match="rows must not overlap"):
        engine.offload(source.ctypes.data, 24, 50, 16)


def test_counts_bytes_copies_and_seconds_of_each_direction() -> None:
    engine = _C.Engine(budget_bytes=32 * MIB, num_threads=2)
    source = random_bytes(16 * MIB, seed=4)
    ticket = engine.offload(source.ctypes.data, source.nbytes)
    target = np.zeros_like(source)
    engine.prefetch(ticket, target.ctypes.data)
    engine.prefetch(ticket, target.ctypes.data)
    engine.wait(ticket)
    stats = engine.stats()
    assert (stats["offload_num_copies"], stats["offload_bytes"]) == (1, 16 * MIB)
    assert (stats["prefetch_num_copies"], stats["prefetch_bytes"]) == (2, 32 * MIB)
    assert 0 < stats["offload_busy_s"] < 10 and 0 < stats["prefetch_busy_s"] < 10
    assert engine.streams() == (0, 0)  # the host has none
    assert stats["setup_s"] > 0 and stats["num_setup_threads"] == 2 and 0 <= stats["huge_bytes"] <= 32 * MIB


def test_copies_a_torch_tensor() -> None:
    torch = pytest.importorskip("torch")
    engine = _C.Engine(budget_bytes=MIB)
    source = torch.randn(123, 45, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    ticket = engine.offload(source.data_ptr(), source.nbytes)
    engine.prefetch(ticket, target.data_ptr())
    engine.wait(ticket)
    engine.release(ticket)
    assert torch.equal(target.view(torch.int16), source.view(torch.int16))


def test_threads_share_one_engine() -> None:
    engine = _C.Engine(budget_bytes=16 * MIB)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for round_ in range(40):
                source = random_bytes(1 + 997 * (seed + round_), seed * 1000 + round_)
                target = np.zeros_like(source)
                ticket = engine.offload(source.ctypes.data, source.nbytes)
                engine.prefetch(ticket, target.ctypes.data)
                engine.wait(ticket)
                engine.release(ticket)
                np.testing.assert_array_equal(target, source)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = engine.stats()
    assert (stats["num_allocations"], stats["used_bytes"], stats["num_free_ranges"]) == (240, 0, 1)


def test_waiting_leaves_the_interpreter_free() -> None:
    """While one thread waits for copies that are held up, another must get to run Python."""
    engine = _C.Engine(budget_bytes=16 * MIB, delay_us_max=100_000, seed=1)
    source = np.zeros(MIB, dtype=np.uint8)
    tickets = [engine.offload(source.ctypes.data, MIB) for _ in range(8)]
    ticks, waiting = 0, threading.Event()

    def wait() -> None:
        for ticket in tickets:
            engine.wait(ticket)
        waiting.set()

    thread = threading.Thread(target=wait)
    thread.start()
    while not waiting.is_set():
        ticks += 1
        time.sleep(0.0005)
    thread.join()
    assert ticks > 5


def test_budget_error_says_what_is_needed_and_loses_nothing() -> None:
    engine = _C.Engine(budget_bytes=8192)
    source = random_bytes(8192, seed=1)
    held = engine.offload(source.ctypes.data, 4096)
    with pytest.raises(_C.BudgetError, match="4096 of 8192 bytes free.*at least 12288 bytes"):
        engine.offload(source.ctypes.data, 8192)
    target = np.zeros(4096, dtype=np.uint8)
    engine.prefetch(held, target.ctypes.data)
    engine.wait(held)
    np.testing.assert_array_equal(target, source[:4096])
    assert engine.stats()["high_water_bytes"] == 4096


def test_dead_tickets_are_refused() -> None:
    engine = _C.Engine(budget_bytes=4096)
    source = random_bytes(10, seed=2)
    ticket = engine.offload(source.ctypes.data, source.nbytes)
    engine.release(ticket)
    with pytest.raises(_C.TicketError, match=f"ticket {ticket} was released already"):
        engine.release(ticket)
    with pytest.raises(_C.TicketError, match="never given out"):
        engine.wait(ticket + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_bytes": 0}, "positive multiple of 4096"),
        ({"budget_bytes": 5000}, "positive multiple of 4096"),
        ({"budget_bytes": 4096, "alignment": 64}, "256 or 4096"),
        ({"budget_bytes": 4096, "chunk_bytes": 100}, "chunk that is a positive multiple of 4096"),
        ({"budget_bytes": 4096, "without": "luck"}, "after, wait or done"),
        ({"budget_bytes": 4096, "cuda": True, "delay_us_max": 5}, "no delays"),
    ],
)
def test_rejected_pools(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.Engine(**arguments)


def test_rejected_addresses() -> None:
    engine = _C.Engine(budget_bytes=4096)
    with pytest.raises(ValueError, match="null pointer"):
        engine.offload(0, 16)
    with pytest.raises(ValueError, match="at least 1 byte"):
        engine.offload(np.zeros(1).ctypes.data, 0)


def test_build_info_tells_how_it_was_built() -> None:
    info = _C.build_info()
    assert set(info) == {"compiler", "flags", "sanitize", "cuda"}
    assert info["compiler"] and "-std=c++17" in info["flags"]
    if not info["cuda"]:
        with pytest.raises(ValueError, match="no CUDA copier; build with VCHITECT_FAST_CUDA=1"):
            _C.Engine(budget_bytes=4096, cuda=True)
