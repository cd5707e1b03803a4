"""Small image files of every kind, and the straight line from a file to the pixels of a square."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mlc.extract.backbone import Backbone

BAD_FILES = {"04.jpg": "truncated", "09.png": "text"}
FILES = tuple(f"{index:02d}.{'png' if index % 3 == 0 else 'jpg'}" for index in range(12))
PNG_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # colour type by number of samples of a pixel


def colours(width: int = 40, height: int = 30, seed: int = 0) -> NDArray[np.uint8]:
    """(height, width, 3): smooth, without symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def photo(width: int = 40, height: int = 30, seed: int = 0, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(colours(width, height, seed)).convert(mode)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png16(samples: NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits a sample from (H, W, samples), most of which Pillow cannot write."""
    height, width, depth = samples.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOURS[depth], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*each) for each in chunks)


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 4 // 5]


def squashed(data: bytes, size_px: int, interpolation: str = "bilinear") -> NDArray[np.uint8]:
    """What plain Pillow makes of a file that needs no special care."""
    with Image.open(BytesIO(data)) as image:
        resample = Image.Resampling[interpolation.upper()]
        return np.asarray(image.convert("RGB").resize((size_px, size_px), resample))


def write_data(folder: Path, *, bad: bool = True) -> Path:
    """Write twelve small photos, two of them broken unless ``bad`` is off, and their CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file,labels,split"]
    for index, name in enumerate(FILES):
        (folder / name).write_bytes(broken_file(name) if bad else good_file(name))
        labels = ";".join(("cat", "dog", "cow")[: 1 + index % 3])
        lines.append(f"{name},{labels},{('train', 'val', 'test')[index % 3]}")
    table = folder / "photos.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def good_file(name: str) -> bytes:
    seed = FILES.index(name)
    image = photo(36 + seed, 48 - seed, seed, mode="L" if seed == 7 else "RGB")
    return encoded(image, "PNG" if name.endswith(".png") else "JPEG")


def broken_file(name: str) -> bytes:
    """The file as it is in the data set with bad images: only two of them are."""
    kind = BAD_FILES.get(name)
    if kind == "truncated":
        return truncated(good_file(name))
    return b"no image, a note" if kind == "text" else good_file(name)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of images, that are not black, of each forward pass."""
    counts: list[int] = []
    features = Backbone.features

    def spy(self: Backbone, pixels: NDArray[np.uint8]) -> Any:
        counts.append(int(pixels.any(axis=(1, 2, 3)).sum()))
        return features(self, pixels)

    monkeypatch.setattr(Backbone, "features", spy)
    return counts
