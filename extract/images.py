"""One image file -> the square of pixels that the backbone sees, or the reason why not."""

import hashlib
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

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
        error: why there are no pixels; empty if there are.
        read_seconds: time to read the bytes.
        decode_seconds: time to decode and resize them.
    """

    content_hash: str
    error: str
    read_seconds: float
    decode_seconds: float


def load_image(path: Path, interpolation: str, pixels: NDArray[np.uint8]) -> LoadedImage:
    """Read and decode a file into ``pixels`` (S, S, 3) uint8, which is left alone if that fails.

    Runs in threads: Pillow works without the interpreter's lock.
    """
    start = time.perf_counter()
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        return LoadedImage("", reason, time.perf_counter() - start, 0.0)
    content_hash = hash_content(data)
    read = time.perf_counter()
    reason = ""
    try:
        pixels[:] = decode_image(data, size_px=len(pixels), interpolation=interpolation)
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes decoders raise anything at all
        reason = _reason(data, error)
    return LoadedImage(content_hash, reason, read - start, time.perf_counter() - read)


def hash_content(data: bytes) -> str:
    """Return BLAKE2b of a file's bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=HASH_CHARS // 2).hexdigest()


def decode_image(data: bytes, *, size_px: int, interpolation: str) -> NDArray[np.uint8]:
    """Decode an image as a viewer shows it and squash it to a square.

    Turned as its EXIF orientation says, the first frame of an animation, transparency over white,
    16-bit grey scaled to 8 bits. The aspect ratio is not kept: a crop would cut labelled objects
    away.

    Args:
        data: the bytes of a file in any format that Pillow reads.
        size_px: side of the square S.
        interpolation: a key of ``INTERPOLATIONS``; antialiased, as Pillow does it.

    Returns:
        (S, S, 3) uint8 RGB.

    Raises:
        OSError, SyntaxError, ValueError, …: whatever Pillow raises on a broken file.
    """
    with Image.open(BytesIO(data)) as image:
        upright = _as_rgb(ImageOps.exif_transpose(image))
        return np.asarray(upright.resize((size_px, size_px), INTERPOLATIONS[interpolation]))


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
