"""One image file -> the squares of pixels that the backbone sees, or the reason why not."""

import errno
import hashlib
import re
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from mlc.extract.views import Squares, View, crop_box, squash_views
from mlc.store.schema import HASH_CHARS

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}

TURNS = {  # by EXIF orientation; 1, and whatever else a file says, is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

MOST_16_BIT = 2**16 - 1
# Pillow's own bound, kept where a program has lifted it (Image.MAX_IMAGE_PIXELS = None): the
# largest cameras give 151 million pixels, and 179 million take 0.7 GB as RGB in Pillow.
MOST_PIXELS = 2 * (2**30 // 12)
MOST_BYTES = 2**31  # a file of MOST_PIXELS is smaller, even uncompressed in 4 x 16 bits a pixel
PILLOWS_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as a filter


@dataclass(frozen=True)
class LoadedImage:
    """What came of one file.

    Attributes:
        content_hash: BLAKE2b of the file's bytes, in hexadecimal; empty if it cannot be read.
        error: why it cannot be read or decoded; empty if it can, or was not tried.
        decoded: there are pixels.
        read_seconds: time to read the bytes.
        decode_seconds: time to decode and resize them.
    """

    content_hash: str
    error: str
    decoded: bool
    read_seconds: float
    decode_seconds: float


class Decode(Protocol):
    """A function like ``decode_views``."""

    def __call__(self, data: bytes, *asked: Squares) -> Iterator[NDArray[np.uint8]]:
        """Yield each view of an image, (S, S, 3), of all that is asked for."""
        ...


def never(content_hash: str) -> bool:
    """Return False: no photo is known."""
    return False


def load_image(
    path: Path,
    pixels: Mapping[Squares, NDArray[np.uint8]],
    known: Callable[[str], bool] = never,
    decode: Decode | None = None,
) -> LoadedImage:
    """Read and decode a file into arrays of pixels, left alone if there are none.

    Runs in threads: Pillow works without the interpreter's lock.

    Args:
        path: the file.
        pixels: to be filled, (V, S, S, 3) for each that is asked for.
        known: asked with the content hash, in the thread that read the file; a photo that is
            known is not decoded.
        decode: of ``decoders.DECODERS``; by default ``decode_views``.
    """
    start = time.perf_counter()
    try:
        data = read_file(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        return LoadedImage("", reason, False, time.perf_counter() - start, 0.0)
    content_hash = hash_content(data)
    read = time.perf_counter()
    if known(content_hash):
        return LoadedImage(content_hash, "", False, read - start, 0.0)
    reason = ""
    _silence_pillow()
    try:
        places = (place for array in pixels.values() for place in array)
        for place, square in zip(places, (decode or decode_views)(data, *pixels), strict=True):
            place[:] = square
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes decoders raise anything at all
        reason = _reason(data, error)
    return LoadedImage(content_hash, reason, not reason, read - start, time.perf_counter() - read)


def read_file(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        OSError: it is not there or cannot be read; it is a pipe, a socket or a device, at which a
            read might wait for ever; or it has more than ``MOST_BYTES``.
        ValueError: no file can have this name.
    """
    about = path.stat()
    if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
        raise OSError(errno.EINVAL, "not a file but a pipe, a socket or a device")
    if about.st_size > MOST_BYTES:
        reason = f"too large: {about.st_size:,} bytes, the limit is {MOST_BYTES:,}"
        raise OSError(errno.EFBIG, reason)
    return path.read_bytes()


def hash_content(data: bytes) -> str:
    """Return BLAKE2b of a file's bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=HASH_CHARS // 2).hexdigest()


def decode_image(data: bytes, *, size_px: int, interpolation: str) -> NDArray[np.uint8]:
    """Return the original view of an image, (S, S, 3); see ``decode_views``."""
    return next(decode_views(data, Squares(size_px, interpolation)))


def decode_views(data: bytes, *asked: Squares) -> Iterator[NDArray[np.uint8]]:
    """Decode an image once, as a viewer shows it, and yield each view, squashed to a square.

    Turned as its EXIF orientation says, the first frame of an animation, transparency over white,
    16-bit grey scaled to 8 bits. The aspect ratio is not kept: a crop would cut labelled objects
    away.

    Args:
        data: the bytes of a file in any format that Pillow reads.
        asked: squares, all made of one decoded photo.

    Yields:
        Each view of each of them, (S, S, 3) uint8 RGB, to be read only.

    Raises:
        OSError, SyntaxError, ValueError, …: whatever Pillow raises on a broken file.
        DecompressionBombError: it has more than ``MOST_PIXELS``.
    """
    with open_image(data) as image:
        shown = as_shown(image)
    for each in asked:
        yield from squash_views(each.views, partial(squash, shown, each))


def squash(shown: Image.Image, asked: Squares, view: View) -> NDArray[np.uint8]:
    """Return what a view shows of an RGB image before it is turned, (S, S, 3)."""
    size, box = (asked.size_px, asked.size_px), crop_box(view, shown.width, shown.height)
    return np.asarray(shown.resize(size, INTERPOLATIONS[asked.interpolation], box))


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Read an image's header; what is too large, or runs a program to be drawn, is refused.

    Raises:
        OSError, SyntaxError, ValueError, …: see ``decode_views``.
        DecompressionBombError: see ``decode_views``.
    """
    image = Image.open(BytesIO(data))
    if image.width * image.height > MOST_PIXELS:
        raise Image.DecompressionBombError(
            f"{image.width:,} x {image.height:,} pixels, the limit is {MOST_PIXELS:,} pixels"
        )
    if image.format == "EPS":  # a PostScript program, which need not end, and no pixels
        raise OSError("EPS is a drawing, not a photo")
    return image


def as_shown(image: Image.Image) -> Image.Image:
    """Return the pixels of an opened image as RGB, turned as its EXIF orientation says."""
    image.load()
    turn = TURNS.get(exif_orientation(image))
    return _as_rgb(image if turn is None else image.transpose(turn))


def exif_orientation(image: Image.Image) -> int:
    """Return a key of ``TURNS``, or 1; also if the EXIF data are nonsense, as viewers do."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return int(orientation) if orientation in TURNS else 1
    except Exception:  # of nonsense Pillow raises anything; ImageOps.exif_transpose gives up
        return 1


def _silence_pillow() -> None:
    """Keep Pillow from warning of what it finds in a file.

    It can be shown, or else the reason why not is recorded. ``warnings.catch_warnings`` is not
    made for threads; so the filter stays, ahead of all others.
    """
    if not warnings.filters or warnings.filters[0] != PILLOWS_WARNINGS:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits and more: Pillow's own conversion clips at 255
        values = np.asarray(image).clip(min=0)
        grey = values / max(MOST_16_BIT, values.max()) * 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty (0 bytes)"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {error}"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image: {len(data):,} bytes that begin with {data[:8]!r}"
    words = " ".join(str(error).split())  # on one line
    return f"broken image: {words or type(error).__name__}"
