"""Embedded data: pictures of one to four real handwritten digits, which digits is the label.

The glyphs are scikit-learn's ``load_digits``, 1,797 digits of 43 writers. Those on training and
validation images never appear on test images.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlc.configs.errors import MlcError
from mlc.datasets.csv_file import SEPARATOR, read_csv
from mlc.datasets.images import ImageSet

SIZE_PX = 224
CELL_PX = SIZE_PX // 2  # a digit lies somewhere in its quarter of the canvas
GLYPH_PX = (56, 104)  # least side of a digit, and one more than the largest
IMAGES = {"train": 1200, "val": 300, "test": 500}
TEST_GLYPHS = 600  # the last of load_digits, of other writers than the first
SEED = 0
TABLE = "digits.csv"


def read_digits(root: Path, keep_unlabelled: bool = False) -> ImageSet:
    """Read the digits, drawing them first where they are not there: 2,000 PNG files, 20 MB.

    Args:
        root: the folder that holds, or gets, the images and ``digits.csv``.
        keep_unlabelled: no influence, every image has a label.
    """
    if not (root / TABLE).is_file():
        _draw_all(root)
    images = read_csv(root / TABLE, root)
    return replace(images, labels=replace(images.labels, dataset="digits"))


def draw(
    glyphs: NDArray[np.float64], digits: NDArray[np.int_], generator: np.random.Generator
) -> tuple[Image.Image, list[int]]:
    """Draw one to four random glyphs on a canvas of ``SIZE_PX``.

    Args:
        glyphs: (G, 8, 8) ink in [0, 16].
        digits: (G,) the digit of each glyph.
        generator: of everything random.

    Returns:
        The picture, and the different digits on it in rising order.
    """
    canvas = Image.new("L", (SIZE_PX, SIZE_PX), 0)
    chosen = generator.integers(len(glyphs), size=generator.integers(1, 5))
    for cell, glyph in zip(generator.permutation(4), chosen, strict=False):
        side = int(generator.integers(*GLYPH_PX))
        ink = Image.fromarray((glyphs[glyph] * (255 / 16)).astype(np.uint8))
        x, y = generator.integers(CELL_PX - side + 1, size=2) + CELL_PX * np.array(divmod(cell, 2))
        canvas.paste(ink.resize((side, side), Image.Resampling.BICUBIC), (int(x), int(y)))
    return canvas.convert("RGB"), np.unique(digits[chosen]).tolist()


def _draw_all(root: Path) -> None:
    """Draw all images into a folder aside and rename it, so that it is whole or absent."""
    from sklearn.datasets import load_digits  # slow to import, and needed once

    root = root.absolute()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise MlcError(f"{root}: is there and has no {TABLE}; name an empty folder with --root")
    aside = root.with_name(f".{root.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    bunch = load_digits()
    generator = np.random.default_rng(SEED)
    lines = ["file,labels,split"]
    for split, count in IMAGES.items():
        pool = slice(-TEST_GLYPHS, None) if split == "test" else slice(None, -TEST_GLYPHS)
        (aside / split).mkdir(parents=True)
        for index in range(count):
            name = f"{split}/{index:04d}.png"
            image, labels = draw(bunch.images[pool], bunch.target[pool], generator)
            image.save(aside / name)
            lines.append(f"{name},{SEPARATOR.join(map(str, labels))},{split}")
    (aside / TABLE).write_text("\n".join(lines) + "\n")
    aside.rename(root)
