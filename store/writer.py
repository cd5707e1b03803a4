"""StoreWriter: fills a store shard by shard, so that a killed process loses one shard at most."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.backend import Backend
from mlc.store.key import FeatureKey, require_same_key


@dataclass(frozen=True)
class Layout:
    """What a store is laid out for, fixed when it is created.

    Attributes:
        key: what makes the features of an image.
        image_id: (N,) text, the rows.
        file: (N,) text, where each image was found, relative to the data set's root.
        widths: numbers an image, by layer: D of ``<layer>/pooled`` (N, V, D).
        batch_size: of the forward pass; kept on resuming, as it can change the last bits.
        shard_rows: rows that are written and marked done together.
        made_by: what is recorded and not compared.
    """

    key: FeatureKey
    image_id: NDArray[np.str_]
    file: NDArray[np.str_]
    widths: Mapping[str, int]
    batch_size: int
    shard_rows: int
    made_by: Mapping[str, Any]


class StoreWriter:
    """An unfinished or finished store, open for writing; hold its ``writer_lock``."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        attributes = backend.attributes()
        self.batch_size: int = attributes["batch_size"]
        self._shard_rows: int = attributes["shard_rows"]
        self._dtype = np.dtype(attributes["key"]["dtype"])
        self.made_by: dict[str, Any] = attributes["made_by"]
        self.status: NDArray[np.uint8] = backend.read(schema.STATUS)

    @classmethod
    def create_or_resume(cls, path: Path, layout: Layout) -> "StoreWriter":
        """Open the store at a path, or lay it out there.

        Raises:
            MlcError: a store is there that was made with other settings or for other images.
        """
        if not path.exists():
            _create(path, layout)
        backend = schema.format_of(path).open(path, write=True)
        try:
            _check(backend, layout)
            return cls(backend)
        except BaseException:
            backend.close()
            raise

    def shards(self) -> list[range]:
        """Return the rows of all shards, in order."""
        rows = len(self.status)
        starts = range(0, rows, self._shard_rows)
        return [range(start, min(start + self._shard_rows, rows)) for start in starts]

    def content_hash(self) -> NDArray[np.str_]:
        """Return (N,) text: the hash of each image file, empty where it was not read."""
        return self._backend.read(schema.CONTENT_HASH)

    def errors(self) -> dict[str, str]:
        """Return why each bad image is bad, by file."""
        return schema.read_errors(self._backend)

    def write_shard(
        self,
        shard: range,
        features: Mapping[str, NDArray[np.float32]],
        content_hash: NDArray[np.str_],
        error: NDArray[np.str_],
    ) -> None:
        """Write one whole shard, then mark it done; rows that are good already stay as they are.

        Args:
            shard: one of ``shards()``.
            features: (n, V, D) for each layer; rows of bad images are zeroed here.
            content_hash: (n,) text.
            error: (n,) text, empty where the image is good.

        Raises:
            MlcError: a feature does not fit the store's dtype.
        """
        bad = (error != "")[:, None, None]
        new = {schema.CONTENT_HASH: content_hash, schema.ERROR: _clip_text(error)}
        for layer, values in features.items():
            new[schema.pooled(layer)] = self._cast(layer, np.where(bad, np.float32(0), values))
        kept = {name: self._keep_good(name, shard, values) for name, values in new.items()}
        for name, values in kept.items():
            self._backend.write(name, shard.start, values)
        self._backend.flush()
        status = np.where(kept[schema.ERROR] == "", schema.OK, schema.BAD)
        status = status.astype(schema.STATUS_DTYPE)
        self._backend.write(schema.STATUS, shard.start, status)
        self._backend.flush()
        self.status[shard.start : shard.stop] = status

    def finish(self) -> None:
        """Mark the store complete.

        Raises:
            MlcError: rows are still pending.
        """
        pending = int((self.status == schema.PENDING).sum())
        if pending:
            raise MlcError(f"{self._backend.path}: {pending} images are still to be extracted")
        self._backend.set_attribute("complete", True)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Finish the store after a block that fills it, and close it whatever happens there.

        Raises:
            MlcError: rows are still pending.
            KeyboardInterrupt: with a message that says what is kept.
        """
        try:
            yield
            self.finish()
        except KeyboardInterrupt:
            done = int((self.status != schema.PENDING).sum())
            raise KeyboardInterrupt(
                f"{self._backend.path}: stopped, {done:,} of {len(self.status):,} images are kept; "
                "the same command goes on from there"
            ) from None
        finally:
            self.close()

    def close(self) -> None:
        """Flush and close."""
        self._backend.close()

    def _keep_good(self, name: str, shard: range, values: NDArray[Any]) -> NDArray[Any]:
        """Return new values, but those that the store has where a row is good already."""
        good = self.status[shard.start : shard.stop] == schema.OK
        if not good.any():
            return values
        stored = self._backend.read(name, shard.start, shard.stop)
        return np.where(good.reshape(-1, *[1] * (values.ndim - 1)), stored, values)

    def _cast(self, layer: str, values: NDArray[np.float32]) -> NDArray[Any]:
        with np.errstate(over="ignore"):
            stored = values.astype(self._dtype)
        if not np.isfinite(values).all():
            raise MlcError(f"{self._backend.path}: {layer} has features that are not numbers")
        if not np.isfinite(stored).all():
            raise MlcError(
                f"{self._backend.path}: {layer} has features that {self._dtype} cannot hold, "
                f"the largest is {np.abs(values).max():.3g}; store float32"
            )
        return stored


def _create(path: Path, layout: Layout) -> None:
    """Lay a store out aside and rename it, so that a path holds a whole layout or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = schema.format_of(path).create(partial)
    rows, chunk = len(layout.image_id), layout.shard_rows
    backend.set_attribute("schema_version", schema.SCHEMA_VERSION)
    backend.set_attribute("complete", False)
    backend.set_attribute("key", layout.key.to_json())
    backend.set_attribute("shard_rows", layout.shard_rows)
    backend.set_attribute("batch_size", layout.batch_size)
    backend.set_attribute("made_by", dict(layout.made_by))
    for name, text in ((schema.IMAGE_ID, layout.image_id), (schema.FILE, layout.file)):
        # One chunk: a COCO of 122,218 rows is a few MB, and text is read whole.
        backend.create_text(name, rows, max(len(each.encode()) for each in text.tolist()), rows)
        backend.write(name, 0, text)
    backend.create_text(schema.CONTENT_HASH, rows, schema.HASH_CHARS, chunk)
    backend.create_text(schema.ERROR, rows, schema.ERROR_BYTES, chunk)
    backend.create_array(schema.STATUS, (rows,), schema.STATUS_DTYPE, chunk)
    for layer, width in layout.widths.items():
        shape = (rows, len(layout.key.views), width)
        backend.create_array(schema.pooled(layer), shape, np.dtype(layout.key.dtype), chunk)
    backend.close()
    partial.rename(path)


def _check(backend: Backend, layout: Layout) -> None:
    attributes = backend.attributes()
    schema.require_version(backend.path, attributes)
    require_same_key(backend.path, attributes["key"], layout.key)
    stored = backend.read(schema.IMAGE_ID)
    if not np.array_equal(stored, layout.image_id):
        raise MlcError(
            f"{backend.path}: holds {len(stored)} other images than the {len(layout.image_id)} "
            "asked for; name another store with --out"
        )


def _clip_text(text: NDArray[np.str_]) -> NDArray[np.str_]:
    clipped = [each.encode()[: schema.ERROR_BYTES].decode(errors="ignore") for each in text]
    return np.array(clipped, dtype=np.str_)
