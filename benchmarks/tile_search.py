"""The search of `vchitect-fast tune kernels`: which tile for each kernel of attention, which backend for each branch.

A candidate is what a row of a table may hold (kernels/tuned.py). Those that cannot fit are left out by arithmetic. Every
other is checked against fp64 at the bench's check sizes; then all are timed in interleaved rounds, and the fastest once more
beside the heuristic's alone, since the least of many medians is luck in part. There its median must be below the
heuristic's p10, else the row holds the heuristic's choice: nothing here was faster, and no neighbour's row is taken.
Samples of dq and dkv are of the whole backward, with what has won so far in the other kernels; those of a backend are of
forward and backward over joint rows, triton in the tiles that won. It prints nothing and writes nothing.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product

import torch

from vchitect_fast import attention
from vchitect_fast.benchmarks.attention_cases import attention_cases
from vchitect_fast.benchmarks.case import Case, Problem, Provider, Sizes
from vchitect_fast.benchmarks.record import BACKWARD, BOTH, FORWARD
from vchitect_fast.benchmarks.suite import check, work_of
from vchitect_fast.benchmarks.timing import Samples, Work, reason
from vchitect_fast.kernels import tiles
from vchitect_fast.kernels.tiles import BACKEND, TUNED, FlashTile, PackedTile, Tile, TiledTile
from vchitect_fast.kernels.tuned import Choice, Measured, Row, trying
from vchitect_fast.plan import ATTENTION_BACKENDS
from vchitect_fast.shapes import VideoShape

BUDGET_S = 0.5  # for the rounds of all candidates of a kernel, and again for the fastest beside the heuristic's
DEFAULT_BACKEND = "sdpa"
NO_CANDIDATE = ("auto", "math")  # a name for others; what defines the answer, and writes the scores out
CHECK_TOKENS = 2048  # a frame: up to here 16 frames of scores in fp64 are small
# fp32 values a thread by the formula of `why_not`. ptxas for sm_90, spatial at C = 64: 192 spill (forward 128x128 in 4 warps,
# 40 bytes; dkv 128x128 in 8, 272), 160 do not (dq 128x128 in 8).
MOST_VALUES = 192  # and more are left out
# kernel -> operands that a program keeps, sums of [owned, C], products of [owned, looped] that live at once
HELD = {"forward": (1, 1, 1), "dq": (2, 1, 2), "dkv": (2, 2, 2), "backward": (2, 1, 2)}
DIRECTION = {"forward": FORWARD, BACKEND: BOTH}  # else backward

Measure = Callable[[Mapping[str, Work], float], tuple[dict[str, Samples], dict[str, str]]]  # timing.interleaved
Tried = dict[tuple[str, str], Choice | None]
Given = dict[bool, tuple[Problem, list[torch.Tensor]]]  # by whether the provider is joint: inputs, gradients of outputs


@dataclass(frozen=True)
class Task:
    """One op at one shape; `case` is the bench's."""

    op: str
    shape: str
    case: Case

    @property
    def dtype(self) -> str:
        """As a row names it."""
        return str(self.case.dtype).removeprefix("torch.")

    def sizes(self, kernel: str) -> dict[str, int]:
        """As tiles.py and attention.py look them up."""
        at = self.case.sizes
        of_spatial = {"J": at.J} if kernel == BACKEND else {"S": at.S, "N": at.N}
        by_op = {"spatial": of_spatial, "temporal": {"T": at.T}, "cross": {"R": at.T * at.J, "N": at.N}}
        return by_op[self.op] | {"C": at.C}

    def keys(self) -> list[tuple[object, ...]]:
        """Of all rows that it makes."""
        return [(self.op, kernel, self.dtype, *self.sizes(kernel).items()) for kernel in (*TUNED[self.op], BACKEND)]


def key(row: Row) -> tuple[object, ...]:
    """What makes two rows one."""
    return row.op, row.kernel, row.dtype, *row.sizes.items()


@dataclass(frozen=True)
class Dropped:
    """A candidate that is not among the timed ones, or a whole kernel where `choice` is empty."""

    place: str
    choice: str
    reason: str


def all_tasks(shapes: Iterable[VideoShape], ops: Iterable[str], *, tiny: bool) -> list[Task]:
    """Shape by shape; of shapes that an op's rows cannot tell apart, the one with the most tokens."""
    dtype, rest = (torch.float32, (2, 2, 64)) if tiny else (torch.bfloat16, (333, 24, 64))
    found: dict[object, Task] = {}
    for shape in shapes:
        at = Sizes.of(shape, *rest)
        # As divisible by 16 as the timed sizes are, so that Triton compiles once.
        frames = 16 if at.T % 16 == 0 and at.J <= CHECK_TOKENS else min(at.T, 2)
        for make in attention_cases():
            if make.__name__ not in ops:
                continue
            sizes = at if tiny else None if make.__name__ == "temporal" else replace(at, T=frames, H=2)
            task = Task(make.__name__, str(shape), make(str(shape), at, sizes, dtype, True))
            rows = tuple(task.keys())
            if rows not in found or found[rows].case.sizes.rows < at.rows:
                found[rows] = task
    return list(found.values())


