"""The goals of the activation memory engine, one row each: pass, fall short, or not measured and why.

    python -m vchitect_fast.benchmarks.offload_goals [--only copies steps] [--json]

Every figure is taken side by side with what it is held against, in the same process. Needs one GPU and a build with
VCHITECT_FAST_CUDA=1; what must fit an 80 GB GPU is held to what such a one leaves. NEVER RUN so far: there was no GPU where
it was written; without one each row says "not measured". --tiny: the same code at toy sizes on whatever is here, nothing
counts. Whole steps stand in model_steps.py. Exit code 1 when a row fell short or a measurement failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from vchitect_fast.plan import Policy

GIB = 2**30
LIMIT_BYTES = int(78.5 * GIB)  # of an H100's 79.6 GiB, what its context leaves
INPUT = Policy("offload", "recompute", "recompute", "recompute", "recompute")
MOVED = Policy("offload", "offload", "offload", "offload", "offload")


@dataclass(frozen=True)
class Row:
    """One goal: `found` against `limit`, in the unit; at_least says which side is good."""

    goal: str
    limit: float
    unit: str
    at_least: bool = False
    found: float | None = None
    not_measured: str = ""

    @property
    def verdict(self) -> str:
        """In words."""
        if self.found is None:
            return f"not measured: {self.not_measured}"
        return "pass" if (self.found >= self.limit) == self.at_least or self.found == self.limit else "fall short"

    def __str__(self) -> str:
        sign, found = (">=" if self.at_least else "<="), "" if self.found is None else f"{self.found:.3g} {self.unit}; "
        return f"{self.goal:<80} {sign} {self.limit:g} {self.unit:<10} {found}{self.verdict}"


ROWS = {
    "copy out": Row("copies out, share of the link's measured speed", 0.95, "ratio", at_least=True),
    "copy back": Row("copies back, share of the link's measured speed", 0.95, "ratio", at_least=True),
    "both": Row("both directions at once, share of the link's measured speed", 0.95, "ratio", at_least=True),
    "set-up": Row("slab set-up", 110, "ms a GiB"),
    "input": Row("block-input offload over recompute alone, 40x768x432, 10 blocks", 0.5, "%"),
    "fifth": Row("20 % of 10 blocks offloaded over keeping everything, 40x768x432", 2.0, "%"),
    "freed": Row("bytes freed by offloading block inputs, share of theory", 0.99, "ratio", at_least=True),
    "spin": Row("gradients that a slow kernel on the copy streams changes", 0, "tensors"),
    "mix": Row("best mix faster than recomputing all at the same peak, 40x768x432, 10 blocks", 5.0, "%", at_least=True),
    "longest": Row("24 blocks train at 144x1920x1088, host memory", 120, "GiB"),
}


@dataclass(frozen=True)
class Sizes:
    """On which device, and how much of everything."""

    device: str
    copy_bytes: int
    slab_bytes: int
    model: str
    dtype: str
    num_text_tokens: int
    steps: tuple[str, int]  # VideoShape, blocks
    spin: tuple[str, int]
    longest: tuple[str, int, int]  # and chunks
    num_rounds: int  # of a step


FULL = Sizes(
    "cuda", GIB, 16 * GIB, "vchitect-2b", "bfloat16", 333, ("40x768x432", 10), ("32x256x256", 4),
    ("144x1920x1088", 24, 36), 3,
)  # fmt: skip


def tiny() -> Sizes:
    """A toy of everything, on whatever is here."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Sizes(
        device, 2**20, 2**20, "vchitect-nano", "float32", 4, ("2x32x32", 4), ("2x32x32", 4), ("4x32x32", 3, 2), 1
    )


