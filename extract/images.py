"""One image file -> the squares of pixels that the backbone sees, or the reason why not."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mlc.extract.views import ORIGINAL, VIEWS, Box, crop_box
from mlc.store.schema import HASH_CHARS

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


MOST_16_BIT = 2**16 - 1


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


def never(content_hash: str) -> bool:
    """Return False: no photo is known."""
    return False


def load_image(
    path: Path,
    interpolation: str,
    views: Sequence[str],
    pixels: NDArray[np.uint8],
    known: Callable[[str], bool] = never,
) -> LoadedImage:
    """Read and decode a file into ``pixels`` (V, S, S, 3) uint8, left alone if there are none.

    Runs in threads: Pillow works without the interpreter's lock.

    Args:
        path: the file.
        interpolation: a key of ``INTERPOLATIONS``.
        views: V keys of ``VIEWS``.
        pixels: to be filled.
        known: asked with the content hash, in the thread that read the file; a photo that is
            known is not decoded.
    """
    start = time.perf_counter()
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        return LoadedImage("", reason, False, time.perf_counter() - start, 0.0)
    content_hash = hash_content(data)
    read = time.perf_counter()
    if known(content_hash):
        return LoadedImage(content_hash, "", False, read - start, 0.0)
    reason = ""
    try:
        squares = decode_views(
            data, size_px=pixels.shape[1], interpolation=interpolation, views=views
        )
        for place, square in zip(pixels, squares, strict=True):
            place[:] = square
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes decoders raise anything at all
        reason = _reason(data, error)
    return LoadedImage(content_hash, reason, not reason, read - start, time.perf_counter() - read)


def hash_content(data: bytes) -> str:
    """Return BLAKE2b of a file's bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=HASH_CHARS // 2).hexdigest()


def decode_image(data: bytes, *, size_px: int, interpolation: str) -> NDArray[np.uint8]:
    """Return the original view of an image, (S, S, 3); see ``decode_views``."""
    views = (ORIGINAL,)
    return next(decode_views(data, size_px=size_px, interpolation=interpolation, views=views))


def decode_views(
    data: bytes, *, size_px: int, interpolation: str, views: Sequence[str]
) -> Iterator[NDArray[np.uint8]]:
    """Decode an image once, as a viewer shows it, and yield each view, squashed to a square.

    Turned as its EXIF orientation says, the first frame of an animation, transparency over white,
    16-bit grey scaled to 8 bits. The aspect ratio is not kept: a crop would cut labelled objects
    away.

    Args:
        data: the bytes of a file in any format that Pillow reads.
        size_px: side of the square S.
        interpolation: a key of ``INTERPOLATIONS``; antialiased, as Pillow does it.
        views: V keys of ``VIEWS``.

    Yields:
        V times (S, S, 3) uint8 RGB, to be read only.

    Raises:
        OSError, SyntaxError, ValueError, …: whatever Pillow raises on a broken file.
    """
    with Image.open(BytesIO(data)) as image:
        upright = _as_rgb(ImageOps.exif_transpose(image))
    squashed: dict[Box | None, NDArray[np.uint8]] = {}  # views that only turn share a resize
    for view in map(VIEWS.__getitem__, views):
        if view.crop not in squashed:
            box = crop_box(view, upright.width, upright.height)
            square = upright.resize((size_px, size_px), INTERPOLATIONS[interpolation], box)
            squashed[view.crop] = np.asarray(square)
        pixels = squashed[view.crop]
        yield pixels if view.turn is None else view.turn(pixels)


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
    if isinstance(error, UnidentifiedImageError):
        return f"not an image: {len(data):,} bytes that begin with {data[:8]!r}"
    return f"broken image: {error or type(error).__name__}"
