"""A store of made-up features with its labels beside it, for the tests of training."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.datasets.labels import LabelTable, full_labels, save_labels
from mlc.store import schema
from mlc.store.key import FeatureKey
from mlc.store.reader import labels_path
from mlc.store.writer import Layout, StoreWriter

WIDTH = 12
CLASSES = ("ant", "bee", "cat", "dog", "owl")
SPLIT = ["train"] * 70 + ["val"] * 30 + ["test"] * 30
IDS = [str(1000 + row) for row in range(len(SPLIT))]
LAYER = "final"
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
    views=("original",),
    dtype="float32",
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
    ids = np.array(image_ids)
    layout = Layout(KEY, ids, ids, {LAYER: values.shape[1]}, 4, 50, MADE_BY)
    writer = StoreWriter.create_or_resume(path, layout)
    error = np.array(["not an image" if each in bad else "" for each in image_ids])
    for shard in writer.shards():
        rows = slice(shard.start, shard.stop)
        writer.write_shard(shard, {LAYER: values[rows, None]}, ids[rows], error[rows])
    writer.finish()
    writer.close()
    return path


def write(folder: Path, table: LabelTable | None = None, name: str = "small.zarr") -> Path:
    """Write a store and its labels; return its path."""
    features = features_of(table_of())
    path = write_store(folder / name, IDS, features)
    save_labels(table_of() if table is None else table, labels_path(path))
    return path


def spoil(path: Path, image_id: str, values: Sequence[float]) -> None:
    """Overwrite the first features of an image behind the writer's back, as a damaged disk may."""
    backend = schema.format_of(path).open(path, write=True)
    row = backend.read(schema.IMAGE_ID).tolist().index(image_id)
    stored = backend.read(schema.pooled(LAYER))[row : row + 1]
    stored[0, 0, : len(values)] = values
    backend.write(schema.pooled(LAYER), row, stored)
    backend.close()
