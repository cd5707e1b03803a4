"""Problem: what is bad in a store, by array, file and rows."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError

# What the libraries raise over bytes that are not what was written.
BROKEN = (
    MlcError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
MISSING = "missing"
CHANGED = "does not match its checksum"

Fault = TypeVar("Fault", bound=Hashable)


@dataclass(frozen=True)
class Problem:
    """Rows of an array that are bad in one file, for one reason.

    Attributes:
        array: its name.
        file: where they are or should be: the file of a chunk or shard, or the HDF5 file.
        rows: (n,) consecutive rows; none where no image was extracted that could be at fault.
        reason: e.g. "missing", "truncated".
    """

    array: str
    file: str
    rows: NDArray[np.intp]
    reason: str

    def describe(self) -> str:
        """Return e.g. ``a.zarr/x/tokens/c/0/0/0/0: missing, x/tokens of rows 0 to 255``."""
        where = "no row"
        if len(self.rows):
            first, last = int(self.rows[0]), int(self.rows[-1])
            where = f"row {first}" if first == last else f"rows {first} to {last}"
        return f"{self.file}: {self.reason}, {self.array} of {where}"


def bad_rows(problems: Iterable[Problem]) -> NDArray[np.intp]:
    """Return the rows, sorted, that a repair has to extract again."""
    rows = [each.rows for each in problems]
    return np.unique(np.concatenate(rows)) if rows else np.empty(0, np.intp)


def consecutive(faults: Iterable[tuple[int, Fault]]) -> list[tuple[NDArray[np.intp], Fault]]:
    """Return rows that follow each other and have the same fault together, sorted by row.

    >>> consecutive([(4, "missing"), (2, "missing"), (3, "missing"), (8, "missing")])
    [(array([2, 3, 4]), 'missing'), (array([8]), 'missing')]
    """
    rows_of: dict[Fault, list[int]] = {}
    for row, fault in faults:
        rows_of.setdefault(fault, []).append(row)
    runs = []
    for fault, rows in rows_of.items():
        every = np.unique(np.array(rows, np.intp))
        runs += [(run, fault) for run in np.split(every, np.flatnonzero(np.diff(every) > 1) + 1)]
    return sorted(runs, key=lambda run: int(run[0][0]))


def why(error: BaseException) -> str:
    """Return the reason of a problem that an exception of ``BROKEN`` tells of."""
    return f"cannot be read ({type(error).__name__}: {error})"
