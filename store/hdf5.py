"""HDF5: one file, easy to carry, one writer."""

import json
from pathlib import Path
from typing import Any, ClassVar, Self

import h5py
import numpy as np

from mlc.configs.errors import MlcError
from mlc.store.backend import Array


class Hdf5Backend:
    """A store in one HDF5 file.

    Every array has its final size, its space allocated when it is created, and no filter. So
    nothing but values changes after creation, and a killed writer leaves a file that opens: a
    layout that grows loses the whole file when its writer is killed between two flushes.
    """

    suffix: ClassVar[str] = ".h5"

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make an empty file."""
        return cls(path, h5py.File(path, "w-"))

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Self:
        """Open a file; HDF5 itself refuses a second writer."""
        try:
            return cls(path, h5py.File(path, "r+" if write else "r"))
        except FileNotFoundError:
            raise MlcError(f"{path}: no such store") from None
        except BlockingIOError:
            raise MlcError(f"{path}: another process has it open; wait for it") from None
        except PermissionError:
            raise MlcError(f"{path}: no permission to open it") from None
        except OSError as error:
            raise MlcError(f"{path}: not an HDF5 file, or damaged ({error})") from None

    def attributes(self) -> dict[str, Any]:
        """Return the root's attributes."""
        values = {}
        try:
            for name, value in self._file.attrs.items():
                values[name] = bool(value) if isinstance(value, np.bool_) else json.loads(value)
        except (TypeError, ValueError):
            raise MlcError(f"{self.path}: an HDF5 file, but not a feature store") from None
        return values

    def set_attribute(self, name: str, value: Any) -> None:
        """Set an attribute; ``modify`` overwrites an existing one in place."""
        plain = np.bool_(value) if isinstance(value, bool) else json.dumps(value)
        self._file.attrs.modify(name, plain)

    def create_array(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunk_rows: int
    ) -> None:
        """Lay out an array, chunked by rows."""
        chunks = (min(chunk_rows, shape[0]), *shape[1:])
        self._lay_out(name, h5py.h5t.py_create(dtype, logical=True), shape, chunks)

    def create_text(self, name: str, rows: int, max_bytes: int, chunk_rows: int) -> None:
        """Lay out text of fixed length, which needs no heap that would grow later."""
        dtype = h5py.string_dtype("utf-8", max(1, max_bytes))
        chunks = (min(chunk_rows, rows),)
        self._lay_out(name, h5py.h5t.py_create(dtype, logical=True), (rows,), chunks)

    def _lay_out(
        self, name: str, dtype: Any, shape: tuple[int, ...], chunks: tuple[int, ...]
    ) -> None:
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk(chunks)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        parents = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        parents.set_create_intermediate_group(True)
        space = h5py.h5s.create_simple(shape)
        h5py.h5d.create(self._file.id, name.encode(), dtype, space, dcpl=layout, lcpl=parents)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array."""
        return tuple(self._array(name).shape)

    def lost_chunks(self, name: str) -> int:
        """Return 0: all chunks are allocated when the array is created."""
        return 0

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows; text as numpy ``str``."""
        dataset = self._array(name)
        if h5py.check_string_dtype(dataset.dtype):
            return np.array(dataset.asstr()[start:stop].tolist(), dtype=np.str_)
        values: Array = dataset[start:stop]
        return values

    def write(self, name: str, start: int, values: Array) -> None:
        """Write rows; text is encoded here because HDF5 counts bytes, not characters."""
        dataset = self._array(name)
        if values.dtype.kind == "U":  # the dataset's dtype tells HDF5 that the bytes are UTF-8
            values = np.char.encode(values, "utf-8").astype(dataset.dtype)
        dataset[start : start + len(values)] = values

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def _array(self, name: str) -> Any:
        if name not in self._file:
            raise MlcError(f"{self.path}: damaged, it has no array {name!r}; extract it again")
        return self._file[name]
