"""Schedule: which windows step k trains on, of which VideoShape, and which of them a data-parallel rank reads.

All of it is a pure function of (windows, batch, weights, seed, step): nothing is stored, so a run resumes at any step, and
ranks agree without a word. In a step every rank has the same VideoShape, hence the same predicted time. Opens no file.
It refuses weights that are not of the planned shapes and buckets that would stay empty. Standard library and numpy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from vchitect_fast.buckets import Window
from vchitect_fast.errors import UserError
from vchitect_fast.shapes import VideoShape

MAX_CYCLE = 100_000  # steps after which the order of shapes of a mixture repeats; half a second to lay out


class Schedule:
    """Which windows a step trains on.

    A step of a shape takes `batch` windows a rank, `num_dp` times as many in all: rank i takes the i-th run of them, so that
    n ranks see in a step what one process with n times the batch sees. Each sample has its own stand-ins, for when its window
    does not decode: the windows a whole step further in the permutation, which no other sample of the step can come to.
    What a step trains on thus does not depend on how many ranks share it.

    Without weights: in every epoch each bucket's windows are permuted by (seed, epoch, shape) and cut into steps; the last
    step is filled up from the start of the same permutation; then the steps of all buckets are shuffled by (seed, epoch).
    With weights: `Mixture` orders the shapes, and each bucket has epochs of its own.
    The draws are raw Philox words, whose stream NumPy keeps for good, so the order survives an update.
    """

    def __init__(
        self,
        windows_by_shape: Mapping[VideoShape, Sequence[Window]],
        batch_by_shape: Mapping[VideoShape, int],
        seed: int,
        *,
        num_dp: int = 1,
        weights: Mapping[VideoShape, float] | None = None,
    ) -> None:
        """
        batch_by_shape  samples a step and rank (microbatch x accumulation)
        weights         relative shares of the steps; None: as many steps as a shape has windows for

        UserError when there is no window at all, seed < 0, or a weight is of no use (`Mixture`).
        """
        if seed < 0:
            raise UserError(f"seed must be 0 or more, got {seed}; correct it in the run's YAML.")
        self._windows = {
            shape: windows_by_shape[shape] for shape in sorted(windows_by_shape) if windows_by_shape[shape]
        }
        if not self._windows:
            counts = ", ".join(f"{shape}: 0" for shape in windows_by_shape) or "no buckets"
            raise UserError(f"no bucket has a window to train on ({counts}); plan shapes that the clips fill.")
        self._batch = {shape: batch_by_shape[shape] for shape in self._windows}
        self._seed, self.num_dp = seed, num_dp
        assert num_dp > 0
        assert all(batch > 0 for batch in self._batch.values())
        self._steps = {shape: -(-len(found) // self._total(shape)) for shape, found in self._windows.items()}
        self._order = [(shape, k) for shape, num_steps in self._steps.items() for k in range(num_steps)]
        self._mixture = None if weights is None else Mixture(weights, list(self._windows), seed)
        self._permutation = lru_cache(maxsize=4 * len(self._windows))(self._draw_permutation)
        self._shuffled = lru_cache(maxsize=4)(lambda epoch: _permutation(len(self._order), self._seed, epoch))

    @property
    def steps_per_epoch(self) -> int:
        """Steps from 0 on in which every window is seen at least once."""
        if self._mixture is None:
            return len(self._order)
        return max(self._mixture.step_of(shape, self._steps[shape] - 1) + 1 for shape in self._mixture.shapes)

    def batch(self, step: int, dp_rank: int = 0) -> tuple[VideoShape, list[Window]]:
        """The shape of a step, counted from 0, and a rank's windows."""
        shape, samples = self.candidates(step, dp_rank)
        return shape, [next(candidates) for candidates in samples]

    def candidates(self, step: int, dp_rank: int = 0) -> tuple[VideoShape, list[Iterator[Window]]]:
        """The shape of a step and, for each of the rank's samples, its window and then those that stand in for it.

        Each ends when every window of the bucket has been given out.
        """
        assert 0 <= dp_rank < self.num_dp
        shape, epoch, k = self._place(step)
        batch, begin = self._batch[shape], k * self._total(shape)
        return shape, [self._stand_ins(shape, epoch, begin, dp_rank * batch + sample) for sample in range(batch)]

    def num_windows(self, shape: VideoShape) -> int:
        """Windows of a bucket."""
        return len(self._windows[shape])

    def batch_size(self, shape: VideoShape) -> int:
        """Samples a rank has in a step of this shape."""
        return self._batch[shape]

    def _total(self, shape: VideoShape) -> int:
        return self._batch[shape] * self.num_dp

    def _place(self, step: int) -> tuple[VideoShape, int, int]:
        """The step's shape, the epoch of its bucket, and which of the epoch's steps of this shape it is."""
        if self._mixture is None:
            epoch, position = divmod(step, len(self._order))
            shape, k = self._order[self._shuffled(epoch)[position]]
            return shape, epoch, k
        shape, number = self._mixture.at(step)
        return shape, *divmod(number, self._steps[shape])

    def _stand_ins(self, shape: VideoShape, epoch: int, begin: int, sample: int) -> Iterator[Window]:
        windows, permutation, stride = self._windows[shape], self._permutation(shape, epoch), self._total(shape)
        num = len(windows)
        own = range(sample, num, stride) or [sample]  # a step larger than its bucket goes around
        for offset in own:
            yield windows[permutation[(begin + offset) % num]]
        # No window of its own is good. Better one that another sample has as well than none.
        for offset in range(sample + 1, sample + num):
            if (offset - sample) % stride or offset >= num:
                yield windows[permutation[(begin + offset) % num]]

    def _draw_permutation(self, shape: VideoShape, epoch: int) -> np.ndarray:
        return _permutation(len(self._windows[shape]), self._seed, epoch, shape.num_frames, shape.width, shape.height)


