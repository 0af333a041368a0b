"""The block composed of the ops, and hand-written, against blocks.py: the same answer, the same gradients.

Run: pytest tests/kernels/test_block.py. Interpreted where there is no GPU.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from block_cases import Run, config_of, make_block, make_inputs, plain, values
from close import assert_close_to_exact, relative_error
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.model import Branches, VchitectTransformer, transformer
from vchitect_fast.model.fused import fused_block
from vchitect_fast.model.handwritten import handwritten_block

SIZES = [(2, 3, 5, 7), (1, 1, 6, 4)]  # B, T, S, N: odd and two samples; an image
# Exactly 0 but for rounding: a bias of all keys of a query moves its scores alike, one key leaves nothing to choose, an image
# leaves zero gradients in the temporal weights.
ROUNDING = 1e-9
RUNS: dict[str, Run] = {"composed": fused_block, "hand-written": handwritten_block}
ABLATIONS = [
    Branches(spatial=False),  # cross writes the text gradients first, and of the first frame's keys alone
    Branches(temporal=False),
    Branches(cross=False),
    Branches(spatial=False, cross=False),
    Branches(spatial=False, temporal=False),
    Branches(temporal=False, cross=False),
]


def reference(block, *tensors):
    return handwritten_block(block, *tensors, impl="reference")


def assert_exact(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """In fp64 only the order of sums differs; what has no gradient has none."""
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if value.norm() < ROUNDING:
            assert found[name].norm() < ROUNDING, name
        else:
            assert relative_error(found[name], value) < 1e-10, name


def assert_kernels_are_right(size: tuple[int, ...], run: Run, dtype: torch.dtype = torch.float32, **options) -> None:
    """The kernels against fp64 on the same values, by the rule of close.py."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    D = options.get("num_heads", 1) * options.get("head_dim", 64)
    low = make_block(dtype, **options).to(device)
    tensors = [x.detach().to(device).requires_grad_() for x in make_inputs(*size, dtype, D)]
    double = [x.detach().double().requires_grad_() for x in tensors]
    found, same = values(low, tensors, partial(run, impl="triton")), values(low, tensors, plain)
    wide = make_block(torch.float64, **options)
    wide.load_state_dict({name: value.double() for name, value in low.state_dict().items()})
    exact = values(wide.to(device), double, plain)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if value.norm() < ROUNDING:
            continue
        assert_close_to_exact(found[name], value, same[name], reduced=64 * 64, name=name)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_block(size: tuple[int, ...], last: bool, run: Run) -> None:
    block, tensors = make_block(torch.float64, last=last), make_inputs(*size, torch.float64)
    assert_exact(values(block, tensors, partial(run, impl="reference")), values(block, tensors, plain))


@pytest.mark.parametrize("size", [(1, 2, 3, 1), (3, 1, 1, 5), (1, 4, 9, 3)])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 128), (3, 64), (2, 6)])
def test_any_heads(size: tuple[int, ...], num_heads: int, head_dim: int) -> None:
    block = make_block(torch.float64, num_heads=num_heads, head_dim=head_dim)
    tensors = make_inputs(*size, torch.float64, num_heads * head_dim)
    assert_exact(values(block, tensors, reference), values(block, tensors, plain))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("branches", ABLATIONS, ids=str)
def test_branches_that_are_off(branches: Branches, T: int, last: bool) -> None:
    block, tensors = make_block(torch.float64, last=last, branches=branches), make_inputs(2, T, 4, 3, torch.float64)
    if T == 1 and not (branches.spatial or branches.cross):
        with pytest.raises(UserError, match="an attention branch to compute"):
            reference(block, *tensors)
    else:
        assert_exact(values(block, tensors, reference), values(block, tensors, plain))


@pytest.mark.parametrize("last", [False, True])
def test_gates_of_zero_as_training_starts(last: bool) -> None:
    """AdaLN-Zero: nothing but the gates gets a gradient through the branches, and that one without the product itself."""
    block, tensors = make_block(torch.float64, last=last), make_inputs(2, 2, 3, 3, torch.float64)
    for norm in (block.norm1, block.norm1_context):
        for parameter in norm.parameters():
            torch.nn.init.zeros_(parameter)
    found, exact = values(block, tensors, reference), values(block, tensors, plain)
    assert_exact(found, exact)
    assert found["d norm1.linear.weight"].norm() > 0 and found["d attn.to_q.weight"].norm() == 0


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_give_the_block(size: tuple[int, ...], last: bool, run: Run) -> None:
    assert_kernels_are_right(size, run, last=last)


