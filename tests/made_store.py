"""A store of made-up features with its labels beside it, for the tests of training."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.datasets.labels import LabelTable, full_labels, save_labels
from mlc.store import schema
from mlc.store.checksums import row_crc32c
from mlc.store.key import FeatureKey
from mlc.store.layout import Layout
from mlc.store.reader import labels_path
from mlc.store.units import crc32c
from mlc.store.writer import StoreWriter

WIDTH = 12
CLASSES = ("ant", "bee", "cat", "dog", "owl")
SPLIT = ["train"] * 70 + ["val"] * 30 + ["test"] * 30
IDS = [str(1000 + row) for row in range(len(SPLIT))]
LAYER = "final"
VIEWS = ("original", "flip", "rotated")
KEY = FeatureKey(
    backbone="stub",
    weights="0",
    layers=(LAYER,),
    size_px=32,
    resize="squash",
    interpolation="bilinear",
    decode="pillow",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    precision="float32",
    engine="torch",
    views=VIEWS[:1],
    features=("pooled:float32",),
)
MADE_BY = {"backbone": "stub", "weights_licence": "none", "backbone_config": {}}


def table_of(**changes: Any) -> LabelTable:
    """Return fully labelled images, each with a positive, of a data set of the papers."""
    generator = np.random.default_rng(0)
    true = generator.random((len(IDS), len(CLASSES))) < 0.3
    true[np.arange(len(IDS)), generator.integers(len(CLASSES), size=len(IDS))] = True
    ids, split = np.array(IDS), np.array(SPLIT)
    return replace(
        LabelTable(ids, ids, CLASSES, full_labels(true), true, split, "coco", 1.9), **changes
    )


def csv_table(observed: NDArray[np.int8], *, partial: bool = False) -> LabelTable:
    """Return the labels of a CSV, which training sees as they are."""
    true = None if partial else observed == 1
    return table_of(observed=observed, true=true, dataset="csv-photos", expected_positives=None)


def features_of(table: LabelTable) -> NDArray[np.float32]:
    """Return (N, WIDTH) features that tell the labels, with some noise."""
    generator = np.random.default_rng(1)
    directions = generator.standard_normal((len(table.classes), WIDTH))
    noise = generator.standard_normal((len(table), WIDTH))
    return (table.targets() @ directions + noise).astype(np.float32)


def write_store(
    path: Path,
    image_ids: Sequence[str],
    values: NDArray[np.float32],
    bad: Collection[str] = (),
) -> Path:
    """Write a store of features (N, D); those of bad images are not kept."""
    return write_layers(path, image_ids, {LAYER: values[:, None]}, bad)


def write_layers(
    path: Path,
    image_ids: Sequence[str],
    layers: Mapping[str, NDArray[np.float32]],
    bad: Collection[str] = (),
) -> Path:
    """Write a store of layers of features (N, V, D), V at most 3."""
    arrays = {schema.feature(layer, schema.POOLED): values for layer, values in layers.items()}
    return write_arrays(path, image_ids, arrays, bad)


def write_arrays(
    path: Path,
    image_ids: Sequence[str],
    arrays: Mapping[str, NDArray[np.float32]],
    bad: Collection[str] = (),
    *,
    features: tuple[str, ...] = ("pooled:float32",),
    scales: Mapping[str, NDArray[np.float32]] | None = None,
    grids: Mapping[str, tuple[int, int]] | None = None,
) -> Path:
    """Write a store of feature arrays (N, V, ...), V at most 3, of dtypes as in a key's features.

    What is int8 needs scales (C,), by name of its array.
    """
    ids = np.array(image_ids)
    (views,) = {values.shape[1] for values in arrays.values()}
    layers = tuple(dict.fromkeys(name.rpartition("/")[0] for name in arrays))
    layout = Layout(
        key=replace(KEY, layers=layers, views=VIEWS[:views], features=features),
        image_id=ids,
        file=ids,
        arrays={name: values.shape[2:] for name, values in arrays.items()},
        batch_size=4,
        shard_rows=50,
        made_by=MADE_BY,
        scales=scales or {},
        grids=grids or {},
    )
    writer = StoreWriter.create_or_resume(path, layout)
    error = np.array(["not an image" if each in bad else "" for each in image_ids])
    for shard in writer.shards():
        rows = slice(shard.start, shard.stop)
        values = {name: each[rows] for name, each in arrays.items()}
        writer.write_shard(shard, values, ids[rows], error[rows])
    writer.finish()
    writer.close()
    return path


def write(folder: Path, table: LabelTable | None = None, name: str = "small.zarr") -> Path:
    """Write a store and its labels; return its path."""
    features = features_of(table_of())
    path = write_store(folder / name, IDS, features)
    save_labels(table_of() if table is None else table, labels_path(path))
    return path


def write_views(folder: Path, views: int = 2, name: str = "views.zarr") -> Path:
    """Write a store of views that differ by some noise, and its labels; return its path."""
    features = features_of(table_of())
    noise = np.random.default_rng(2).standard_normal((len(features), views, WIDTH))
    noise[:, 0] = 0
    values = (features[:, None] + 0.5 * noise).astype(np.float32)
    path = write_layers(folder / name, IDS, {LAYER: values, "other": 2 * values[..., ::-1]})
    save_labels(table_of(), labels_path(path))
    return path


def spoil(
    path: Path, image_id: str, values: Sequence[float], view: int = 0, *, noticed: bool = False
) -> None:
    """Overwrite the first pooled features of an image: checksums follow unless it is to be noticed.

    A model that went wrong is stored with good checksums; a damaged disk is noticed by them.
    """
    name = schema.feature(LAYER, schema.POOLED)
    backend = schema.format_of(path).open(path, write=True)
    row = backend.read(schema.IMAGE_ID).tolist().index(image_id)
    stored = backend.read(name, row, row + 1)
    stored[0, view, : len(values)] = values
    backend.write(name, row, stored)
    if not noticed:
        backend.write(schema.crc(name), row, crc32c(stored[0])[None])
        arrays = list(schema.feature_arrays(backend))
        small = {each: backend.read(each, row, row + 1) for each in schema.small_arrays(arrays)}
        backend.write(schema.ROW_CRC32C, row, row_crc32c(small, arrays))
    backend.close()
