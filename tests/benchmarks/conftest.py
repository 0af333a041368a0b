"""As in tests/kernels: without a GPU the kernels are interpreted, chosen before a kernel's module is imported."""

from __future__ import annotations

from vchitect_fast.benchmarks.case import prepare_process

prepare_process()
