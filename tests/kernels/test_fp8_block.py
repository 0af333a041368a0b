"""The hand-written block with its linears in fp8: wired as the block is, every product over rows in fp8, refused elsewhere.

Run: pytest tests/kernels/test_fp8_block.py. Interpreted where there is no GPU; rows and products alone: test_fp8.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from block_cases import config_of, make_block, make_inputs, plain, values
from close import assert_close_to_exact, relative_error
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.model import VchitectTransformer, fp8_steps, handwritten
from vchitect_fast.model.fp8_steps import Fp8, check_device, exact_product, fp8_steps_of
from vchitect_fast.model.handwritten import handwritten_block
from vchitect_fast.model.steps import steps_of
from vchitect_fast.plan import Policy

ROUNDING = 1e-9  # what is exactly 0 but for rounding, as in test_block.py
reference = partial(handwritten_block, impl="reference", fp8=True)
on_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no fp8 on this GPU"
)


def unrounded() -> Fp8:
    """The fp8 steps with rows that keep their values, each under a scale of its own."""

    def rows(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.exp2(torch.arange(len(x)) % 5 - 2).to(x)
        return x / scale[:, None], scale

    def turn(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return F.pad((q * scale[:, None] / 4).T, (0, -len(q) % 16)), scale.new_full((1,), 4)

    return Fp8(steps_of("reference"), rows, turn, exact_product)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 1, 6, 4)])
def test_with_rounding_that_rounds_nothing_it_is_the_block(
    size: tuple[int, ...], last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handwritten, "fp8_steps_of", lambda impl: unrounded().table())
    block, tensors = make_block(torch.float64, last=last), make_inputs(*size, torch.float64)
    found, exact = values(block, tensors, reference), values(block, tensors, plain)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if value.norm() < ROUNDING:
            assert found[name].norm() < ROUNDING, name
        else:
            assert relative_error(found[name], value) < 1e-10, name


@pytest.mark.parametrize(("last", "products"), [(False, 26), (True, 16)])
def test_every_product_over_rows_is_in_fp8(last: bool, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample. As many as there are in 16 bits (test_handwritten_trace.py), and what they read has values of e4m3 only."""
    counted: Counter = Counter()

    def counting(a, b, **how):
        assert a.q.dtype == b.q.dtype == torch.float8_e4m3fn
        counted["products"] += 1
        return exact_product(a, b, **how)

    def none(*args, **how):
        raise AssertionError("a product of the block in its own precision")

    how = replace(
        unrounded(), rows=fp8_steps.reference.quantised_rows, turn=fp8_steps.reference.turned, product=counting
    )
    plain_steps = replace(steps_of("reference"), linear=none, input_gradient=none, weight_gradient=none)
    monkeypatch.setattr(handwritten, "fp8_steps_of", lambda impl: replace(how, steps=plain_steps).table())
    block, tensors = make_block(torch.float32, last=last), make_inputs(1, 3, 5, 7, torch.float32)
    values(block, tensors, reference)
    assert counted["products"] == products


@on_fp8
@pytest.mark.parametrize(
    ("size", "dtype", "last"),
    [
        ((2, 3, 5, 7), torch.float32, False),
        ((1, 2, 9, 4), torch.float32, True),
        pytest.param((2, 3, 77, 33), torch.bfloat16, False, marks=pytest.mark.gpu),
        pytest.param((1, 40, 300, 333), torch.bfloat16, True, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_the_kernels_err_as_the_definition_does(
    size: tuple[int, ...], dtype: torch.dtype, last: bool, device: torch.device
) -> None:
    """Against the block in fp64: rounding to fp8 is nearly all of both errors, so neither may be the larger."""
    options = {"last": last, "num_heads": 1 if device.type == "cpu" else 4}
    low = make_block(dtype, **options).to(device)
    tensors = [x.detach().to(device).requires_grad_() for x in make_inputs(*size, dtype, 64 * options["num_heads"])]
    double = make_block(torch.float64, **options).to(device)
    double.load_state_dict({name: value.double() for name, value in low.state_dict().items()})
    exact = values(double, [x.detach().double().requires_grad_() for x in tensors], plain)
    found = values(low, tensors, partial(handwritten_block, impl="triton", fp8=True))
    defined = values(low, tensors, reference)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if value.norm() > ROUNDING:
            assert_close_to_exact(found[name], value, defined[name], reduced=64 * 64, name=name)


@on_fp8
@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=pytest.mark.soak)])  # 20 s interpreted
def test_rebuilt_in_backward_and_of_any_strides_it_has_the_same_bits(impl: str, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    block = make_block(dtype).to(device)
    size = (
        (1, 2, 2, 1) if impl == "triton" and device.type == "cpu" else (2, 2, 3, 5)
    )  # interpreted: 6 s a run of the larger
    tensors = [x.detach().to(device).requires_grad_() for x in make_inputs(*size, dtype)]
    run = partial(handwritten_block, impl=impl, fp8=True)
    kept = values(block, tensors, run)
    rebuilt = values(block, tensors, partial(run, policy=Policy.recompute()))
    strange = [x.detach().repeat_interleave(2, dim=1)[:, ::2].requires_grad_() for x in tensors]
    other = values(block, strange, run)
    assert all(torch.equal(kept[name], rebuilt[name]) and torch.equal(kept[name], other[name]) for name in kept)


def test_what_is_saved_is_what_16_bits_save() -> None:
    block, tensors = make_block(torch.float32), make_inputs(1, 2, 3, 5, torch.float32)
    found = []
    for fp8 in (False, True):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            handwritten_block(block, *tensors, impl="reference", fp8=fp8)
        found.append([(t.shape, t.dtype) for t in kept])
    assert found[0] == found[1]


def test_the_model_switches() -> None:
    torch.manual_seed(0)
    model = VchitectTransformer(config_of())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = (torch.randn(1, 2, 16, 4, 4), torch.randn(1, 3, 12), torch.randn(1, 20), torch.tensor([300.0]))
    plain_output = model(*batch)
    model.set_kernels("reference", fp8=True)
    rounded = model(*batch)
    assert not torch.equal(rounded, plain_output) and relative_error(rounded, plain_output) < 1
    model.set_kernels("reference")
    assert not model.fp8 and relative_error(model(*batch), plain_output) < relative_error(rounded, plain_output) / 100
    with pytest.raises(UserError, match="fp8 linears are those of the hand-written block, got kernels None"):
        model.set_kernels(None, fp8=True)


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block(torch.float32, num_heads=2, head_dim=4)
    with pytest.raises(UserError, match="a hidden dim that 16 divides, got 8"):
        reference(block, *make_inputs(1, 2, 3, 5, torch.float32, 8))
    with pytest.raises(UserError, match="unknown impl 'cuda'"):
        fp8_steps_of("cuda")
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="a GPU from sm_89 on, got sm_80"):
        check_device(gpu, torch.bfloat16, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UserError, match="bfloat16 on a GPU, got torch.float32"):
        check_device(gpu, torch.float32, 64)
    check_device(gpu, torch.bfloat16, 64)
