"""Zarr v3: a folder of chunks, the default."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import zarr
import zarr.errors
from zarr.codecs import BytesCodec, ShardingCodec
from zarr.core.metadata import ArrayV3Metadata

from mlc.configs.errors import MlcError
from mlc.configs.files import written_aside
from mlc.store.backend import Array
from mlc.store.units import LOST, Units
from mlc.store.zarr_chunks import PARTIAL, Chunks, is_little, plain_chunks
from mlc.store.zarr_shards import is_plain, make_index, read_index


class ZarrBackend:
    """A store in a folder; each chunk is one file, written aside and renamed by Zarr.

    A write of whole chunks therefore leaves each of them old or new, never torn.
    """

    suffix: ClassVar[str] = ".zarr"

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._chunks: dict[str, Chunks | None] = {}

    @classmethod
    def create(cls, path: Path, chunks: int) -> Self:
        """Make an empty folder."""
        return cls(path, zarr.open_group(path, mode="w-", zarr_format=3))

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Self:
        """Open a folder."""
        if not path.is_dir():
            found = "a file, not a Zarr v3 folder" if path.exists() else "no such store"
            raise MlcError(f"{path}: {found}")
        if write and not os.access(path, os.W_OK):
            raise MlcError(f"{path}: no permission to write to it, or a read-only disk")
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
        return cls(path, group)

    @classmethod
    def restore_length(cls, path: Path) -> None:
        """Bring chunks of features that were cut off to their length again, for others to read."""
        backend = cls.open(path, write=True)
        try:
            names = backend.names()
        except (ValueError, KeyError, TypeError, zarr.errors.MetadataValidationError):
            return  # what tells of arrays is damaged; that is said by who reads it
        for name in names:
            array = backend._array(name)
            if array.ndim < 3 or array.shards is not None:
                continue
            size = prod(array.chunks) * array.dtype.itemsize
            for chunk in range(-(-array.shape[0] // array.chunks[0])):
                file = backend._file(name, chunk)
                if file.is_file() and file.stat().st_size < size:
                    os.truncate(file, size)

    def clear_leftovers(self) -> None:
        """Remove the chunks that a killed writer left half written; no other may be writing."""
        for leftover in self.path.rglob(f"*{PARTIAL}"):
            leftover.unlink()

    def attributes(self) -> dict[str, Any]:
        """Return the root's attributes."""
        return dict(self._group.attrs)

    def set_attribute(self, name: str, value: Any, max_bytes: int = 0) -> None:
        """Set an attribute: all of them are written aside and renamed, of whatever length."""
        self._group.attrs[name] = value

    def create_array(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunk_rows: int
    ) -> None:
        """Lay out an array, chunked by rows."""
        self._create(name, shape, dtype, (chunk_rows, *shape[1:]))

    def create_features(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        shard_rows: int,
        *,
        unit_chunks: bool,
    ) -> None:
        """Lay out a feature array, a file for ``shard_rows``: features hardly compress.

        Chunks of one unit lie in Zarr's shards. Their index is at the beginning of the file, and
        says once for all where each unit goes, so that a shard can be written bit by bit.
        """
        file_shape = (shard_rows, *shape[1:])
        if not unit_chunks:
            self._create(name, shape, dtype, file_shape)
            return
        sharding = ShardingCodec(
            chunk_shape=(1, 1, *shape[2:]), codecs=[BytesCodec()], index_location="start"
        )
        self._create(name, shape, dtype, file_shape, serializer=sharding)

    def create_text(self, name: str, rows: int, max_bytes: int, chunk_rows: int) -> None:
        """Lay out text of any length."""
        self._group.create_array(
            name, shape=(rows,), dtype=str, chunks=(chunk_rows,), compressors=None
        )

    def _create(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        chunks: tuple[int, ...],
        **codec: Any,
    ) -> None:
        self._group.create_array(
            name, shape=shape, dtype=dtype, chunks=chunks, compressors=None, fill_value=0, **codec
        )

    def grow(self, rows: int, names: list[str], text: Mapping[str, Array]) -> None:
        """Lengthen arrays, the attribute last: until then the new rows are not there."""
        self.set_attribute("complete", False)
        for name in (*names, *text):
            self._array(name).resize((rows, *self.shape(name)[1:]))
        for name, values in text.items():
            self.write(name, 0, values)
        self.set_attribute("rows", rows)

    def names(self) -> set[str]:
        """Return the names of all arrays."""
        with warnings.catch_warnings():  # what a killed writer left half written is no member
            warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
            members = list(self._group.members(max_depth=None))
        return {name for name, member in members if isinstance(member, zarr.Array)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array."""
        return tuple(self._array(name).shape)

    def units(self, name: str) -> Units | None:
        """Return where units lie, or None if the array was rewritten with another codec.

        A shard's own index is believed, as another tool may have ordered its chunks otherwise.
        """
        array = self._array(name)
        rows, views, *item = array.shape
        shard_rows, shard_views, *rest = array.chunks if array.shards is None else array.shards
        codec, *others = self._metadata(name).codecs
        if others or shard_views != views or rest != item:
            return None
        unit_bytes = prod(item) * array.dtype.itemsize
        shards = -(-rows // shard_rows)
        offset = np.tile(np.arange(shard_rows * views) * unit_bytes, (shards, 1))
        files = tuple(self._file(name, shard) for shard in range(shards))
        if isinstance(codec, ShardingCodec):
            if not is_plain(codec, array.dtype) or codec.chunk_shape != (1, 1, *item):
                return None
            for shard, file in enumerate(files):
                offset[shard] = read_index(file, shard_rows * views, unit_bytes)
        elif not is_little(codec, array.dtype):
            return None
        units = np.arange(rows * views)
        places = offset.reshape(-1)[: len(units)]
        return Units(
            files=files,
            file=units // (shard_rows * views),
            offset=places,
            views=views,
            shape=tuple(item),
            dtype=array.dtype,
        )

    def make_room(self, name: str, shard: int) -> bool:
        """Make the file of a shard, with the index of its units if it has one."""
        array, file = self._array(name), self._file(name, shard)
        unit_bytes = prod(array.chunks) * array.dtype.itemsize
        if file.exists():
            if array.shards is None:
                return False
            units = prod(array.shards[:2])
            if (read_index(file, units, unit_bytes) != LOST).all():
                return False
            with file.open("r+b") as damaged:  # it was damaged, or left out chunks of zeros
                damaged.write(make_index(units, unit_bytes))
            return True
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(file) as aside, aside.open("wb") as out:
            if array.shards is None:
                out.truncate(prod(array.chunks) * array.dtype.itemsize)
            else:
                out.write(make_index(prod(array.shards[:2]), unit_bytes))
        return False

    def lost_chunks(self, name: str, rows: int) -> list[str]:
        """Return the chunks, or shards of chunks, that are not there."""
        array = self._array(name)
        chunks = range(-(-rows // (array.shards or array.chunks)[0]))
        files = [self._file(name, chunk) for chunk in chunks]
        return [str(file) for file in files if not file.is_file()]

    def _file(self, name: str, shard: int) -> Path:
        """Return the file of a chunk, or of a shard of chunks."""
        array = self._array(name)
        where = (shard, *[0] * (len(array.shape) - 1))
        key = self._metadata(name).chunk_key_encoding.encode_chunk_key(where)
        return Path(f"{self.path}/{name}/{key}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows; text as numpy ``str``."""
        with self._readable(name):
            chunks, rows = self._plain(name), self.shape(name)[0]
            if chunks is not None:
                return chunks.read(start, rows if stop is None else min(stop, rows))
            values = np.asarray(self._array(name)[start:stop])
        return values if values.dtype.kind in "biuf" else np.array(values.tolist(), dtype=np.str_)

    def write(self, name: str, start: int, values: Array) -> None:
        """Write rows."""
        with self._readable(name):
            chunks = self._plain(name)
            if chunks is not None:
                chunks.write(start, values)
            else:
                self._array(name)[start : start + len(values)] = values

    def reset(self, name: str, start: int, blank: Array) -> None:
        """Write blank rows over a chunk that may be unreadable."""
        chunk_rows = self._array(name).chunks[0]
        for shard in range(start // chunk_rows, -(-(start + len(blank)) // chunk_rows)):
            self._file(name, shard).unlink(missing_ok=True)
        self.write(name, start, blank)

    def flush(self) -> None:
        """Every write has already been handed over."""

    def close(self) -> None:
        """Nothing is held open."""

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except (LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            raise MlcError(
                f"{self.path}: damaged, a chunk of {name} cannot be read "
                f"({error or type(error).__name__}); mend it with mlc store repair"
            ) from None

    def _plain(self, name: str) -> Chunks | None:
        if name not in self._chunks:
            self._chunks[name] = plain_chunks(self._metadata(name), partial(self._file, name))
        return self._chunks[name]

    def _metadata(self, name: str) -> ArrayV3Metadata:
        metadata = self._array(name).metadata
        if not isinstance(metadata, ArrayV3Metadata):
            raise MlcError(f"{self.path}: {name} is of Zarr version 2; extract it again")
        return metadata

    def _array(self, name: str) -> "zarr.Array[Any]":
        if name not in self._arrays:
            array = self._group.get(name)
            if not isinstance(array, zarr.Array):
                raise MlcError(f"{self.path}: damaged, it has no array {name!r}; extract it again")
            # A chunk of zeros is written too, so that an absent one is a lost one.
            self._arrays[name] = array.with_config({"write_empty_chunks": True})
        return self._arrays[name]
