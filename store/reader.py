"""FeatureStore: a finished store, open for reading."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError, choose
from mlc.store import schema
from mlc.store.checksums import row_crc32c
from mlc.store.features import FeatureArray, open_features
from mlc.store.key import current_key
from mlc.store.problems import BROKEN


class FeatureStore:
    """The features of one backbone on one set of images.

    Attributes:
        path: where it is.
        key: the fields of its FeatureKey.
        made_by: what was recorded when it was made.
        extraction: how the last one that extracted images went, as ``Pace.summary`` says; {} if
            nothing was recorded.
        image_id: (N,) text.
        file: (N,) text.
        status: (N,) uint8 of ``schema.PENDING``, ``OK``, ``BAD``.
        layers: names of the layers.
        arrays: dtype of each feature array, by name.
        grids: (H, W) of the tokens, by layer.
    """

    def __init__(self, path: Path, *, unfinished: bool = False) -> None:
        """Open a store.

        Args:
            path: ends in ``.zarr`` or ``.h5``.
            unfinished: open it even if extraction has not ended, to look at it.

        Raises:
            MlcError: there is no store, it is damaged, unfinished or of another version.
        """
        self.path = path
        self._sound = False  # not looked at yet
        self._backend = schema.format_of(path).open(path)
        try:
            self._read(unfinished)
        except BROKEN as error:
            self._backend.close()
            if isinstance(error, MlcError):
                raise
            raise MlcError(
                f"{path}: damaged ({type(error).__name__}: {error}); "
                "see what with mlc store verify, mend it with mlc store repair"
            ) from None
        except BaseException:
            self._backend.close()
            raise

    def _read(self, unfinished: bool) -> None:
        path = self.path
        attributes = self._backend.attributes()
        schema.require_version(path, attributes)
        self.complete: bool = attributes["complete"]
        self.key: dict[str, Any] = current_key(attributes["key"])
        self.made_by: dict[str, Any] = attributes["made_by"]
        self.extraction: dict[str, Any] = schema.read_extraction(attributes)
        self.batch_size: int = attributes["batch_size"]
        self.shard_rows: int = attributes["shard_rows"]
        self.grids: dict[str, list[int]] = attributes["grids"]
        self._rows: int = attributes["rows"]
        self.image_id: NDArray[np.str_] = self._rows_of(schema.IMAGE_ID)
        self.file: NDArray[np.str_] = self._rows_of(schema.FILE)
        self.status: NDArray[np.uint8] = self._rows_of(schema.STATUS)
        self.layers: tuple[str, ...] = tuple(self.key["layers"])
        self.arrays: dict[str, np.dtype[Any]] = schema.feature_arrays(self._backend)
        if self.complete:
            self._require_whole()
        elif not unfinished:
            done = int((self.status != schema.PENDING).sum())
            raise MlcError(
                f"{path}: unfinished, {done:,} of {len(self.status):,} images are extracted; run "
                "the same command again, it goes on where it stopped (mlc store finish, after "
                "several workers)"
            )

    def _require_whole(self) -> None:
        rows = dict.fromkeys((*schema.ROW_ARRAYS, *self.arrays), self._rows)
        int8 = [schema.scale(array) for array, dtype in self.arrays.items() if dtype == np.int8]
        for name, count in (rows | dict.fromkeys(int8, 1)).items():
            lost = self._backend.lost_chunks(name, count)
            if lost:
                raise MlcError(
                    f"{self.path}: damaged, {len(lost)} chunks of {name} are lost ({lost[0]}); "
                    "mend it with mlc store repair"
                )

    def _require_sound_rows(self) -> None:
        """Raise an MlcError if what is small of an extracted row is not as it was written."""
        if self._sound:
            return
        values = {
            schema.IMAGE_ID: self.image_id,
            schema.FILE: self.file,
            schema.STATUS: self.status,
        }
        others = [name for name in schema.small_arrays(self.arrays) if name not in values]
        with ThreadPoolExecutor(len(others)) as pool:  # for Zarr's thousands of small files
            values |= zip(others, pool.map(self._rows_of, others), strict=True)
        bad = row_crc32c(values, list(self.arrays)) != values[schema.ROW_CRC32C]
        if not self.complete:
            bad &= self.status != schema.PENDING
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise MlcError(
                f"{self.path}: damaged, what is known of {int(bad.sum()):,} images is not as it "
                f"was written, the first is row {row} ({self.image_id[row]}); see all with "
                "mlc store verify, mend it with mlc store repair"
            )
        self._sound = True

    def _rows_of(self, name: str) -> NDArray[Any]:
        return self._backend.read(name, 0, self._rows)

    def features(
        self, layer: str | None = None, kind: str = schema.POOLED, *, check: bool = True
    ) -> FeatureArray:
        """Return a feature array, to be read by rows.

        Args:
            layer: by default the first.
            kind: "pooled", "tokens" or "prefix".
            check: compare what is known of the images with its checksums.

        Raises:
            MlcError: the store does not have it, or is damaged.
        """
        if check:
            self._require_sound_rows()
        choose(dict.fromkeys(self.layers), layer or self.layers[0], f"layer of {self.path}")
        name = schema.feature(layer or self.layers[0], kind)
        if name not in self.arrays:
            raise MlcError(
                f"{self.path}: has no {name}, it has {', '.join(self.arrays)}; run mlc extract "
                f"with --features {kind}"
            )
        return open_features(self._backend, name, self.image_id)

    def pooled(
        self, layer: str | None = None, view: str | None = None, *, check: bool = True
    ) -> NDArray[np.float32]:
        """Return (N, D) float32, zeros for bad images.

        Args:
            layer: by default the first.
            view: by default the first.
            check: compare with the checksums.

        Raises:
            MlcError: the store does not have it, or it is damaged.
        """
        views = list(self.key["views"])
        index = views.index(view) if view else 0
        array = self.features(layer, check=False)
        with ThreadPoolExecutor(1) as pool:
            values = pool.submit(array.read_all, index, check=check)
            if check:
                self._require_sound_rows()  # while the disk is at work
            return values.result()

    def clipped(self, array: str) -> NDArray[np.uint32]:
        """Return (N, V): how many numbers of each unit the dtype of a feature array cannot hold."""
        return self._rows_of(schema.clipped(array))

    def content_hash(self) -> NDArray[np.str_]:
        """Return (N,) text: BLAKE2b of each image file."""
        return self._rows_of(schema.CONTENT_HASH)

    def errors(self) -> dict[str, str]:
        """Return why each bad image is bad, by file."""
        return schema.read_errors(self._backend, self._rows)

    def close(self) -> None:
        """Close the file."""
        self._backend.close()

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def labels_path(store: Path) -> Path:
    """Return where the label table of a store lies: beside it."""
    return store.with_name(f"{store.name}.labels.npz")


def find_store(features: Path | None, folder: Path = Path("features")) -> Path:
    """Return the store that is named, or the only one in the folder.

    Raises:
        MlcError: none is there, or there are several to choose from.
    """
    if features is not None:
        return features
    found = sorted(path for suffix in schema.SUFFIXES for path in folder.glob(f"*{suffix}"))
    if not found:
        raise MlcError(f"{folder}: no feature store there; run mlc extract, or pass --features")
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise MlcError(f"{folder}: several stores are there; pass one as --features: {names}")
    return found[0]
