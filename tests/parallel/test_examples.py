"""The examples that bring diffusers' models into shards: two ranks take the steps of one process.

pytest tests/parallel/test_examples.py
"""

from __future__ import annotations

import example_cases
import pytest
import torch
from ranks import ranks

from vchitect_fast.parallel.mesh import ALONE


@pytest.mark.parametrize("name", ["diffusers_transformer", "diffusers_unet"])
def test_two_ranks_take_the_steps_of_one_process(name: str) -> None:
    expected = example_cases.losses(name, ALONE)
    assert len(set(expected)) == example_cases.STEPS
    for found in ranks(2).run("example_cases:losses_on", name):
        # diffusers computes norms and embeddings in fp32, whatever the model's dtype
        assert found == pytest.approx(expected, rel=example_cases.STEPS * torch.finfo(torch.float32).eps, abs=0)
