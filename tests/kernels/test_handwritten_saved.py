"""What the hand-written block saves: the bytes of the formula and no others, and every Policy gives the same bits.

Run: pytest tests/kernels/test_handwritten_saved.py
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from block_cases import config_of, make_block, make_inputs, values
from offloading import MIB, NUM_BLOCKS, assert_no_leaks, assert_same, gradients, make_model, work_of
from offloading import make_inputs as model_inputs
from torch import Tensor

from vchitect_fast.architecture import preset
from vchitect_fast.errors import UserError
from vchitect_fast.model import handwritten
from vchitect_fast.model.block_layout import GROUPS
from vchitect_fast.model.handwritten import handwritten_block
from vchitect_fast.model.steps import Steps, steps_of
from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.plan import Policy
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

ACTIONS = ("keep", "recompute", "offload")
MIXES = [
    Policy(block_input, qkv, branch_out, mlp_pre, branch_out)
    for block_input in ("keep", "offload")
    for qkv, branch_out, mlp_pre in itertools.product(ACTIONS, repeat=3)
]


def saved_storages(block, tensors: list[Tensor], **options) -> Counter:
    """Bytes of every storage that is saved and is not a parameter's nor temb's, by dtype."""
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = handwritten_block(block, *tensors, **options)
    for tensor in (tensors[2], *block.parameters()):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    del outs
    counted: Counter = Counter()
    for tensor in found.values():
        counted[tensor.dtype] += tensor.untyped_storage().nbytes()
    return counted


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("reference", torch.float64), ("reference", torch.float32), ("reference", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)],
    ids=str,
)  # fmt: skip
def test_the_formula_counts_what_is_saved(
    impl: str, dtype: torch.dtype, T: int, last: bool, device: torch.device
) -> None:
    B, N = 2, 5
    work = Workload(config_of(), VideoShape(T, 16 * 3, 16), B, N)
    block = make_block(dtype, last=last).to(device)
    tensors = [x.detach().to(device).requires_grad_() for x in make_inputs(B, T, 3, N, dtype)]
    predicted = work.handwritten_saved_bytes(dtype.itemsize, last=last)
    counted = saved_storages(block, tensors, impl=impl)
    assert sum(counted.values()) == sum(predicted.values())
    if dtype.itemsize < 4:
        assert counted[torch.float32] == predicted["stats"]


@pytest.mark.parametrize("group", GROUPS[1:])
def test_a_group_that_is_recomputed_is_not_saved(group: str) -> None:
    work = Workload(config_of(), VideoShape(2, 48, 16), 1, 5)
    block, tensors = make_block(torch.float32), make_inputs(1, 2, 3, 5, torch.float32)
    counted = saved_storages(block, tensors, impl="reference", policy=replace(Policy.keep(), **{group: "recompute"}))
    assert sum(counted.values()) == sum(work.handwritten_saved_bytes(4, recomputed={group}).values())


def test_the_goal_by_arithmetic() -> None:
    """3000 MB at 40x768x432 (24 heads x 64, 333 text tokens, bf16); keeping the temporal branch as well would miss it."""
    work = Workload(preset("vchitect-2b"), VideoShape.parse("40x768x432")[0], 1, 333)
    saved = work.handwritten_saved_bytes(2)
    assert tuple(saved) == GROUPS
    assert round(sum(saved.values()) / 1e6) == 2851
    assert round((sum(saved.values()) + work.block_input_bytes(2)) / 1e6) == 3052


def saving_of(model, **options) -> Engine:
    """An engine with delays for the model; every block may be offloaded."""
    engine = Engine(8 * MIB, delay_us_max=300, max_in_flight_bytes=MIB)
    model.saving = Saving(engine, **{"keep_last": 0, "count": True, **options})
    return engine


def test_every_mix_gives_bitwise_the_same_gradients_and_saves_the_predicted_bytes() -> None:
    pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")
    work, model = work_of("3x32x32"), make_model()
    model.set_kernels("reference")
    inputs = model_inputs(work)
    expected = gradients(model, inputs)
    engine = saving_of(model)
    for policy in MIXES:
        model.set_policy([policy] * NUM_BLOCKS)
        model.saving.forget()
        assert_same(gradients(model, inputs), expected)
        recomputed = {name for name in GROUPS if getattr(policy, name) == "recompute"}
        predicted = {
            (block, name, getattr(policy, name)): num_bytes
            for block in range(NUM_BLOCKS)
            for name, num_bytes in work.handwritten_saved_bytes(
                4, first=block == 0, last=block == NUM_BLOCKS - 1, recomputed=recomputed
            ).items()
        }
        assert dict(model.saving.bytes) == predicted, policy
        assert_no_leaks(engine)


def test_a_mix_that_differs_from_block_to_block_over_two_microbatches_and_images() -> None:
    pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")
    config = preset("vchitect-tiny")
    model = make_model(1, config)
    model.set_kernels("reference")
    batches = [model_inputs(work_of(shape, 1, config), seed) for seed, shape in enumerate(("2x48x32", "1x32x32"))]
    expected = gradients(model, *batches)
    engine = saving_of(model, count=False)
    model.set_policy([MIXES[(7 * i + 11) % len(MIXES)] for i in range(config.num_layers)])
    for _ in range(2):  # the second with a learnt order
        assert_same(gradients(model, *batches), expected)
        assert_no_leaks(engine)
    assert engine.stats()["offload_num_copies"] > 0


ATTENTIONS = ("spatial_attention", "cross_attention", "temporal_attention")


@pytest.mark.parametrize(
    ("recomputed", "calls"),
    [((), 1), (("qkv",), 1), (("mlp_pre",), 1), (("branch_out", "stats"), 2), (("stats",), 2)],
    ids=str,
)
def test_backward_rebuilds_what_is_missing_and_nothing_else(
    recomputed: tuple[str, ...], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: Counter = Counter()

    def counting(name: str):
        def called(*args):
            counted[name] += 1
            return getattr(steps_of("reference"), name)(*args)

        return called

    counting_steps = Steps(**{name: counting(name) for name in Steps.__dataclass_fields__})
    monkeypatch.setattr(handwritten, "steps_of", lambda impl: counting_steps)
    policy = replace(Policy.keep(), **dict.fromkeys(recomputed, "recompute"))
    block, tensors = make_block(torch.float64), make_inputs(1, 2, 3, 5, torch.float64)
    x, c = handwritten_block(block, *tensors, impl="reference", policy=policy)
    torch.autograd.grad(x.sum() + c.sum(), tensors)
    expected = dict.fromkeys(ATTENTIONS, calls) | {"temporal_attention": calls + 1}  # whose output is never saved
    assert {name: counted[name] for name in ATTENTIONS} == expected
    norms = 2 + 4 + (2 if "qkv" in recomputed else 0)  # visual and text: forward, both norms' weights, to rebuild
    assert counted["norm"] == norms and counted["residual_norm"] == 2 * calls and counted["residual"] == 2


@pytest.mark.parametrize(
    "recomputed", [("qkv",), ("mlp_pre",), ("branch_out", "stats"), ("qkv", "branch_out", "mlp_pre", "stats")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_the_kernels_rebuild_the_same_bits(
    dtype: torch.dtype, recomputed: tuple[str, ...], device: torch.device
) -> None:
    """n comes from one kernel in forward and from another in backward: both round y first and go on alike."""
    block = make_block(dtype).to(device)
    tensors = [x.detach().to(device).requires_grad_() for x in make_inputs(1, 2, 3, 5, dtype)]
    policies = Policy.keep(), replace(Policy.keep(), **dict.fromkeys(recomputed, "recompute"))
    kept, rebuilt = (values(block, tensors, partial(handwritten_block, impl="triton", policy=p)) for p in policies)
    assert all(torch.equal(kept[name], rebuilt[name]) for name in kept)


def test_a_policy_that_offloads_without_an_engine_is_refused() -> None:
    model = make_model()
    model.set_kernels("reference")
    x, c, temb = make_inputs(1, 2, 3, 5, torch.float32)
    run = partial(handwritten_block, make_block(torch.float32), impl="reference")
    with pytest.raises(UserError, match="block 3 is to be offloaded and there is no engine"):
        Saving().run_grouped(run, Policy(qkv="offload"), 3, None, x, c, temb)


def test_offloading_inside_torch_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputing is not: the block runs outside the graph and rebuilds its groups itself."""
    pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")
    saving, tensors = Saving(Engine(MIB)), make_inputs(1, 2, 3, 5, torch.float32)
    run = partial(handwritten_block, make_block(torch.float32), impl="reference")
    saved_pass = saving.new_pass()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(UserError, match="block 3 is to be offloaded inside torch.compile; offload outside of it"):
        saving.run_grouped(run, Policy(qkv="offload"), 3, saved_pass, *tensors)
    assert saving.run_grouped(run, Policy.recompute(), 3, saved_pass, *tensors)[0].requires_grad
