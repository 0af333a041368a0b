"""Copies that the probe times move real bytes, ranks wait for each other, and contention is seen where there is some.

pytest tests/autotune/test_probe_host_link.py; no time is compared with an expectation of a machine.
"""

from __future__ import annotations

import threading
import time

import pytest
import torch

from vchitect_fast.autotune.probe import contention, host_link
from vchitect_fast.autotune.probe.clock import several, summary
from vchitect_fast.autotune.probe.host_link import CudaCopies, EngineCopies
from vchitect_fast.errors import UserError
from vchitect_fast.parallel.mesh import ALONE

SIZE = 2**14


@pytest.mark.parametrize(("out", "back"), [(True, False), (False, True), (True, True)])
def test_the_engine_moves_the_bytes_that_are_timed(out: bool, back: bool) -> None:
    copies = EngineCopies(SIZE)
    copies._target.zero_()
    before = copies._engine.stats()
    assert copies.seconds(out, back, 3) > 0
    after = copies._engine.stats()
    assert after["offload_bytes"] - before["offload_bytes"] == 3 * SIZE * out
    assert after["prefetch_bytes"] - before["prefetch_bytes"] == 3 * SIZE * back
    assert after["num_slots"] == before["num_slots"]  # every slot that was taken is given back
    assert torch.equal(copies._target, torch.full((SIZE,), int(back), dtype=torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize(("out", "back"), [(True, False), (False, True), (True, True)])
def test_cuda_copies_move_the_bytes(out: bool, back: bool) -> None:
    copies = CudaCopies(SIZE, torch.device("cuda", torch.cuda.current_device()))
    copies._on_host[0].zero_()
    copies._on_device[1].zero_()
    assert copies.seconds(out, back, 3) > 0
    assert int(copies._on_host[0].sum()) == SIZE * out
    assert int(copies._on_device[1].sum()) == SIZE * back


class Stepping:
    """Copies that take as long as the size says: 1 ms and a GB a second, half of it both ways."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def seconds(self, out: bool, back: bool, calls: int) -> float:
        return 1e-3 + self.num_bytes / (0.5e9 if out and back else 1e9)


def test_links_say_what_the_copies_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_link, "open_copies", lambda num_bytes, device: Stepping(num_bytes))
    advanced: list[int] = []
    links = host_link.measure_host_link(ALONE, (10**6, 10**7, 10**8), 2**20, "made up", lambda: advanced.append(1))
    assert len(advanced) == 7
    for link in links:
        assert link.latency_s == pytest.approx(1e-3)
        assert link.bytes_per_s == pytest.approx(1e9)
        assert link.both_ways_bytes_per_s == pytest.approx(1e8 / (1e-3 + 1e8 / 0.5e9))
        assert link.seconds(10**7) == pytest.approx(11e-3)


def test_a_cpu_without_the_module_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UserError("offload needs the C++ module and it is not there")

    monkeypatch.setattr(host_link, "Engine", refuse)
    with pytest.raises(UserError, match="needs the C"):
        host_link.measure_host_link(ALONE, (SIZE,), SIZE, "made up", lambda: None)


class Product:
    """Takes twice as long while the other work runs."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.busy = threading.Event()

    def seconds(self) -> float:
        time.sleep(2e-3)
        return 2.0 if self.busy.is_set() else 1.0


@pytest.mark.parametrize(("slows", "ratio"), [(True, 2.0), (False, 1.0)])
def test_contention_is_the_ratio_beside_the_work(slows: bool, ratio: float) -> None:
    product = Product()

    def work() -> None:
        if slows:
            product.busy.set()
        time.sleep(0.3)

    assert contention._ratio(ALONE, product, 1.0, work) == ratio  # type: ignore[arg-type]


def test_a_product_that_is_quicker_beside_the_work_is_noise() -> None:
    assert contention._ratio(ALONE, Product(), 5.0, lambda: time.sleep(0.1)) == 1.0  # type: ignore[arg-type]


def test_too_little_beside_the_work_is_not_measured() -> None:
    assert contention._ratio(ALONE, Product(), 1.0, lambda: None) is None  # type: ignore[arg-type]


def test_an_error_of_the_work_is_raised() -> None:
    def work() -> None:
        raise UserError("no copy today")

    with pytest.raises(UserError, match="no copy today"):
        contention._ratio(ALONE, Product(), 1.0, work)  # type: ignore[arg-type]


def test_beside_copies_is_measured() -> None:
    """Copies that last as long as asked for: enough products fit beside them."""

    class Lasting:
        def seconds(self, out: bool, back: bool, calls: int) -> float:
            start = time.perf_counter()
            time.sleep(2e-3 * calls)
            return (time.perf_counter() - start) / calls

    assert contention.beside_copies(ALONE, Lasting(), 512) is not None


def test_repeats() -> None:
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0]).median_s == 3.0
    assert summary([1.0] * 9 + [9.0]).spread == 0.0  # the tenth is an outlier
    times = iter([100.0, 1.0, 2.0, 3.0])
    found = several(lambda: next(times), 3)  # the first call connects and is not counted
    assert (found.median_s, found.number) == (2.0, 3)
