"""Zarr v3: a folder of chunks, the default."""

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import zarr
import zarr.errors

from mlc.configs.errors import MlcError
from mlc.store.backend import Array


class ZarrBackend:
    """A store in a folder; each chunk is one file, written aside and renamed by Zarr.

    A write of whole chunks therefore leaves each of them old or new, never torn.
    """

    suffix: ClassVar[str] = ".zarr"

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        self._arrays: dict[str, zarr.Array[Any]] = {}

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make an empty folder."""
        return cls(path, zarr.open_group(path, mode="w-", zarr_format=3))

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Self:
        """Open a folder; a writer clears away the chunks that a killed one left half written."""
        if not path.is_dir():
            found = "a file, not a Zarr v3 folder" if path.exists() else "no such store"
            raise MlcError(f"{path}: {found}")
        try:
            group = zarr.open_group(path, mode="r+" if write else "r", zarr_format=3)
        except (
            zarr.errors.GroupNotFoundError,
            FileNotFoundError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:
            raise MlcError(f"{path}: not a Zarr v3 folder, or damaged ({error})") from None
        if write:
            for leftover in path.rglob("*.partial"):
                leftover.unlink()
        return cls(path, group)

    def attributes(self) -> dict[str, Any]:
        """Return the root's attributes."""
        return dict(self._group.attrs)

    def set_attribute(self, name: str, value: Any) -> None:
        """Set an attribute."""
        self._group.attrs[name] = value

    def create_array(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunk_rows: int
    ) -> None:
        """Lay out an array, chunked by rows, uncompressed: features hardly compress."""
        self._group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=(min(chunk_rows, shape[0]), *shape[1:]),
            compressors=None,
            fill_value=0,
        )

    def create_text(self, name: str, rows: int, max_bytes: int, chunk_rows: int) -> None:
        """Lay out text of any length."""
        self._group.create_array(name, shape=(rows,), dtype=str, chunks=(min(chunk_rows, rows),))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array."""
        return tuple(self._array(name).shape)

    def lost_chunks(self, name: str) -> int:
        """Return how many chunks of an array are not there."""
        array = self._array(name)
        return array.nchunks - array.nchunks_initialized

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows; text as numpy ``str``."""
        try:
            values = np.asarray(self._array(name)[start:stop])
        except ValueError as error:
            raise MlcError(
                f"{self.path}: damaged, a chunk of {name} cannot be read ({error})"
            ) from None
        return values if values.dtype.kind in "biuf" else np.array(values.tolist(), dtype=np.str_)

    def write(self, name: str, start: int, values: Array) -> None:
        """Write rows."""
        self._array(name)[start : start + len(values)] = values

    def flush(self) -> None:
        """Every write has already been handed over."""

    def close(self) -> None:
        """Nothing is held open."""

    def _array(self, name: str) -> "zarr.Array[Any]":
        if name not in self._arrays:
            array = self._group.get(name)
            if not isinstance(array, zarr.Array):
                raise MlcError(f"{self.path}: damaged, it has no array {name!r}; extract it again")
            # A chunk of zeros is written too, so that an absent one is a lost one.
            self._arrays[name] = array.with_config({"write_empty_chunks": True})
        return self._arrays[name]
