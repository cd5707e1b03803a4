"""Columns: everything small that a store holds of its rows, read however damaged it is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.backend import Array, Backend
from mlc.store.checksums import row_crc32c
from mlc.store.problems import BROKEN, CHANGED, MISSING, Problem, consecutive, why

ALWAYS = (schema.IMAGE_ID, schema.FILE)  # written when a store is laid out, not row by row


@dataclass(frozen=True)
class Contents:
    """A store, and what its attributes say that it should hold.

    Attributes:
        backend: open.
        rows: N.
        shard_rows: rows that are written together.
        complete: whether none is pending.
        views: names of the V views.
        arrays: dtype of each feature array, by name.
        scale_crc32c: checksum of the scales of each int8 array, by name, where there is one.
    """

    backend: Backend
    rows: int
    shard_rows: int
    complete: bool
    views: tuple[str, ...]
    arrays: dict[str, np.dtype[Any]]
    scale_crc32c: Mapping[str, int]

    def has(self, name: str) -> bool:
        """Return whether an array is there, be it damaged."""
        return _is_there(self.backend, name)

    def file_of(self, name: str) -> str:
        """Return the file or folder that holds an array."""
        path = self.backend.path
        return str(path / name if path.is_dir() else path)

    def shard(self, index: int) -> slice:
        """Return the rows of a shard."""
        start = index * self.shard_rows
        return slice(start, min(start + self.shard_rows, self.rows))


def read_contents(backend: Backend) -> Contents:
    """Read the attributes of a store.

    Raises:
        MlcError: they are damaged, or of another version.
    """
    try:
        attributes = backend.attributes()
        schema.require_version(backend.path, attributes)
        key = attributes["key"]
        return Contents(
            backend=backend,
            rows=int(attributes["rows"]),
            shard_rows=max(1, int(attributes["shard_rows"])),
            complete=attributes["complete"] is True,
            views=tuple(key["views"]),
            arrays=_expected_arrays(backend, key),
            scale_crc32c=attributes.get("scale_crc32c", {}),
        )
    except MlcError:
        raise
    except BROKEN as error:
        raise MlcError(
            f"{backend.path}: damaged, its attributes do not say what it holds "
            f"({type(error).__name__}: {error}); extract it again"
        ) from None


def _expected_arrays(backend: Backend, key: Mapping[str, Any]) -> dict[str, np.dtype[Any]]:
    """Return what ``schema.feature_arrays`` does, but any part of an array tells that it was."""
    arrays = {}
    for layer in key["layers"]:
        for kind, dtype in schema.array_dtypes(key).items():
            array = schema.feature(layer, kind)
            parts = (array, schema.crc(array), schema.clipped(array))
            if kind != schema.PREFIX or any(_is_there(backend, part) for part in parts):
                arrays[array] = np.dtype(dtype)
    return arrays


def _is_there(backend: Backend, name: str) -> bool:
    try:
        backend.shape(name)
    except MlcError:
        return False
    except BROKEN:
        return True
    return True


@dataclass(frozen=True)
class Columns:
    """What is small of each row: all that ``row_crc32c`` covers, and itself.

    Attributes:
        contents: of the store.
        values: (N, ...) of each array, by name; zeros or no text where it cannot be read.
        known: (N,) which rows of each array could be read, by name.
        extracted: (N,) which rows should be there: in a finished store all, whatever their status.
        problems: what is bad.
    """

    contents: Contents
    values: dict[str, Array]
    known: dict[str, NDArray[np.bool_]]
    extracted: NDArray[np.bool_]
    problems: list[Problem]

    def pending(self) -> int:
        """Return how many rows are still to be extracted."""
        return int((self.known[schema.STATUS] & ~self.extracted).sum())


def read_columns(contents: Contents) -> Columns:
    """Read and check everything small of each row."""
    like = _laid_out(contents)
    columns = Columns(contents, {}, {}, np.ones(contents.rows, np.bool_), [])
    for name in (schema.STATUS, *(name for name in like if name != schema.STATUS)):
        columns.values[name], columns.known[name], faults = _read_column(contents, name, like[name])
        if name == schema.STATUS and not contents.complete:
            status = columns.values[name]
            columns.extracted[:] = columns.known[name] & (status != schema.PENDING)
        faults += _lost_rows(columns, name)
        columns.known[name][[row for row, _ in faults]] = False
        columns.problems.extend(
            Problem(name, file, rows, reason) for rows, (file, reason) in consecutive(faults)
        )
    columns.problems.extend(_check_rows(columns))
    return columns


def _laid_out(contents: Contents) -> dict[str, Array]:
    """Return for each array one of the shape and dtype that it should have."""
    rows = contents.rows
    like: dict[str, Array] = dict.fromkeys(schema.ROW_ARRAYS, np.full(rows, "", np.str_))
    like[schema.STATUS] = np.zeros(rows, schema.STATUS_DTYPE)
    like[schema.ROW_CRC32C] = np.zeros(rows, schema.COUNT_DTYPE)
    counts = np.zeros((rows, len(contents.views)), schema.COUNT_DTYPE)
    for array in contents.arrays:
        like |= {schema.crc(array): counts, schema.clipped(array): counts}
    return like


Faults = list[tuple[int, tuple[str, str]]]  # row, file and reason


def _read_column(
    contents: Contents, name: str, like: Array
) -> tuple[Array, NDArray[np.bool_], Faults]:
    """Read an array whole or, if that fails, shard by shard; also say what cannot be read."""
    known = np.ones(contents.rows, np.bool_)
    try:
        return _read(contents, name, like, slice(0, contents.rows)), known, []
    except BROKEN:
        pass
    texts = like.dtype.kind == "U"
    values, faults = like.astype(object) if texts else like.copy(), Faults()
    for index in range(-(-contents.rows // contents.shard_rows)):
        part = contents.shard(index)
        try:
            values[part] = _read(contents, name, like, part)
        except BROKEN as error:
            fault = contents.file_of(name), why(error) if contents.has(name) else MISSING
            faults += [(row, fault) for row in range(part.start, part.stop)]
    return values.astype(np.str_) if texts else values, known, faults


def _read(contents: Contents, name: str, like: Array, part: slice) -> Array:
    values = contents.backend.read(name, part.start, part.stop)
    same = values.dtype == like.dtype or {values.dtype.kind, like.dtype.kind} == {"U"}
    if not same or values.shape != like[part].shape:
        raise ValueError(f"{values.dtype} of shape {values.shape}, not as it was laid out")
    return values


def _lost_rows(columns: Columns, name: str) -> Faults:
    """Return the rows of chunks that are not there, which read as zeros or no text."""
    contents, values = columns.contents, columns.values[name]
    try:
        lost = contents.backend.lost_chunks(name, contents.rows)
    except BROKEN:
        return []  # the array itself cannot be read, and is named for that
    faults = Faults()
    for file in lost:
        if name in ALWAYS:  # one chunk, and one for each time that images were added
            rows = np.flatnonzero(values == "")
        else:
            part = contents.shard(int(Path(file).relative_to(contents.file_of(name)).parts[1]))
            # What was never written is no loss.
            rows = part.start + np.flatnonzero(columns.extracted[part])
        faults += [(row, (file, MISSING)) for row in rows.tolist()]
    return faults


def _check_rows(columns: Columns) -> Iterator[Problem]:
    """Compare what is known of each row with the row's own checksum."""
    known = np.all(list(columns.known.values()), axis=0) & columns.extracted
    rows = np.flatnonzero(known)
    values = {name: each[rows] for name, each in columns.values.items()}
    crc = row_crc32c(values, list(columns.contents.arrays))
    bad = rows[crc != values[schema.ROW_CRC32C]]
    file = columns.contents.file_of("")
    reason = f"what is small of an image {CHANGED}"
    for run, _ in consecutive((row, reason) for row in bad.tolist()):
        yield Problem(schema.ROW_CRC32C, file, run, reason)
