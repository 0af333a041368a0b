"""MasterAdamW: torch's AdamW where nothing is low precision, and fp32 truth behind a bf16 model.

pytest tests/test_optimizer.py
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from close import assert_close_to_exact, relative_error
from torch import Tensor, nn

from vchitect_fast.optimizer import MasterAdamW

DECAY, BETAS = 0.3, (0.8, 0.95)


class Net(nn.Module):
    """Matrices, vectors, a 4-D kernel, and a parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 2)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 5)
        self.unused = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.conv(x).flatten(2).transpose(1, 2)))


def nets(dtype: torch.dtype = torch.float32) -> tuple[Net, Net]:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(Net().to(dtype))
    return made[0], made[1]


def batches(num: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(num)]


def backward(net: Net, batches: Iterable[Tensor]) -> None:
    for x in batches:
        net(x).float().square().mean().backward()


def optimizer(net: nn.Module) -> MasterAdamW:
    return MasterAdamW(net, weight_decay=DECAY, betas=BETAS)


def test_in_fp32_it_is_torchs_adamw_with_decay_on_matrices_only() -> None:
    """Bit by bit over five steps of two microbatches, with a norm that is clipped and one that is not."""
    ours, theirs = nets()
    ours_step = optimizer(ours)
    matrices = [theirs.conv.weight, theirs.linear.weight, theirs.unused]
    vectors = [theirs.conv.bias, theirs.norm.weight, theirs.norm.bias, theirs.linear.bias]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=BETAS, fused=True)
    clipped = []
    for step in range(5):
        rate, clip_norm = 0.1 / (step + 1), 0.2 if step % 2 else 100.0
        for net in (ours, theirs):
            backward(net, batches(2))
        for group in reference.param_groups:
            group["lr"] = rate
        expected_norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
        reference.step()
        reference.zero_grad()
        norm = ours_step.step(rate, clip_norm)
        clipped.append(bool(norm > clip_norm))
        assert torch.equal(norm, expected_norm)
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b), name
            assert a.grad is None, name
    assert clipped == [False, True, False, True, False]


def test_an_fp32_model_is_its_own_master() -> None:
    net = Net()
    assert all(optimizer(net).masters[name] is parameter for name, parameter in net.named_parameters())


def test_masters_of_a_bf16_model_are_fp32_and_its_parameters_are_those_rounded() -> None:
    net = Net().bfloat16()
    step = optimizer(net)
    for _ in range(3):
        backward(net, batches(1, torch.bfloat16))
        step.step(1e-3, 1.0)
    inexact = 0
    for name, parameter in net.named_parameters():
        master = step.masters[name]
        assert master.dtype == torch.float32 and parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, master.bfloat16()), name
        inexact += int((parameter.float() != master).sum())
    assert inexact > 50  # there is something that bf16 could not have kept


def test_small_updates_of_a_bf16_model_are_not_lost() -> None:
    """1 + 64 x 1e-4: each update is below half of bf16's spacing at 1, their sum is not."""
    net = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(net.weight)
    step = MasterAdamW(net, weight_decay=0.0, betas=(0.0, 0.0))
    for _ in range(64):
        (-net.weight).sum().backward()
        step.step(1e-4, 1.0)
    assert net.weight.item() == torch.tensor(1 + 64e-4).bfloat16().item() != 1.0


