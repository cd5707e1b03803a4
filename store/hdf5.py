"""HDF5: one file, easy to carry, one writer."""

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from time import monotonic, sleep
from typing import Any, ClassVar, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.store.backend import Array, longest
from mlc.store.journal import journal_path, journaled, roll_back
from mlc.store.lock import writer_lock
from mlc.store.units import LOST, Units

META_BYTES = 1 << 16  # of groups, headers and attributes
META_BYTES_OF_CHUNK = 128  # of a B-tree whose nodes are half full: 114 were measured
UNDO_SECONDS = 2.0  # that readers wait for another that undoes a growth
SMALLEST_OFFSET = 96  # the length of a superblock
SIGNATURE, EOF_OFFSET = b"\x89HDF\r\n\x1a\n", 40  # of a superblock of version 0


class Hdf5Backend:
    """A store in one HDF5 file.

    Every array has its space allocated when it is created, and no filter. So nothing but values
    changes after creation, and a killed writer leaves a file that opens: a layout that grows loses
    the whole file when its writer is killed between two flushes. Where it must grow, because images
    were added, a journal of what is overwritten makes that a step that is done or not.
    """

    suffix: ClassVar[str] = ".h5"

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file

    @classmethod
    def create(cls, path: Path, chunks: int) -> Self:
        """Make an empty file, with room at its beginning for what tells where its arrays are.

        So a file that was cut off has lost the features that were there, and nothing else.
        """
        room = META_BYTES + chunks * META_BYTES_OF_CHUNK
        return cls(path, h5py.File(path, "w-", meta_block_size=room))

    @classmethod
    def restore_length(cls, path: Path) -> None:
        """Bring a file that was cut off to its length again, for HDF5 refuses to open it."""
        roll_back(path)
        with path.open("r+b") as file:
            head = file.read(EOF_OFFSET + 8)
            if len(head) == EOF_OFFSET + 8 and head.startswith(SIGNATURE):
                length = int.from_bytes(head[EOF_OFFSET:], "little")
                if path.stat().st_size < length:
                    file.truncate(length)

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Self:
        """Open a file; HDF5 itself refuses a second writer.

        A growth that was cut off is undone before, by whoever comes first.
        """
        if write and path.exists() and not os.access(path, os.W_OK):
            raise MlcError(f"{path}: no permission to write to it, or a read-only disk")
        if write:
            roll_back(path)
        else:
            _undo_growth(path)
        try:
            return cls(path, h5py.File(path, "r+" if write else "r"))
        except FileNotFoundError:
            raise MlcError(f"{path}: no such store") from None
        except BlockingIOError:
            raise MlcError(f"{path}: another process has it open; wait for it") from None
        except PermissionError:
            raise MlcError(f"{path}: no permission to open it") from None
        except OSError as error:
            raise MlcError(
                f"{path}: not an HDF5 file, or damaged ({error}); if it was cut off, mend it with "
                "mlc store repair"
            ) from None

    def clear_leftovers(self) -> None:
        """Do nothing: what a killed writer left is within the file."""

    def attributes(self) -> dict[str, Any]:
        """Return the root's attributes."""
        values = {}
        try:
            for name, value in self._file.attrs.items():
                plain = isinstance(value, np.bool_ | np.integer)
                values[name] = value.item() if plain else _load(value)
        except (TypeError, ValueError):
            raise MlcError(f"{self.path}: an HDF5 file, but not a feature store") from None
        return values

    def set_attribute(self, name: str, value: Any, max_bytes: int = 0) -> None:
        """Set an attribute; ``modify`` overwrites an existing one in place.

        Text is of fixed length, as HDF5 keeps any other far from what tells where arrays are.
        What may become longer is padded with spaces.
        """
        kinds = {bool: np.bool_, int: np.int64}
        make = kinds.get(type(value), lambda other: np.bytes_(json.dumps(other).ljust(max_bytes)))
        self._file.attrs.modify(name, make(value))

    def create_array(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunk_rows: int
    ) -> None:
        """Lay out an array, chunked by rows; its zeros are written, so a full disk is seen here."""
        self._lay_out(name, dtype, shape, (chunk_rows, *shape[1:]), h5py.h5d.FILL_TIME_ALLOC)

    def create_features(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        shard_rows: int,
        *,
        unit_chunks: bool,
    ) -> None:
        """Lay out a feature array; its space is a hole in the file until it is written."""
        chunks = (1, 1, *shape[2:]) if unit_chunks else (shard_rows, *shape[1:])
        self._lay_out(name, dtype, shape, chunks, h5py.h5d.FILL_TIME_NEVER)

    def create_text(self, name: str, rows: int, max_bytes: int, chunk_rows: int) -> None:
        """Lay out text of fixed length, which needs no heap that would grow later."""
        dtype = h5py.string_dtype("utf-8", max(1, max_bytes))
        self._lay_out(name, dtype, (rows,), (chunk_rows,), h5py.h5d.FILL_TIME_ALLOC)

    def _lay_out(
        self,
        name: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        fill_time: int,
    ) -> None:
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk(chunks)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(fill_time)
        layout.set_obj_track_times(False)  # the same store is the same bytes
        parents = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        parents.set_create_intermediate_group(True)
        space = h5py.h5s.create_simple(shape, (h5py.h5s.UNLIMITED, *shape[1:]))
        stored = h5py.h5t.py_create(dtype, logical=True)
        h5py.h5d.create(self._file.id, name.encode(), stored, space, dcpl=layout, lcpl=parents)

    def grow(self, rows: int, names: list[str], text: Mapping[str, Array]) -> None:
        """Lengthen arrays; a killed call is rolled back when the store is opened for writing."""
        self._file.close()
        with journaled(self.path) as journal, h5py.File(journal, "r+") as file:
            grown = Hdf5Backend(self.path, file)
            grown.set_attribute("complete", False)
            grown.set_attribute("rows", rows)
            for name in names:
                file[name].resize(rows, axis=0)
            for name, values in text.items():
                chunk_rows = file[name].chunks[0]
                del file[name]  # what is new may be longer than its fixed length
                grown.create_text(name, rows, longest(values), chunk_rows)
                grown.write(name, 0, values)
        self._file = h5py.File(self.path, "r+")

    def names(self) -> set[str]:
        """Return the names of all arrays."""
        found: set[str] = set()
        self._file.visititems(
            lambda name, each: found.add(name) if isinstance(each, h5py.Dataset) else None
        )
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array."""
        return tuple(self._array(name).shape)

    def units(self, name: str) -> Units | None:
        """Return where units lie, or None if the array was repacked with a filter."""
        dataset = self._array(name)
        if dataset.chunks is None or dataset.id.get_create_plist().get_nfilters():
            return None
        rows, views, *item = dataset.shape
        chunk_rows, chunk_views = dataset.chunks[:2]
        if tuple(dataset.chunks[2:]) != tuple(item) or chunk_views not in (1, views):
            return None
        place = np.full((-(-rows // chunk_rows), -(-views // chunk_views)), LOST, dtype=np.int64)

        def note(chunk: Any) -> None:
            row, view, *_ = chunk.chunk_offset
            if row < rows and view < views:
                place[row // chunk_rows, view // chunk_views] = chunk.byte_offset

        dataset.id.chunk_iter(note)
        _distrust(place, prod(dataset.chunks) * dataset.dtype.itemsize, self.path.stat().st_size)
        row, view = np.divmod(np.arange(rows * views), views)
        chunk = place[row // chunk_rows, view // chunk_views]
        within = row % chunk_rows * chunk_views + view % chunk_views
        unit_bytes = prod(item) * dataset.dtype.itemsize
        return Units(
            files=(self.path,),
            file=np.zeros(rows * views, np.intp),
            offset=np.where(chunk == LOST, LOST, chunk + within * unit_bytes),
            views=views,
            shape=tuple(item),
            dtype=dataset.dtype,
        )

    def make_room(self, name: str, shard: int) -> bool:
        """Do nothing: all space is allocated when the array is created."""
        return False

    def lost_chunks(self, name: str, rows: int) -> list[str]:
        """Return none: all chunks are allocated when the array is created."""
        return []

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

    def reset(self, name: str, start: int, blank: Array) -> None:
        """Write blank rows: text that is no UTF-8 any more cannot be read, but written over."""
        self.write(name, start, blank)

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


def _load(text: bytes) -> Any:
    """Return what a text attribute says, None if it is padded and no JSON.

    Padded text is rewritten, and a kill may tear that between two pages of the file.
    """
    try:
        return json.loads(text)
    except ValueError:
        if not text.endswith(b" "):
            raise
        return None


def _undo_growth(path: Path) -> None:
    """Undo a growth that was cut off, whoever comes first; others wait for that.

    Raises:
        MlcError: images are being added by a living process, or nothing can be written here.
    """
    deadline = monotonic() + UNDO_SECONDS
    while journal_path(path).exists():
        if not (os.access(path, os.W_OK) and os.access(path.resolve().parent, os.W_OK)):
            raise MlcError(
                f"{path}: a process was killed that added images, and to undo that here there is "
                "no permission; run the same mlc extract again, or open it where it may be written"
            )
        try:
            with writer_lock(path):
                roll_back(path)
        except MlcError:
            if monotonic() > deadline:
                raise
            sleep(0.02)


def _distrust(place: NDArray[np.int64], chunk_bytes: int, file_bytes: int) -> None:
    """Set to ``LOST`` the addresses of chunks that cannot be true.

    HDF5 keeps no checksum of them, and writing to a wrong one would destroy something else.
    """
    place[(place < SMALLEST_OFFSET) | (place + chunk_bytes > file_bytes)] = LOST
    flat = place.reshape(-1)
    order = np.argsort(flat, kind="stable")
    overlap = (np.diff(flat[order]) < chunk_bytes) & (flat[order][:-1] != LOST)
    flat[order[:-1][overlap]] = LOST
    flat[order[1:][overlap]] = LOST
