"""A forward and backward that is cut over ranks equals one process: losses, every gradient, every way to cut.

pytest tests/parallel/test_sequence.py
"""

from __future__ import annotations

import pytest
from ranks import ranks
from sequence_cases import SPECS, Case

TOLERANCE = 1e-10  # of the largest number of a gradient, in fp64


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_cut_equals_one_process(num_ranks: int) -> None:
    """S = 6 and N = 5 that 2 or 3 do not divide, three frames and an image, one sample and two."""
    cases = [Case(spec, B=B, T=T) for spec in SPECS.values() for B, T in ((1, 3), (2, 1), (2, 4))]
    worst = ranks(num_ranks).run("sequence_cases:equal", cases)[0]
    assert len(worst) == len(cases)
    for case, (error, name) in zip(cases, worst, strict=True):
        assert error < TOLERANCE, (case, name, error)
