"""Views: each is what its name says, of the photo or of its square, and the list is checked."""

from collections.abc import Callable

import numpy as np
import pictures
import pytest
from numpy.typing import NDArray
from PIL import Image

from mlc.configs.errors import MlcError
from mlc.extract.images import decode_views
from mlc.extract.views import VIEWS, Squares, check_views

S = 24
WIDTH, HEIGHT = 40, 32  # 7/8 of which are 35 and 28
PHOTO = pictures.photo(WIDTH, HEIGHT)
DATA = pictures.encoded(PHOTO)
Square = NDArray[np.uint8]

BOXES = {
    "center": (2.5, 2, 37.5, 30),
    "top-left": (0, 0, 35, 28),
    "top-right": (5, 0, 40, 28),
    "bottom-left": (0, 4, 35, 32),
    "bottom-right": (5, 4, 40, 32),
}
TURNS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "orig": lambda square: square,
    "flip": lambda square: square.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "vflip": lambda square: square.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "rot90": lambda square: square.transpose(Image.Transpose.ROTATE_90),
    "rot180": lambda square: square.transpose(Image.Transpose.ROTATE_180),
    "rot270": lambda square: square.transpose(Image.Transpose.ROTATE_270),
}


def views(*names: str) -> list[Square]:
    return list(decode_views(DATA, Squares(S, "bicubic", names)))


def squash(box: tuple[float, float, float, float] | None = None) -> Image.Image:
    return PHOTO.resize((S, S), Image.Resampling.BICUBIC, box)


@pytest.mark.parametrize("name", TURNS)
def test_a_turn_is_one_of_the_squashed_square(name: str) -> None:
    np.testing.assert_array_equal(views(name)[0], np.asarray(TURNS[name](squash())))


@pytest.mark.parametrize("name", BOXES)
def test_a_crop_is_seven_eighths_of_the_photo(name: str) -> None:
    upright, flipped = views(name, f"{name}-flip")
    np.testing.assert_array_equal(upright, np.asarray(squash(BOXES[name])))
    np.testing.assert_array_equal(flipped, upright[:, ::-1])


def test_a_crop_shows_its_corner_and_not_the_opposite_one() -> None:
    photo = Image.new("RGB", (WIDTH, HEIGHT), "black")
    photo.paste((255, 0, 0), (0, 0, 2, 2))
    photo.paste((0, 0, 255), (WIDTH - 2, HEIGHT - 2, WIDTH, HEIGHT))
    data = pictures.encoded(photo)
    asked = Squares(64, "bilinear", ("top-left", "bottom-right", "center"))
    first, last, middle = decode_views(data, asked)
    assert (first[0, 0, 0], first[..., 2].max()) == (255, 0)
    assert (last[-1, -1, 2], last[..., 0].max()) == (255, 0)
    assert middle.max() == 0


def test_every_view_is_tested_and_no_two_are_alike() -> None:
    assert VIEWS.keys() == TURNS.keys() | BOXES.keys() | {f"{name}-flip" for name in BOXES}
    assert len({square.tobytes() for square in views(*VIEWS)}) == len(VIEWS)


def test_views_do_not_depend_on_each_other() -> None:
    together = views(*VIEWS)
    alone = [views(name)[0] for name in VIEWS]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(views(*reversed(VIEWS))[::-1], alone)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_a_photo_of_any_shape_has_all_views(size: tuple[int, int]) -> None:
    data = pictures.encoded(pictures.photo(*size))
    shown = list(decode_views(data, Squares(S, "bicubic", tuple(VIEWS))))
    assert [square.shape for square in shown] == [(S, S, 3)] * len(VIEWS)


@pytest.mark.parametrize(
    "names", [("orig",), ("flip",), ("orig", "flip"), ("flip", "center"), tuple(VIEWS)]
)
def test_the_order_is_kept(names: tuple[str, ...]) -> None:
    assert check_views(list(names)) == names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), r"views: got none; name at least one, as orig"),
        (("orig", "flop"), r"unknown view 'flop'; did you mean 'flip'"),
        (("orig", "flip", "flip"), r"views: got 'flip' more than once"),
        (("orig", "orig"), r"views: got 'orig' more than once"),
        (("flip", "orig"), r"views: orig comes first, got flip,orig; ask for orig,flip"),
    ],
)
def test_a_list_that_cannot_be_is_one_sentence(names: tuple[str, ...], expected: str) -> None:
    with pytest.raises(MlcError, match=expected):
        check_views(names)