def test_microbatch_gradients_of_a_bf16_model_are_added_in_fp32() -> None:
    """Closer to the fp64 sum of the bf16 gradients than bf16 addition gets, and as close as fp32 must be."""
    net = Net().bfloat16()
    step = optimizer(net)
    micro = batches(32, torch.bfloat16)
    single: dict[str, list[Tensor]] = {name: [] for name, _ in net.named_parameters()}
    plain = Net().bfloat16()
    plain.load_state_dict(net.state_dict())
    for x in micro:
        plain.zero_grad()
        backward(plain, [x])
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                single[name].append(parameter.grad)
    backward(net, micro)
    for name, parameter in net.named_parameters():
        assert parameter.grad is None, name  # the bf16 gradient is freed at once
        if name == "unused":
            assert step.masters[name].grad is None
            continue
        exact = torch.stack(single[name]).double().sum(0)
        in_fp32, in_bf16 = single[name][0].float(), single[name][0]
        for gradient in single[name][1:]:
            in_fp32, in_bf16 = in_fp32 + gradient.float(), in_bf16 + gradient
        actual = step.masters[name].grad
        assert actual is not None and actual.dtype == torch.float32
        assert_close_to_exact(actual, exact, in_fp32, reduced=len(micro), name=name)
        assert relative_error(actual, exact) < relative_error(in_bf16, exact) / 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_without_gradient_stays_as_it_is(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    step = optimizer(net)
    before = net.unused.detach().clone()
    used = net.linear.weight.detach().clone()
    backward(net, batches(1, dtype))
    step.step(0.1, 1.0)
    assert torch.equal(net.unused, before)  # no decay either
    assert torch.equal(step.masters["unused"].to(dtype), before)
    assert not torch.equal(net.linear.weight, used)


class NoGradient(torch.autograd.Function):
    """x, of which a second argument is an input without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _parameter: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> tuple[Tensor, None]:
        return d[0], None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_that_has_no_gradient_for_a_parameter_leaves_it(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    step = optimizer(net)
    before, used = net.unused.detach().clone(), net.linear.weight.detach().clone()
    NoGradient.apply(net(batches(1, dtype)[0]), net.unused).float().square().mean().backward()
    step.step(0.1, 1.0)
    assert torch.equal(net.unused, before) and not torch.equal(net.linear.weight, used)


def test_a_step_without_gradients_changes_nothing() -> None:
    net, twin = nets()
    step = optimizer(net)
    assert step.step(0.1, 1.0) == 0
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert not any(tensor.any() for tensor in step.state().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_of_all_gradients_before_clipping(dtype: torch.dtype) -> None:
    net, twin = nets(dtype)
    step = optimizer(net)
    backward(net, batches(1, dtype))
    backward(twin, batches(1, dtype))
    gradients = [p.grad.double().flatten() for p in twin.parameters() if p.grad is not None]
    exact = torch.cat(gradients).norm()
    low = torch.cat([g.float() for g in gradients]).norm()
    assert_close_to_exact(step.step(0.1, float(exact) / 10), exact, low, reduced=sum(g.numel() for g in gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_has_its_names_from_the_start_and_shares_storage(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    step = optimizer(net)
    first = step.state()
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert first.keys() == {f"{kind}.{name}" for kind in kinds for name, _ in net.named_parameters()}
    assert all(tensor.dtype == torch.float32 and not tensor.any() for tensor in first.values())
    backward(net, batches(1, dtype))
    step.step(0.1, 1.0)
    assert step.state().keys() == first.keys()
    for name, tensor in step.state().items():
        assert tensor.data_ptr() == first[name].data_ptr(), name
    assert first["step.linear.weight"].item() == 1.0
    assert first["step.unused"].item() == 0.0
    assert first["exp_avg_sq.linear.weight"].any()


def test_masters_and_state_written_in_place_go_on_bit_by_bit() -> None:
    """What resuming does: tensors of one run into those of a fresh one."""
    net, fresh = nets(torch.bfloat16)
    step, other = optimizer(net), optimizer(fresh)
    backward(net, batches(2, torch.bfloat16))
    step.step(0.1, 1.0)
    with torch.no_grad():
        for name, master in step.masters.items():
            other.masters[name].copy_(master)
        for name, tensor in step.state().items():
            other.state()[name].copy_(tensor)
    other.copy_masters()
    for model, steps in ((net, step), (fresh, other)):
        backward(model, batches(3, torch.bfloat16))
        steps.step(0.05, 1.0)
    for name in step.masters:
        assert torch.equal(step.masters[name], other.masters[name]), name
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))
