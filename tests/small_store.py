"""A store of a few made-up rows, finished or not, for the tests of looking after stores."""

from pathlib import Path
from typing import Any

import numpy as np

from mlc.store.key import FeatureKey
from mlc.store.layout import Layout
from mlc.store.writer import StoreWriter

KEY = FeatureKey(
    backbone="test_resnet",
    weights="0123456789abcdef",
    layers=("pre_logits",),
    size_px=64,
    resize="squash",
    interpolation="bilinear",
    decode="pillow",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    precision="float32",
    engine="torch",
    views=("orig", "flip"),
    features=("pooled:float32", "tokens:float16"),
)
SHAPES = {"pre_logits/pooled": (8,), "pre_logits/tokens": (4, 8)}


def small_store(path: Path, good: int = 3, bad: int = 1, pending: int = 0, **made_by: Any) -> Path:
    """Write a store of shards of one row each; it is complete if no row is left pending."""
    ids = np.array([f"{row}.jpg" for row in range(good + bad + pending)])
    layout = Layout(KEY, ids, ids, SHAPES, 8, 1, made_by)
    writer = StoreWriter.create_or_resume(path, layout)
    for shard in writer.shards()[: good + bad]:
        features = {name: np.ones((1, 2, *shape), np.float32) for name, shape in SHAPES.items()}
        error = np.array(["" if shard.start < good else "not an image"])
        writer.write_shard(shard, features, np.array(["0" * 32]), error)
    if not pending:
        writer.finish()
    writer.close()
    return path
