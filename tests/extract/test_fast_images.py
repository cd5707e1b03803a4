"""The fast way to squares: nearly the pixels of the exact one, or exactly them where it says so."""

import numpy as np
import pictures
import pytest
from numpy.typing import NDArray
from PIL import Image

from mlc.extract import fast_images
from mlc.extract.fast_images import decode_views_fast
from mlc.extract.images import INTERPOLATIONS, decode_views
from mlc.extract.views import VIEWS, Squares

S = 24
EXIF_ORIENTATION = 0x0112
Pixels = NDArray[np.uint8]


def both(
    data: bytes, interpolation: str = "bilinear", views: tuple[str, ...] = ("orig",), size: int = S
) -> tuple[Pixels, Pixels]:
    """The squares of the fast and of the exact way, (V, S, S, 3)."""
    asked = Squares(size, interpolation, views)
    fast, exact = (np.stack(list(way(data, asked))) for way in (decode_views_fast, decode_views))
    assert fast.shape == exact.shape == (len(views), size, size, 3)
    assert fast.dtype == np.uint8
    return fast, exact


def jpeg(width: int, height: int, mode: str = "RGB", **options: object) -> bytes:
    return pictures.encoded(pictures.photo(width, height, mode=mode), "JPEG", **options)


def noise(width: int = 400, height: int = 300) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def turned(orientation: int, width: int, height: int) -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return jpeg(width, height, exif=exif)


def assert_near(fast: Pixels, exact: Pixels, mean: float, most: int) -> None:
    difference = np.abs(fast.astype(int) - exact)
    assert difference.mean() < mean
    assert difference.max() <= most


# Whole; a half; an eighth, whose last row and column stand for fewer pixels.
SIZES = [(40, 30), (130, 100), (803, 605)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "mean", "most"), [(SIZES[0], 0.5, 2), (SIZES[1], 0.5, 4)])
def test_a_smooth_photo_differs_by_little(
    size: tuple[int, int], mean: float, most: int, interpolation: str
) -> None:
    assert_near(*both(jpeg(*size), interpolation), mean, most)


def nearest(fast: list[Pixels], exact: list[Pixels]) -> list[int]:
    """Which of the exact squares is most like each of the fast ones, by mean difference."""
    differences = [[np.abs(one.astype(int) - each).mean() for each in exact] for one in fast]
    assert all(row[index] < 3 for index, row in enumerate(differences))
    return np.argmin(differences, axis=1).tolist()


@pytest.mark.parametrize("size", SIZES)
def test_a_photo_is_turned_as_its_exif_says(size: tuple[int, int]) -> None:
    ways = zip(*(both(turned(orientation, *size)) for orientation in range(1, 9)), strict=True)
    assert nearest(*map(list, ways)) == list(range(8))


@pytest.mark.parametrize("size", SIZES)
def test_every_view_is_of_the_same_part(size: tuple[int, int]) -> None:
    fast, exact = both(jpeg(*size), views=tuple(VIEWS))
    assert nearest(list(fast), list(exact)) == list(range(len(VIEWS)))


def test_views_come_in_the_order_asked() -> None:
    fast, exact = both(jpeg(130, 100), views=("orig", "flip", "center", "rot90"))
    assert_near(fast, exact, mean=1.5, most=10)


def test_a_grey_photo_is_read_in_three_equal_colours() -> None:
    fast, exact = both(jpeg(130, 100, mode="L"))
    assert_near(fast, exact, mean=1, most=4)
    np.testing.assert_array_equal(fast[..., 0], fast[..., 2])


# --- what is decoded -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "views", "scale"),
    [
        (2 * 2 * S - 1, ("orig",), 1),
        (2 * 2 * S, ("orig",), 2),
        (2 * 2 * S, ("orig", "center"), 1),  # 7/8 of the side, and two pixels for each even so
        (2 * 2 * S * 8 // 7 + 1, ("orig", "center"), 2),
        (4 * 2 * S, ("orig",), 4),
        (100 * S, ("orig",), 8),
    ],
)
def test_at_least_two_pixels_are_decoded_for_each_of_the_square(
    side: int, views: tuple[str, ...], scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    squash = fast_images._squash

    def spy(photo, *rest):
        shapes.append(tuple(photo.shape))
        return squash(photo, *rest)

    monkeypatch.setattr(fast_images, "_squash", spy)
    list(decode_views_fast(jpeg(side, side + 9), Squares(S, "bilinear", views)))
    assert shapes[0] == (-(-(side + 9) // scale), -(-side // scale), 3)


def test_noise_is_averaged_and_not_sampled() -> None:
    fast, exact = both(pictures.encoded(noise(), "JPEG", quality=95), size=40)
    assert np.abs(fast.astype(int) - exact).mean() < exact.std() / 3


# --- exact all the same --------------------------------------------------------------------------

EXACT = {
    "png": pictures.encoded(noise()),
    "palette with transparency": pictures.encoded(
        noise().quantize(8), transparency=bytes(range(0, 256, 32))
    ),
    "gif": pictures.encoded(noise().convert("P"), "GIF"),
    "webp": pictures.encoded(noise(), "WEBP"),
    "tiff": pictures.encoded(noise(), "TIFF"),
    "cmyk jpeg": pictures.encoded(noise().convert("CMYK"), "JPEG"),
    "jpeg lower than the square": jpeg(100, S - 1),
    "jpeg narrower than the square": jpeg(S - 1, 100),
    "jpeg of a pixel": jpeg(1, 1),
}


@pytest.mark.parametrize("kind", EXACT)
def test_what_is_no_plain_jpeg_is_decoded_exactly(kind: str) -> None:
    fast, exact = both(EXACT[kind], views=("orig", "center-flip"))
    np.testing.assert_array_equal(fast, exact)


@pytest.mark.parametrize(
    "interpolation", sorted(INTERPOLATIONS.keys() - set(fast_images.INTERPOLATIONS))
)
def test_an_interpolation_that_torch_has_not_is_exact(interpolation: str) -> None:
    fast, exact = both(pictures.encoded(noise(), "JPEG"), interpolation)
    np.testing.assert_array_equal(fast, exact)


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("size", [30, 300])
def test_a_broken_photo_is_refused_for_the_same_reason(kept: float, size: int) -> None:
    data = pictures.encoded(noise(), "JPEG")
    reasons = []
    for way in (decode_views_fast, decode_views):
        with pytest.raises((OSError, SyntaxError)) as caught:
            next(way(data[: int(len(data) * kept)], Squares(size, "bilinear")))
        reasons.append(str(caught.value).split("(")[0].split("<")[0])
    assert reasons[0] == reasons[1]


@pytest.mark.parametrize("data", [jpeg(100, 90), EXACT["png"]], ids=["jpeg", "png"])
def test_squares_of_several_backbones_are_those_of_each_alone(data: bytes) -> None:
    asked = [
        Squares(S, "bilinear"),
        Squares(S // 2, "bicubic", ("flip", "center")),
        Squares(80, "lanczos"),
    ]
    together = list(decode_views_fast(data, *asked))
    alone = [square for each in asked for square in decode_views_fast(data, each)]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one, other)
