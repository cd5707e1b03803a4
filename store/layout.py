"""Layout: how a store begins, and how it grows when images are added."""

import glob
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.backend import Backend, longest
from mlc.store.full_disk import full_disk
from mlc.store.journal import journal_path
from mlc.store.key import FeatureKey, require_same_key
from mlc.store.shard import find_units
from mlc.store.units import crc32c

SHARD_ROWS = (1024, 512, 256)  # fewer files where there are many images


@dataclass(frozen=True)
class Layout:
    """What a store is laid out for.

    Attributes:
        key: what makes the features of an image.
        image_id: (N,) text, the rows.
        file: (N,) text, where each image was found, relative to the data set's root.
        arrays: shape of what is stored of one view of an image, by name of the feature array.
        batch_size: of the forward pass; kept on resuming, as it can change the last bits.
        shard_rows: rows that are written and marked done together.
        made_by: what is recorded and not compared.
        grids: (H, W) of the tokens, by layer.
        scales: (C,) float32 of each array that is int8.
    """

    key: FeatureKey
    image_id: NDArray[np.str_]
    file: NDArray[np.str_]
    arrays: Mapping[str, tuple[int, ...]]
    batch_size: int
    shard_rows: int
    made_by: Mapping[str, Any]
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    scales: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def dtype(self, array: str) -> np.dtype[Any]:
        """Return the dtype of a feature array."""
        kind = array.rpartition("/")[2]
        return np.dtype(schema.array_dtypes(self.key.to_json())[kind])

    def chunks(self) -> int:
        """Return about how many chunks the store will have."""
        rows, views = len(self.image_id), len(self.key.views)
        units = sum(rows * views for array in self.arrays if not array.endswith(schema.POOLED))
        arrays = len(schema.ROW_ARRAYS) + 3 * len(self.arrays)
        return units + arrays * (1 + rows // self.shard_rows)

    def row_bytes(self) -> int:
        """Return the bytes of the features of one image."""
        views = len(self.key.views)
        return sum(
            views * prod(shape) * self.dtype(array).itemsize for array, shape in self.arrays.items()
        )


def shard_rows_for(images: int) -> int:
    """Return how many rows are best written together: 256, or up to 1,024 in large stores.

    A killed process then loses 1 % of the images at most, and what is small of them lies in some
    hundred files of each array.
    """
    return next((rows for rows in SHARD_ROWS if images >= 100 * rows), SHARD_ROWS[-1])


def open_for_writing(path: Path, layout: Layout, *, alone: bool) -> Backend:
    """Open the store at a path, laid out there if nothing is, and grown by images that are new.

    Args:
        path: of the store.
        layout: what it is for.
        alone: no other process is writing to it.

    Raises:
        MlcError: a store is there that was made with other settings, or images are to be added
            while others may be writing.
    """
    if alone:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
            _remove(leftover)
    if not path.exists():
        with full_disk(path, "nothing was made; free space, or name another disk with --out"):
            _create(path, layout)
    backend = schema.format_of(path).open(path, write=True)
    try:
        attributes = backend.attributes()
        schema.require_version(path, attributes)
        require_same_key(path, attributes["key"], layout.key)
        if alone:
            backend.clear_leftovers()
        new = ~np.isin(layout.image_id, backend.read(schema.IMAGE_ID, 0, attributes["rows"]))
        if new.any() and not alone:
            raise MlcError(
                f"{path}: {int(new.sum()):,} images are not in it yet, and shards cannot be added "
                "by several workers; run mlc extract without --shard first"
            )
        if new.any():
            for array in schema.feature_arrays(backend):
                find_units(backend, array)  # refuses what could not be filled
            with full_disk(path, "no image was added; free space, the same command adds them"):
                _grow(backend, layout.image_id[new], layout.file[new])
        return backend
    except BaseException:
        backend.close()
        raise


def rows_of(stored: NDArray[np.str_], asked: NDArray[np.str_]) -> NDArray[np.intp]:
    """Return the row of each asked image id, all of which are stored."""
    row = {image_id: index for index, image_id in enumerate(stored.tolist())}
    return np.array([row[image_id] for image_id in asked.tolist()], np.intp)


def _create(path: Path, layout: Layout) -> None:
    """Lay a store out aside and rename it, so that a path holds a whole layout or nothing."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    _remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    journal_path(path).unlink(missing_ok=True)  # of a store of this name that is gone
    try:
        backend = schema.format_of(path).create(partial, layout.chunks())
        try:
            _lay_out(backend, layout)
        finally:
            backend.close()
        _take_place(partial, path)
    finally:
        _remove(partial)


def _take_place(partial: Path, path: Path) -> None:
    """Rename a new store; of several workers that make the same one, the first wins."""
    try:
        partial.rename(path)
    except OSError:
        if not path.is_dir():
            raise


def _remove(partial: Path) -> None:
    """Remove a store that was laid out aside.

    When one file of a new array cannot be written, Zarr's threads may still be at its other files:
    they come and go while the folder is removed, so it is tried again for a second.
    """
    if not partial.is_dir():
        partial.unlink(missing_ok=True)
        return
    for _ in range(20):
        shutil.rmtree(partial, ignore_errors=True)
        if not partial.exists():
            return
        time.sleep(0.05)
    shutil.rmtree(partial)


def _lay_out(backend: Backend, layout: Layout) -> None:
    rows, chunk = len(layout.image_id), layout.shard_rows
    attributes = {
        "schema_version": schema.SCHEMA_VERSION,
        "complete": False,
        "rows": rows,
        "key": layout.key.to_json(),
        "shard_rows": layout.shard_rows,
        "batch_size": layout.batch_size,
        "grids": {layer: list(grid) for layer, grid in layout.grids.items()},
        "scale_crc32c": {
            array: int(crc32c(scale[None])[0]) for array, scale in layout.scales.items()
        },
        "made_by": dict(layout.made_by),
    }
    attributes["attributes_crc32c"] = schema.attributes_crc32c(attributes)
    for name, value in attributes.items():
        backend.set_attribute(name, value)
    backend.set_attribute(schema.EXTRACTION, {}, schema.EXTRACTION_BYTES)
    for name, text in ((schema.IMAGE_ID, layout.image_id), (schema.FILE, layout.file)):
        # One chunk: a COCO of 122,218 rows is a few MB, and text is read whole.
        backend.create_text(name, rows, longest(text), rows)
        backend.write(name, 0, text)
    backend.create_text(schema.CONTENT_HASH, rows, schema.HASH_CHARS, chunk)
    backend.create_text(schema.ERROR, rows, schema.ERROR_BYTES, chunk)
    backend.create_array(schema.STATUS, (rows,), schema.STATUS_DTYPE, chunk)
    backend.create_array(schema.ROW_CRC32C, (rows,), schema.COUNT_DTYPE, chunk)
    views = len(layout.key.views)
    for name in schema.count_arrays(layout.arrays):
        backend.create_array(name, (rows, views), schema.COUNT_DTYPE, chunk)
    for array, scale in layout.scales.items():
        backend.create_array(schema.scale(array), scale.shape, schema.SCALE_DTYPE, len(scale))
        backend.write(schema.scale(array), 0, scale)
    for array, shape in layout.arrays.items():  # last: what is cut off a file is features
        unit_chunks = not array.endswith(schema.POOLED)
        backend.create_features(
            array, (rows, views, *shape), layout.dtype(array), chunk, unit_chunks=unit_chunks
        )


def _grow(backend: Backend, image_id: NDArray[np.str_], file: NDArray[np.str_]) -> None:
    """Add rows for new images after those that are there."""
    rows = backend.attributes()["rows"]
    text = {
        schema.IMAGE_ID: np.concatenate([backend.read(schema.IMAGE_ID, 0, rows), image_id]),
        schema.FILE: np.concatenate([backend.read(schema.FILE, 0, rows), file]),
    }
    arrays = schema.feature_arrays(backend)
    names = [schema.CONTENT_HASH, schema.ERROR, schema.STATUS, schema.ROW_CRC32C]
    names += [*arrays, *schema.count_arrays(arrays)]
    backend.grow(rows + len(image_id), names, text)
