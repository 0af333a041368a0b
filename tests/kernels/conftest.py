"""Without a GPU the kernels run in Triton's interpreter; it must be chosen before a kernel's module is imported.

It rounds fp16 as a GPU does, but cuts fp32 to bf16 toward zero: a bf16 error is up to twice a GPU's there, and of one sign.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run here: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
