"""Tuned tables: which row a launch takes, which file is read, and what is refused or passed over.

pytest tests/kernels/test_tuned.py; the rows are made up, the GPU is a name.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned_tables import GPU, flash_choice, make_row, make_table

from vchitect_fast import attention
from vchitect_fast.errors import UserError
from vchitect_fast.kernels import ops, tiles, tuned
from vchitect_fast.kernels.tuned import Row, Table
from vchitect_fast.offload.groups import Frame

NEAR = make_row("spatial", "forward", flash_choice(32), S=1000, N=300, C=64)
EXACT = make_row("spatial", "forward", flash_choice(64), S=1296, N=333, C=64)
FAR = make_row("spatial", "forward", flash_choice(16), S=3072, N=333, C=64)


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU by name, no shipped file, and nothing read before or left behind."""
    monkeypatch.setattr(tuned, "gpu_name", lambda: GPU)
    monkeypatch.setattr(tuned, "SHIPPED", Path("/nowhere"))
    monkeypatch.delenv(tuned.ENVIRONMENT, raising=False)
    tuned.forget()
    yield
    tuned.forget()
    attention._by_table.cache_clear()


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Name a table of these rows in the environment."""

    def write(*rows: Row, **fields: Any) -> Path:
        path = tmp_path / "mine.json"
        make_table(*rows, **fields).save(path)
        monkeypatch.setenv(tuned.ENVIRONMENT, str(path))
        tuned.forget()
        return path

    return write


def blocks(S: int, N: int, C: int = 64, element_bytes: int = 2) -> int:
    return tiles.flash("spatial", "forward", C, element_bytes, S=S, N=N).block_queries


BY_SIZE = tiles.flash_by_size("forward", 64, 2).block_queries

# ---- which row --------------------------------------------------------------------------------------------------------


def test_the_exact_row_then_the_nearest_then_the_heuristic(use: Callable[..., Path]) -> None:
    use(NEAR, EXACT, FAR)
    assert blocks(1296, 333) == 64  # though others are near
    assert blocks(1100, 310) == 32 and blocks(1290, 333) == 64
    assert blocks(4000, 333) == 16  # log2(4000 / 3072) = 0.38
    assert blocks(6144, 333) == 16 and blocks(6145, 333) == BY_SIZE  # a factor of 2, and beyond
    assert blocks(1296, 333, C=128) == tiles.flash_by_size("forward", 128, 2).block_queries  # no neighbour in C
    assert blocks(1296, 333, element_bytes=4) == tiles.flash_by_size("forward", 64, 4).block_queries
    assert tiles.flash("spatial", "dq", 64, 2, S=1296, N=333) == tiles.flash_by_size("dq", 64, 2)
    assert tiles.flash("cross", "forward", 64, 2, R=1296, N=333) == tiles.flash_by_size("forward", 64, 2)


def test_the_distance_by_hand() -> None:
    assert tuned.distance({"S": 8, "N": 4, "C": 64}, {"S": 4, "N": 8, "C": 64}) == 2.0
    assert tuned.distance({"S": 8, "C": 64}, {"S": 8, "C": 64}) == 0.0
    assert tuned.distance({"S": 8, "C": 64}, {"S": 8, "C": 128}) == math.inf
    assert tuned.distance({"S": 8}, {"R": 8}) == math.inf


def test_without_a_table_or_a_gpu_tiles_are_chosen_by_size(
    use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert blocks(1296, 333) == BY_SIZE and tuned.digest() == "none"
    use(EXACT)
    assert blocks(1296, 333) == 64 and len(tuned.digest()) == 16
    monkeypatch.setattr(tuned, "gpu_name", lambda: None)
    tuned.forget()
    assert blocks(1296, 333) == BY_SIZE and tuned.digest() == "none"
    monkeypatch.setattr(tuned, "gpu_name", lambda: GPU)
    monkeypatch.setenv(tuned.ENVIRONMENT, "none")
    tuned.forget()
    assert blocks(1296, 333) == BY_SIZE and tuned.digest() == "none"


def test_a_temporal_tile_that_cannot_hold_the_frames_is_not_taken(use: Callable[..., Path]) -> None:
    use(make_row("temporal", "forward", {"block": 64, "pack": 3, "num_warps": 2}, T=20, C=64))
    assert tiles.temporal("forward", 20, 64, 2) == tiles.PackedTile(64, 3, 2)
    assert tiles.temporal("forward", 21, 64, 2) == tiles.PackedTile(64, 3, 2)
    assert tiles.temporal("forward", 22, 64, 2) == tiles.temporal_forward(22, 64, 2)  # 66 rows
    assert tiles.temporal("backward", 20, 64, 2) == tiles.temporal_backward(20, 64, 2)
    use(make_row("temporal", "backward", {"block_q": 32, "block_k": 64, "num_warps": 4, "num_stages": 1}, T=144, C=64))
    assert tiles.temporal("backward", 160, 64, 2) == tiles.TiledTile(32, 64, 4, 1)


def test_what_is_tried_comes_before_any_table(use: Callable[..., Path]) -> None:
    use(EXACT)
    with tuned.trying({("spatial", "forward"): flash_choice(128), ("spatial", "dq"): None}):
        assert blocks(1296, 333) == blocks(7, 7) == 128
        with tuned.trying({("spatial", "forward"): None}):
            assert blocks(1296, 333) == BY_SIZE
        assert blocks(1296, 333) == 128
    assert blocks(1296, 333) == 64


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_the_kernels_run_in_the_tile_of_the_table(kernel: str, use: Callable[..., Path]) -> None:
    """A block of 16 queries and keys where the heuristic has 64 and more, seen by the launch and right to rounding."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter's launch is watched")
    from vchitect_fast.kernels import cross, spatial

    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 20, 1, 64, generator=draw).half().requires_grad_() for _ in range(3))
    tile = flash_choice(16, 16, 1, 1)
    use(
        make_row("spatial", kernel, tile, S=12, N=8, C=64), make_row("cross", kernel, tile, R=20, N=8, C=64),
    )  # fmt: skip
    seen: list[tuple[str, int]] = []
    for module in (spatial, cross):
        real = getattr(module, f"_{kernel}_kernel")

        class Watched:
            def __init__(self, name: str, real: Any) -> None:
                self.name, self.real = name, real

            def __getitem__(self, grid: Any) -> Any:
                def launch(*args: Any, **options: Any) -> Any:
                    seen.append((self.name, options["BLOCK_M"]))
                    return self.real[grid](*args, **options)

                return launch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, f"_{kernel}_kernel", Watched(module.__name__.rpartition(".")[2], real))
            if module is spatial:
                outs = ops.spatial_attention(tuple(x[:, :, :12] for x in (q, k, v)), tuple(x[:, :, 12:] for x in (q, k, v)), impl="triton")  # fmt: skip
            else:
                outs = ops.cross_attention(q[:, :, :12], q[:, :, 12:], k[:, 0, :8], v[:, 0, :8], impl="triton")
            torch.autograd.grad(outs, (q, k, v), [torch.ones_like(out) for out in outs])
    assert seen == [("spatial", 16), ("cross", 16)]


