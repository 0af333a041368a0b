"""The planner ranks Policies as this machine does: a quick probe, predictions, then interleaved steps of every Policy.

pytest tests/autotune/test_ranking.py; one thread, processor time, so that others on the machine count for less. Two Policies
are a tie where the median of their differences within the rounds is less than twice its standard error; ties are not scored.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from vchitect_fast.autotune.probe import CPU_SIZES, Grid, probe
from vchitect_fast.autotune.verify import build_step, noise
from vchitect_fast.benchmarks.planner import CPU_CASES, predictions
from vchitect_fast.cluster import Cluster
from vchitect_fast.parallel.mesh import ALONE
from vchitect_fast.shapes import VideoShape
from vchitect_fast.train import build_saving

# In the smaller shape what a Policy costs the host decides, in the larger one what it makes again.
CASES = replace(CPU_CASES, shapes=("8x96x64", "8x176x96"))
ROUNDS = 7
GRID = Grid(  # around the sizes of these cases
    rows=(8, 64, 512), widths=(64, 192, 768), attention_rows=(512,), attention_width=192, lengths=(8, 32, 128),
    elements=(2**12, 2**16, 2**19), square=512, copy_bytes=2**24, held_out_linear=((256, 192),), held_out_attention=(),
    held_out_elements=(2**17,), held_out_products=((512, 192, 768),), pool_bytes=2**26, seconds_per_point=0.02,
)  # fmt: skip
MEDIANS_ERROR = 1.25  # of a mean's, for normal noise: sqrt(pi / 2)


@pytest.fixture
def processor_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(cluster: Cluster) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], list[float]]]:
    """By shape and Policy: seconds of a step, predicted, and of each round."""
    plans, left_out = predictions(CASES, cluster)
    assert not left_out
    cpu = torch.device("cpu")
    step_once = build_step(next(iter(plans.values())), CASES.config, replace(ALONE, device=cpu))
    predicted: dict[tuple[str, str], float] = {}
    rounds: dict[tuple[str, str], list[float]] = {}
    for number in range(1 + ROUNDS):  # the first warms up
        for text in CASES.shapes:
            for name, plan in plans.items():
                entry = plan.entry(VideoShape.parse(text)[0])
                step_once.plan, step_once.model.saving = plan, build_saving(plan, CASES.config, cpu)
                seconds = step_once(number, noise(step_once, entry))["step_s"]
                predicted[text, name] = entry.predicted.step_s
                rounds.setdefault((text, name), []).extend([seconds] if number else [])
    return predicted, rounds


@pytest.mark.usefixtures("processor_time")
def test_policies_are_ranked_as_they_are_measured() -> None:
    sizes = replace(CPU_SIZES, ops=GRID, copies=(), mini_batches=(), num_clips=0)
    predicted, rounds = measured(probe(progress=False, sizes=sizes))
    agree, wrong = 0, []
    for one, other in combinations(rounds, 2):
        if one[0] != other[0]:
            continue
        differences = [a - b for a, b in zip(rounds[one], rounds[other], strict=True)]
        median = statistics.median(differences)
        error = MEDIANS_ERROR * statistics.stdev(differences) / len(differences) ** 0.5
        if abs(median) < 2 * error:
            continue
        if (median > 0) == (predicted[one] > predicted[other]):
            agree += 1
        else:
            wrong.append(
                f"{one}, {other}: {median:+.4f} ({error:.4f}) s, predicted {predicted[one] - predicted[other]:+.4f}"
            )
    assert agree >= len(CASES.policies)  # enough that differ by more than the noise
    tau = (agree - len(wrong)) / (agree + len(wrong))
    assert tau >= 0.8, f"tau {tau:.2f}, {agree} pairs agree; wrong: {'; '.join(wrong)}"
