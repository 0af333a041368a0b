"""The block in chunks: the same outputs and gradients to 1e-10 in fp64, and nothing wide at full length.

pytest tests/model/test_chunks.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from close import relative_error
from offloading import INPUT, MIB, NANO, NUM_BLOCKS, assert_no_leaks, gradients, make_inputs, make_model, work_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vchitect_fast.errors import UserError
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.model.blocks import Branches
from vchitect_fast.model.chunks import chunked_block
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.plan import Policy

RELATIVE_ERROR = 1e-10  # asked for in fp64; only the order of sums differs


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each tensor by itself. Some are zero but for rounding: softmax does not change with the bias of all keys."""
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, wanted in expected.items():
        if wanted.norm() > torch.finfo(torch.float64).eps * whole:
            assert relative_error(found[name], wanted) < RELATIVE_ERROR, name
        else:
            assert found[name].norm() <= torch.finfo(torch.float64).eps * whole, name


@pytest.mark.parametrize("num_chunks", [2, 3, 100])
@pytest.mark.parametrize("shape", ["5x32x48", "1x32x32"])
@pytest.mark.parametrize("policy", [Policy.keep(), Policy.recompute()], ids=["keep", "recompute"])
def test_gradients_are_those_of_the_whole_block(num_chunks: int, shape: str, policy: Policy) -> None:
    model, inputs = make_model(dtype=torch.float64), make_inputs(work_of(shape))
    expected_out, expected = model(*inputs), gradients(model, inputs)
    model.set_policy([policy] * NUM_BLOCKS)
    model.set_chunks(num_chunks)
    assert relative_error(model(*inputs), expected_out) < RELATIVE_ERROR
    assert_equal(gradients(model, inputs), expected)


@pytest.mark.parametrize("off", ["spatial", "temporal", "cross"])
def test_branches_that_are_off_stay_off(off: str) -> None:
    torch.manual_seed(0)
    model = VchitectTransformer(NANO, replace(Branches(), **{off: False})).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    inputs = make_inputs(work_of())
    expected = gradients(model, inputs)
    model.set_chunks(2)
    assert_equal(gradients(model, inputs), expected)


class Largest(TorchDispatchMode):
    """The most elements of any op's output."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, torch.Tensor):
                self.num = max(self.num, item.numel())
        return out


def test_nothing_wider_than_a_row_exists_at_full_length() -> None:
    config, B, T, S, N = NANO, 1, 8, 24, 5
    D, rows = config.hidden_dim, 1 * 8 * (24 + 5)
    block = make_model().transformer_blocks[0]
    x, c = (torch.randn(B, T, length, D, requires_grad=True) for length in (S, N))
    backend = {"spatial": "sdpa", "temporal": "sdpa", "cross": "sdpa"}
    largest = {}
    for num_chunks in (1, 8):
        with Largest() as mode:
            out = chunked_block(block, x, c, torch.randn(B, D), backend=backend, num_chunks=num_chunks)
            (out[0].sum() + out[1].sum()).backward()
        largest[num_chunks] = mode.num
    assert largest[1] >= 4 * D * T * S  # the hidden layer of the MLP
    assert largest[8] <= D * rows


def test_with_block_inputs_offloaded() -> None:
    from vchitect_fast.offload.engine import Engine

    pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")
    model, inputs = make_model(dtype=torch.float64), make_inputs(work_of())
    expected = gradients(model, inputs)
    engine = Engine(MIB, delay_us_max=200)
    model.saving = Saving(engine, keep_last=0)
    model.set_policy([INPUT] * NUM_BLOCKS)
    model.set_chunks(2)
    found = gradients(model, inputs)
    assert all(
        relative_error(found[name], expected[name]) < RELATIVE_ERROR for name in expected if expected[name].any()
    )
    assert_no_leaks(engine)


def test_what_does_not_go_together() -> None:
    model = make_model()
    model.set_policy([Policy("keep", "keep", "recompute", "recompute", "recompute")] * NUM_BLOCKS)
    with pytest.raises(UserError, match="block 0: in 4 chunks all groups but block_input are recomputed"):
        model.set_chunks(4)
    model.set_policy([Policy.recompute()] * NUM_BLOCKS)
    model.set_kernels("reference")
    with pytest.raises(UserError, match="4 chunks is plain torch, got kernels 'reference'"):
        model.set_chunks(4)
    model.set_kernels(None)
    model.set_chunks(4)
    with pytest.raises(UserError, match="kernels 'triton' compute whole blocks, this model has 4 chunks"):
        model.set_kernels("triton")
