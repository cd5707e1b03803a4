"""LabelTable: what is known of each image's labels, and in which split the image is."""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError, nearest
from mlc.configs.files import written_aside

SPLITS = ("train", "val", "test")
DAMAGED = (EOFError, RuntimeError, BadZipFile, zlib.error)  # what a broken .npz raises


@dataclass(frozen=True)
class LabelTable:
    """N images and L classes.

    Attributes:
        image_id: (N,) text, unique; joins labels to the features of a store.
        file: (N,) text, path of the image relative to its data set's root.
        classes: L class names, in the order of the columns.
        observed: (N, L) int8, what training may see: +1 positive, 0 unknown, -1 negative.
        true: (N, L) bool, or None where the truth is not known.
        split: (N,) text, "train", "val" or "test"; "" where nothing has assigned it yet.
        dataset: name of the data set: a key of DATASETS, or "csv-" and the stem of a CSV.
        expected_positives: mean number of positives of an image, a given constant of the data
            set in the MLSPL losses; None where no source states one.
    """

    image_id: NDArray[np.str_]
    file: NDArray[np.str_]
    classes: tuple[str, ...]
    observed: NDArray[np.int8]
    true: NDArray[np.bool_] | None
    split: NDArray[np.str_]
    dataset: str
    expected_positives: float | None = None

    def __post_init__(self) -> None:
        ids, counts = np.unique(self.image_id, return_counts=True)
        if (counts > 1).any():
            raise MlcError(f"labels: image id {str(ids[counts > 1][0])!r} is there twice")

    def __len__(self) -> int:
        return len(self.image_id)

    def rows(self, keep: NDArray[np.bool_] | NDArray[np.intp]) -> "LabelTable":
        """Return the table of some rows, given as a mask (N,) or as indices."""
        return replace(
            self,
            image_id=self.image_id[keep],
            file=self.file[keep],
            observed=self.observed[keep],
            true=None if self.true is None else self.true[keep],
            split=self.split[keep],
        )

    def part(self, split: str) -> "LabelTable":
        """Return the rows of one split, in their order."""
        return self.rows(self.split == split)

    def digest(self) -> str:
        """Return a hash of everything in the table but where its images lie."""
        digest = hashlib.sha256(repr((self.classes, self.expected_positives)).encode())
        for array in (self.image_id, self.split):
            digest.update("\n".join(array.tolist()).encode())
        digest.update(self.observed.tobytes())
        digest.update(b"" if self.true is None else self.true.tobytes())
        return digest.hexdigest()

    def targets(self) -> NDArray[np.bool_]:
        """Return (N, L) bool: the truth, or the observed positives where it is not known."""
        return self.observed == 1 if self.true is None else self.true


def full_labels(true: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Return the observed matrix of fully labelled images: +1 where true, else -1."""
    return np.where(true, 1, -1).astype(np.int8)


def select_classes(table: LabelTable, names: Sequence[str]) -> LabelTable:
    """Return the table of some classes, in the order asked for.

    The constant ``expected_positives`` belongs to all classes together and is dropped.

    Raises:
        MlcError: no name is given, or one is not a class of the table, or is named twice.
    """
    if not names:
        raise MlcError("classes: is empty; name at least one")
    columns = class_columns(table.classes, names)
    return replace(
        table,
        classes=tuple(names),
        observed=table.observed[:, columns],
        true=None if table.true is None else table.true[:, columns],
        expected_positives=None,
    )


def add_classes(table: LabelTable, names: Sequence[str]) -> LabelTable:
    """Return the table with a column for each name that is no class of it, without positives."""
    new = tuple(name for name in names if name not in table.classes)
    shape = (len(table), len(new))
    unlisted = np.full(shape, 0 if table.true is None else -1, dtype=np.int8)
    absent = np.zeros(shape, dtype=np.bool_)
    return replace(
        table,
        classes=table.classes + new,
        observed=np.hstack([table.observed, unlisted]),
        true=None if table.true is None else np.hstack([table.true, absent]),
    )


def class_columns(classes: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the columns of some class names.

    Raises:
        MlcError: a name is not among the classes, or is named twice.
    """
    column = {name: index for index, name in enumerate(classes)}
    for index, name in enumerate(names):
        if name not in column:
            raise MlcError(f"unknown class {name!r}; {nearest(name, column)}")
        if name in names[:index]:
            raise MlcError(f"classes: {name!r} is named twice")
    return [column[name] for name in names]


def save_labels(table: LabelTable, path: Path) -> None:
    """Write a table as one ``.npz`` file, aside and renamed, so that it is whole or absent."""
    arrays: dict[str, Any] = {
        "image_id": table.image_id,
        "image_file": table.file,  # "file" is the name of numpy's own argument
        "classes": np.array(table.classes, dtype=np.str_),
        "observed": table.observed,
        "split": table.split,
        "dataset": np.str_(table.dataset),
    }
    if table.true is not None:
        arrays["true"] = table.true
    if table.expected_positives is not None:
        arrays["expected_positives"] = np.float64(table.expected_positives)
    # Workers that share an extraction all write the labels of its images.
    with written_aside(path, by_several=True) as partial, partial.open("wb") as handle:
        np.savez_compressed(handle, **arrays)


def load_labels(path: Path) -> LabelTable:
    """Read a table that ``save_labels`` wrote.

    Raises:
        MlcError: there is no such file, or it is not a label table.
    """
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            return LabelTable(
                image_id=arrays["image_id"],
                file=arrays["image_file"],
                classes=tuple(str(name) for name in arrays["classes"]),
                observed=arrays["observed"],
                true=arrays.get("true"),
                split=arrays["split"],
                dataset=str(arrays["dataset"]),
                expected_positives=float(arrays["expected_positives"])
                if "expected_positives" in arrays
                else None,
            )
    except FileNotFoundError:
        raise MlcError(
            f"{path}: no label table there; mlc data prepare --out {path} makes one"
        ) from None
    except (*DAMAGED, ValueError, TypeError, KeyError, OSError) as error:
        raise MlcError(f"{path}: not a label table ({error})") from None


def merge_labels(table: LabelTable, added: LabelTable) -> LabelTable:
    """Return a table with the rows of another after its own.

    Raises:
        MlcError: they have other classes, or the truth is known of one alone.
    """
    if table.classes != added.classes or (table.true is None) != (added.true is None):
        raise MlcError(
            f"labels: the {len(table):,} images that are there are labelled with other classes "
            f"({len(table.classes)}) than the {len(added):,} that are added "
            f"({len(added.classes)}); list all images in one table, or name another store with "
            "--out"
        )
    true = None
    if table.true is not None and added.true is not None:
        true = np.concatenate([table.true, added.true])
    return replace(
        added,
        image_id=np.concatenate([table.image_id, added.image_id]),
        file=np.concatenate([table.file, added.file]),
        observed=np.concatenate([table.observed, added.observed]),
        true=true,
        split=np.concatenate([table.split, added.split]),
    )