@pytest.mark.parametrize("options", [{"head_dim": 128}, {"num_heads": 2}, {"branches": ABLATIONS[0]}], ids=str)
def test_the_kernels_give_other_blocks(options: dict) -> None:
    assert_kernels_are_right((1, 2, 3, 5), handwritten_block, **options)


@pytest.mark.parametrize("last", [False, True])
def test_an_image_leaves_zero_gradients_and_not_missing_ones(last: bool) -> None:
    found = values(make_block(torch.float64, last=last), make_inputs(1, 1, 6, 4, torch.float64), reference)
    temporal = [name for name in found if "_temp" in name]
    assert len(temporal) == (8 if last else 10) and all((found[name] == 0).all() for name in temporal)


@pytest.mark.parametrize("size", [(1, 4, 64, 33), (2, 8, 16, 9)])
def test_in_bf16_it_errs_as_the_block_does(size: tuple[int, ...]) -> None:
    """The gates' gradients come out of weight gradients, which are rounded: that costs no more than rounding the rows."""
    block, tensors = make_block(torch.bfloat16, num_heads=2), make_inputs(*size, torch.bfloat16, 128)
    double = make_block(torch.float64, num_heads=2)
    double.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    exact = values(double, [x.detach().double().requires_grad_() for x in tensors], plain)
    found, low = values(block, tensors, reference), values(block, tensors, plain)
    for name, value in exact.items():
        assert_close_to_exact(found[name], value, low[name], reduced=4 * 128, name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(2, 3, 77, 33), (1, 40, 300, 333), (2, 1, 256, 333)])
def test_the_kernels_give_the_block_in_16_bits(size: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    """The interpreter multiplies bf16 wrongly, so on a GPU only."""
    assert_kernels_are_right(size, handwritten_block, dtype, last=last, num_heads=4)


def test_samples_do_not_mix() -> None:
    block, (x, c, temb) = make_block(torch.float64), make_inputs(3, 2, 3, 4, torch.float64)
    together = values(block, [x, c, temb], reference)
    for b in range(3):
        one = [t[b : b + 1].detach().requires_grad_() for t in (x, c, temb)]
        assert relative_error(reference(block, *one)[0], together["x"][b : b + 1]) < 1e-10


def test_the_model_on_the_kernels(device: torch.device) -> None:
    """Every block in fp32, the first on the patch embedding's rows and on text that is expanded over the frames."""
    torch.manual_seed(0)
    model = VchitectTransformer(config_of())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = (torch.randn(1, 2, 16, 4, 4), torch.randn(1, 3, 12), torch.randn(1, 20), torch.tensor([300.0]))

    def gradients(dtype: torch.dtype, kernels: str | None) -> dict[str, Tensor]:
        model.to(device, dtype).set_kernels(kernels)
        model.zero_grad()
        model(*(x.to(device, dtype) for x in batch)).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found, low = gradients(torch.float32, "triton"), gradients(torch.float32, None)
    exact = gradients(torch.float64, None)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if value.norm() > ROUNDING:
            assert_close_to_exact(found[name], value, low[name], reduced=64 * 64, name=name)


def test_the_model_switches_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = VchitectTransformer(config_of()).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = (
        torch.randn(2, 3, 16, 4, 4).double(),
        torch.randn(2, 5, 12).double(),
        torch.randn(2, 20).double(),
        torch.tensor([3.0, 900.0]),
    )
    assert not transformer.DEFAULT_KERNELS, "nothing was measured on a GPU: the plain block is the default"
    exact = model(*batch)
    monkeypatch.setitem(transformer.DEFAULT_KERNELS, "cpu", "reference")
    by_default = model(*batch)
    assert not torch.equal(by_default, exact) and relative_error(by_default, exact) < 1e-10
    model.set_kernels(None)
    assert torch.equal(model(*batch), exact), "a choice stands above the default"
    monkeypatch.delitem(transformer.DEFAULT_KERNELS, "cpu")
    model.set_kernels("reference")
    assert torch.equal(model(*batch), by_default)
    model.set_kernels(None)
    assert torch.equal(model(*batch), exact)
    with pytest.raises(UserError, match="unknown"):
        model.set_kernels("tritn")
