"""The Ray engine: the same tasks as a Ray Data pipeline, on a cluster or on a Ray that is started on this machine.

Every node must reach the videos by the same paths or URLs and have this package installed; results come back to the driver,
which alone writes the curation folder, so that no file system need be shared. A task whose worker died, or
that failed for no reason of its input, is tried again and split as by the local engine.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterable, Iterator
from typing import Any

from vchitect_fast.curation.engines import ATTEMPTS, Outcome, Task, attempt
from vchitect_fast.curation.engines.local import WORKERS_A_GPU
from vchitect_fast.errors import UserError

ROUND = 4096  # tasks of one dataset, so that an iterator of tasks is not held in memory whole


class RayEngine:
    """`address` of a running cluster, "auto", or None to start one here; `num_workers` tasks at once (None: one a core)."""

    name = "ray"

    def __init__(self, address: str | None = None, num_workers: int | None = None) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise UserError(f"--engine ray needs Ray Data ({error}); pip install 'vchitect-fast[ray]'.") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(
                    address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    include_dashboard=False if address is None else None,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"no Ray cluster answers at {address} ({error}); start it, or leave --ray-address out."
                ) from None
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # a task whose worker died leaves its row out; the others go on
        self._ray, self.num_workers = ray, num_workers

    def run(self, tasks: Iterable[Task], num_workers: int | None = None, *, gpu: bool = False) -> Iterator[Outcome]:
        """Outcomes as they come."""
        waiting: list[tuple[Task, int]] = []
        source = iter(tasks)
        while True:
            while len(waiting) < ROUND and (task := next(source, None)) is not None:
                waiting.append((task, 1))
            if not waiting:
                return
            again: list[tuple[Task, int]] = []
            for number, (kind, value, cpu_s) in self._round([task for task, _ in waiting], num_workers, gpu):
                task, tried = waiting[number]
                if kind == "stillborn":
                    raise UserError(
                        f"a node of the Ray cluster cannot load the work ({value}); install the same package there."
                    )
                if kind == "value":
                    yield Outcome(task, value, None, tried, cpu_s)
                elif smaller := task.split():  # which part it was is not known
                    again += [(part, 1) for part in smaller]
                elif kind == "bad" or tried == ATTEMPTS:
                    yield Outcome(task, None, value, tried)
                else:
                    again.append((task, tried + 1))
            waiting = again

    def close(self) -> None:
        """Leave the cluster, or end the one that was started here."""
        if self._started:
            self._ray.shutdown()

    def _round(
        self, tasks: list[Task], num_workers: int | None, gpu: bool
    ) -> Iterator[tuple[int, tuple[str, Any, float]]]:
        """Each task once, as a row of its own: (number, result)."""
        limit = num_workers or self.num_workers
        rows = [{"number": k, "task": pickle.dumps(task)} for k, task in enumerate(tasks)]
        dataset = self._ray.data.from_items(rows, override_num_blocks=len(rows))
        compute = self._ray.data.TaskPoolStrategy(size=limit)
        missing = set(range(len(rows)))
        share = 1 / WORKERS_A_GPU if gpu and self._ray.cluster_resources().get("GPU") else 0
        # No retries of Ray's own: it would start a task for ever that kills its worker.
        for row in dataset.map(_attempt, num_cpus=1, num_gpus=share, max_retries=0, compute=compute).iter_rows():
            missing.discard(row["number"])
            yield row["number"], pickle.loads(row["result"])
        for number in sorted(missing):
            yield number, ("error", "the worker died", 0.0)


def _attempt(row: dict[str, Any]) -> dict[str, Any]:
    try:
        result = attempt(pickle.loads(row["task"]))
    except (ImportError, AttributeError) as error:
        result = ("stillborn", str(error), 0.0)
    return {"number": row["number"], "result": pickle.dumps(result)}