class Mixture:
    """An order of shapes in which, after any k steps, each shape had its weight's share of k, to within one step.

    It is the solution of the chairman assignment problem (Tijdeman 1980, Discrete Mathematics 32, 323-330): of the shapes
    that are owed enough, the one whose next step is due first; |count - k w| <= 1 - 1 / (2 m - 2) for m shapes. After as
    many steps as the whole weights add up to, all are owed nothing and the order repeats. The seed breaks ties.
    """

    def __init__(self, weights: Mapping[VideoShape, float], filled: Sequence[VideoShape], seed: int) -> None:
        """UserError for a weight below 0 or not finite, weights that are all 0 or need too long a cycle, an empty bucket."""
        whole = _whole_weights(weights)
        for shape in whole:
            if shape not in filled:
                raise UserError(
                    f"the mixture gives {shape} the weight {weights[shape]:g} and no clip fits it; add clips, or set it to 0."
                )
        shapes = sorted(whole)
        self.shapes = tuple(shapes[k] for k in _permutation(len(shapes), seed))
        self._length = sum(whole.values())
        cycle = _cycle([whole[shape] for shape in self.shapes])
        self._steps = {shape: np.flatnonzero(cycle == k) for k, shape in enumerate(self.shapes)}  # within a cycle
        self._cycle = cycle

    def at(self, step: int) -> tuple[VideoShape, int]:
        """The shape of a step, and how many steps of it came before."""
        cycles, position = divmod(step, self._length)
        shape = self.shapes[self._cycle[position]]
        steps = self._steps[shape]
        return shape, cycles * len(steps) + int(np.searchsorted(steps, position))

    def step_of(self, shape: VideoShape, number: int) -> int:
        """The step at which a shape comes for the time `number`, counted from 0."""
        cycles, position = divmod(number, len(self._steps[shape]))
        return cycles * self._length + int(self._steps[shape][position])


def _whole_weights(weights: Mapping[VideoShape, float]) -> dict[VideoShape, int]:
    """The weights above 0 as whole numbers without a common divisor."""
    for shape, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"a mixture's weight must be a number from 0 up, got {weight} for {shape}; correct it.")
    # As they are written: 0.1 means a tenth.
    exact = {shape: Fraction(str(float(weight))) for shape, weight in weights.items() if weight > 0}
    if not exact:
        raise UserError(
            "a mixture needs a weight above 0, got none; give the shapes weights, or leave the mixture out."
        )
    scale = math.lcm(*(weight.denominator for weight in exact.values()))
    whole = {shape: int(weight * scale) for shape, weight in exact.items()}
    divisor = math.gcd(*whole.values())
    whole = {shape: weight // divisor for shape, weight in whole.items()}
    if sum(whole.values()) > MAX_CYCLE:
        written = ", ".join(f"{shape}: {weight:g}" for shape, weight in weights.items())
        raise UserError(
            f"a mixture's weights must be whole numbers that add up to at most {MAX_CYCLE} after dividing by what they share, "
            f"got {sum(whole.values())} for {written}; round them to three digits."
        )
    return whole


def _cycle(weights: Sequence[int]) -> np.ndarray:
    """[sum of weights] which of the weights each step serves."""
    total, many = sum(weights), 2 * len(weights) - 2
    owed = [0] * len(weights)  # (step x weight - count x total): what each has coming, in 1 / total steps
    order = np.zeros(total, dtype=np.int64)
    for step in range(total if many else 0):
        owed = [have + weight for have, weight in zip(owed, weights, strict=True)]
        due = [k for k, have in enumerate(owed) if many * have >= total]
        chosen = min(due, key=lambda k: ((many - 1) * total - many * owed[k]) / weights[k])
        order[step] = chosen
        owed[chosen] -= total
    return order


def _permutation(length: int, *key: int) -> np.ndarray:
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(words, kind="stable")
