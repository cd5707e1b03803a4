"""convert(): a store in another format, or of narrower numbers, without its images."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.configs.files import written_aside
from mlc.configs.progress import Progress, silent
from mlc.configs.provenance import made_by
from mlc.store import schema
from mlc.store.backend import Array, Backend
from mlc.store.checked_source import Source, SourceDamaged, read_source
from mlc.store.converted_key import converted_key, converted_path, key_of
from mlc.store.full_disk import full_disk
from mlc.store.key import FeatureKey
from mlc.store.layout import Layout, open_for_writing, rows_of
from mlc.store.lock import writer_lock
from mlc.store.quantize import calibrate, choose_sample, decode_numpy, encode
from mlc.store.reader import FeatureStore, labels_path
from mlc.store.remove import remove_store
from mlc.store.shard import Encoded, ShardWriter

BATCH_BYTES = 64 << 20  # of float32, converted at once
CONVERTED_FROM = "converted_from"  # in ``made_by``


@dataclass
class Conversion:
    """What convert() did.

    Attributes:
        path: the new store.
        images: its rows.
        converted: rows that this call converted; the others were there.
        clipped: how many numbers the dtype of each feature array could not hold, by name.
    """

    path: Path
    images: int
    converted: int = 0
    clipped: dict[str, int] = field(default_factory=dict)


def convert(
    source: Path,
    target: Path | None = None,
    features: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Conversion:
    """Write a store anew in another format, with narrower dtypes, or without a kind of features.

    What keeps its dtype is copied byte for byte; all that is read is compared with its checksums.
    The new store says of its extraction what the source does, as of what made its features.
    A killed call leaves an unfinished store, and the same call goes on; it also converts images
    that were added to the source meanwhile. Of a damaged source nothing is made.

    Args:
        source: a finished store.
        target: where the new one will be, in the format that its name ends in; by default beside
            the source and named like it, with the digest of its own key.
        features: every kind that the new one has, with an optional dtype, as "tokens:int8"; by
            default those of the source.
        progress: told of images.

    Raises:
        MlcError: see ``FeatureStore`` and ``writer_lock``; the source lacks the features, or has
            them in less precision than asked; there is no default for the target, or another
            store is there; the disk is full.
        SourceDamaged: features or anything else of the source is damaged.
        KeyboardInterrupt: with a message that says what is kept.
    """
    with FeatureStore(source) as store:
        key = converted_key(store, features)
        path = target or converted_path(store, key)
        schema.format_of(path)
        if path.resolve() == source.resolve():
            raise MlcError(f"{path}: is the store that is to be converted; name another target")
        opened, there = read_source(store), path.exists()
        try:
            with writer_lock(path), _keeping(path):
                return _convert(opened, path, key, progress)
        except SourceDamaged:
            if path.exists() and not there:
                remove_store(path)
            raise


@contextmanager
def _keeping(path: Path) -> Iterator[None]:
    """Say of a store that is only filled in part that it is kept."""
    kept = "what was converted is kept"
    try:
        with full_disk(path, f"{kept}; free space, the same command goes on from there"):
            yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{path}: stopped, {kept}; the same command goes on from there"
        ) from None


def _convert(source: Source, path: Path, key: FeatureKey, progress: Progress) -> Conversion:
    layout = _layout(source, key, calibrated=not path.exists())
    with closing(open_for_writing(path, layout, alone=True)) as backend:
        target = _Target(source, backend, _rows_in_source(source, backend))
        labels = labels_path(source.store.path)
        if labels.is_file():
            with written_aside(labels_path(path)) as partial:
                shutil.copyfile(labels, partial)
        result = Conversion(path, len(target.rows))
        target.fill(result, progress)
        schema.record_extraction(backend, source.store.extraction)
        backend.set_attribute("complete", True)
        result.clipped = {
            array: int(backend.read(schema.clipped(array)).sum()) for array in layout.arrays
        }
        return result


def _layout(source: Source, key: FeatureKey, *, calibrated: bool) -> Layout:
    """Return what a new store is laid out for; scales are wanted only where none is there."""
    store = source.store
    dtypes = schema.array_dtypes(key.to_json())
    kinds = {array: array.rsplit("/", 1)[1] for array in source.arrays}
    arrays = {name: each for name, each in source.arrays.items() if kinds[name] in dtypes}
    origin: dict[str, Any] = {
        "path": str(store.path.resolve()),
        "features": list(store.key["features"]),
        "digest": key_of(store).digest(),
        "made_by": made_by(),
    }
    if CONVERTED_FROM in store.made_by:
        origin[CONVERTED_FROM] = store.made_by[CONVERTED_FROM]
    grids = {layer: (height, width) for layer, (height, width) in store.grids.items()}
    return Layout(
        key=key,
        image_id=store.image_id,
        file=store.file,
        arrays={name: each.unit_shape for name, each in arrays.items()},
        batch_size=store.batch_size,
        shard_rows=source.shard_rows,
        made_by=store.made_by | {CONVERTED_FROM: origin},
        grids=grids if schema.TOKENS in dtypes else {},
        scales={
            name: _scale(source, name)
            for name, each in arrays.items()
            if calibrated and dtypes[kinds[name]] == "int8"
        },
    )


def _scale(source: Source, name: str) -> NDArray[np.float32]:
    """Return the scale (C,) for an array: its own, or that of a sample of its good images."""
    array = source.arrays[name]
    if array.scale is not None:
        return array.scale
    good = np.flatnonzero(source.store.status == schema.OK)
    if not len(good):
        raise MlcError(f"{array.path}: has no good image to calibrate int8 with")
    stored = source.read(name, good[choose_sample(len(good), prod(array.shape[1:]))])
    scale: NDArray[np.float32] = calibrate(torch.from_numpy(decode_numpy(stored))).numpy()
    return scale


def _rows_in_source(source: Source, backend: Backend) -> NDArray[np.intp]:
    """Return the row in the source of each row of the target.

    Raises:
        MlcError: the target was not converted from the source, or from other photos.
    """
    attributes, store = backend.attributes(), source.store
    origin = attributes["made_by"].get(CONVERTED_FROM, {})
    image_id = backend.read(schema.IMAGE_ID, 0, attributes["rows"])
    if (
        origin.get("digest") != key_of(store).digest()
        or not np.isin(image_id, store.image_id).all()
    ):
        raise MlcError(
            f"{backend.path}: is there already, and was not converted from {store.path}; name "
            "another target"
        )
    rows = rows_of(store.image_id, image_id)
    done = backend.read(schema.STATUS, 0, len(rows)) == schema.OK
    stored = backend.read(schema.CONTENT_HASH, 0, len(rows))
    changed = done & (stored != source.columns[schema.CONTENT_HASH][rows])
    if changed.any():
        raise MlcError(
            f"{backend.path}: was converted from other photos than {store.path} has now "
            f"({int(changed.sum()):,}, the first is {image_id[changed][0]}); remove it with "
            "mlc store rm, or name another target"
        )
    return rows


@dataclass(frozen=True)
class _Target:
    """The new store.

    Attributes:
        source: what it is converted from.
        backend: of it, open for writing.
        rows: (N,) the row in the source of each of its rows.
    """

    source: Source
    backend: Backend
    rows: NDArray[np.intp]

    def fill(self, result: Conversion, progress: Progress) -> None:
        """Convert the rows that are not there, shard by shard."""
        columns = {name: each[self.rows] for name, each in self.source.columns.items()}
        status = self.backend.read(schema.STATUS, 0, len(self.rows))
        missing = status != columns[schema.STATUS]
        writer, shard_rows = ShardWriter(self.backend), self.backend.attributes()["shard_rows"]
        arrays = schema.feature_arrays(self.backend)
        for start in range(0, len(self.rows), shard_rows):
            shard = range(start, min(start + shard_rows, len(self.rows)))
            part = slice(shard.start, shard.stop)
            new = start + np.flatnonzero(missing[part])
            if not len(new):
                continue
            for array, dtype in arrays.items():
                self._write(writer, array, dtype.name, new)
            content_hash, error = columns[schema.CONTENT_HASH][part], columns[schema.ERROR][part]
            writer.mark(shard, content_hash, error, missing[part])
            result.converted += len(new)
            progress(result.converted, int(missing.sum()))

    def _write(self, writer: ShardWriter, array: str, dtype: str, new: NDArray[np.intp]) -> None:
        """Write rows of one shard of an array, some at a time, which bounds memory."""
        was = self.source.arrays[array]
        scale = self._scale(array) if dtype == "int8" else None
        clipped = self.source.columns[schema.clipped(array)]
        step = max(1, BATCH_BYTES // (prod(was.shape[1:]) * np.dtype(np.float32).itemsize))
        for start in range(0, len(new), step):
            rows = new[start : start + step]
            stored, counts = self.source.read(array, self.rows[rows]), clipped[self.rows[rows]]
            if dtype != was.dtype.name:
                stored, beyond = _encode(decode_numpy(stored), dtype, scale)
                # What float16 clipped is at the end of its range, where int8 clips it again.
                counts = np.maximum(counts, beyond)
            writer.write(rows, {array: Encoded.with_checksums(stored, counts)})

    def _scale(self, array: str) -> NDArray[np.float32]:
        scale: NDArray[np.float32] = self.backend.read(schema.scale(array))
        own = self.source.arrays[array].scale
        if own is not None and not np.array_equal(scale, own):
            raise MlcError(
                f"{self.backend.path}: {array} has other scales than {self.source.store.path} has "
                "now; remove it with mlc store rm, or name another target"
            )
        return scale


def _encode(
    values: NDArray[np.float32], dtype: str, scale: NDArray[np.float32] | None
) -> tuple[Array, Array]:
    """Return values (n, V, ...) as they are stored, and counts (n, V) of those clipped."""
    tensor = None if scale is None else torch.from_numpy(scale)
    stored, clipped = encode(torch.from_numpy(values), dtype, tensor)
    return stored.numpy(), clipped.numpy()
