"""Layouts: all that the runtime allows and nothing that it refuses.

pytest tests/autotune/test_space.py
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from planner_cases import TINY, gpus, problem

from vchitect_fast.autotune.space import (
    FRAMES,
    TOKENS_TO_FRAMES,
    TOKENS_TO_HEADS,
    check_mesh,
    common_meshes,
    divisors,
    layouts,
    meshes,
    shard_specs,
)
from vchitect_fast.errors import UserError
from vchitect_fast.plan import SHARDED, ShardSpec
from vchitect_fast.shapes import VideoShape

SHORT, IMAGE = VideoShape(2, 256, 256), VideoShape(1, 256, 256)


def test_divisors() -> None:
    for number in (1, 2, 16, 36, 97, 360):
        assert divisors(number) == [size for size in range(1, number + 1) if number % size == 0]


@pytest.mark.parametrize(("number", "batch"), [(1, 1), (4, 4), (4, 2), (6, 12), (12, 8), (8, 3)])
def test_every_mesh_that_shares_the_batch(number: int, batch: int) -> None:
    sizes = range(1, number + 1)
    expected = {(r, s, p) for r in sizes for s in sizes for p in sizes if r * s * p == number and batch % (r * s) == 0}
    found = [tuple(mesh.values()) for mesh in meshes(number, batch)]
    assert set(found) == expected
    assert len(found) == len(expected)


def test_the_cuts_are_those_of_the_plan() -> None:
    """Every axis and way to reshard that a ShardSpec knows."""
    known = {
        ShardSpec(axis, spatial, temporal)
        for axis, branches in SHARDED.items()
        for spatial in branches["spatial"]
        for temporal in branches["temporal"]
    }
    assert known == {ShardSpec(), FRAMES, TOKENS_TO_HEADS, TOKENS_TO_FRAMES}


def test_cuts_give_every_rank_rows_and_heads_are_not_divided() -> None:
    wide = VideoShape(16, 256, 256)
    assert shard_specs(TINY, wide, 1, 16) == [ShardSpec()]
    assert set(shard_specs(TINY, wide, 2, 16)) == {FRAMES, TOKENS_TO_FRAMES, TOKENS_TO_HEADS}
    assert set(shard_specs(TINY, wide, 4, 16)) == {FRAMES, TOKENS_TO_FRAMES}  # 3 heads
    assert shard_specs(TINY, SHORT, 3, 16) == [TOKENS_TO_HEADS]  # 2 frames
    assert shard_specs(TINY, IMAGE, 2, 16) == [TOKENS_TO_HEADS]
    assert shard_specs(TINY, IMAGE, 4, 16, strict=True) == []
    assert set(shard_specs(TINY, IMAGE, 4, 16)) == {FRAMES, TOKENS_TO_FRAMES}  # some ranks idle, as asked for
    assert FRAMES in shard_specs(TINY, wide, 16, 8) and TOKENS_TO_FRAMES not in shard_specs(TINY, wide, 16, 8)


def test_layouts_divide_the_batch_and_fill_the_mesh() -> None:
    asked = problem(gpus(4), batch=24)
    for mesh in meshes(4, 24):
        found = layouts(asked, mesh)
        assert len(set(found)) == len(found)
        specs = shard_specs(asked.config, asked.shape, mesh["sp"], 16)
        share = 24 // (mesh["dp_replicate"] * mesh["dp_shard"])
        assert len(found) == len(specs) * len(divisors(share))
        for layout in found:
            assert layout.mesh == mesh
            assert layout.num_dp * layout.microbatch * layout.accumulation == 24
            assert layout.shard in specs
    with pytest.raises(UserError, match="a step of 24 samples does not divide over 5 data-parallel ranks"):
        layouts(asked, {"dp_replicate": 5, "dp_shard": 1, "sp": 1})


def test_a_codec_in_the_step_begins_with_the_fewest_frames() -> None:
    [layout] = layouts(replace(problem(gpus(), batch=1), encode=True), {"dp_replicate": 1, "dp_shard": 1, "sp": 1})
    assert layout.vae_mini_batch == 1


def test_common_meshes_suit_every_shape() -> None:
    both = [problem(gpus(4), batch=4), problem(gpus(4), batch=4, shape=IMAGE)]
    assert {mesh["sp"] for mesh in common_meshes(both[:1])} == {1, 2, 4}
    assert {mesh["sp"] for mesh in common_meshes(both)} == {1, 2}  # an image over 4 ranks leaves some without rows
    alone = [problem(gpus(4), batch=1, shape=IMAGE)]
    assert [math.prod(mesh.values()) for mesh in common_meshes(alone)] == [4]  # nothing else shares one sample


@pytest.mark.parametrize(("number", "link"), [(4, "intra_node"), (16, "inter_node")])
def test_a_cluster_without_the_link_that_ranks_need_is_refused(number: int, link: str) -> None:
    on = gpus(number)
    lacking = replace(on, links=tuple(item for item in on.links if item.name != link))
    assert common_meshes([problem(on, batch=number)])
    with pytest.raises(UserError, match=f"has no link '{link}'"):
        common_meshes([problem(lacking, batch=number)])


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"dp_replicate": 1, "dp_shard": 1, "pp": 1}, "unknown mesh axis 'pp'"),
        ({"dp_replicate": 1, "sp": 1}, "got none for dp_shard"),
        ({"dp_replicate": 0, "dp_shard": 1, "sp": 1}, "dp_replicate must be a whole number from 1 up, got 0"),
        ({"dp_replicate": 1, "dp_shard": True, "sp": 1}, "dp_shard must be a whole number from 1 up, got True"),
        ({"dp_replicate": 2, "dp_shard": 2, "sp": 2}, "has 8 ranks, made up has 4 devices"),
    ],
)
def test_a_given_mesh_is_checked(mesh: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_mesh(mesh, gpus(4))
    check_mesh({"dp_replicate": 1, "dp_shard": 2, "sp": 2}, gpus(4))
