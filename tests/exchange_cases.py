"""The ways of the benchmark of sequence parallelism, on the ranks of tests/benchmarks/test_bench_parallel.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.benchmarks.case import Sizes
from vchitect_fast.benchmarks.exchanges import BACKEND, WAYS, Layer, Way, make_block
from vchitect_fast.benchmarks.link import Watch
from vchitect_fast.benchmarks.parallel import Traffic, watch_rank
from vchitect_fast.model import preset
from vchitect_fast.parallel.mesh import CPU, make_mesh

UNEVEN = Sizes(2, 4, 7, 5, 3, 8)
EVEN = Sizes(2, 4, 6, 4, 4, 8)


def config_of(sizes: Sizes) -> TransformerConfig:
    return replace(
        preset("vchitect-nano"), num_attention_heads=sizes.H, attention_head_dim=sizes.C, caption_projection_dim=sizes.D
    )


def errors() -> dict[str, float]:
    """By way: outputs and every gradient against one process, the largest relative error in fp64."""
    sizes = UNEVEN
    draw = torch.Generator().manual_seed(1)
    x, c = (torch.randn(sizes.B, sizes.T, rows, sizes.D, generator=draw) for rows in (sizes.S, sizes.N))
    temb = torch.randn(sizes.B, sizes.D, generator=draw)
    leaves = [leaf.double().requires_grad_() for leaf in (x, c, temb)]
    block = make_block(config_of(sizes), WAYS[0].attention).double()
    out = block(*leaves, BACKEND)
    (out[0].square().sum() + out[1].square().sum()).backward()
    return {way.name: _error(way, out, leaves, block) for way in WAYS}


def _error(way: Way, out: Sequence[Tensor], leaves: Sequence[Tensor], block: nn.Module) -> float:
    layer = Layer(way, config_of(UNEVEN), UNEVEN, dist.group.WORLD, CPU, torch.float64)
    found = layer.run()
    dim = 1 if way.spec.axis == "frames" else 2
    own = [
        whole.tensor_split(_bounds(whole.shape[dim]), dim)[dist.get_rank()]
        for whole in (*out, *(leaf.grad for leaf in leaves[:2]))
    ]
    pairs = list(zip((*found, layer.x.grad, layer.c.grad), own, strict=True))
    expected = dict(block.named_parameters())
    for name, parameter in layer.block.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grad)
        pairs.append((grad, expected[name].grad))
    dist.all_reduce(layer.temb.grad)
    pairs.append((layer.temb.grad, leaves[2].grad))
    floor = 1e-6 * max(float(value.abs().max()) for _, value in pairs if value.numel())  # keys' biases have no gradient
    return max(float((a - b).abs().max()) / max(float(b.abs().max()), floor) for a, b in pairs if b.numel())


def _bounds(size: int) -> list[int]:
    each, rest = divmod(size, dist.get_world_size())
    return [each * rank + min(rank, rest) for rank in range(1, dist.get_world_size())]


def counts() -> dict[str, tuple[int, int, int]]:
    """By way, of forward and backward: bytes this rank sends, exchanges, messages."""
    found = {}
    for way in WAYS:
        layer = Layer(way, config_of(EVEN), EVEN, dist.group.WORLD, CPU, torch.float32)
        with Watch() as watch:
            layer.run()
        found[way.name] = watch.sent_bytes, watch.num_collectives, watch.num_messages
    return found


def traffic() -> dict[str, Traffic]:
    world_size = dist.get_world_size()
    mesh = make_mesh({"dp_replicate": 1, "dp_shard": 1, "sp": world_size}, "global", CPU)
    return watch_rank(mesh, config_of(EVEN), EVEN, rounds=2)
