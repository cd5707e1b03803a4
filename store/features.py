"""FeatureArray: one feature array of a store, read by rows and views in any order."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.backend import Backend
from mlc.store.open_files import OpenFiles
from mlc.store.quantize import decode_numpy
from mlc.store.units import DamagedUnits, Units, crc32c, read_units

THREADS = 16  # reading at once keep a disk's queue full
PIECE_BYTES = 8 << 20  # what a thread reads at once of a whole array


@dataclass(frozen=True)
class FeatureArray:
    """A feature array (N, V, ...); it holds no open file, and goes to other threads and processes.

    A unit is one view of one image: unit ``row * V + view``.

    Attributes:
        path: of the store.
        name: e.g. "pre_logits/tokens".
        shape: (N, V, ...).
        dtype: as stored: float32, float16 or int8.
        scale: (C,) float32 if it is int8: a number is the stored one times its channel's.
        crc32c: (N*V,) uint32, the checksums of the units.
        units: where they lie; None if a codec hides it.
        image_id: (N,) text.
        views: names of the V views.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scale: NDArray[np.float32] | None
    crc32c: NDArray[np.uint32]
    units: Units | None
    image_id: NDArray[np.str_]
    views: tuple[str, ...]

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of a unit: (D,) or (T, C)."""
        return self.shape[2:]

    @property
    def unit_bytes(self) -> int:
        """Size of a unit as stored."""
        return prod(self.unit_shape) * self.dtype.itemsize

    def units_of(
        self, rows: NDArray[np.intp], view: int | NDArray[np.intp] = 0
    ) -> NDArray[np.intp]:
        """Return the units (n,) of rows, in one view or each in its own."""
        return rows * len(self.views) + view

    def read(
        self,
        which: NDArray[np.intp],
        out: NDArray[Any] | None = None,
        files: OpenFiles | None = None,
        *,
        check: bool = True,
    ) -> NDArray[Any]:
        """Read units as they are stored.

        Args:
            which: (n,) units, in any order.
            out: (n, ...) to fill, C-contiguous, of the stored dtype; else a new array.
            files: kept open from one call to the next.
            check: compare with the checksums.

        Returns:
            (n, ...), of the stored dtype.

        Raises:
            MlcError: a unit is missing, truncated or not as it was written.
        """
        values = np.empty((len(which), *self.unit_shape), self.dtype) if out is None else out
        if self.units is None:
            self._read_by_library(which, values)
        else:
            try:
                read_units(self.units, which, values, files)
            except DamagedUnits as error:
                raise self._damage(error.units, str(error)) from None
        if check:
            self.require_sound(which, values)
        return values

    def require_sound(self, which: NDArray[np.intp], values: NDArray[Any]) -> None:
        """Raise an MlcError if units (n, ...) that were read are not as they were written."""
        bad = crc32c(values) != self.crc32c[which]
        if bad.any():
            raise self._damage(which[bad], "not as it was written")

    def read_many(self, which: NDArray[np.intp], *, check: bool = True) -> NDArray[Any]:
        """Read units as ``read`` does, by several threads: for those that lie together."""
        out = np.empty((len(which), *self.unit_shape), self.dtype)
        for part in self._in_pieces(
            which, lambda part: self.read(which[part], out[part], check=False)
        ):
            if check:
                self.require_sound(which[part], out[part])
        return out

    def read_all(self, view: int = 0, *, check: bool = True) -> NDArray[np.float32]:
        """Read one view of all rows, (N, ...) float32, by several threads."""
        which = self.units_of(np.arange(self.shape[0]), view)
        if self.dtype == np.float32:
            values: NDArray[np.float32] = self.read_many(which, check=check)
            return values
        out = np.empty((len(which), *self.unit_shape), np.float32)

        def read(part: slice) -> None:
            out[part] = decode_numpy(self.read(which[part], check=check), self.scale)

        for _ in self._in_pieces(which, read):
            pass
        return out

    def _in_pieces(
        self, which: NDArray[np.intp], read: Callable[[slice], object]
    ) -> Iterator[slice]:
        """Have threads read pieces, and yield each that is read."""
        step = max(1, PIECE_BYTES // self.unit_bytes)
        parts = [slice(start, start + step) for start in range(0, len(which), step)]
        with ThreadPoolExecutor(THREADS) as pool:
            for part, _ in zip(parts, pool.map(read, parts), strict=True):
                yield part

    def _read_by_library(self, which: NDArray[np.intp], out: NDArray[Any]) -> None:
        """Read an array that another tool compressed: slowly, a row at a time."""
        backend = schema.format_of(self.path).open(self.path)
        try:
            for place, unit in enumerate(which.tolist()):
                row, view = divmod(unit, len(self.views))
                out[place] = backend.read(self.name, row, row + 1)[0, view]
        finally:
            backend.close()

    def _damage(self, units: NDArray[np.intp], reason: str) -> MlcError:
        row, view = divmod(int(units[0]), len(self.views))
        more = f" and {len(units) - 1:,} more" if len(units) > 1 else ""
        return MlcError(
            f"{self.path}: damaged, {self.name} of image {self.image_id[row]} (row {row}, view "
            f"{self.views[view]}){more}: {reason}; see all with mlc store verify, mend it with "
            "mlc store repair"
        )


def open_features(backend: Backend, name: str, image_id: NDArray[np.str_]) -> FeatureArray:
    """Return a feature array of a store that is open, of which N rows have ids."""
    key = backend.attributes()["key"]
    dtype = np.dtype(schema.array_dtypes(key)[name.rpartition("/")[2]])
    crc: NDArray[np.uint32] = backend.read(schema.crc(name), 0, len(image_id))
    scale = _read_scale(backend, name) if dtype == np.int8 else None
    return FeatureArray(
        path=backend.path,
        name=name,
        shape=(len(image_id), *backend.shape(name)[1:]),
        dtype=dtype,
        scale=scale,
        crc32c=crc.reshape(-1),
        units=backend.units(name),
        image_id=image_id,
        views=tuple(key["views"]),
    )


def _read_scale(backend: Backend, name: str) -> NDArray[np.float32]:
    scale: NDArray[np.float32] = backend.read(schema.scale(name))
    if int(crc32c(scale[None])[0]) != backend.attributes()["scale_crc32c"][name]:
        raise MlcError(
            f"{backend.path}: damaged, the scales of {name} are not as they were written; extract "
            "the images again to another --out"
        )
    return scale
