"""Policies on the running model: bitwise the same gradients in every mix, bytes as predicted, nothing left behind.

pytest tests/offload/test_blocks.py
"""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from offloading import (
    ALL,
    INPUT,
    MIB,
    NANO,
    NUM_BLOCKS,
    assert_no_leaks,
    assert_same,
    gradients,
    loss_of,
    make_inputs,
    make_model,
    work_of,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vchitect_fast.errors import UserError
from vchitect_fast.model import VchitectTransformer, preset
from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.offload.policy import offload_budget_bytes, step_bytes
from vchitect_fast.plan import Policy

pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")
ACTIONS = ("keep", "recompute", "offload")
MIXES = [
    Policy(block_input, qkv, branch_out, mlp_pre, branch_out)
    for block_input in ("keep", "offload")
    for qkv, branch_out, mlp_pre in itertools.product(ACTIONS, repeat=3)
]


def saving_of(model: VchitectTransformer, **options) -> Engine:
    """An engine with delays for the model; every block may be offloaded."""
    engine = Engine(8 * MIB, delay_us_max=options.pop("delay_us_max", 300), max_in_flight_bytes=MIB)
    model.saving = Saving(engine, **{"keep_last": 0, "count": True, **options})
    return engine


@pytest.mark.parametrize("shape", ["4x32x32", "1x32x48"])
def test_every_mix_gives_bitwise_the_same_gradients_and_the_predicted_bytes(shape: str) -> None:
    work, model = work_of(shape), make_model()
    inputs = make_inputs(work)
    expected = gradients(model, inputs)
    engine = saving_of(model)
    for policy in MIXES:
        model.set_policy([policy] * NUM_BLOCKS)
        model.saving.forget()
        assert_same(gradients(model, inputs), expected)
        predicted = {
            (item.block, item.group, item.action): item.num_bytes
            for item in step_bytes(work, [policy] * NUM_BLOCKS, "float32", keep_last=0)
        }
        whole = policy == Policy.recompute() or policy == INPUT  # then nobody looks at what is computed again
        saved = {key: value for key, value in predicted.items() if not whole or key[1] == "block_input"}
        assert dict(model.saving.bytes) == saved, policy
        assert_no_leaks(engine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_a_mix_that_differs_from_block_to_block(dtype: torch.dtype) -> None:
    config = preset("vchitect-tiny")
    work, model = work_of("4x48x32", 1, config), make_model(1, config, dtype)
    inputs = make_inputs(work)
    expected = gradients(model, inputs)
    engine = saving_of(model)
    model.set_policy([MIXES[(7 * i + 11) % len(MIXES)] for i in range(config.num_layers)])
    for _ in range(2):  # the second with a learnt order
        assert_same(gradients(model, inputs), expected)
        assert_no_leaks(engine)


def test_the_budget_that_is_predicted_is_enough_and_no_more() -> None:
    work, model = work_of(), make_model()
    inputs, policies = make_inputs(work), [ALL] * NUM_BLOCKS
    expected = gradients(model, inputs)
    budget = offload_budget_bytes(work, policies, "float32", keep_last=0)
    for bytes_, fits in ((budget, True), (budget - 256, False)):
        engine = Engine(bytes_)
        model.saving = Saving(engine, keep_last=0)
        model.set_policy(policies)
        if fits:
            assert_same(gradients(model, inputs), expected)
            assert engine.stats()["high_water_bytes"] == budget
        else:
            with pytest.raises(UserError, match="no room to offload .* of block 1: .*at least"):
                gradients(model, inputs)
        assert_no_leaks(engine)


def test_several_forwards_before_a_backward_and_accumulation() -> None:
    model, work = make_model(), work_of()
    batches = [make_inputs(work, seed) for seed in range(3)]
    expected = gradients(model, *batches)
    engine = saving_of(model)
    model.set_policy([ALL, INPUT])
    assert_same(gradients(model, *batches), expected)
    for order in itertools.permutations(range(3)):
        model.zero_grad(set_to_none=True)
        losses = [loss_of(model, inputs) for inputs in batches]
        found: dict[str, Tensor] = {}
        parts = {}
        for i in order:  # summed in the order of the accumulation above
            parts[i] = torch.autograd.grad(losses[i], list(model.parameters()), allow_unused=True)
        for i in range(3):
            for (name, _), gradient in zip(model.named_parameters(), parts[i], strict=True):
                if gradient is not None:
                    found[name] = found[name] + gradient if name in found else gradient
        assert_same(found, expected)
        del losses, parts
        assert_no_leaks(engine)


def test_two_models_on_one_engine_do_not_mix() -> None:
    work, models = work_of(), [make_model(0), make_model(1)]
    inputs = make_inputs(work)
    expected = [gradients(model, inputs) for model in models]
    engine = saving_of(models[0])
    models[1].saving = Saving(engine, keep_last=0)
    for model in models:
        model.set_policy([ALL] * NUM_BLOCKS)
        model.zero_grad(set_to_none=True)
    total = sum(loss_of(model, inputs) for model in models)  # both forwards, then one backward through both
    assert isinstance(total, Tensor)
    total.backward()
    for model, wanted in zip(models, expected, strict=True):
        assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)
    del total
    assert_no_leaks(engine)


def test_a_second_backward_through_the_same_graph() -> None:
    model, inputs = make_model(), make_inputs(work_of())
    parameters = [p for p in model.parameters()]
    expected = torch.autograd.grad(loss_of(model, inputs), parameters, allow_unused=True)
    engine = saving_of(model)
    model.set_policy([ALL, Policy("offload", "keep", "recompute", "offload", "recompute")])
    loss = loss_of(model, inputs)
    for retain in (True, True, False):
        found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=retain)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    del loss
    assert_no_leaks(engine)


