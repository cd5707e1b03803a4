"""Backend: the little that a file format must do; schema and meaning live above it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mlc.store.units import Units

Array = NDArray[Any]


def longest(text: Array) -> int:
    """Return the bytes of the longest of some texts in UTF-8."""
    return max((len(each.encode()) for each in text.tolist()), default=0)


class Backend(Protocol):
    """A tree of named arrays, a row for each image, with JSON attributes at the root.

    Text arrays go in and come out as numpy ``str``; the format chooses how it keeps them.

    What a killed writer may leave: ``create`` lays out everything, so afterwards a write changes
    values only; after ``flush`` what was written is found again by the next process.
    """

    suffix: ClassVar[str]
    path: Path

    @classmethod
    def create(cls, path: Path, chunks: int) -> Self:
        """Make an empty store at a path where nothing is, open for writing.

        Args:
            path: of the store.
            chunks: that it will have, about.
        """
        ...

    @classmethod
    def restore_length(cls, path: Path) -> None:
        """Make files that were cut off as long as they were; what is lost is zeros then.

        Hold the ``writer_lock``.
        """
        ...

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Self:
        """Open a store.

        Raises:
            MlcError: what is at the path is not a store of this format, or is damaged.
        """
        ...

    def clear_leftovers(self) -> None:
        """Remove what a killed writer left half written; no other may be writing."""
        ...

    def attributes(self) -> dict[str, Any]:
        """Return the root's attributes."""
        ...

    def set_attribute(self, name: str, value: Any, max_bytes: int = 0) -> None:
        """Set an attribute; one that exists must keep its type and, for text, its length.

        Args:
            name: of the attribute.
            value: JSON.
            max_bytes: the length of an attribute whose JSON may change, always the same, and more
                than that JSON ever has; a kill may leave None of it, and of nothing else.
        """
        ...

    def create_array(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunk_rows: int
    ) -> None:
        """Lay out an array of numbers, zero everywhere; ``a/b`` makes the group ``a``."""
        ...

    def create_features(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        shard_rows: int,
        *,
        unit_chunks: bool,
    ) -> None:
        """Lay out a feature array (N, V, ...), uncompressed, whose ``units`` are then known.

        Args:
            name: of the array.
            shape: of the array.
            dtype: as stored.
            shard_rows: rows that one worker writes, so that no file is shared by two of them.
            unit_chunks: a chunk for each unit, as they are large; else one for ``shard_rows``.
        """
        ...

    def create_text(self, name: str, rows: int, max_bytes: int, chunk_rows: int) -> None:
        """Lay out an array (rows,) of text of at most ``max_bytes`` in UTF-8, empty everywhere."""
        ...

    def grow(self, rows: int, names: list[str], text: Mapping[str, Array]) -> None:
        """Lengthen arrays to ``rows``, and set the attributes ``complete`` and ``rows``.

        Whenever the process is killed, the store is as before or as after, but that arrays may be
        longer than the attribute ``rows`` says.

        Args:
            rows: N from now on.
            names: arrays of numbers, and text whose new rows are empty.
            text: whole new values, (rows,), of the other text arrays.
        """
        ...

    def names(self) -> set[str]:
        """Return the names of all arrays."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array."""
        ...

    def units(self, name: str) -> Units | None:
        """Return where the units of a feature array lie; None if a codec hides their bytes."""
        ...

    def make_room(self, name: str, shard: int) -> bool:
        """Make the file that a shard of a feature array is written to, or mend its index.

        Returns:
            Whether ``units`` says something else now.
        """
        ...

    def lost_chunks(self, name: str, rows: int) -> list[str]:
        """Return the chunks that are not there any more of the first rows of a written array."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return the rows from ``start`` to before ``stop``."""
        ...

    def write(self, name: str, start: int, values: Array) -> None:
        """Write rows from ``start`` on."""
        ...

    def reset(self, name: str, start: int, blank: Array) -> None:
        """Write blank rows over whole chunks of an array that may be unreadable."""
        ...

    def flush(self) -> None:
        """Hand everything written to the operating system."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...
