"""Backend: the little that a file format must do; schema and meaning live above it."""

from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Backend(Protocol):
    """A tree of named arrays of fixed length, with JSON attributes at the root.

    Text arrays go in and come out as numpy ``str``; the format chooses how it keeps them.

    What a killed writer may leave: ``create`` lays out everything, so afterwards a write changes
    values only; after ``flush`` what was written is found again by the next process.
    """

    suffix: ClassVar[str]
    path: Path

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make an empty store at a path where nothing is, open for writing."""
        ...

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Self:
        """Open a store.

        Raises:
            MlcError: what is at the path is not a store of this format, or is damaged.
        """
        ...

    def attributes(self) -> dict[str, Any]:
        """Return the root's attributes."""
        ...

    def set_attribute(self, name: str, value: Any) -> None:
        """Set an attribute; one that exists must keep its type and, for text, its length."""
        ...

    def create_array(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunk_rows: int
    ) -> None:
        """Lay out an array of numbers, zero everywhere; ``a/b`` makes the group ``a``."""
        ...

    def create_text(self, name: str, rows: int, max_bytes: int, chunk_rows: int) -> None:
        """Lay out an array (rows,) of text of at most ``max_bytes`` in UTF-8, empty everywhere."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array."""
        ...

    def lost_chunks(self, name: str) -> int:
        """Return how many chunks of an array that is written whole are not there any more."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return the rows from ``start`` to before ``stop``."""
        ...

    def write(self, name: str, start: int, values: Array) -> None:
        """Write rows from ``start`` on."""
        ...

    def flush(self) -> None:
        """Hand everything written to the operating system."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...
