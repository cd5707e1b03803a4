"""Units: where the numbers of a feature array lie in its files, read and written by position.

A unit is one view of one image: contiguous bytes, never compressed. Positioned reads and writes
need neither h5py's global lock nor Zarr's codec pipeline, and run in any number of threads.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.store.open_files import OpenFiles

MOST_BUFFERS = 1024  # of one preadv or pwritev: IOV_MAX on Linux
INDEX = "its index is damaged"
LOST = -1  # an offset that is not known any more


class DamagedUnits(Exception):
    """Units cannot be read.

    Attributes:
        units: their indices.
        file: where they should be.
        reason: "missing", "truncated", "its index is damaged", or what the operating system says.
    """

    def __init__(self, units: NDArray[np.intp], file: Path, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.units, self.file, self.reason = units, file, reason


@dataclass(frozen=True)
class Units:
    """The places of all units of an array (N, V, ...); unit ``row * V + view``.

    Attributes:
        files: the files that hold them.
        file: (N*V,) index into ``files``.
        offset: (N*V,) int64, bytes from the file's beginning, or ``LOST``.
        views: V.
        shape: of a unit.
        dtype: as stored.
    """

    files: tuple[Path, ...]
    file: NDArray[np.intp]
    offset: NDArray[np.int64]
    views: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @cached_property
    def unit_bytes(self) -> int:
        """Size of a unit."""
        return prod(self.shape) * self.dtype.itemsize

    def of_rows(self, rows: NDArray[np.intp], view: int | None = None) -> NDArray[np.intp]:
        """Return the units of rows, of one view or, row by row, of all."""
        if view is not None:
            return rows * self.views + view
        return (rows[:, None] * self.views + np.arange(self.views)).reshape(-1)

    def empty(self, count: int) -> NDArray[Any]:
        """Return room for units, (count, *shape)."""
        return np.empty((count, *self.shape), self.dtype)


def read_units(
    units: Units, which: NDArray[np.intp], out: NDArray[Any], files: OpenFiles | None = None
) -> None:
    """Read units into ``out`` (n, *shape), neighbours in a file with one call.

    Args:
        units: their places.
        which: (n,) units, in any order.
        out: C-contiguous, of the stored dtype.
        files: kept open from one call to the next; by default none is.

    Raises:
        DamagedUnits: a file is missing or ends too early.
        MlcError: the process may not open another file.
    """
    files = files or OpenFiles(most=0)
    buffers = _bytes_of(units, out)
    for file, offset, places in _runs(units, which):
        path = units.files[file]
        try:
            if offset == LOST:
                raise EOFError(INDEX)
            with files.opened(path) as descriptor:
                _read_run(descriptor, offset, buffers, places, units.unit_bytes)
        except FileNotFoundError:
            raise DamagedUnits(which[places], path, "missing") from None
        except (EOFError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise MlcError(f"{path}: {reason}; allow more, as with ulimit -n 4096") from None
            raise DamagedUnits(which[places], path, reason) from None


def write_units(units: Units, which: NDArray[np.intp], values: NDArray[Any]) -> set[Path]:
    """Write units (n, *shape) of the stored dtype to their places; return the files they are in.

    Raises:
        DamagedUnits: a place is not known any more; nothing is written then.
        OSError: a file is missing, or the disk is full.
    """
    buffers = _bytes_of(units, values)
    lost = which[units.offset[which] == LOST]
    if len(lost):
        raise DamagedUnits(lost, units.files[units.file[lost[0]]], INDEX)
    touched = set()
    for file, offset, places in _runs(units, which):
        path = units.files[file]
        fd = os.open(path, os.O_WRONLY)
        try:
            _write_run(fd, offset, [buffers[place].data for place in places])
        finally:
            os.close(fd)
        touched.add(path)
    return touched


def sync(files: set[Path]) -> None:
    """Wait until the disk has everything that was written to some files."""
    for path in files:
        fd = os.open(path, os.O_WRONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def crc32c(values: NDArray[Any]) -> NDArray[np.uint32]:
    """Return the CRC32C of each item of an array (n, ...), of its bytes as stored."""
    values = np.ascontiguousarray(values)
    rows = values.reshape(len(values), prod(values.shape[1:])).view(np.uint8)
    rows.flags.writeable = False  # the library takes read-only buffers alone
    return np.fromiter(map(google_crc32c.value, rows), np.uint32, len(rows))


def _bytes_of(units: Units, values: NDArray[Any]) -> NDArray[np.uint8]:
    if values.dtype != units.dtype or values.shape[1:] != units.shape:
        raise TypeError(
            f"{values.dtype} {values.shape} is not units of {units.dtype} {units.shape}"
        )
    if not values.flags.c_contiguous:
        raise ValueError("units are read and written in contiguous memory alone")
    return values.reshape(len(values), prod(units.shape)).view(np.uint8)


def _runs(units: Units, which: NDArray[np.intp]) -> Iterator[tuple[int, int, NDArray[np.intp]]]:
    """Yield (file, offset, places in ``which``) of units that follow each other in a file."""
    if not len(which):
        return
    file, offset = units.file[which], units.offset[which]
    order = np.lexsort((offset, file))
    file, offset = file[order], offset[order]
    breaks = (np.diff(file) != 0) | (np.diff(offset) != units.unit_bytes)
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1, [len(order)]))
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for first in range(start, stop, MOST_BUFFERS):
            places = order[first : min(first + MOST_BUFFERS, stop)]
            yield int(file[first]), int(offset[first]), places


def _read_run(
    fd: int, offset: int, buffers: NDArray[np.uint8], places: NDArray[np.intp], size: int
) -> None:
    """Fill the buffers at ``places`` from consecutive bytes; as one if they are neighbours too."""
    first, count = int(places[0]), len(places)
    if count == 1 or bool((np.diff(places) == 1).all()):
        parts = [buffers[first : first + count].reshape(-1).data]
    else:
        parts = [buffers[place].data for place in places]
    read = 0
    while read < count * size:  # once, but for a signal, or the 2 GB that Linux reads at most
        more = os.preadv(fd, _after(parts, read), offset + read)
        if more == 0:
            raise EOFError("truncated")
        read += more


def _write_run(fd: int, offset: int, parts: list[memoryview]) -> None:
    total = sum(part.nbytes for part in parts)
    written = 0
    while written < total:
        written += os.pwritev(fd, _after(parts, written), offset + written)
    # Has Linux begin to write to the disk, which else waits until ``sync``, and then for long.
    with suppress(OSError):
        os.posix_fadvise(fd, offset, total, os.POSIX_FADV_DONTNEED)


def _after(parts: list[memoryview], skip: int) -> list[memoryview]:
    """Return what is left of some buffers after their first bytes."""
    left = []
    for part in parts:
        if skip < part.nbytes:
            left.append(part[skip:])
        skip = max(0, skip - part.nbytes)
    return left
