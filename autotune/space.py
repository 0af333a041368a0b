"""The layouts that one step may have: every mesh of the ranks, and within a mesh every division of the step.

    meshes(num_devices, batch)      dp_replicate x dp_shard x sp = num_devices, whose data-parallel ranks share the batch
    common_meshes(problems)         those of them that suit every shape of a run
    shard_specs(config, shape, sp)  how the sp ranks may cut a video of this shape
    layouts(problem, mesh)          ShardSpec x (microbatch x accumulation), blocks computed whole
    in_chunks(problem, layout)      the same with its blocks in 2, 4, 8, ... pieces (model/chunks.py)

Everything that parallel/sequence.py and mesh.py refuse is left out, and so are cuts that leave a rank without rows where
another cut of the same mesh leaves none. How far copies are fetched ahead and how many frames the codec takes at
once are chosen later (policies.py, search.py), since they do not change what blocks compute. Nothing is predicted here.
Refused: a batch that the ranks of a given mesh cannot share. Layer 0 only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.autotune.layout import NOT_CUT, Layout, Problem
from vchitect_fast.cluster import Cluster
from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.plan import ShardSpec
from vchitect_fast.shapes import CODEC_FACTOR, VideoShape

AXES = ("dp_replicate", "dp_shard", "sp")
PREFETCH_DEPTHS = (1, 2, 3)
VAE_MINI_BATCHES = (1, 2, 4, 8, 16, 32)  # frames
FRAMES = ShardSpec("frames", temporal="tokens")
TOKENS_TO_HEADS = ShardSpec("tokens", spatial="heads")
MORE_ROWS = 1.05
TOKENS_TO_FRAMES = ShardSpec("tokens", spatial="frames")


def divisors(number: int) -> list[int]:
    """In ascending order."""
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return low + [number // size for size in reversed(low) if size * size != number]


def meshes(num_devices: int, batch: int) -> list[dict[str, int]]:
    """Every mesh of so many ranks whose data-parallel ranks share `batch` samples a step evenly, fewest sp ranks first."""
    found = []
    for sp in divisors(num_devices):
        num_dp = num_devices // sp
        if batch % num_dp == 0:
            found += [dict(zip(AXES, (num_dp // shard, shard, sp), strict=True)) for shard in divisors(num_dp)]
    return found


def shard_specs(
    config: TransformerConfig, shape: VideoShape, sp: int, num_text_tokens: int, *, strict: bool = False
) -> list[ShardSpec]:
    """The cuts that sp ranks can make; of those, the ones that give every rank rows, if there are any. `strict`: only those."""
    if sp == 1:
        return [NOT_CUT]
    frames, visual = shape.num_frames, shape.tokens_per_frame(config.patch_size)
    allowed = {FRAMES: frames, TOKENS_TO_FRAMES: min(frames, visual, num_text_tokens)}  # spec -> ranks that have rows
    if sp <= config.num_attention_heads:
        allowed[TOKENS_TO_HEADS] = min(visual, num_text_tokens)
    full = [spec for spec, number in allowed.items() if number >= sp]
    return full if full or strict else list(allowed)


def layouts(problem: Problem, mesh: Mapping[str, int]) -> list[Layout]:
    """Every division of a step on this mesh, the codec with as few frames at once as it can have where it runs inside."""
    replicate, shard, sp = (mesh[axis] for axis in AXES)
    num_dp = replicate * shard
    if problem.batch % num_dp:
        raise UserError(
            f"a step of {problem.batch} samples does not divide over {num_dp} data-parallel ranks; give a batch that is a multiple of {num_dp}."
        )
    share = problem.batch // num_dp
    codec = {"vae_mini_batch": 1} if problem.encode else {}
    return [
        Layout(replicate, shard, sp, spec, size, share // size, **codec)
        for spec in _priced(problem, sp, shard_specs(problem.config, problem.shape, sp, problem.num_text_tokens))
        for size in divisors(share)
    ]


def in_chunks(problem: Problem, layout: Layout) -> list[Layout]:
    """In powers of two of pieces, until each is one frame; the temporal branch has as many pieces, of positions."""
    counts = [2**i for i in range(1, most_chunks(problem.shape.num_frames).bit_length())]
    return [replace(layout, num_chunks=count) for count in counts]


def most_chunks(num_frames: int) -> int:
    """The least power of two in which every piece is one frame."""
    return 1 << (num_frames - 1).bit_length()


def _priced(problem: Problem, sp: int, specs: Sequence[ShardSpec]) -> Sequence[ShardSpec]:
    """Where no link says what an exchange takes: the cut that exchanges least, unless its fullest rank has many rows more."""
    if len(specs) < 2 or any(link.name == "intra_node" for link in problem.cluster.links):
        return specs
    rows = {spec: problem.workload(Layout(sp=sp, shard=spec)).rows for spec in specs}
    least = min(rows.values())
    return [
        next(
            spec
            for spec in (FRAMES, TOKENS_TO_HEADS, TOKENS_TO_FRAMES)
            if rows.get(spec, math.inf) <= MORE_ROWS * least
        )
    ]


def common_meshes(problems: Sequence[Problem]) -> list[dict[str, int]]:
    """The meshes on which every shape gives every rank rows; where there are none, all that share the batch.

    Raises UserError where ranks share nothing evenly, or the cluster lacks a link between them.
    """
    problem = problems[0]
    cluster, number = problem.cluster, problem.num_devices
    if number > 1 and cluster.num_devices_per_node > 1:
        cluster.link("intra_node")
    if number > cluster.num_devices_per_node:
        cluster.link("inter_node")
    found = meshes(number, problem.batch)

    def full(sp: int) -> bool:
        return all(shard_specs(p.config, p.shape, sp, p.num_text_tokens, strict=True) for p in problems)

    possible = {mesh["sp"] for mesh in found}
    good = {sp for sp in possible if full(sp)} or possible
    return [mesh for mesh in found if mesh["sp"] in good]


def check_mesh(mesh: Mapping[str, int], cluster: Cluster) -> None:
    """UserError for a given mesh that is not one, or that the cluster has not the devices for."""
    for axis in mesh:
        if axis not in AXES:
            raise unknown_name("mesh axis", axis, AXES)
    if missing := [axis for axis in AXES if axis not in mesh]:
        raise UserError(f"expected a mesh of {', '.join(AXES)}, got none for {', '.join(missing)}; give 1 for it.")
    for axis, size in mesh.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"mesh axis {axis} must be a whole number from 1 up, got {size!r}; give 1 for none.")
    number = math.prod(mesh.values())
    if cluster.num_devices > 1 and number > cluster.num_devices:
        raise UserError(
            f"the mesh {' x '.join(f'{axis} {mesh[axis]}' for axis in AXES)} has {number} ranks, {cluster.name} has "
            f"{cluster.num_devices} devices; give a smaller mesh, or raise num_nodes in the cluster file."
        )


def check_grid(config: TransformerConfig, shape: VideoShape) -> None:
    """UserError for a picture larger than the model's position grid."""
    side = config.pos_embed_max_size * config.patch_size * CODEC_FACTOR
    if shape.width > side or shape.height > side:
        raise UserError(
            f"{shape} exceeds the model's position grid of {side} x {side} pixels; choose a smaller shape or another model."
        )
