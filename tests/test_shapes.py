"""VideoShape: what is read, what is rounded and how it is said, and the token counts of the sizes that matter.

pytest tests/test_shapes.py
"""

from __future__ import annotations

import pytest

from vchitect_fast.errors import UserError
from vchitect_fast.shapes import VideoShape, round_size


@pytest.mark.parametrize(
    ("pixels", "rounded"),
    [(1, 16), (7, 16), (16, 16), (23, 16), (24, 32), (25, 32), (1079, 1072), (1080, 1088), (1081, 1088), (1096, 1104)],
)
def test_sizes_round_to_the_nearest_multiple_ties_up(pixels: int, rounded: int) -> None:
    assert round_size(pixels) == rounded


@pytest.mark.parametrize("text", ["32x512x384", " 32X512x384\n", "032x0512x384"])
def test_an_exact_size_needs_no_note(text: str) -> None:
    assert VideoShape.parse(text) == (VideoShape(num_frames=32, width=512, height=384), "")


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("144x1920x1080", "144x1920x1080 rounded to 144x1920x1088: sizes are multiples of 16."),
        ("1x20x500", "1x20x500 rounded to 1x16x496: sizes are multiples of 16."),
        ("3x1x24", "3x1x24 rounded to 3x16x32: sizes are multiples of 16."),
    ],
)
def test_rounding_is_said(text: str, note: str) -> None:
    shape, said = VideoShape.parse(text)
    assert said == note
    assert str(shape) == note.split()[3].rstrip(":")
    assert VideoShape.parse(str(shape)) == (shape, "")


@pytest.mark.parametrize("text", ["", "32", "512x384", "32x512x384x3", "32 x 512 x 384", "32x512.0x384", "-1x16x16"])
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="frames x width x height like 32x512x384") as caught:
        VideoShape.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["0x16x16", "1x0x16", "1x16x0"])
def test_nothing_is_not_rounded_up_to_something(text: str) -> None:
    with pytest.raises(UserError, match=f"positive frames x width x height, got '{text}'"):
        VideoShape.parse(text)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((0, 16, 16), "positive frames x width x height, got 0x16x16"),
        ((1, -16, 16), "positive frames x width x height, got 1x-16x16"),
        ((1, 16, 0), "positive frames x width x height, got 1x16x0"),
        ((32, 512, 380), "multiples of 16, got 32x512x380; the nearest is 32x512x384"),
        ((32, 1, 384), "multiples of 16, got 32x1x384; the nearest is 32x16x384"),
    ],
)
def test_the_constructor_rounds_nothing(sizes: tuple[int, int, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        VideoShape(*sizes)


@pytest.mark.parametrize(
    ("text", "tokens_per_frame", "num_frames"),
    [
        ("32x256x256", 256, 32),
        ("32x512x384", 768, 32),
        ("40x768x432", 1296, 40),
        ("128x256x256", 256, 128),
        ("32x1024x768", 3072, 32),
        ("144x1920x1080", 120 * 68, 144),  # "about 8100", 1080 being rounded to 1088
    ],
)
def test_token_counts_of_the_sizes_that_matter(text: str, tokens_per_frame: int, num_frames: int) -> None:
    shape = VideoShape.parse(text)[0]
    assert shape.tokens_per_frame() == tokens_per_frame
    assert shape.num_visual_tokens() == tokens_per_frame * num_frames


def test_width_and_height_are_not_swapped() -> None:
    shape = VideoShape(2, 96, 32)
    assert (shape.latent_width, shape.latent_height) == (12, 4)
    assert shape.tokens_per_frame(patch_size=4) == 3 * 1
    assert shape.num_visual_tokens(patch_size=4) == 6
