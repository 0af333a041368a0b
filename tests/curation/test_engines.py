"""Engines: the same outcomes from local processes and from Ray, whatever tasks and workers do; the same tables from both.

Ray is started once for the module. pytest tests/curation/test_engines.py
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from curated import CHEAP, carphone, clips, copy, curate, quarantine
from made_up_stage import MadeUp, MadeUpReader
from made_up_task import MadeUpBatch, MadeUpTask
from real_video import bikes, truncate

from vchitect_fast.curation.engines import ATTEMPTS, Engine, Outcome
from vchitect_fast.curation.engines.local import LocalEngine

NAMES = ["local", "ray"]


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    started: dict[str, Engine] = {}
    yield started
    for engine in started.values():
        engine.close()


def started(name: str, engines: dict[str, Engine]) -> Engine:
    if name not in engines:
        if name == "ray":
            pytest.importorskip("ray.data", reason="Ray is not installed; pip install 'vchitect-fast[ray]'")
            from vchitect_fast.curation.engines.ray import RayEngine

            with pytest.MonkeyPatch.context() as patch:  # Ray's workers find modules by it
                patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
                engines[name] = RayEngine(None, 2)
        else:
            engines[name] = LocalEngine(2)
    return engines[name]


@pytest.fixture
def engine(request: pytest.FixtureRequest, engines: dict[str, Engine]) -> Engine:
    return started(request.param, engines)


def by_number(outcomes: Iterator[Outcome]) -> dict[Any, Outcome]:
    found: dict[Any, Outcome] = {}
    for outcome in outcomes:
        key = outcome.task.number if isinstance(outcome.task, MadeUpTask) else outcome.task
        assert key not in found, "a task ends once"
        found[key] = outcome
    return found


@pytest.mark.parametrize("engine", NAMES, indirect=True)
def test_every_task_ends_once_however_its_worker_does(engine: Engine, tmp_path: Path) -> None:
    def task(number: int, how: str, times: int = 1_000_000) -> MadeUpTask:
        return MadeUpTask(number, how, str(tmp_path / f"{number}"), times)

    tasks: list[Any] = [MadeUpTask(k) for k in range(8)]
    tasks[2:2] = [task(20, "raise"), task(21, "bad"), task(22, "die"), task(23, "raise", 1), task(24, "die", 2)]
    found = by_number(engine.run(iter(tasks)))
    assert found.keys() == {*range(8), 20, 21, 22, 23, 24}
    assert {k: (found[k].value, found[k].reason, found[k].attempts) for k in range(8)} == {
        k: (k, None, 1) for k in range(8)
    }
    assert (found[20].reason, found[20].attempts) == ("RuntimeError: mistake 20", ATTEMPTS)
    assert (found[21].reason, found[21].attempts) == ("bad 21", 1), "trying again is no use"
    assert (found[22].value, found[22].attempts) == (None, ATTEMPTS)
    assert str(found[22].reason).startswith("the worker died")
    assert (found[23].value, found[23].reason, found[23].attempts) == (23, None, 2)
    assert (found[24].value, found[24].reason, found[24].attempts) == (24, None, 3)
    runs = {k: len((tmp_path / str(k)).read_text().split()) for k in range(20, 25)}
    assert runs == {20: ATTEMPTS, 21: 1, 22: ATTEMPTS, 23: 2, 24: 3}


@pytest.mark.parametrize("engine", NAMES, indirect=True)
@pytest.mark.parametrize("how", ["raise", "bad", "die"])
def test_a_batch_that_fails_is_tried_in_its_parts(engine: Engine, how: str) -> None:
    batch = MadeUpBatch((MadeUpTask(1), MadeUpTask(2, how), MadeUpTask(3)))
    whole = MadeUpBatch((MadeUpTask(4), MadeUpTask(5)))
    found = by_number(engine.run([batch, whole]))
    assert found.keys() == {1, 2, 3, whole}
    assert [found[1].value, found[3].value, found[whole].value] == [1, 3, [4, 5]]
    assert found[2].reason
    assert found[2].attempts == (1 if how == "bad" else ATTEMPTS)


def tables(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Clips in order, and quarantine in any; only the local engine knows by which signal a worker died."""
    rows = clips(folder)
    bad = quarantine(folder)
    for row in (*rows, *bad):
        row["reason"] = row["reason"] and row["reason"].replace(" (signal 9)", "")
    return rows, sorted(bad, key=lambda row: (row["path"], row["clip"] or ""))


