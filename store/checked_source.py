"""Source: a finished store that is read for good, every byte compared with its checksum."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.backend import Array
from mlc.store.checksums import row_crc32c
from mlc.store.features import FeatureArray
from mlc.store.problems import BROKEN
from mlc.store.reader import FeatureStore


class SourceDamaged(MlcError):
    """A store that is read is not as it was written."""


@dataclass(frozen=True)
class Source:
    """A finished store, of which nothing is believed before its checksum was compared.

    Attributes:
        store: open for reading.
        columns: all that is small of its rows, by name of the array.
        arrays: its feature arrays, by name.
        shard_rows: rows that were written together.
    """

    store: FeatureStore
    columns: dict[str, Array]
    arrays: dict[str, FeatureArray]
    shard_rows: int

    def read(self, name: str, rows: NDArray[np.intp]) -> Array:
        """Return all views of some rows of a feature array, (n, V, ...) as stored.

        Raises:
            SourceDamaged: they are not as they were written.
        """
        array = self.arrays[name]
        views = array.shape[1]
        which = (rows[:, None] * views + np.arange(views)).reshape(-1)
        try:
            return array.read_many(which).reshape(len(rows), *array.shape[1:])
        except MlcError as error:
            raise SourceDamaged(str(error)) from None


def read_source(store: FeatureStore) -> Source:
    """Read what is small of a store, and compare it with its checksums.

    Raises:
        SourceDamaged: it is not as it was written.
    """
    names = schema.small_arrays(store.arrays)
    rows = len(store.image_id)
    try:
        with closing(schema.format_of(store.path).open(store.path)) as backend:
            columns = {name: backend.read(name, 0, rows) for name in names}
            shard_rows: int = backend.attributes()["shard_rows"]
        arrays = {array: store.features(*array.rsplit("/", 1)) for array in store.arrays}
        bad = np.flatnonzero(row_crc32c(columns, list(arrays)) != columns[schema.ROW_CRC32C])
    except BROKEN as error:
        raise _damaged(store.path, f"{type(error).__name__}: {error}") from None
    if len(bad):
        raise _damaged(store.path, f"rows {', '.join(map(str, bad[:5]))}, {len(bad):,} in all")
    return Source(store, columns, arrays, shard_rows)


def _damaged(path: Path, what: str) -> SourceDamaged:
    return SourceDamaged(
        f"{path}: damaged ({what}); see all with mlc store verify, mend it with mlc store repair"
    )