@pytest.mark.parametrize("kernels", [None, "reference"])
def test_the_fused_block_hands_over_its_groups_too(kernels: str | None) -> None:
    model, inputs = make_model(), make_inputs(work_of())
    model.set_kernels(kernels)
    expected = gradients(model, inputs)
    engine = saving_of(model)
    for policy in (ALL, Policy("keep", "recompute", "offload", "keep", "offload")):
        model.set_policy([policy] * NUM_BLOCKS)
        assert_same(gradients(model, inputs), expected)
        assert_no_leaks(engine)


class Boom(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "backward", "recomputation"])
def test_an_exception_in_the_middle_of_a_step_leaves_nothing(where: str) -> None:
    model, inputs = make_model(), make_inputs(work_of())
    expected = gradients(model, inputs)
    engine = saving_of(model, delay_us_max=3000)
    model.set_policy([ALL] * NUM_BLOCKS)
    linear = model.transformer_blocks[0].attn.to_out[0]
    calls = {"forward": 0}

    def fail(*_: object) -> None:
        calls["forward"] += 1
        if where == "forward" or calls["forward"] == 2:
            raise Boom

    if where == "backward":
        hook = linear.register_full_backward_hook(lambda *_: (_ for _ in ()).throw(Boom()))
    else:
        hook = linear.register_forward_hook(fail)
    with pytest.raises(Boom), model.saving.step():
        gradients(model, inputs)
    hook.remove()
    assert_no_leaks(engine)
    assert_same(gradients(model, inputs), expected)  # and the next step is right
    assert_no_leaks(engine)


def test_a_step_that_was_given_up_cannot_be_gone_through() -> None:
    model, inputs = make_model(), make_inputs(work_of())
    engine = saving_of(model)
    model.set_policy([Policy("keep", "offload", "keep", "recompute", "keep")] * NUM_BLOCKS)
    loss = loss_of(model, inputs)
    with pytest.raises(Boom), model.saving.step():
        raise Boom
    assert_no_leaks(engine)
    with pytest.raises(RuntimeError, match="given up with its step|its forward ran nothing"):
        loss.backward()


def test_a_forward_whose_graph_is_thrown_away_leaves_nothing() -> None:
    model, inputs = make_model(), make_inputs(work_of())
    engine = saving_of(model)
    model.set_policy([ALL] * NUM_BLOCKS)
    loss = loss_of(model, inputs)
    assert engine.stats()["num_slots"] > 0
    del loss
    assert_no_leaks(engine)
    with torch.no_grad():
        model(*inputs)
    assert engine.stats()["num_allocations"] == 20 + 19  # no grad, nothing moved: 20 tensors a block, 19 in the last


def test_the_last_block_is_not_moved_by_default() -> None:
    model, inputs = make_model(), make_inputs(work_of())
    saving_of(model, keep_last=1)
    model.set_policy([ALL] * NUM_BLOCKS)
    gradients(model, inputs)
    assert {key[0] for key in model.saving.bytes if key[2] == "offload"} == {0}


def test_math_attention_hands_over_no_branch_outputs() -> None:
    model, inputs = make_model(), make_inputs(work_of())
    engine = saving_of(model)
    model.attention_backend = dict.fromkeys(model.attention_backend, "math")
    model.set_policy([ALL] * NUM_BLOCKS)
    with pytest.raises(UserError, match="block 0 hands over no tensor of branch_out, stats"):
        gradients(model, inputs)
    assert_no_leaks(engine)


