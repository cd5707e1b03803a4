"""A store of two layers, all kinds of features and random numbers, for the tests of its upkeep."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from small_store import KEY as SMALL

from mlc.store import schema
from mlc.store.layout import Layout
from mlc.store.writer import StoreWriter

IMAGES = 10
BAD = 3  # the row of an image that is not one
SHARD_ROWS = 4
SHAPES = {
    "a/pooled": (5,),
    "a/tokens": (4, 5),
    "a/prefix": (1, 5),
    "b.c/pooled": (3,),
    "b.c/tokens": (2, 3),
}
FLOATS = ("pooled:float32", "tokens:float16")
INT8 = ("pooled:float32", "tokens:int8")
KEY = replace(SMALL, layers=("a", "b.c"))


def features_of(images: int = IMAGES, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Return (N, 2, ...) of each array; two of them are beyond float16 and its int8."""
    generator = np.random.default_rng(seed)
    values = {
        array: generator.normal(size=(images, 2, *shape)).astype(np.float32)
        for array, shape in SHAPES.items()
    }
    for array in ("a/tokens", "b.c/tokens"):
        values[array][1:2, 1, 0, 2] = 7e4
    return values


def random_store(
    path: Path, features: Sequence[str] = FLOATS, *, images: int = IMAGES, shards: int | None = None
) -> Path:
    """Write a store, of which only the first shards are extracted if it is said how many."""
    ids = np.array([f"{row:02d}.jpg" for row in range(images)])
    dtypes = schema.array_dtypes({"features": features})
    scales = {
        array: np.full(shape[-1], 0.03, np.float32)
        for array, shape in SHAPES.items()
        if dtypes[array.rsplit("/", 1)[1]] == "int8"
    }
    layout = Layout(
        key=replace(KEY, features=tuple(features)),
        image_id=ids,
        file=np.char.add("photos/", ids),
        arrays=SHAPES,
        batch_size=8,
        shard_rows=SHARD_ROWS,
        made_by={"backbone": "stub", "created": 1.5},
        grids={"a": (2, 2), "b.c": (1, 2)},
        scales=scales,
    )
    writer = StoreWriter.create_or_resume(path, layout)
    values = features_of(images)
    for shard in writer.shards()[:shards]:
        part = {array: each[shard.start : shard.stop] for array, each in values.items()}
        error = np.array(["broken image" if row == BAD else "" for row in shard])
        writer.write_shard(shard, part, np.array([f"{row:032x}" for row in shard]), error)
    if shards is None:
        writer.finish()
    writer.close()
    return path


def copier(folder: Path) -> Callable[..., Path]:
    """Return a ``random_store`` that is laid out once in a folder: that takes most of the time."""

    def copy(path: Path, features: Sequence[str] = FLOATS) -> Path:
        whole = folder / f"{'-'.join(features).replace(':', '-')}{path.suffix}"
        if not whole.exists():
            random_store(whole, features)
        shutil.copytree(whole, path) if whole.is_dir() else shutil.copy(whole, path)
        return path

    return copy


def contents(path: Path) -> dict[str, Any]:
    """Return every array of a store, and its attributes but ``made_by``."""
    backend = schema.format_of(path).open(path)
    try:
        arrays: dict[str, Any] = {name: backend.read(name) for name in backend.names()}
        attributes = backend.attributes()
    finally:
        backend.close()
    attributes.pop("made_by")
    attributes.pop("attributes_crc32c")  # that of made_by too
    return arrays | {"attributes": attributes}
