"""Views: the named ways to show one photo to a backbone, which a store caches side by side.

``orig`` is the whole photo, squashed to the square. The crops are the four corners and the centre,
each 7/8 of both sides (224 of 256 px, the share of ImageNet's usual crop), squashed likewise: all
but the objects at the far edge stay in the picture. Turns are of the squashed square.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError, choose

CROP_SHARE = 7 / 8  # of a side
ORIGINAL = "orig"

Box = tuple[float, float, float, float]
Turn = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


@dataclass(frozen=True)
class View:
    """A part of the photo, and how its square is turned.

    Attributes:
        crop: (left, upper, right, lower) as shares of width and height; None is the whole photo.
        turn: (S, S, 3) -> (S, S, 3); None leaves it upright.
    """

    crop: Box | None = None
    turn: Turn | None = None


@dataclass(frozen=True)
class Squares:
    """What a backbone is shown of an image: each view squashed to a square, (V, S, S, 3).

    Attributes:
        size_px: side of the square S.
        interpolation: a key of ``images.INTERPOLATIONS``; antialiased, as Pillow does it.
        views: V keys of ``VIEWS``.
    """

    size_px: int
    interpolation: str
    views: tuple[str, ...] = (ORIGINAL,)

    def blank(self, images: int) -> NDArray[np.uint8]:
        """Return black pixels (V, images, S, S, 3)."""
        return np.zeros((len(self.views), images, self.size_px, self.size_px, 3), dtype=np.uint8)


def check_views(views: Sequence[str]) -> tuple[str, ...]:
    """Return names of views, checked.

    The order is kept, it is that of the store's view axis. Evaluation takes the first view, so
    "orig" comes first wherever it is asked for.

    Raises:
        MlcError: none, an unknown name, one that is there twice, or "orig" in another place.
    """
    if not views:
        raise MlcError(f"views: got none; name at least one, as {ORIGINAL}")
    for view in views:
        choose(VIEWS, view, "view")
    twice = next((view for view in views if views.count(view) > 1), None)
    if twice:
        raise MlcError(f"views: got {twice!r} more than once; name each view once")
    if ORIGINAL in views[1:]:
        rest = [view for view in views if view != ORIGINAL]
        raise MlcError(
            f"views: {ORIGINAL} comes first, got {','.join(views)}; "
            f"ask for {','.join([ORIGINAL, *rest])}"
        )
    return tuple(views)


def crop_box(view: View, width: int, height: int) -> Box | None:
    """Return what a view shows of a photo, as Pillow's ``resize(box=)`` takes it, in pixels."""
    if view.crop is None:
        return None
    left, upper, right, lower = view.crop
    return left * width, upper * height, right * width, lower * height


def squash_views(
    names: Sequence[str], squash: Callable[[View], NDArray[np.uint8]]
) -> Iterator[NDArray[np.uint8]]:
    """Yield the square (S, S, 3) of each view by its name; those that only turn share a resize.

    Args:
        names: keys of ``VIEWS``.
        squash: gives what a view shows, not turned yet.
    """
    squares: dict[Box | None, NDArray[np.uint8]] = {}
    for view in map(VIEWS.__getitem__, names):
        if view.crop not in squares:
            squares[view.crop] = squash(view)
        square = squares[view.crop]
        yield square if view.turn is None else view.turn(square)


def _crop(x: float, y: float) -> Box:
    """Return the crop whose free space is shared out by x to its left and y above it."""
    free = 1 - CROP_SHARE
    return x * free, y * free, x * free + CROP_SHARE, y * free + CROP_SHARE


_CROPS = {
    "center": _crop(0.5, 0.5),
    "top-left": _crop(0, 0),
    "top-right": _crop(1, 0),
    "bottom-left": _crop(0, 1),
    "bottom-right": _crop(1, 1),
}

VIEWS = {
    ORIGINAL: View(),
    "flip": View(turn=np.fliplr),
    "vflip": View(turn=np.flipud),
    # Quarter turns are anticlockwise, as numpy's.
    "rot90": View(turn=partial(np.rot90, k=1)),
    "rot180": View(turn=partial(np.rot90, k=2)),
    "rot270": View(turn=partial(np.rot90, k=3)),
    **{name: View(crop) for name, crop in _CROPS.items()},
    **{f"{name}-flip": View(crop, np.fliplr) for name, crop in _CROPS.items()},
}