@pytest.mark.parametrize("action", ["keep", "offload"])
def test_a_group_that_is_changed_in_place_is_named(action: str) -> None:
    model, inputs = make_model(), make_inputs(work_of())
    saving_of(model)
    policy = Policy("keep", "recompute", "recompute", action, "recompute")
    model.set_policy([policy, Policy.keep()])
    seen: list[Tensor] = []
    hook = model.transformer_blocks[0].ff.net[0].proj.register_forward_hook(lambda m, i, out: seen.append(out.detach()))
    loss = loss_of(model, inputs)
    hook.remove()
    seen[0].add_(1)
    with pytest.raises(UserError, match="mlp_pre of block 0 was changed in place after it was saved"):
        loss.backward()


def test_compiling_around_a_policy_is_refused() -> None:
    """R15: hooks do not survive compilation, so nothing is silently left on the device."""
    model, inputs = make_model(), make_inputs(work_of())
    saving_of(model)
    model.set_policy([ALL] * NUM_BLOCKS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="outside torch.compile|torch.compile"):
        compiled(*inputs)


def test_nano_has_as_many_blocks_as_these_tests_assume() -> None:
    assert NANO.num_layers == NUM_BLOCKS == 2


def test_the_pool_wastes_little_and_asks_the_system_for_nothing_after_it_was_made() -> None:
    """At a size where rounding does not decide: at most 5 % of what is in use is rounding or holes between slots."""
    config = preset("vchitect-tiny")
    work, model = work_of("4x96x64", 1, config, 16), make_model(0, config)
    inputs, policies = make_inputs(work), [ALL] * config.num_layers
    budget = offload_budget_bytes(work, policies, "float32", keep_last=0)
    engine = Engine(budget, delay_us_max=50)
    model.saving = Saving(engine, keep_last=0)
    model.set_policy(policies)
    fullest = []
    hook = model.proj_out.register_forward_hook(lambda *_: fullest.append(engine.stats()))
    for _ in range(3):
        gradients(model, inputs)
        engine.settle()
    hook.remove()
    for stats in fullest:
        assert stats["requested_bytes"] > 0.95 * stats["budget_bytes"] > 0
        assert stats["used_bytes"] == budget
    after = engine.stats()
    assert after["high_water_bytes"] == budget and after["num_free_ranges"] == 1
    steady = [stats["setup_s"] for stats in fullest] + [after["setup_s"]]
    assert len(set(steady)) == 1, "a slab was made again"


def test_slots_and_sources_return_while_backward_goes_on() -> None:
    model, inputs = make_model(), make_inputs(work_of())
    engine = saving_of(model)
    engine.max_in_flight_bytes = 0
    model.set_policy([ALL] * NUM_BLOCKS)
    seen = {}

    def look(name: str) -> None:
        engine.settle()
        seen[name] = engine.stats()["num_slots"]

    model.proj_out.weight.register_hook(lambda _: look("before the last block"))
    model.transformer_blocks[0].ff.net[2].bias.register_hook(lambda _: look("at the first block"))
    gradients(model, inputs)
    assert seen == {"before the last block": 20 + 19, "at the first block": 20}


def test_two_threads_with_a_model_each_share_an_engine() -> None:
    work = work_of()
    models, inputs = [make_model(seed) for seed in range(2)], make_inputs(work)
    expected = [gradients(model, inputs) for model in models]
    engine = Engine(8 * MIB, delay_us_max=200, max_in_flight_bytes=20_000)
    failures: list[BaseException] = []

    def train(number: int) -> None:
        try:
            for _ in range(8):
                assert_same(gradients(models[number], inputs), expected[number])
        except BaseException as error:
            failures.append(error)

    for model in models:
        model.saving = Saving(engine, keep_last=0)
        model.set_policy([ALL] * NUM_BLOCKS)
    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert_no_leaks(engine)


def test_a_checkpoint_inside_a_module_that_is_not_ours() -> None:
    """Nested recompute: the module's own checkpoint saves its inputs through the anonymous hooks, and only those."""
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    x = torch.randn(8, 16, requires_grad=True)

    def run() -> list[Tensor]:
        y = checkpoint(inner, torch.tanh(x), use_reentrant=False)
        y = checkpoint(lambda z: checkpoint(inner, z, use_reentrant=False).sin(), y, use_reentrant=False)
        return list(torch.autograd.grad(y.square().sum(), [x, *inner.parameters()]))

    expected = run()
    engine = Engine(MIB, delay_us_max=200)
    saving = Saving(engine)
    with saving.anonymous("inner", min_bytes=0):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert_no_leaks(engine)
    assert engine.stats()["offload_num_copies"] > 0
