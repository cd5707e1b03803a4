"""ImageSet: the images of a data set, and the labels that are known of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.datasets.labels import LabelTable

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class ImageSet:
    """M images below a root folder.

    Attributes:
        root: the folder that ``file`` is relative to.
        image_id: (M,) text, unique.
        file: (M,) text, paths relative to ``root``.
        labels: the label table, which may leave images out.
    """

    root: Path
    image_id: NDArray[np.str_]
    file: NDArray[np.str_]
    labels: LabelTable

    def check_files(self) -> None:
        """Raise an MlcError if not one of the images is there: the root is wrong or empty."""
        if not any(_is_file(self.root / str(name)) for name in self.file):
            raise MlcError(
                f"{self.root}: not one of the {len(self.file):,} listed images is there, "
                f"the first is {str(self.file[0])!r}; pass the images' folder as --root"
            )


def find_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, by path.

    Raises:
        MlcError: there is no such folder, or no file in it is named like an image.
    """
    if not folder.is_dir():
        raise MlcError(f"{folder}: no such folder")
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and _is_file(path)
    )
    if not found:
        raise MlcError(f"{folder}: no images there; looked for {' '.join(sorted(SUFFIXES))}")
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
