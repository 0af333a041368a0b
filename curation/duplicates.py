"""Near-duplicates: clips that show the same pictures, found by their signatures (cheap.py). Judges a set, not one clip.

Two clips are duplicates when at most 8 % of their 320 bits differ and their lengths differ by at most a fifth. Of duplicates
the largest picture stays, then the longest, then the one whose id comes first: the answer does not depend on the order in
which clips were found. An even picture (black, white) has no bits to compare and is nobody's duplicate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from vchitect_fast.curation.stage import ClipSpan

MAX_BITS = 25  # of 320 that may differ
MAX_STRETCH = 1.2  # ratio of lengths
NAME = "duplicate"


def duplicates(clips: Iterable[tuple[ClipSpan, str]]) -> dict[str, str]:
    """Clip id -> id of the clip that stays instead, for every near-duplicate; `clips` come with their signature's bits.

    Candidates share 16 equal bits at one of the five times (20 chances), so that no two clips without likeness are compared.
    """
    ordered = sorted(clips, key=lambda c: (-c[0].width * c[0].height, -c[0].num_frames, c[0].id))
    kept: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    bits = [np.frombuffer(bytes.fromhex(text), np.uint8) for _, text in ordered]
    found: dict[str, str] = {}
    for k, (span, _) in enumerate(ordered):
        count = int(np.bitwise_count(bits[k]).sum())
        if count < 32:  # nothing stands out in most of its pictures
            continue
        bands = [(b, bits[k][2 * b : 2 * b + 2].tobytes()) for b in range(20)]
        for other in dict.fromkeys(j for band in bands for j in kept[band]):
            twin = ordered[other][0]
            alike = int(np.bitwise_count(bits[k] ^ bits[other]).sum()) <= MAX_BITS
            if alike and max(span.seconds, twin.seconds) <= MAX_STRETCH * min(span.seconds, twin.seconds):
                found[span.id] = twin.id
                break
        else:
            for band in bands:
                kept[band].append(k)
    return found