def measure_all(names: Sequence[str], sizes: Sizes) -> list[Row]:
    """The rows of these measurements; without what they need, each row says why it was not measured."""
    why = _missing(sizes)
    found: dict[str, Row] = {}
    values: list[float | str]
    for name in names:
        rows, measurement = MEASUREMENTS[name]
        try:
            values = [why] * len(rows) if why else list(measurement(sizes))
        except Exception as error:  # one that fails must not hide the others; the exit code tells
            values = [f"failed with {type(error).__name__}: {error}"] * len(rows)
        for row, value in zip(rows, values, strict=True):
            change = {"not_measured": value} if isinstance(value, str) else {"found": float(value)}
            found[row] = replace(ROWS[row], **change)
        if not why:
            _give_back(sizes)
    return list(found.values())


def _missing(sizes: Sizes) -> str:
    import torch

    if sizes.device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    try:
        from vchitect_fast import _C
    except ImportError as error:
        return f"the C++ module is not there ({error})"
    copies = sizes.device == "cpu" or _C.build_info()["cuda"]
    return "" if copies else "this build has no CUDA copier; build with VCHITECT_FAST_CUDA=1"


def _give_back(sizes: Sizes) -> None:
    """What a measurement held is free for the next."""
    import torch

    gc.collect()
    if sizes.device == "cuda":
        torch.cuda.empty_cache()


def _wait(sizes: Sizes) -> None:
    import torch

    if sizes.device == "cuda":
        torch.cuda.synchronize()


def _seconds(work: Callable[[], object], sizes: Sizes, num_rounds: int, num_warm_up: int = 2) -> float:
    """Median of the rounds after those that warm up; the host waits for the GPU."""
    found = []
    for _ in range(num_rounds + num_warm_up):
        _wait(sizes)
        begin = time.perf_counter()
        work()
        _wait(sizes)
        found.append(time.perf_counter() - begin)
    return median(found[num_warm_up:])


def copies(sizes: Sizes) -> Sequence[float]:
    """Ours over torch's copies of as many bytes of pinned memory: out, back, both."""
    import torch

    from vchitect_fast import _C

    on_gpu, num_bytes = sizes.device == "cuda", sizes.copy_bytes
    device = [torch.zeros(num_bytes, dtype=torch.uint8, device=sizes.device) for _ in range(2)]
    host = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)] if on_gpu else [None, None]
    engine = _C.Engine(3 * num_bytes, 256, cuda=on_gpu)
    now = torch.cuda.current_stream().cuda_stream if on_gpu else 0
    standing = engine.offload(device[0].data_ptr(), num_bytes, stream=now)
    engine.settle()

    def theirs(out: bool, back: bool) -> None:
        if out:
            with torch.cuda.stream(streams[0]):
                host[0].copy_(device[0], non_blocking=True)
        if back:
            with torch.cuda.stream(streams[1]):
                device[1].copy_(host[1], non_blocking=True)

    def ours(out: bool, back: bool) -> None:
        if out:
            engine.release(engine.offload(device[0].data_ptr(), num_bytes, stream=now))
        if back:
            engine.prefetch(standing, device[1].data_ptr(), stream=now)

    def seconds(copy: Callable[[bool, bool], None], way: tuple[bool, bool]) -> float:
        return _seconds(lambda: copy(*way), sizes, num_rounds=10)

    ways = ((True, False), (False, True), (True, True))
    return [seconds(theirs, way) / seconds(ours, way) for way in ways]


def set_up(sizes: Sizes) -> Sequence[float]:
    """Milliseconds a GiB, pages touched and registered."""
    from vchitect_fast import _C

    begin = time.perf_counter()
    _C.Engine(sizes.slab_bytes, 256, cuda=sizes.device == "cuda")
    return [1000 * (time.perf_counter() - begin) / (sizes.slab_bytes / GIB)]


