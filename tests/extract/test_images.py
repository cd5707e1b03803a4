"""Decoding: plain Pillow where that is right, and what a viewer shows where it is not."""

import hashlib
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pictures
import pytest
from numpy.typing import NDArray
from PIL import Image

from mlc.extract.images import (
    INTERPOLATIONS,
    LoadedImage,
    decode_image,
    decode_views,
    hash_content,
    load_image,
)
from mlc.extract.views import Squares

S = 24
EXIF_ORIENTATION = 0x0112


def decoded(data: bytes, size_px: int = S, interpolation: str = "bilinear") -> NDArray[np.uint8]:
    return decode_image(data, size_px=size_px, interpolation=interpolation)


def over_white(colours: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def ramp(side: int = S) -> NDArray[np.uint16]:
    """(side, side) from 0 to 65535, in equal steps."""
    return np.linspace(0, 65535, side * side).round().astype(np.uint16).reshape(side, side)


# --- equal to plain Pillow -----------------------------------------------------------------------

PLAIN = {
    "jpeg": pictures.encoded(pictures.photo(), "JPEG"),
    "progressive jpeg": pictures.encoded(pictures.photo(), "JPEG", progressive=True),
    "jpeg of full chroma": pictures.encoded(pictures.photo(), "JPEG", subsampling=0),
    "grey jpeg": pictures.encoded(pictures.photo(mode="L"), "JPEG"),
    "cmyk jpeg": pictures.encoded(pictures.photo(mode="CMYK"), "JPEG"),
    "png": pictures.encoded(pictures.photo()),
    "palette png": pictures.encoded(pictures.photo().quantize(16)),
    "black and white png": pictures.encoded(pictures.photo(mode="1")),
    "bmp": pictures.encoded(pictures.photo(), "BMP"),
    "tiff": pictures.encoded(pictures.photo(), "TIFF"),
    "webp": pictures.encoded(pictures.photo(), "WEBP"),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_file_is_exactly_what_pillow_makes_of_it(kind: str) -> None:
    got = decoded(PLAIN[kind])
    assert got.shape == (S, S, 3)
    assert got.dtype == np.uint8
    assert got.std() > 10
    np.testing.assert_array_equal(got, pictures.squashed(PLAIN[kind], S))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_interpolation_is_pillows_of_that_name(interpolation: str) -> None:
    got = decoded(PLAIN["jpeg"], interpolation=interpolation)
    np.testing.assert_array_equal(got, pictures.squashed(PLAIN["jpeg"], S, interpolation))


def test_interpolations_differ() -> None:
    results = {decoded(PLAIN["jpeg"], interpolation=name).tobytes() for name in INTERPOLATIONS}
    assert len(results) == len(INTERPOLATIONS)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 900), (S, S)])
def test_an_image_of_any_shape_is_squashed(size: tuple[int, int]) -> None:
    data = pictures.encoded(pictures.photo(*size))
    np.testing.assert_array_equal(decoded(data), pictures.squashed(data, S))


def test_a_single_pixel_fills_the_square() -> None:
    data = pictures.encoded(Image.new("RGB", (1, 1), (10, 200, 30)))
    np.testing.assert_array_equal(decoded(data), np.full((S, S, 3), (10, 200, 30)))


# --- transparency --------------------------------------------------------------------------------


def test_rgba_lies_over_white() -> None:
    colours = pictures.colours(S, S)
    alpha = np.linspace(0, 255, S * S).astype(np.uint8).reshape(S, S)
    data = pictures.encoded(Image.fromarray(np.dstack([colours, alpha])))
    np.testing.assert_allclose(decoded(data), over_white(colours, alpha), rtol=0, atol=1)


def test_grey_with_alpha_lies_over_white() -> None:
    grey = np.asarray(pictures.photo(S, S, mode="L"))
    alpha = np.linspace(255, 0, S * S).astype(np.uint8).reshape(S, S)
    bands = [Image.fromarray(grey), Image.fromarray(alpha)]
    data = pictures.encoded(Image.merge("LA", bands))
    want = over_white(np.dstack([grey] * 3), alpha)
    np.testing.assert_allclose(decoded(data), want, rtol=0, atol=1)


