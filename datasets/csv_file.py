"""A folder of photos and a CSV of ``file,labels``, perhaps with a ``split`` column."""

import csv
from pathlib import Path
from posixpath import normpath
from typing import Literal

import numpy as np

from mlc.configs.errors import MlcError, nearest
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import SPLITS, LabelTable

SEPARATOR = ";"
LINE = "line of the file"  # a key that no column has
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
    marks = [_read_labels(path, row) for row in rows]
    classes = tuple(sorted({name for each in marks for name in each}))
    if not classes:
        raise MlcError(f"{path}: the column 'labels' is empty in every row")
    column = {name: index for index, name in enumerate(classes)}
    observed = np.full((len(rows), len(classes)), -1 if unlisted == "absent" else 0, dtype=np.int8)
    for values, each in zip(observed, marks, strict=True):
        for name, value in each.items():
            values[column[name]] = value
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
    """Return the rows, all fields stripped, with the line of each under ``LINE``."""
    if not path.is_file():
        raise MlcError(f"{path}: no such file; --data takes the name of a data set or a CSV")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or []]
            for column in ("file", "labels"):
                if column not in columns:
                    raise MlcError(f"{path}: no column {column!r}, got {', '.join(columns)!r}")
            if len(set(columns)) != len(columns):
                raise MlcError(f"{path}: a column is there twice, got {', '.join(columns)!r}")
            rows = [_strip(path, reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise MlcError(f"{path}: not a CSV in UTF-8 ({error})") from None
    if not rows:
        raise MlcError(f"{path}: has a header and no rows")
    _check_rows(path, rows)
    return rows


def _strip(path: Path, line: int, row: dict[str, str]) -> dict[str, str]:
    if None in row or None in row.values():
        raise MlcError(
            f"{path}:{line}: expected as many fields as the header has, got "
            f"{[value for value in row.values() if value]}; several labels are joined by "
            f"{SEPARATOR!r}"
        )
    fields = {name: value.strip() for name, value in row.items()} | {LINE: str(line)}
    if fields["file"]:  # "./a.jpg" and "a.jpg" are the same photo
        fields["file"] = normpath(fields["file"])
    return fields


def _check_rows(path: Path, rows: list[dict[str, str]]) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        where, file, split = f"{path}:{row[LINE]}", row["file"], row.get("split")
        if not file:
            raise MlcError(f"{where}: the column 'file' is empty")
        if file in seen:
            raise MlcError(f"{where}: image id {file!r} is there twice, first in line {seen[file]}")
        if split and split not in SPLITS:
            raise MlcError(f"{where}: unknown split {split!r}; {nearest(split, SPLITS)}")
        seen[file] = row[LINE]


def _read_labels(path: Path, row: dict[str, str]) -> dict[str, int]:
    """Return +1 or -1 for each label that a row lists."""
    labels: dict[str, int] = {}
    for mark in filter(None, (each.strip() for each in row["labels"].split(SEPARATOR))):
        name, value = mark.removeprefix("-").strip(), -1 if mark.startswith("-") else 1
        if not name or labels.get(name, value) != value:
            raise MlcError(
                f"{path}:{row[LINE]}: {mark!r} in {row['labels']!r} "
                + ("is also listed without a minus" if name else "names no label")
            )
        labels[name] = value
    return labels