class _Stack:
    """Blocks of the model with noise, ready to run under Policies."""

    def __init__(self, sizes: Sizes, text: str, num_blocks: int) -> None:
        import torch

        from vchitect_fast.architecture import preset
        from vchitect_fast.model import VchitectTransformer
        from vchitect_fast.shapes import VideoShape
        from vchitect_fast.workload import Workload

        config = replace(preset(sizes.model), num_layers=num_blocks)
        shape = VideoShape.parse(text)[0]
        self.sizes, self.num_blocks = sizes, num_blocks
        self.work = Workload(config, shape, 1, sizes.num_text_tokens)
        torch.manual_seed(0)
        with torch.device(sizes.device):  # drawn there: on a CPU a billion numbers take a quarter of a minute
            self.model = VchitectTransformer(config).to(getattr(torch, sizes.dtype))
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        shapes = [
            (1, shape.num_frames, config.in_channels, shape.latent_height, shape.latent_width),
            (1, sizes.num_text_tokens, config.joint_attention_dim), (1, config.pooled_projection_dim), (1,),
        ]  # fmt: skip
        self.inputs = [torch.randn(size, device=sizes.device) for size in shapes]

    def set(self, policies: Sequence[Policy]) -> Any:
        """The Policies and an engine with exactly their pool; returns the Saving."""
        from vchitect_fast.offload.engine import Engine
        from vchitect_fast.offload.hooks import Saving
        from vchitect_fast.offload.policy import offload_budget_bytes

        budget = offload_budget_bytes(self.work, policies, self.sizes.dtype)
        self.model.saving = Saving()  # the pool before is gone when the next is made
        self.model.saving = Saving(Engine(budget, self.sizes.device)) if budget else Saving()
        self.model.set_policy(policies)
        return self.model.saving

    def step(self) -> None:
        """Forward and backward."""
        self.model.zero_grad(set_to_none=True)
        self.model(*self.inputs).float().square().mean().backward()

    def peak_bytes(self, policies: Sequence[Policy]) -> int:
        """Of the second step; it stays set."""
        import torch

        self.set(policies)
        self.step()
        if self.sizes.device == "cpu":
            return 0
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated()

    def cost(self, policies: Sequence[Policy]) -> tuple[float, int]:
        """Median seconds of a step, and its peak bytes."""
        peak = self.peak_bytes(policies)
        return _seconds(self.step, self.sizes, self.sizes.num_rounds, num_warm_up=0), peak


def steps(sizes: Sizes) -> Sequence[float]:
    """Percent over recompute, percent over keeping, share of bytes freed, percent of the best mix under recompute."""
    from vchitect_fast.offload.policy import step_bytes

    stack = _Stack(sizes, *sizes.steps)
    n = stack.num_blocks
    keep, again = (Policy.keep(),) * n, (Policy.recompute(),) * n
    moved = range(2, n, 5)  # 2 and 7 of 10: a fifth
    fifth = tuple(MOVED if i in moved else Policy.keep() for i in range(n))
    (kept_s, _), (fifth_s, _) = stack.cost(keep), stack.cost(fifth)
    (again_s, again_peak), (input_s, input_peak) = stack.cost(again), stack.cost((INPUT,) * n)
    rows = step_bytes(stack.work, (INPUT,) * n, sizes.dtype, device_kind=sizes.device)
    theory = sum(row.num_bytes for row in rows if row.action == "offload")
    best_s = min((stack.cost(mix)[0] for mix in _mixes(stack, again_peak)), default=again_s)
    return [
        100 * (input_s / again_s - 1), 100 * (fifth_s / kept_s - 1), (again_peak - input_peak) / theory,
        100 * (1 - best_s / again_s),
    ]  # fmt: skip


def _mixes(stack: _Stack, peak_bytes: int) -> list[tuple[Policy, ...]]:
    """Inputs offloaded and, of as many blocks as fit under the peak, the attention kept, or offloaded: one mix of each."""
    n, found = stack.num_blocks, []
    for attention in ("keep", "offload"):
        one = replace(INPUT, branch_out=attention, stats=attention)
        fits, beyond = 0, n  # blocks; the last is recomputed in any case
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if stack.peak_bytes((one,) * middle + (INPUT,) * (n - middle)) <= peak_bytes:
                fits = middle
            else:
                beyond = middle
        if fits:
            found.append((one,) * fits + (INPUT,) * (n - fits))
    return found


