"""Times what saving by a Policy costs the host: what torch's checkpoint, and a Frame inside it, add to a block of the model.

On the smallest block there is, where the work itself is next to nothing: hooks see each saved tensor, and a Frame sees each
op from Python, as many of them at every size (offload/hooks.py, offload/groups.py). Computing again is taken off as one more
forward. Every way has its turn in each round; the differences within a round count, their median is the result. Needs torch.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.probe.clock import now_s
from vchitect_fast.cluster import Timing
from vchitect_fast.model.blocks import Block, Branches
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.plan import KEEP, Policy

ROUNDS = 15  # of some 25 ms on a CPU
FRAMES, VISUAL, TEXT = 2, 4, 4  # rows of the block
WAYS = {
    "plain": Policy.keep(),
    "checkpoint": Policy.recompute(),
    "frame": replace(Policy.recompute(), mlp_pre=KEEP),  # of all Frames the one that makes most again
}


def measure_saving(device: torch.device) -> tuple[Timing, Timing]:
    """A checkpoint, and a Frame with the checkpoint around it."""
    config = preset("vchitect-nano")
    block, saving = Block(config, last=False, branches=Branches()).to(device), Saving()
    sizes = [(1, FRAMES, VISUAL, config.hidden_dim), (1, FRAMES, TEXT, config.hidden_dim), (1, config.hidden_dim)]
    inputs = [torch.randn(*size, device=device, requires_grad=True) for size in sizes]
    backend = dict.fromkeys(("spatial", "temporal", "cross"), "sdpa")

    def once(policy: Policy) -> tuple[float, float]:
        """Seconds forward and backward."""
        start_s = now_s(device)
        out = saving.run_block(lambda x, c, temb: block(x, c, temb, backend), policy, 0, None, *inputs)
        between_s = now_s(device)
        tensors = [tensor for tensor in out if tensor is not None]
        torch.autograd.backward(tensors, [torch.ones_like(tensor) for tensor in tensors])
        return between_s - start_s, now_s(device) - between_s

    rounds = [{name: once(policy) for name, policy in WAYS.items()} for _ in range(1 + ROUNDS)][1:]
    return _timing("checkpoint", rounds), _timing("frame", rounds)


def _timing(name: str, rounds: list[dict[str, tuple[float, float]]]) -> Timing:
    ahead, behind = [], []
    for found in rounds:
        plain, with_it = found["plain"], found[name]
        ahead.append(with_it[0] - plain[0])
        behind.append(with_it[1] - plain[1] - plain[0])
    forward_s, backward_s = (max(0.0, statistics.median(values)) for values in (ahead, behind))
    low, *_, high = statistics.quantiles(ahead, n=10, method="inclusive")
    spread = (high - low) / forward_s if forward_s else 0.0
    rows = FRAMES * (VISUAL + TEXT)
    width = preset("vchitect-nano").hidden_dim
    return Timing(name, "float32", rows, width, forward_s, backward_s, num_repeats=len(rounds), spread=spread)
