"""Chunks: a Zarr array whose chunks are plain files of rows, read and written as such.

Zarr-python spends a millisecond on a chunk, whatever is in it, and what is small of a COCO's images
lies in thousands.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numcodecs.vlen import VLenUTF8
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, VLenUTF8Codec
from zarr.core.metadata import ArrayV3Metadata

from mlc.store.backend import Array

PARTIAL = ".partial"  # what a file is called until it is whole, as Zarr does
TEXT = np.dtype(object)
COUNT_BYTES = 4  # of a chunk of text: how many texts follow


@dataclass(frozen=True)
class Chunks:
    """The chunks of an array (N, ...) of numbers or text; one that is not there is zeros, or "".

    Attributes:
        file: returns the path of a chunk.
        rows: of a chunk.
        shape: of a row.
        dtype: as stored, or ``TEXT``.
    """

    file: Callable[[int], Path]
    rows: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, start: int, stop: int) -> Array:
        """Return the rows from ``start`` to before ``stop``, text as numpy ``str``.

        Raises:
            ValueError: a chunk is not as long as it should be, or no text.
        """
        if self.dtype == TEXT:
            texts = [self._load(chunk)[part] for chunk, part in self._split(start, stop)]
            return np.array([text for part in texts for text in part.tolist()], np.str_)
        values, done = np.zeros((max(stop - start, 0), *self.shape), self.dtype), 0
        for chunk, within in self._split(start, stop):
            count = within.stop - within.start
            data = self._bytes(chunk)
            if data is not None:
                values[done : done + count] = self._numbers(chunk, data)[within]
            done += count
        return values

    def write(self, start: int, values: Array) -> None:
        """Write rows from ``start`` on; each chunk is old or new, whatever happens.

        Raises:
            ValueError: a chunk of which other rows are kept is not as long as it should be.
        """
        stop, done = start + len(values), 0
        for chunk, within in self._split(start, stop):
            count = within.stop - within.start
            whole = self._blank() if count == self.rows else self._load(chunk)
            whole[within] = values[done : done + count]
            done += count
            self._store(chunk, whole)

    def _split(self, start: int, stop: int) -> list[tuple[int, slice]]:
        """Return the chunks that hold some rows, and where they lie within each."""
        firsts = range(start // self.rows * self.rows, stop, self.rows)
        return [
            (first // self.rows, slice(max(start - first, 0), min(stop - first, self.rows)))
            for first in firsts
        ]

    def _blank(self) -> NDArray[Any]:
        return np.full((self.rows, *self.shape), "" if self.dtype == TEXT else 0, self.dtype)

    def _load(self, chunk: int) -> NDArray[Any]:
        """Return a whole chunk, to be changed at will."""
        data = self._bytes(chunk)
        if data is None:
            return self._blank()
        if self.dtype != TEXT:
            return self._numbers(chunk, data).copy()
        # Looked at here, as the library takes memory for as many as a damaged count says.
        count = int.from_bytes(data[:COUNT_BYTES], "little")
        if count != self.rows:
            raise ValueError(f"{self.file(chunk)}: expected {self.rows} texts, got {count}")
        texts: NDArray[Any] = VLenUTF8().decode(data)
        return texts

    def _bytes(self, chunk: int) -> bytes | None:
        """Return what is in the file of a chunk, None if it is not there."""
        try:
            with open(self.file(chunk), "rb", buffering=0) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _numbers(self, chunk: int, data: bytes) -> NDArray[Any]:
        size = self.rows * prod(self.shape) * self.dtype.itemsize
        if len(data) != size:
            raise ValueError(f"{self.file(chunk)}: expected {size} bytes, got {len(data)}")
        return np.frombuffer(data, self.dtype).reshape(self.rows, *self.shape)

    def _store(self, chunk: int, values: NDArray[Any]) -> None:
        file = self.file(chunk)
        partial = file.with_name(f"{file.name}.{uuid4().hex}{PARTIAL}")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            text = self.dtype == TEXT
            partial.write_bytes(VLenUTF8().encode(values) if text else values.tobytes())
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def plain_chunks(metadata: ArrayV3Metadata, file: Callable[[int], Path]) -> Chunks | None:
    """Return the chunks of an array; None if rows are not all that is cut, or a codec hides them.

    Args:
        metadata: of the array.
        file: returns the path of the chunk of the i-th rows.
    """
    rows, *item = metadata.chunks
    if tuple(item) != metadata.shape[1:] or metadata.fill_value not in (0, ""):
        return None
    match metadata.codecs:
        case [VLenUTF8Codec()] if not item:
            return Chunks(file, rows, (), TEXT)
        case [BytesCodec() as codec]:
            dtype = metadata.data_type.to_native_dtype()
            if is_little(codec, dtype):
                return Chunks(file, rows, tuple(item), dtype)
    return None


def is_little(codec: object, dtype: np.dtype[Any]) -> bool:
    """Return whether a codec stores numbers little-endian, as they then are in memory too."""
    if not isinstance(codec, BytesCodec) or dtype != dtype.newbyteorder("<"):
        return False
    return dtype.itemsize == 1 or (codec.endian is not None and codec.endian.value == "little")
