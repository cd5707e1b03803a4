"""Case: random features of some shape that stores and files are timed with."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlc.store.key import FeatureKey
from mlc.store.layout import Layout, shard_rows_for
from mlc.store.writer import StoreWriter

GB = 1e9
BATCH, POOL = 64, 256  # images; a pool of random ones is used again and again
PLAIN_BYTES = 1e9  # at most, of a file of the usual tools: some are slow


@dataclass(frozen=True)
class Case:
    """Features that are written and read.

    Attributes:
        folder: for its files.
        array: name of the feature array.
        dtype: as stored.
        shape: of one image.
        images: N.
    """

    folder: Path
    array: str
    dtype: str
    shape: tuple[int, ...]
    images: int

    @property
    def image_bytes(self) -> int:
        """Size of an image's features as stored."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def shard_rows(self) -> int:
        """Images in a file of a Zarr store, and in a chunk of the usual tools."""
        return shard_rows_for(self.images)

    @property
    def plain_images(self) -> int:
        """Images in a file of the usual tools."""
        return min(self.images, int(PLAIN_BYTES / self.image_bytes))

    @cached_property
    def pool(self) -> NDArray[np.float32]:
        """(POOL, 1, *shape) float32 random numbers, as a backbone gives them."""
        generator = np.random.default_rng(0)
        return generator.standard_normal((POOL, 1, *self.shape), dtype=np.float32)

    @cached_property
    def stored(self) -> NDArray[Any]:
        """The pool as stored."""
        return self.pool.astype(self.dtype)

    def batches(self, images: int) -> Iterator[tuple[range, slice]]:
        """Yield the rows of each batch, and where in the pool they come from."""
        for start in range(0, images, BATCH):
            rows = range(start, min(start + BATCH, images))
            yield rows, slice(start % POOL, start % POOL + len(rows))


def make_case(
    folder: Path,
    kind: str,
    dtype: str,
    shape: tuple[int, ...],
    *,
    images: int = 0,
    gb: float = 0.0,
) -> Case:
    """Return features of so many images, or gigabytes."""
    image_bytes = prod(shape) * np.dtype(dtype).itemsize
    return Case(folder, f"layer/{kind}", dtype, shape, images or int(gb * GB / image_bytes))


def size_of(case: Case, images: int) -> str:
    """Return e.g. ``9,965 images, 8.0 GB``."""
    return f"{images:,} images, {images * case.image_bytes / GB:.1f} GB"


def synced(path: Path) -> int:
    """Wait until the disk has a file, or all files of a folder; return their bytes."""
    total = 0
    for each in files_of(path):
        with each.open("rb") as file:
            os.fsync(file.fileno())
            total += os.fstat(file.fileno()).st_size
    return total


def files_of(path: Path) -> list[Path]:
    """Return a file, or all files of a folder."""
    return [each for each in (path, *path.rglob("*")) if each.is_file()]


def write_store(case: Case, file: str) -> int:
    """Write a store as extraction does, batch by batch."""
    path = case.folder / file
    hashes, no_error = np.full(case.shard_rows, "0" * 32), np.full(case.shard_rows, "")
    features = torch.from_numpy(case.pool)
    writer = StoreWriter.create_or_resume(path, layout(case))
    with writer.filling():
        for shard in writer.shards():
            for start in range(shard.start, shard.stop, BATCH):
                rows = range(start, min(start + BATCH, shard.stop))
                batch = features[start % POOL : start % POOL + len(rows)]
                writer.write(rows, {case.array: batch})
            writer.mark(shard, hashes[: len(shard)], no_error[: len(shard)])
    synced(path)
    return case.images * case.image_bytes


def layout(case: Case) -> Layout:
    """Return what a store of a case holds."""
    layer, kind = case.array.split("/")
    key = FeatureKey(
        backbone="random",
        weights="0",
        layers=(layer,),
        size_px=224,
        resize="squash",
        interpolation="bilinear",
        decode="pillow",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        precision="float32",
        engine="torch",
        views=("orig",),
        features=(f"{kind}:{case.dtype}",),
    )
    rows = np.array([f"{row:012}" for row in range(case.images)])
    return Layout(
        key=key,
        image_id=rows,
        file=rows,
        arrays={case.array: case.shape},
        batch_size=BATCH,
        shard_rows=case.shard_rows,
        made_by={},
    )