def test_a_palette_with_an_alpha_of_each_colour_lies_over_white() -> None:
    image = pictures.photo(S, S).quantize(8)
    alphas = np.array([255, 0, 128, 200, 255, 30, 90, 255], dtype=np.uint8)
    data = pictures.encoded(image, transparency=alphas.tobytes())
    want = over_white(np.asarray(image.convert("RGB")), alphas[np.asarray(image)])
    assert np.unique(np.asarray(image)).size == 8
    np.testing.assert_allclose(decoded(data), want, rtol=0, atol=1)


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_a_palette_with_one_transparent_colour_lies_over_white(file_format: str) -> None:
    image = Image.new("P", (S, S), 1)
    image.putpalette([0, 0, 0, 200, 10, 20, 30, 40, 50])
    image.paste(2, (0, 0, S, S // 2))
    got = decoded(pictures.encoded(image, file_format, transparency=2))
    np.testing.assert_array_equal(got[: S // 2], 255)
    np.testing.assert_array_equal(got[S // 2 :], np.full((S // 2, S, 3), (200, 10, 20)))


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (9, 8, 7)), ("L", 9)])
def test_one_transparent_colour_without_a_palette_lies_over_white(
    mode: str, colour: int | tuple[int, ...]
) -> None:
    image = Image.new(mode, (S, S), colour)
    image.paste(77 if mode == "L" else (77, 77, 77), (0, 0, S // 2, S))
    got = decoded(pictures.encoded(image, transparency=colour))
    np.testing.assert_array_equal(got[:, : S // 2], 77)
    np.testing.assert_array_equal(got[:, S // 2 :], 255)


# --- more than 8 bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_clipped(file_format: str) -> None:
    got = decoded(pictures.encoded(Image.fromarray(ramp()), file_format))
    want = np.dstack([ramp() / 257] * 3)
    np.testing.assert_allclose(got, want, rtol=0, atol=1)


def test_16_bit_colours_are_scaled() -> None:
    samples = np.dstack([ramp(), ramp()[::-1], ramp().T])
    np.testing.assert_allclose(decoded(pictures.png16(samples)), samples / 257, rtol=0, atol=1)


@pytest.mark.parametrize("bands", [1, 3])
def test_16_bit_alpha_lies_over_white(bands: int) -> None:
    samples = np.dstack([ramp()] * bands + [ramp().T])
    alpha = (ramp().T >> 8).astype(np.uint8)
    want = over_white(np.dstack([(ramp() >> 8).astype(np.uint8)] * 3), alpha)
    np.testing.assert_allclose(decoded(pictures.png16(samples)), want, rtol=0, atol=2)


def test_32_bit_grey_does_not_wrap_around() -> None:
    values = ramp().astype(np.int32) * 4
    got = decoded(pictures.encoded(Image.fromarray(values), "TIFF"))[..., 0].astype(int)
    assert (np.diff(got.ravel()) >= 0).all()
    assert got.min() == 0
    assert got.max() == 255


# --- orientation ---------------------------------------------------------------------------------

AS_SHOWN = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def turned(orientation: int, file_format: str) -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return pictures.encoded(pictures.photo(), file_format, exif=exif)


@pytest.mark.parametrize("orientation", AS_SHOWN)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_an_image_is_turned_as_its_exif_says(orientation: int, file_format: str) -> None:
    data = turned(orientation, file_format)
    shown = AS_SHOWN[orientation](np.asarray(Image.open(BytesIO(data))))
    want = Image.fromarray(np.ascontiguousarray(shown)).resize((S, S), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decoded(data), np.asarray(want))


def test_all_orientations_differ() -> None:
    results = {decoded(turned(orientation, "PNG")).tobytes() for orientation in AS_SHOWN}
    assert len(results) == len(AS_SHOWN)


BROKEN_EXIF = {
    "no tiff": b"Exif\0\0garbage",
    "empty": b"Exif\0\0",
    "cut off": b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",
    "unknown orientation": b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x112, 3, 1, 99, 0),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", BROKEN_EXIF)
def test_an_image_with_broken_exif_is_shown_as_it_lies(kind: str) -> None:
    data = pictures.encoded(pictures.photo(), "JPEG", exif=BROKEN_EXIF[kind])
    assert BROKEN_EXIF[kind] in data
    np.testing.assert_array_equal(decoded(data), pictures.squashed(data, S))


# --- animation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(file_format: str) -> None:
    red, blue = (Image.new("RGB", (S, S), colour) for colour in ("#c80000", "#0000c8"))
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = pictures.encoded(red, file_format, save_all=True, append_images=[blue], **options)
    assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 2
    np.testing.assert_array_equal(decoded(data), np.full((S, S, 3), (200, 0, 0)))


# --- files ---------------------------------------------------------------------------------------


def loaded(path: Path) -> tuple[LoadedImage, NDArray[np.uint8]]:
    """What comes of a file, and the pixels, 7 everywhere before."""
    pixels = np.full((1, S, S, 3), 7, dtype=np.uint8)
    return load_image(path, {Squares(S, "bilinear"): pixels}), pixels[0]


def test_a_good_file_gives_its_pixels_hash_and_times(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(PLAIN["jpeg"])
    image, pixels = loaded(path)
    assert image.error == ""
    assert image.decoded
    assert image.content_hash == hashlib.blake2b(PLAIN["jpeg"], digest_size=16).hexdigest()
    assert image.read_seconds > 0
    assert image.decode_seconds > 0
    np.testing.assert_array_equal(pixels, pictures.squashed(PLAIN["jpeg"], S))


def test_a_file_is_what_it_holds_and_not_what_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(PLAIN["png"])
    image, pixels = loaded(path)
    assert image.error == ""
    np.testing.assert_array_equal(pixels, pictures.squashed(PLAIN["png"], S))


BROKEN = {
    "empty": (b"", "the file is empty (0 bytes)"),
    "text": (b"hello, world", "not an image: 12 bytes that begin with b'hello, w'"),
    "truncated jpeg": (pictures.truncated(PLAIN["jpeg"]), "broken image: image file is truncated"),
    "truncated png": (pictures.truncated(PLAIN["png"]), "broken image: "),
    "header only": (PLAIN["jpeg"][:2], "not an image: 2 bytes that begin with"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_says_why_keeps_its_hash_and_leaves_the_pixels(
    tmp_path: Path, kind: str
) -> None:
    data, reason = BROKEN[kind]
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    image, pixels = loaded(path)
    assert image.error.startswith(reason)
    assert len(image.error) > len("broken image: ")
    assert "\n" not in image.error
    assert not image.decoded
    assert image.content_hash == hashlib.blake2b(data, digest_size=16).hexdigest()
    assert (pixels == 7).all()


@pytest.mark.parametrize(
    ("name", "reason"), [("gone.jpg", "No such file or directory"), (".", "Is a directory")]
)
def test_a_file_that_cannot_be_read_says_why_and_has_no_hash(
    tmp_path: Path, name: str, reason: str
) -> None:
    image, pixels = loaded(tmp_path / name)
    assert image.error == reason
    assert not image.decoded
    assert image.content_hash == ""
    assert (pixels == 7).all()


def test_all_views_of_a_file_are_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(PLAIN["jpeg"])
    asked = Squares(S, "bicubic", ("center", "orig", "flip"))
    pixels = asked.blank(1)[:, 0]
    assert load_image(path, {asked: pixels}).decoded
    want = decode_views(PLAIN["jpeg"], asked)
    np.testing.assert_array_equal(pixels, np.stack(list(want)))
    np.testing.assert_array_equal(pixels[1], pictures.squashed(PLAIN["jpeg"], S, "bicubic"))


def test_squares_of_several_backbones_are_those_of_each_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(PLAIN["jpeg"])
    asked = [
        Squares(S, "bilinear"),
        Squares(S, "bicubic", ("flip", "center")),
        Squares(5, "lanczos"),
    ]
    pixels = {each: each.blank(1)[:, 0] for each in asked}
    assert load_image(path, pixels).decoded
    for each in asked:
        np.testing.assert_array_equal(pixels[each], list(decode_views(PLAIN["jpeg"], each)))


def test_a_known_photo_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(PLAIN["jpeg"])
    pixels = np.full((1, S, S, 3), 7, dtype=np.uint8)
    asked: list[str] = []
    scratch = {Squares(S, "bilinear"): pixels}
    image = load_image(path, scratch, lambda content: not asked.append(content))
    assert asked == [image.content_hash] == [hash_content(PLAIN["jpeg"])]
    assert (image.error, image.decoded, image.decode_seconds) == ("", False, 0.0)
    assert image.read_seconds > 0
    assert (pixels == 7).all()