def test_both_engines_give_the_same_tables(engines: dict[str, Engine], tmp_path: Path) -> None:
    """Real clips, a duplicate, a truncated file, a clip that kills its worker and one that raises."""
    paths = [
        bikes(),
        carphone(),
        copy(carphone(), tmp_path / "again.mp4", 1),
        truncate(bikes(), tmp_path / "cut.mp4", 0.5),
    ]
    log = str(tmp_path / "log")
    curate(tmp_path / "plain", paths)
    ids = [row["clip"] for row in clips(tmp_path / "plain")]
    assert len(ids) == 8
    stages = (MadeUp(log, dies_at=ids[1], raises_at=ids[3]), MadeUpReader(log))
    for name in NAMES:
        curate(tmp_path / name, paths, *stages, overrides=("text=off", *CHEAP[2:]), engine=started(name, engines))
    rows, bad = tables(tmp_path / "local")
    assert (rows, bad) == tables(tmp_path / "ray")
    assert [row["clip"] for row in bad if row["clip"]] == sorted([ids[1], ids[3]])
    assert len(bad) == 3
    assert sum(row["kept"] for row in rows) == 5


def test_local_workers_are_reused_and_end_with_the_engine() -> None:
    engine = LocalEngine(2)
    assert sorted(outcome.value for outcome in engine.run(MadeUpTask(k) for k in range(9))) == list(range(9))
    before = {worker.process.pid for worker in engine._workers}
    assert len(before) == 2
    assert len(list(engine.run(MadeUpTask(k) for k in range(9)))) == 9
    assert {worker.process.pid for worker in engine._workers} == before
    engine.close()
    assert not any(psutil.pid_exists(pid) for pid in before)


def test_a_task_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import vchitect_fast.curation.engines.local as local

    monkeypatch.setattr(local, "TASK_LIMIT_S", 0.5)
    # `wait` returns at the latest after this; the test need not.
    monkeypatch.setattr(local, "wait", lambda things, timeout: time.sleep(0.1))
    engine = LocalEngine(1)
    began = time.monotonic()
    found = by_number(engine.run([MadeUpTask(1, "hang"), MadeUpTask(2)]))
    engine.close()
    assert (found[1].reason, found[1].attempts, found[2].value) == ("no result within 0 s", ATTEMPTS, 2)
    assert time.monotonic() - began < 30


def test_the_server_that_starts_workers_may_be_killed_too() -> None:
    engine = LocalEngine(2)
    outcomes = engine.run(MadeUpTask(k, "die" if k in (3, 6) else "well") for k in range(9))
    found = [next(outcomes)]
    server = psutil.Process(engine._workers[0].process.pid).parent()
    assert server
    assert server.pid != os.getpid()
    server.kill()
    found += outcomes
    engine.close()
    assert sorted(outcome.value for outcome in found if outcome.value is not None) == [0, 1, 2, 4, 5, 7, 8]


def test_a_start_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = LocalEngine(1), [EOFError("unexpected EOF"), ConnectionRefusedError(), None]
    start = multiprocessing.context.ForkServerProcess.start

    def failing(process: Any) -> None:
        if error := calls.pop(0):
            raise error
        start(process)

    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start", failing)
    assert [outcome.value for outcome in engine.run([MadeUpTask(1)])] == [1]
    engine.close()
    assert not calls


def test_workers_that_cannot_begin_are_said_and_blamed_on_no_task(tmp_path: Path) -> None:
    """A script without the guard of its main module: the workers would run it themselves."""
    (tmp_path / "script.py").write_text(
        "from made_up_task import MadeUpTask\n"
        "from vchitect_fast.curation.engines.local import LocalEngine\n"
        "for outcome in LocalEngine(1).run([MadeUpTask(1)]):\n"
        "    print('an outcome', outcome)\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])},
    )  # fmt: skip
    assert "an outcome" not in done.stdout
    last = done.stderr.splitlines()[-1]
    assert "UserError: worker processes end before they begin (exit code 1), as said above; a script must" in last


def test_workers_end_when_their_driver_is_killed_in_the_middle_of_a_task(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.append({str(Path(__file__).parent.parent)!r})\n"
        "from made_up_task import MadeUpTask\n"
        "from vchitect_fast.curation.engines.local import LocalEngine\n"
        f"list(LocalEngine(2).run([MadeUpTask(k, 'hang', {str(tmp_path / 'log')!r}) for k in range(2)]))\n"
    )
    driver = subprocess.Popen([sys.executable, "-P", "-c", code])
    while not (tmp_path / "log").exists() or len((tmp_path / "log").read_text().split()) < 2:
        assert driver.poll() is None
        time.sleep(0.05)
    family = psutil.Process(driver.pid).children(recursive=True)
    assert len(family) >= 4, "a server, a tracker and two workers"
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, left = psutil.wait_procs(family, timeout=15)
    for process in left:
        process.kill()
    assert not left
