"""Without a GPU the kernels run in Triton's interpreter, which tests/conftest.py chooses before triton is imported.

It rounds fp16 as a GPU does, but cuts fp32 to bf16 toward zero: a bf16 error is up to twice a GPU's there, and of one sign.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run here: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