# ---- which file -------------------------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written(use: Callable[..., Path]) -> None:
    path = use(EXACT, FAR)
    assert Table.load(path) == make_table(EXACT, FAR)
    assert [file.name for file in path.parent.iterdir()] == ["mine.json"]


def test_the_shipped_file_has_the_name_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path)
    assert tuned.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    make_table(EXACT).save(tmp_path / "made-up-gpu-80gb.json")
    assert blocks(1296, 333) == 64


def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(fields)


def change_row(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["rows"][0].update(fields)


def change_choice(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["rows"][0]["winner"]["choice"].update(fields)


WRONG = [
    (change(schema_version=2), "expected a tuned table of schema 1, got 2"),
    (change(gpu="NVIDIA A100"), "is for GPU NVIDIA A100, this is Made-up GPU 80GB"),
    (change(triton="3.2.0"), "is for triton 3.2.0, this is 3"),
    (change(torch="1.9.0"), "is for torch 1.9.0, this is 2"),
    (change(colour="red"), "is no tuned table"),
    (lambda content: content.pop("rows"), "is no tuned table .*rows"),
    (change_row(kernel="dkw"), "is no tuned table .*tile of spatial dkw"),
    (change_row(kernel="backend"), "is no tuned table .*backend of spatial"),
    (change_row(dtype="float64"), "is no tuned table .*float64"),
    (change_row(sizes={"S": 0}), "is no tuned table .*sizes"),
    (change_choice(block_queries=0), "is no tuned table .*tile of spatial forward"),
    (change_choice(block_querys=64), "is no tuned table .*tile of spatial forward"),
]


@pytest.mark.parametrize(("edit", "message"), WRONG)
def test_a_named_file_that_does_not_fit_is_refused_and_a_shipped_one_passed_over(
    edit: Callable[[dict[str, Any]], None], message: str, use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = use(EXACT)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        tuned.digest()
    monkeypatch.delenv(tuned.ENVIRONMENT)
    monkeypatch.setattr(tuned, "SHIPPED", path.parent)
    path.rename(path.parent / tuned.file_name(GPU))
    tuned.forget()
    with caplog.at_level(logging.WARNING):
        assert blocks(1296, 333) == blocks(1000, 300) == BY_SIZE
    [line] = caplog.messages
    assert "a shipped table is passed over" in line


@pytest.mark.parametrize("text", [b"", b'{"schema_version": 1, "rows": [', b"\xff\xfe", b"[1]"])
def test_a_torn_or_foreign_file_is_refused(text: bytes, use: Callable[..., Path]) -> None:
    path = use(EXACT)
    path.write_bytes(text)
    with pytest.raises(UserError, match="cannot read the tuned table|expected a tuned table of schema"):
        tuned.digest()
    path.unlink()
    with pytest.raises(UserError, match="cannot read the tuned table .*No such file"):
        tuned.digest()


def test_a_patch_release_is_no_other_version(use: Callable[..., Path]) -> None:
    first, second = torch.__version__.split(".")[:2]
    use(EXACT, torch=f"{first}.{second}.9+cu999")
    assert blocks(1296, 333) == 64


# ---- auto: which backend ------------------------------------------------------------------------------------------------


def test_auto_takes_the_tables_backend_and_says_it_once(
    use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [make_row("spatial", "backend", {"backend": "flash"}, dtype="float32", J=9, C=64)]
    rows.append(make_row("cross", "backend", {"backend": "fa3"}, dtype="float32", R=18, N=4, C=64))
    use(*rows)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 1, 64, generator=draw) for _ in range(3))

    def auto(branch: Callable[..., torch.Tensor], *given: torch.Tensor) -> list[str]:
        caplog.clear()
        attention._by_table.cache_clear()
        with caplog.at_level(logging.INFO, attention.__name__):
            outs = [branch(*given, backend="auto") for _ in range(2)]
        assert torch.equal(*outs)
        return caplog.messages

    assert auto(attention.spatial_attention, q, k, v) == []  # on a CPU: sdpa, and no table
    monkeypatch.setattr(attention, "_on_gpu", lambda _: True)
    said = "attention backend auto: {} for the {} branch at {}, C 64, 4 bytes ({})"
    assert auto(attention.spatial_attention, q, k, v) == [said.format("flash", "spatial", "J 9", "tuned")]
    found = auto(attention.cross_attention, q, k[:, 0, :4], v[:, 0, :4])
    assert found == [said.format("sdpa", "cross", "R 18, N 4", "tuned fa3 is not installed")]
    assert auto(attention.temporal_attention, q, k, v) == [said.format("sdpa", "temporal", "T 2", "no tuned row")]
    compiled = torch.compile(attention.spatial_attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, backend="auto"), attention.spatial_attention(q, k, v, backend="flash"))


def test_auto_leaves_what_no_group_sees_where_a_group_is_saved(
    use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(make_row("spatial", "backend", {"backend": "fa4"}, J=9, C=64))
    monkeypatch.setattr(attention, "_on_gpu", lambda _: True)
    monkeypatch.setattr(attention, "_is_installed", lambda _: True)
    attention._by_table.cache_clear()
    q = torch.zeros(1, 2, 9, 1, 64, dtype=torch.bfloat16)
    assert attention._chosen("spatial", "auto", q, J=9) == "fa4"
    with Frame(lambda *_: None, lambda held: held).recording():
        assert attention._chosen("spatial", "auto", q, J=9) == "sdpa"
