"""Origin: the backbone and the photos that a store's features were made of, found again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone
from mlc.extract.images import hash_content, read_file
from mlc.store.key import current_key, require_same_key


@dataclass(frozen=True)
class Where:
    """Where things are now, if not where they were, and where to run.

    Attributes:
        root: the folder of the images.
        weights: the backbone's weights file.
        device: "auto" is the GPU if there is one; precision and engine stay those of the features.
    """

    root: Path | None = None
    weights: Path | None = None
    device: str = "auto"

    @classmethod
    def of(cls, root: Path | None, weights: Path | None, device: str | None) -> "Where":
        """Take the values of the command line, None for what is not given."""
        return cls(root, weights, device or "auto")


def load_origin(
    path: Path,
    key: Mapping[str, Any],
    made_by: Mapping[str, Any],
    batch_size: int,
    where: Where,
) -> Backbone:
    """Return the backbone that made a store.

    Args:
        path: of the store, for errors.
        key: of the store.
        made_by: what the store recorded.
        batch_size: of the store.
        where: things are now.

    Raises:
        MlcError: its features were imported; or the backbone cannot be had, or is not the same.
    """
    if made_by["backbone_config"] is None:
        raise MlcError(
            f"{path}: holds imported features, which no backbone here makes; "
            "run the same mlc import again, it writes what is damaged"
        )
    settings = dict(made_by["backbone_config"])
    # "auto" may mean another engine here, whose features have other last bits.
    settings |= {
        "device": where.device,
        "precision": key["precision"],
        "engine": current_key(key)["engine"],
    }
    if where.weights is not None:
        settings["weights"] = where.weights
    backbone = load_backbone(BackboneConfig(**settings), batch_size)
    require_same_key(path, key, backbone.key)
    return backbone


def photo_files(made_by: Mapping[str, Any], file: NDArray[np.str_], where: Where) -> list[Path]:
    """Return where the photo of each row should be."""
    root = where.root or Path(made_by["root"])
    return [root / name for name in file.tolist()]


def require_photos(
    path: Path, files: list[Path], rows: NDArray[np.intp], content_hash: NDArray[np.str_]
) -> None:
    """Raise an MlcError if a photo is gone, or is another one than when it was extracted.

    Args:
        path: of the store, for errors.
        files: of every row.
        rows: that are needed.
        content_hash: (N,) text; empty where it is not known any more.
    """
    problems = []
    for row in rows.tolist():
        try:
            found = hash_content(read_file(files[row]))
        except OSError as error:
            problems.append(f"{files[row]}: {error.strerror}")
            continue
        if content_hash[row] and content_hash[row] != found:
            problems.append(f"{files[row]}: is another photo now, by its content")
    if problems:
        more = f"; and {len(problems) - 1:,} more" if len(problems) > 1 else ""
        raise MlcError(
            f"{path}: photos that it was made of are not there: {problems[0]}{more}; "
            "pass the folder that has them as --root"
        )