def spin(sizes: Sizes) -> Sequence[float | str]:
    """Gradients that differ bitwise when a slow kernel sits ahead of every copy: a missing edge is wrong every time."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        stack = _Stack(sizes, *sizes.spin)
        stack.set((Policy.keep(),) * stack.num_blocks)

        def gradients() -> list[Any]:
            stack.step()
            return [p.grad.clone() for p in stack.model.parameters() if p.grad is not None]

        first, *others = [gradients() for _ in range(4)]
        noisy = set().union(*(_different(first, other) for other in others))
        if 2 * len(noisy) > len(first):
            return [f"{len(noisy)} of {len(first)} gradients differ from step to step without any copy"]
        saving = stack.set((MOVED, INPUT) * (stack.num_blocks // 2))
        changed = set()
        for _ in range(20):
            for handle in saving.engine.mover.streams() if sizes.device == "cuda" else ():
                with torch.cuda.stream(torch.cuda.ExternalStream(handle)):
                    torch.cuda._sleep(20_000_000)
            changed |= _different(first, gradients())
        return [len(changed - noisy)]
    finally:
        torch.use_deterministic_algorithms(False)


def _different(tensors: Sequence[Any], others: Sequence[Any]) -> set[int]:
    """Where they are not the same bits."""
    return {i for i, (a, b) in enumerate(zip(tensors, others, strict=True)) if not a.equal(b)}


def longest(sizes: Sizes) -> Sequence[float]:
    """GiB of host memory of one whole step with AdamW: inputs offloaded, blocks in chunks of four frames."""
    import torch

    from vchitect_fast.optimizer import MasterAdamW

    if sizes.device == "cuda":
        hold_to_80gb()
    shape, num_blocks, num_chunks = sizes.longest
    stack = _Stack(sizes, shape, num_blocks)
    dtype = getattr(torch, sizes.dtype)
    optimizer = MasterAdamW(stack.model.float(), weight_decay=0.0, betas=(0.9, 0.95), dtype=dtype)
    optimizer.copy_masters()
    saving = stack.set((INPUT,) * stack.num_blocks)
    stack.model.set_chunks(num_chunks)
    with saving.step():
        stack.step()
    optimizer.step(1e-5, 1.0)
    return [saving.engine.stats()["budget_bytes"] / GIB]


def hold_to_80gb() -> None:
    """On a larger GPU torch gets what an 80 GB one leaves it; for the rest of the process."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT_BYTES / total))


MEASUREMENTS: dict[str, tuple[tuple[str, ...], Callable[[Sizes], Sequence[float | str]]]] = {
    "copies": (("copy out", "copy back", "both"), copies),
    "set-up": (("set-up",), set_up),
    "spin": (("spin",), spin),
    "steps": (("input", "fifth", "freed", "mix"), steps),
    "longest": (("longest",), longest),
}


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit code 1 when a row fell short or failed."""
    parser = argparse.ArgumentParser(
        description="Goals of the activation memory engine: pass, fall short, not measured."
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=MEASUREMENTS, help=f"of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--tiny", action="store_true", help="rehearse at toy sizes on whatever is here")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(arguments)
    rows = measure_all(args.only or list(MEASUREMENTS), tiny() if args.tiny else FULL)
    verdicts = [row.verdict for row in rows]
    if args.json:
        print(json.dumps([{**asdict(row), "verdict": row.verdict} for row in rows]))
    else:
        print(*rows, sep="\n")
        words = "rehearsed, no figure counts" if args.tiny else f"{verdicts.count('pass')} pass"
        print(f"{len(rows)} rows: {words}")
    failed = [
        verdict for verdict in verdicts if "failed with" in verdict or (verdict == "fall short" and not args.tiny)
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