def heuristic(op: str, kernel: str, at: Sizes, element_bytes: int) -> Choice:
    """What is taken without a table."""
    if kernel == BACKEND:
        return {BACKEND: DEFAULT_BACKEND}
    if op != "temporal":
        return asdict(tiles.flash_by_size(kernel, at.C, element_bytes))
    by_size = tiles.temporal_forward if kernel == "forward" else tiles.temporal_backward
    return asdict(by_size(at.T, at.C, element_bytes))


def grid(op: str, kernel: str, num_frames: int) -> list[Tile]:
    """The tiles that are considered: at least 16 rows a warp (8 where problems are packed)."""
    if op != "temporal":
        cuts = [cut for cut in product((64, 128), (32, 64, 128), (4, 8), (2, 3)) if cut[2] <= cut[0] // 16]
        order = (1, 0) if kernel == "dkv" else (0, 1)  # dkv owns keys
        return [FlashTile(cut[order[0]], cut[order[1]], cut[2], cut[3]) for cut in cuts]
    packed = [
        PackedTile(block, block // num_frames, num_warps)
        for block, num_warps in product((16, 32, 64, 128), (1, 2, 4, 8))
        if num_frames <= block < 4 * num_frames + 16 and num_warps <= block // 8
    ]
    tiled = [TiledTile(*cut) for cut in product((32, 64), (32, 64), (4, 8), (1, 2)) if num_frames > 64]
    return [*packed, *tiled]


def why_not(tile: Tile, kernel: str, head_dim: int, element_bytes: int, shared_limit_bytes: int) -> str:
    """Why a tile cannot fit, or nothing; of shared memory it needs at least this (of ten compiled for sm_90, 3 to 43 % more)."""
    if isinstance(tile, PackedTile):
        owned, looped, num_stages = tile.block, tile.block, 0
    elif isinstance(tile, TiledTile):
        owned, looped, num_stages = tile.block_q, tile.block_k, tile.num_stages
    else:
        cut = (tile.block_queries, tile.block_keys)
        (owned, looped), num_stages = cut[::-1] if kernel == "dkv" else cut, tile.num_stages
    operands, sums, products = HELD[kernel]
    num_bytes = element_bytes * head_dim * (operands * owned + 2 * num_stages * looped)
    if num_bytes > shared_limit_bytes:
        return f"more than the {shared_limit_bytes} bytes of shared memory that a program has"
    values = owned * (sums * head_dim + products * looped) // (32 * tile.num_warps)
    return f"{MOST_VALUES} fp32 values a thread or more, which spill" if values >= MOST_VALUES else ""


def label(choice: Choice) -> str:
    """A choice in a line."""
    short = {name.removeprefix("block_").removeprefix("num_"): value for name, value in choice.items()}
    return " ".join(str(value) if name == BACKEND else f"{name} {value}" for name, value in short.items())


@dataclass
class Search:
    """What all tasks of a run share, and what became of it beside rows.

    measure     timing.interleaved of a Clock on `device`
    deadline_s  of time.monotonic; a kernel that is not through by then gets no row
    at_most     candidates of a kernel beside the heuristic's, of a rehearsal
    """

    measure: Measure
    device: torch.device
    shared_limit_bytes: int
    deadline_s: float = math.inf
    at_most: int | None = None
    said: Callable[[str], object] = lambda text: None
    dropped: list[Dropped] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)

    def tune(self, task: Task) -> list[Row]:
        """The rows of the op's kernels, then of its backend."""
        rows: list[Row] = []
        won: Tried = dict.fromkeys((task.op, kernel) for kernel in TUNED[task.op])
        given: Given = {}
        for kernel in (*TUNED[task.op], BACKEND):
            place = f"{task.op} {kernel} {task.shape}"
            try:
                if time.monotonic() > self.deadline_s:
                    raise TimeoutError
                given = given or _draw(task, self.device)
                row = self._row(place, task, kernel, won, given)
            except TimeoutError:
                self.not_reached.append(place)
                continue
            except Exception as error:  # of the inputs, or of the definition in fp64
                self._drop(place, "", f"the case itself failed: {reason(error)}")
                continue
            if row:
                rows.append(row)
                won |= {} if kernel == BACKEND else {(task.op, kernel): row.winner.choice}
        del given
        gc.collect()
        return rows

    def _row(self, place: str, task: Task, kernel: str, won: Tried, given: Given) -> Row | None:
        """The winner beside the heuristic; None where the heuristic's own choice is wrong or raises."""
        by_size = heuristic(task.op, kernel, task.case.sizes, task.case.dtype.itemsize)
        choices = {label(choice): choice for choice in (by_size, *self._candidates(place, task, kernel, by_size))}
        errors = self._checked(place, task, kernel, won, choices)
        works = {name: _work(task, kernel, won, choices[name], given) for name in errors}
        standard, found = label(by_size), self._timed(place, works)
        best = min(found, key=lambda name: found[name].median_s, default=standard)
        if best != standard and standard in found:
            found = self._timed(place, {name: works[name] for name in (best, standard)})
        if standard not in found:
            self._drop(place, "", "the heuristic's own choice did not come through")
            return None
        if best not in found or found[best].median_s >= found[standard].p10_s:
            best = standard
        winner, beside = (
            Measured(choices[name], **asdict(found[name]), error_vs_fp64=errors[name]) for name in (best, standard)
        )
        return Row(task.op, kernel, task.dtype, task.sizes(kernel), winner, beside)

    def _candidates(self, place: str, task: Task, kernel: str, by_size: Choice) -> list[Choice]:
        """All that can fit, beside the heuristic's."""
        at, size = task.case.sizes, task.case.dtype.itemsize
        if kernel == BACKEND:
            return [{BACKEND: name} for name in ATTENTION_BACKENDS[task.op] if name not in NO_CANDIDATE]
        found: list[Choice] = []
        for tile in grid(task.op, kernel, at.T):
            if asdict(tile) == by_size:
                continue
            if why := why_not(tile, kernel, at.C, size, self.shared_limit_bytes):
                self._drop(place, label(asdict(tile)), why)
            else:
                found.append(asdict(tile))
        return found[: self.at_most]

    def _checked(
        self, place: str, task: Task, kernel: str, won: Tried, choices: Mapping[str, Choice]
    ) -> dict[str, float]:
        """Errors of those that hold the rule of tests/close.py, in the 2-norm of the worst tensor; TimeoutError."""
        case, direction, kept = task.case, DIRECTION.get(kernel, BACKWARD), {}

        def errors_of(provider: Provider) -> tuple[float, str]:
            torch.manual_seed(0)
            errors, failed = check(case, self.device, [provider])
            return errors.get(provider.name, {}).get(direction, math.inf), failed.get(provider.name, "")

        error, failed = errors_of(case.providers[1])  # eager: plain torch in this precision
        if failed:
            raise RuntimeError(f"plain torch: {failed}")
        rounding = torch.finfo(case.dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(case.check.rows)
        limit = 1.5 * error + rounding
        for i, (name, choice) in enumerate(choices.items(), 1):
            if time.monotonic() > self.deadline_s:
                raise TimeoutError
            self.said(f"{place}: {i} of {len(choices)} checked")
            with trying(_tried(task, kernel, won, choice)):
                error, failed = errors_of(_provider(task, kernel, choice))
            if error <= limit:  # not of nan
                kept[name] = error
            else:
                self._drop(place, name, failed or f"error {error:.1e} against fp64, at most {limit:.1e}")
        return kept

    def _timed(self, place: str, works: Mapping[str, Work]) -> dict[str, Samples]:
        self.said(f"{place}: {len(works)} timed")
        found, failed = self.measure(works, BUDGET_S)
        for name, why in failed.items():
            self._drop(place, name, why)
        return found

    def _drop(self, place: str, choice: str, why: str) -> None:
        self.dropped.append(Dropped(place, choice, why))


def _draw(task: Task, device: torch.device) -> Given:
    """Inputs and gradients of the outputs, which are shaped as the visual and the text queries."""
    torch.manual_seed(0)
    case, text_q = task.case, 1 if task.op == "cross" else 3
    problem = case.draw(case.sizes, case.dtype, device)
    douts = [torch.randn_like(problem.leaves[i]) for i in (0, text_q)]
    return {False: (problem, douts), True: (case.joined(problem), case.join_outputs(douts))}


def _work(task: Task, kernel: str, won: Tried, choice: Choice, given: Given) -> Work:
    """One candidate for the clock, its choice in force in forward and backward."""
    provider, tried = _provider(task, kernel, choice), _tried(task, kernel, won, choice)
    work = work_of(provider, *given[provider.joint], DIRECTION.get(kernel, BACKWARD))

    def within(call: Callable[..., object]) -> Callable[..., object]:
        def called(*args: object) -> object:
            with trying(tried):
                return call(*args)

        return called

    return Work(within(work.run), within(work.prepare), work.once)


def _tried(task: Task, kernel: str, won: Tried, choice: Choice) -> Tried:
    """What every kernel of the op launches with; a backend is an argument."""
    return dict(won) if kernel == BACKEND else won | {(task.op, kernel): choice}


def _provider(task: Task, kernel: str, choice: Choice) -> Provider:
    """Ours from two sources, or a backend of attention.py over joint rows."""
    if kernel != BACKEND:
        return task.case.providers[0]
    name, branch = str(choice[BACKEND]), getattr(attention, f"{task.op}_attention")
    return Provider(name, lambda problem: (branch(*problem.leaves, backend=name),), joint=True)
