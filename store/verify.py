"""verify(): all that a store holds against its checksums, and by name what is bad."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlc.configs.progress import Progress, silent
from mlc.store import schema
from mlc.store.backend import Backend
from mlc.store.columns import Columns, Contents, read_columns, read_contents
from mlc.store.features import PIECE_BYTES, THREADS
from mlc.store.problems import BROKEN, CHANGED, MISSING, Problem, consecutive, why
from mlc.store.units import DamagedUnits, Units, crc32c, read_units

MB = 10**6

Fault = tuple[str, str]  # file and reason


@dataclass(frozen=True)
class Verification:
    """What verify() found.

    Attributes:
        images: rows of the store.
        pending: rows that are still to be extracted, at which nothing was looked.
        read_bytes: of features that were read.
        problems: what is bad, array by array; empty if nothing is.
    """

    images: int
    pending: int
    read_bytes: int
    problems: list[Problem]


def verify(path: Path, progress: Progress = silent) -> Verification:
    """Compare all that is stored of the images that were extracted with its checksums.

    Each array is looked at on its own, so that whatever is damaged the rest is told too. Features
    are read in large pieces, by several threads. An unfinished store can be verified too.

    Args:
        path: of the store.
        progress: told in MB of features.

    Raises:
        MlcError: there is no store, it is of another version, or so badly damaged that it does not
            say what it should hold.
    """
    backend = schema.format_of(path).open(path)
    try:
        groups = _broken_groups(backend)  # first: HDF5 tells of some damage only once
        contents = read_contents(backend)
        columns = read_columns(contents)
        problems = columns.problems
        if groups is not None:
            nothing = np.empty(0, np.intp)
            problems = [Problem("all arrays", contents.file_of(""), nothing, groups), *problems]
        problems += _check_scales(contents, np.flatnonzero(columns.extracted))
        checks = [_begin(contents, columns, array) for array in contents.arrays]
        read_bytes = sum(each.nbytes() for each in checks)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="verify") as pool:
            done = 0
            for check in checks:
                for size in check.run(pool):
                    done += size
                    progress(done // MB, read_bytes // MB)
                problems += check.problems
        return Verification(contents.rows, columns.pending(), read_bytes, problems)
    finally:
        backend.close()


@dataclass(frozen=True)
class _Check:
    """A feature array that is compared with its checksums.

    Attributes:
        contents: of the store.
        array: its name.
        crc32c: (N*V,) uint32.
        rows: (n,) rows that are compared.
        units: where they lie; None if a codec hides it, or if it is not known.
        problems: what was found.
    """

    contents: Contents
    array: str
    crc32c: NDArray[np.uint32]
    rows: NDArray[np.intp]
    units: Units | None
    problems: list[Problem] = field(default_factory=list)

    def nbytes(self) -> int:
        """Return how much will be read."""
        return 0 if self.units is None else len(self._which()) * self.units.unit_bytes

    def _which(self) -> NDArray[np.intp]:
        views = len(self.contents.views)
        return (self.rows[:, None] * views + np.arange(views)).reshape(-1)

    def run(self, pool: ThreadPoolExecutor) -> Iterator[int]:
        """Compare everything, and yield the bytes of each piece that was."""
        if self.problems:
            return
        faults: list[tuple[int, Fault]] = []
        if self.units is None:
            faults = self._read_by_library()
        else:
            which = self._which()
            step = max(1, PIECE_BYTES // max(1, self.units.unit_bytes))
            parts = [which[start : start + step] for start in range(0, len(which), step)]
            for part, found in zip(parts, pool.map(self._read, parts), strict=True):
                faults += found
                yield len(part) * self.units.unit_bytes
        self.problems.extend(self._problems(faults))

    def _read(self, which: NDArray[np.intp]) -> list[tuple[int, Fault]]:
        """Return what is bad among some units."""
        assert self.units is not None
        values = self.units.empty(len(which))
        try:
            read_units(self.units, which, values)
        except DamagedUnits as error:
            if len(which) == 1:
                return [(int(which[0]), (str(error.file), error.reason))]
            return [fault for unit in which for fault in self._read(unit[None])]
        except BROKEN as error:  # e.g. of a shape that no memory could hold
            return [(int(unit), (self._file(unit), why(error))) for unit in which]
        bad = which[crc32c(values) != self.crc32c[which]]
        return [(int(unit), (self._file(unit), CHANGED)) for unit in bad]

    def _file(self, unit: np.intp) -> str:
        assert self.units is not None
        return str(self.units.files[self.units.file[unit]])

    def _read_by_library(self) -> list[tuple[int, Fault]]:
        """Return what is bad in an array that another tool compressed."""
        views = len(self.contents.views)
        crc, file, faults = self.crc32c.reshape(-1, views), self.contents.file_of(self.array), []
        for row in self.rows.tolist():
            try:
                values = self.contents.backend.read(self.array, row, row + 1)[0]
                found = [CHANGED if bad else "" for bad in crc32c(values) != crc[row]]
            except BROKEN as error:
                found = [why(error)] * views
            faults += [
                (row * views + view, (file, each)) for view, each in enumerate(found) if each
            ]
        return faults

    def _problems(self, faults: list[tuple[int, Fault]]) -> list[Problem]:
        """Return faults of units as problems, that say which views unless all are bad."""
        names = self.contents.views
        views: dict[tuple[int, Fault], list[str]] = {}
        for unit, fault in sorted(faults):
            row, view = divmod(unit, len(names))
            views.setdefault((row, fault), []).append(names[view])
        told = [
            (row, (file, reason if len(bad) == len(names) else f"{reason} (view {', '.join(bad)})"))
            for (row, (file, reason)), bad in views.items()
        ]
        return [
            Problem(self.array, file, rows, reason) for rows, (file, reason) in consecutive(told)
        ]


def _begin(contents: Contents, columns: Columns, array: str) -> _Check:
    """Find the units of an array, as far as their checksums are known."""
    rows = np.flatnonzero(columns.extracted & columns.known[schema.crc(array)])
    crc = columns.values[schema.crc(array)].reshape(-1)
    try:
        units = contents.backend.units(array)
        fault = _misfit(contents, array, units)
    except BROKEN as error:
        units, fault = None, why(error) if contents.has(array) else MISSING
    check = _Check(contents, array, crc, rows, None if fault else units)
    if fault:
        every = np.flatnonzero(columns.extracted)
        check.problems.append(Problem(array, contents.file_of(array), every, fault))
    return check


def _misfit(contents: Contents, array: str, units: Units | None) -> str | None:
    """Return what is wrong with the shape or dtype of an array."""
    shape, dtype = contents.backend.shape(array), contents.arrays[array]
    if shape[0] < contents.rows or shape[1] != len(contents.views):
        return f"of shape {shape}, not as it was laid out"
    if units is not None and units.dtype != dtype:
        return f"{units.dtype}, but its key says {dtype}"
    return None


def _broken_groups(backend: Backend) -> str | None:
    """Return why readers will not find the arrays, which lie in a group for each layer."""
    try:
        backend.names()
    except BROKEN as error:
        return f"a group of arrays {why(error)}"
    return None


def _check_scales(contents: Contents, rows: NDArray[np.intp]) -> list[Problem]:
    """Look at the scales of int8, without which none of an array's features can be read."""
    problems = []
    for array in (name for name, dtype in contents.arrays.items() if dtype == np.int8):
        name = schema.scale(array)
        fault = _scale_fault(contents, array)
        if fault is not None:
            problems.append(Problem(name, contents.file_of(name), rows, fault))
    return problems


def _scale_fault(contents: Contents, array: str) -> str | None:
    name, backend = schema.scale(array), contents.backend
    try:
        if not contents.has(name) or backend.lost_chunks(name, backend.shape(name)[0]):
            return MISSING
        scale, width = backend.read(name), backend.shape(array)[-1]
    except BROKEN as error:
        return why(error)
    if scale.dtype != schema.SCALE_DTYPE or scale.shape != (width,):
        return f"{scale.dtype} of shape {scale.shape}, not as it was laid out"
    if not (np.isfinite(scale) & (scale > 0)).all():
        return "has numbers that are not positive"
    stored = contents.scale_crc32c.get(array)
    return CHANGED if stored not in (None, int(crc32c(scale[None])[0])) else None
