"""A folder of photos and a CSV of ``file,labels``, perhaps with a ``split`` column."""

import csv
from pathlib import Path
from typing import Literal

import numpy as np

from mlc.configs.errors import MlcError, nearest
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import SPLITS, LabelTable

SEPARATOR = ";"
Unlisted = Literal["absent", "unknown"]


def read_csv(path: Path, root: Path, unlisted: Unlisted = "absent") -> ImageSet:
    """Read a CSV with a header that has ``file`` and ``labels``, and maybe ``split``.

    A row is ``photos/1.jpg,cat;traffic light`` or ``photos/1.jpg,cat,train``. Classes are in the
    order of the alphabet. A label with a minus before it (``-dog``) is known to be absent.

    Args:
        path: the CSV file, UTF-8.
        root: the folder that the column ``file`` is relative to.
        unlisted: what a class that a row does not list is: "absent" (the row lists all that is
            there, so the truth is known) or "unknown" (partial labels).

    Raises:
        MlcError: no such file, a column is missing, a file is named twice, or a row is broken.
    """
    rows = _read_rows(path)
    marks = [[label.strip() for label in row["labels"].split(SEPARATOR)] for row in rows]
    classes = tuple(sorted({mark.removeprefix("-") for each in marks for mark in each} - {""}))
    if not classes:
        raise MlcError(f"{path}: the column 'labels' is empty in every row")
    column = {name: index for index, name in enumerate(classes)}
    observed = np.full((len(rows), len(classes)), -1 if unlisted == "absent" else 0, dtype=np.int8)
    for values, each in zip(observed, marks, strict=True):
        for mark in filter(None, each):
            values[column[mark.removeprefix("-")]] = -1 if mark.startswith("-") else 1
    file = np.array([row["file"] for row in rows])
    labels = LabelTable(
        image_id=file,
        file=file,
        classes=classes,
        observed=observed,
        true=observed == 1 if unlisted == "absent" else None,
        split=np.array([row.get("split") or "" for row in rows]),
        dataset=f"csv-{path.stem}",
    )
    return ImageSet(root=root, image_id=file, file=file, labels=labels)


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise MlcError(f"{path}: no such file; --data takes 'coco' or the path of a CSV")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = reader.fieldnames or []
            for column in ("file", "labels"):
                if column not in columns:
                    raise MlcError(f"{path}: no column {column!r}, got {', '.join(columns)!r}")
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise MlcError(f"{path}: not a CSV in UTF-8 ({error})") from None
    if not rows:
        raise MlcError(f"{path}: has a header and no rows")
    seen: dict[str, int] = {}
    for line, row in enumerate(rows, start=2):
        _check_row(path, line, row, seen)
    return rows


def _check_row(path: Path, line: int, row: dict[str, str], seen: dict[str, int]) -> None:
    if not row["file"] or row["labels"] is None or None in row:
        raise MlcError(
            f"{path}:{line}: expected as many fields as the header has, got "
            f"{[value for value in row.values() if value]}; several labels are joined by "
            f"{SEPARATOR!r}"
        )
    if row["file"] in seen:
        raise MlcError(
            f"{path}:{line}: image id {row['file']!r} is there twice, first in line "
            f"{seen[row['file']]}"
        )
    seen[row["file"]] = line
    split = row.get("split")
    if split and split not in SPLITS:
        raise MlcError(f"{path}:{line}: unknown split {split!r}; {nearest(split, SPLITS)}")
