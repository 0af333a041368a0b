"""VBench's dynamic degree as a rule on numbers: which frames are compared, the score of a pair, the verdict on a clip.

Pure numpy; every backend that has a flow field uses it, whatever made the field. It computes no flow and reads no frames.
Source: Vchitect/VBench, vbench/dynamic_degree.py at 45e79ec1 (`get_frames`, `get_score`, `set_params`, `check_move`).
Edge cases, as VBench has them: fewer than 3 sampled frames need 0 moving pairs, so one pair is enough, moving or not;
halves round to even (6 sampled frames need 2 pairs, 10 also 2); a clip without any pair is not dynamic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vchitect_fast.curation.stage import Scores

TOP_SHARE = 0.05  # of the flow field's pixels, the fastest
COLUMNS: Mapping[str, type] = {"dynamic": bool, "degree": float, "flow": float, "num_pairs": int, "num_over": int}


def sampled_frames(num_frames: int, fps: float) -> list[int]:
    """The frames of a clip that are compared, about 8 a second: every max(1, round(fps / 8)) from the first."""
    return list(range(0, num_frames, max(1, round(fps / 8))))


def pair_score(flow: np.ndarray) -> float:
    """Mean of the largest 5 % of magnitudes (px) of a flow field, floating [2,H,W]; a field under 20 pixels gives its largest."""
    magnitude = np.sqrt(np.square(flow[0]) + np.square(flow[1])).ravel()
    # Sorted whole, in VBench's order, so that the float32 mean adds up the same way.
    top = np.abs(np.sort(-magnitude))[: max(1, int(magnitude.size * TOP_SHARE))]
    return float(np.mean(top))


def dynamic_degree(pair_scores: Sequence[float] | np.ndarray, num_frames: int, short_side: int) -> Scores:
    """The verdict on a clip from its pair scores (px), the number of sampled frames and the short side (px) of the flow.

    dynamic    enough pairs are over the threshold: `num_over` reaches round(4 num_frames / 16), and there is a pair
    degree     mean pair score over the threshold, so that sizes compare; None without a pair
    flow       mean pair score in pixels of that size; None without a pair
    num_pairs  pairs compared
    num_over   pairs whose score is over 6.0 short_side / 256
    Raises ValueError for a pair score that is not finite: a broken flow field is no stillness.
    """
    scores = np.asarray(pair_scores, np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(
            f"the optical flow of {int((~np.isfinite(scores)).sum())} of {scores.size} pairs is not finite"
        )
    threshold_px = 6.0 * (short_side / 256.0)
    num_needed = round(4 * (num_frames / 16.0))
    num_over = int((scores > threshold_px).sum())
    flow = float(scores.mean()) if scores.size else None
    return {
        "dynamic": scores.size > 0 and num_over >= num_needed,
        "degree": None if flow is None else flow / threshold_px,
        "flow": flow,
        "num_pairs": int(scores.size),
        "num_over": num_over,
    }
