"""ShardWriter: puts rows where they belong, and marks a shard done."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.backend import Backend
from mlc.store.checksums import row_crc32c
from mlc.store.units import LOST, DamagedUnits, Units, crc32c, read_units, sync, write_units

NAMES = (schema.IMAGE_ID, schema.FILE)


class Encoded(NamedTuple):
    """What is stored of n rows of a feature array.

    Attributes:
        values: (n, V, ...) of the stored dtype, C-contiguous.
        crc32c: (n, V) uint32, their checksums.
        clipped: (n, V), how many numbers the dtype could not hold.
    """

    values: NDArray[Any]
    crc32c: NDArray[np.uint32]
    clipped: NDArray[Any]

    @classmethod
    def with_checksums(cls, values: NDArray[Any], clipped: NDArray[Any]) -> "Encoded":
        """Return values (n, V, ...) with their checksums."""
        return cls(
            values, crc32c(values.reshape(-1, *values.shape[2:])).reshape(clipped.shape), clipped
        )


class ShardWriter:
    """Writes one shard after the other, in order and at once."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        attributes = backend.attributes()
        self._rows, self._shard_rows = attributes["rows"], attributes["shard_rows"]
        # Read once: they are one chunk of the names of all images.
        self._names = {name: backend.read(name, 0, self._rows) for name in NAMES}
        self._arrays = list(schema.feature_arrays(backend))
        self._units = {array: find_units(self._backend, array) for array in self._arrays}
        self._require_apart()
        self._touched: set[Path] = set()
        self._shard = -1
        self._counts: dict[str, NDArray[np.uint32]] = {}  # of the shard, (n, V)

    def write(self, rows: NDArray[np.intp], encoded: Mapping[str, Encoded]) -> None:
        """Write what is stored of rows of one shard."""
        self._enter(int(rows[0]) // self._shard_rows)
        for array, each in encoded.items():
            self._put(array, rows, each)

    def copy(self, source: int, row: int) -> None:
        """Give a row the features of another.

        Raises:
            MlcError: they are damaged.
        """
        self._enter(row // self._shard_rows)
        for array, units in self._units.items():
            values = units.empty(units.views)
            crc = self._count(schema.crc(array), source)
            clipped = self._count(schema.clipped(array), source)
            try:
                read_units(units, units.of_rows(np.array([source])), values)
            except DamagedUnits as error:
                raise MlcError(f"{error}; run mlc store repair") from None
            if not np.array_equal(crc32c(values), crc):
                raise MlcError(
                    f"{self._backend.path}: {array} of row {source} is damaged; "
                    "run mlc store repair"
                )
            self._put(array, np.array([row]), Encoded(values[None], crc[None], clipped[None]))

    def mark(
        self,
        shard: range,
        content_hash: NDArray[np.str_],
        error: NDArray[np.str_],
        done: NDArray[np.bool_],
    ) -> NDArray[np.uint8]:
        """Mark rows of a shard done, when everything that was written is on the disk.

        Args:
            shard: its rows.
            content_hash: (n,) text.
            error: (n,) text, empty where the image is good.
            done: (n,) bool, the rows that this is about; the others keep what they have.

        Returns:
            (n,) uint8, the status of the rows.
        """
        self._enter(shard.start // self._shard_rows)
        sync(self._touched)
        status = np.where(error == "", schema.OK, schema.BAD).astype(schema.STATUS_DTYPE)
        new = {schema.CONTENT_HASH: content_hash, schema.ERROR: error, schema.STATUS: status}
        values = {name: self._read(name, shard) for name in new}
        values |= {name: each[shard.start : shard.stop] for name, each in self._names.items()}
        values |= {name: np.where(done, each, values[name]) for name, each in new.items()}
        values |= self._counts
        values[schema.ROW_CRC32C] = row_crc32c(values, self._arrays)
        for name in (schema.CONTENT_HASH, schema.ERROR, schema.ROW_CRC32C, *self._counts):
            self._backend.write(name, shard.start, values[name])
        self._backend.flush()
        self._backend.write(schema.STATUS, shard.start, values[schema.STATUS])
        self._backend.flush()
        self._shard = -1
        return values[schema.STATUS]

    def _require_apart(self) -> None:
        """Raise if arrays share bytes of a file: then its addresses are damaged."""
        places = [units for units in self._units.values() if len(units.files) == 1]
        if not places or len({units.files[0] for units in places}) > 1:
            return  # a file for each
        starts = np.concatenate([units.offset[units.offset != LOST] for units in places])
        sizes = [np.full((units.offset != LOST).sum(), units.unit_bytes) for units in places]
        order = np.argsort(starts)
        ends = (starts + np.concatenate(sizes))[order]
        if (ends[:-1] > starts[order][1:]).any():
            raise MlcError(
                f"{self._backend.path}: damaged, features lie over each other; extract the images "
                "again to another --out"
            )

    def _enter(self, shard: int) -> None:
        """Begin a shard, whose rows keep their checksums until they are written."""
        if shard == self._shard:
            return
        start = shard * self._shard_rows
        rows = range(start, min(start + self._shard_rows, self._rows))
        self._counts = {name: self._read(name, rows) for name in schema.count_arrays(self._arrays)}
        self._shard, self._touched = shard, set()
        for array in self._arrays:
            if self._backend.make_room(array, shard):
                self._units[array] = find_units(self._backend, array)

    def _put(self, array: str, rows: NDArray[np.intp], encoded: Encoded) -> None:
        units, within = self._units[array], rows - self._shard * self._shard_rows
        values = encoded.values.reshape(-1, *units.shape)
        try:
            self._touched |= write_units(units, units.of_rows(rows), values)
        except DamagedUnits as error:
            raise MlcError(
                f"{error}, so {array} has no place to be written to; extract the images again to "
                "another --out"
            ) from None
        self._counts[schema.crc(array)][within] = encoded.crc32c
        self._counts[schema.clipped(array)][within] = encoded.clipped

    def _count(self, name: str, row: int) -> NDArray[Any]:
        """Return what is known of a row (V,), perhaps not marked yet."""
        start = self._shard * self._shard_rows
        if start <= row < start + self._shard_rows:
            return np.array(self._counts[name][row - start])
        return np.array(self._backend.read(name, row, row + 1)[0])

    def _read(self, name: str, rows: range) -> NDArray[Any]:
        return self._backend.read(name, rows.start, rows.stop)


def find_units(backend: Backend, array: str) -> Units:
    """Return where the units of a feature array are to be written.

    Raises:
        MlcError: another tool has rewritten it with a codec, or with chunks of other rows.
    """
    units, shard_rows = backend.units(array), backend.attributes()["shard_rows"]
    if units is not None:
        shard = np.arange(len(units.file)) // (units.views * shard_rows)
        if len(units.files) == 1 or np.array_equal(units.file, shard):
            return units
    raise MlcError(
        f"{backend.path}: {array} was rewritten with another codec or chunks, and can be read "
        "only; extract to another --out"
    )
