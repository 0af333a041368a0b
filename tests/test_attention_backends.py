"""Attention backends by name: each computes the branch, in its own way only, or says in one sentence why it cannot.

pytest tests/test_attention_backends.py. FlashAttention's packages are stood in for by modules with the parameters of the public
sources (flash_attn 2.8, hopper/ and flash_attn/cute/ of 2026-08); ours runs in Triton's interpreter; a GPU runs the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from close import assert_close_to_exact
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vchitect_fast import attention
from vchitect_fast.attention import cross_attention, spatial_attention, temporal_attention
from vchitect_fast.errors import UserError
from vchitect_fast.kernels.reference import attend
from vchitect_fast.offload.groups import Frame, group
from vchitect_fast.plan import ATTENTION_BACKENDS, PlanEntry, Policy, Prediction

BRANCHES = {"spatial": spatial_attention, "temporal": temporal_attention, "cross": cross_attention}
PREDICTED = Prediction(1.0, {}, 1.0, {}, "made up")


def inputs(
    branch: str, *, B: int = 2, T: int = 2, J: int = 9, N: int = 3, H: int = 1, C: int = 64,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> list[Tensor]:  # fmt: skip
    keys = (B, N, H, C) if branch == "cross" else (B, T, J, H, C)
    draw = torch.Generator().manual_seed(1)
    sizes = [(B, T, J, H, C), keys, keys]
    return [torch.randn(size, generator=draw).to(device, dtype).requires_grad_() for size in sizes]


def solved(branch: str, given: list[Tensor], backend: str) -> list[Tensor]:
    """Output and gradients."""
    out = BRANCHES[branch](*given, backend=backend)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, dout)]


def assert_right(branch: str, given: list[Tensor], backend: str) -> None:
    """Against the written-out softmax in fp64, with that in the same precision as the measure."""
    exact = solved(branch, [x.detach().double().requires_grad_() for x in given], "math")
    low, actual = (solved(branch, given, name) for name in ("math", backend))
    for name, got, true, rough in zip(("out", "dq", "dk", "dv"), actual, exact, low, strict=True):
        assert got.shape == true.shape and got.dtype == given[0].dtype
        assert_close_to_exact(got, true, rough, reduced=max(given[0].shape), name=f"{branch} {backend} {name}")


@contextmanager
def seen() -> Any:
    """Names of the ops that run inside."""
    names: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Watch():
        yield names


# ---- torch's own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["spatial", "cross"])
def test_flash_is_torchs_flash_and_nothing_else(branch: str) -> None:
    given = inputs(branch)
    assert_right(branch, given, "flash")
    with seen() as names:
        BRANCHES[branch](*given, backend="flash")
    assert [name for name in names if "attention" in name] == ["aten::_scaled_dot_product_flash_attention_for_cpu"]


@pytest.mark.parametrize("branch", ["spatial", "cross"])
def test_what_torch_lacks_here_is_refused(branch: str) -> None:
    message = "expected torch's SDPA to have 'cudnn' for this device, dtype and head dim, it has not; choose"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=message):
            BRANCHES[branch](*inputs(branch), backend="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "flash", "fa2", "fa3", "fa4", "triton"])
@pytest.mark.parametrize("branch", BRANCHES)
def test_on_a_gpu(branch: str, backend: str) -> None:
    if backend not in ATTENTION_BACKENDS[branch]:
        pytest.skip("not a backend of this branch")
    if backend in attention.PACKAGES:
        pytest.importorskip(attention.PACKAGES[backend])
    given = inputs(branch, T=8, J=589, N=333, H=4, dtype=torch.bfloat16, device="cuda")
    assert_right(branch, given, backend)


# ---- ours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("branch", "num_rows"), [("spatial", 9), ("spatial", 130), ("cross", 9), ("temporal", 9)])
def test_triton_takes_the_joint_rows_as_two_sources(branch: str, num_rows: int) -> None:
    given = inputs(branch, B=1, J=num_rows)
    assert_right(branch, given, "triton")
    with seen() as names:
        BRANCHES[branch](*given, backend="triton")
    assert f"vchitect_fast::{branch}_forward" in names and not any("dot_product" in name for name in names)


@pytest.mark.parametrize("branch", BRANCHES)
def test_triton_refuses_a_single_row(branch: str) -> None:
    with pytest.raises(UserError, match="reads rows of two sources, got 1 in all beside"):
        BRANCHES[branch](*inputs(branch, B=1, T=1, J=1, N=1), backend="triton")


# ---- FlashAttention's packages -----------------------------------------------------------------------------------------


def stand_in(calls: list[tuple[str, bool]]) -> dict[str, Callable[..., Any]]:
    """flash_attn_func of each package, with its parameters and what it returns."""

    def solve(name: str, q: Tensor, k: Tensor, v: Tensor, deterministic: bool) -> Tensor:
        assert all(x.ndim == 4 for x in (q, k, v)) and q.shape[2:] == k.shape[2:] == v.shape[2:]
        calls.append((name, deterministic))
        return attend(*(x.transpose(1, 2) for x in (q, k, v)), math=True).transpose(1, 2)

    def fa2(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return solve("fa2", q, k, v, deterministic)

    def fa3(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        return solve("fa3", q, k, v, deterministic)

    def fa4(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False,
    ):  # fmt: skip
        return solve("fa4", q, k, v, deterministic), None

    return {"fa2": fa2, "fa3": fa3, "fa4": fa4}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """All three installed; the calls they get, as (backend, deterministic)."""
    calls: list[tuple[str, bool]] = []
    for backend, function in stand_in(calls).items():
        module = ModuleType(attention.PACKAGES[backend])
        module.flash_attn_func = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules["flash_attn"].cute = sys.modules["flash_attn.cute"]  # type: ignore[attr-defined]
    monkeypatch.setattr(attention, "_on_gpu", lambda _: True)
    return calls


@pytest.mark.parametrize("backend", attention.PACKAGES)
@pytest.mark.parametrize("branch", ["spatial", "cross"])
def test_a_package_computes_what_it_is_named_for(branch: str, backend: str, packages: list[tuple[str, bool]]) -> None:
    given = inputs(branch, dtype=torch.bfloat16)
    assert_right(branch, given, backend)
    assert packages == [(backend, False)]
    torch.use_deterministic_algorithms(True)
    try:
        solved(branch, given, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert packages[1:] == [(backend, True)]


def test_a_version_that_returns_a_pair(packages: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    single = sys.modules["flash_attn_interface"].flash_attn_func  # type: ignore[attr-defined]
    pair = ModuleType("flash_attn_interface")
    pair.flash_attn_func = lambda *args, **options: (single(*args, **options), torch.zeros(()))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", pair)
    assert_right("spatial", inputs("spatial", dtype=torch.bfloat16), "fa3")


@pytest.mark.parametrize("backend", attention.PACKAGES)
def test_an_absent_package_is_named(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_on_gpu", lambda _: True)
    for name in attention.PACKAGES.values():
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError
    package = attention.PACKAGES[backend]
    with pytest.raises(UserError, match=f"'{backend}' needs the package {package}, which does not import here"):
        spatial_attention(*inputs("spatial", dtype=torch.bfloat16), backend=backend)


@pytest.mark.parametrize("backend", attention.PACKAGES)
def test_a_package_is_not_asked_for_what_it_cannot(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="expects CUDA tensors in float16 or bfloat16, got bfloat16 on cpu"):
        cross_attention(*inputs("cross", dtype=torch.bfloat16), backend=backend)
    monkeypatch.setattr(attention, "_on_gpu", lambda _: True)
    with pytest.raises(UserError, match="got float32"):
        cross_attention(*inputs("cross"), backend=backend)


# ---- the Plan, and what is saved ----------------------------------------------------------------------------------------


def entry(**attention: str) -> PlanEntry:
    names = dict.fromkeys(BRANCHES, "sdpa") | attention
    return PlanEntry("4x32x32", (Policy.keep(), Policy.recompute()), 1, 1, PREDICTED, attention=names)


def test_a_plan_names_backends_that_there_are() -> None:
    for branch, names in ATTENTION_BACKENDS.items():
        for name in names:
            assert entry(**{branch: name}).attention[branch] == name
    with pytest.raises(
        UserError, match="unknown attention backend of the spatial branch 'cuddn'; did you mean 'cudnn'"
    ):
        entry(spatial="cuddn")
    with pytest.raises(UserError, match="unknown attention backend of the temporal branch 'fa4'"):
        entry(temporal="fa4")


def test_a_plan_does_not_save_by_group_what_no_group_sees() -> None:
    grouped = Policy("keep", "recompute", "keep", "recompute", "keep")
    with pytest.raises(UserError, match="keeps or offloads branch_out and its attention is fa4"):
        replace(entry(cross="fa4"), policy=(Policy.keep(), grouped))
    replace(entry(cross="fa2"), policy=(Policy.keep(), grouped))


def test_the_groups_see_every_backend_that_is_a_torch_op(packages: list[tuple[str, bool]]) -> None:
    """FlashAttention 2 and 3 call a custom op of this name below their autograd.Function."""

    @torch.library.custom_op("tests_flash::_flash_attn_forward", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend(*(x.transpose(1, 2) for x in (q, k, v)), math=True).transpose(1, 2).contiguous(), q.new_zeros(2)

    sys.modules["flash_attn"].flash_attn_func = lambda q, k, v, deterministic: forward(q, k, v)[0]  # type: ignore[attr-defined]
    dtypes = {"sdpa": torch.float32, "flash": torch.float32, "fa2": torch.bfloat16, "triton": torch.float32}
    for backend, dtype in dtypes.items():
        saved: list[str] = []
        frame = Frame(lambda name, tensor, saved=saved: saved.append(name) or tensor, lambda held: held)
        given = [x.detach() for x in inputs("spatial", dtype=dtype)]
        with frame.recording(), group("branch_out"):
            first = spatial_attention(*given, backend=backend)
        assert "branch_out" in saved and "stats" in saved, backend
        with frame.replaying(), group("branch_out"):
            again = spatial_attention(*given, backend=backend)
        assert torch.equal(first, again)
