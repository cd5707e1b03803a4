"""FeatureStore: a finished store, open for reading."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.store import schema


class FeatureStore:
    """The features of one backbone on one set of images.

    Attributes:
        path: where it is.
        key: the fields of its FeatureKey.
        made_by: what was recorded when it was made.
        image_id: (N,) text.
        file: (N,) text.
        status: (N,) uint8 of ``schema.PENDING``, ``OK``, ``BAD``.
        layers: names of the layers.
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
        self._backend = schema.format_of(path).open(path)
        try:
            self._read(unfinished)
        except BaseException:
            self._backend.close()
            raise

    def _read(self, unfinished: bool) -> None:
        path = self.path
        attributes = self._backend.attributes()
        schema.require_version(path, attributes)
        self.complete: bool = attributes["complete"]
        self.key: dict[str, Any] = attributes["key"]
        self.made_by: dict[str, Any] = attributes["made_by"]
        self.batch_size: int = attributes["batch_size"]
        self.image_id: NDArray[np.str_] = self._backend.read(schema.IMAGE_ID)
        self.file: NDArray[np.str_] = self._backend.read(schema.FILE)
        self.status: NDArray[np.uint8] = self._backend.read(schema.STATUS)
        self.layers: tuple[str, ...] = tuple(self.key["layers"])
        if self.complete:
            self._require_whole()
        elif not unfinished:
            done = int((self.status != schema.PENDING).sum())
            raise MlcError(
                f"{path}: unfinished, {done} of {len(self.status)} images are extracted; "
                "run the same command again, it goes on where it stopped"
            )

    def _require_whole(self) -> None:
        names = (schema.IMAGE_ID, schema.FILE, schema.CONTENT_HASH, schema.ERROR, schema.STATUS)
        for name in (*names, *map(schema.pooled, self.layers)):
            lost = self._backend.lost_chunks(name)
            if lost:
                raise MlcError(
                    f"{self.path}: damaged, {lost} chunks of {name} are lost; extract it again to "
                    "another --out"
                )

    def pooled(self, layer: str | None = None, view: str | None = None) -> NDArray[np.float32]:
        """Return (N, D) float32, zeros for bad images.

        Args:
            layer: by default the first.
            view: by default the first.
        """
        name = schema.pooled(layer or self.layers[0])
        values = self._backend.read(name)[:, self.key["views"].index(view) if view else 0]
        return np.ascontiguousarray(values, dtype=np.float32)

    def shape(self, layer: str) -> tuple[int, ...]:
        """Return the (N, V, D) of a layer's pooled features."""
        return self._backend.shape(schema.pooled(layer))

    def content_hash(self) -> NDArray[np.str_]:
        """Return (N,) text: BLAKE2b of each image file."""
        return self._backend.read(schema.CONTENT_HASH)

    def errors(self) -> dict[str, str]:
        """Return why each bad image is bad, by file."""
        return schema.read_errors(self._backend)

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
