"""What every test gets: two threads, fixed seeds, and GPU tests skipped with the reason where there is no GPU."""

from __future__ import annotations

import glob
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
from ranks import stop_all

# Before torch is first imported: its thread pools read these once.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "2")
# Threads that wait sleep instead of spinning: beside another busy process a spinning pair loses 8 ms at every operation.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Before triton is first imported, by whatever test: its own library is made for the GPU or the interpreter then.
# Where the device files of a GPU have other names (WSL), say TRITON_INTERPRET=0, as `make gpu` does.
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA GPU, torch sees none"


LONG = ("test_quickstart.py", "test_thousand_steps.py")  # begun first, so that no process ends long after the other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _no_gpu() if marked else ""
    for item in marked if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _ranks_end_with_the_file() -> Iterator[None]:
    yield
    stop_all()
