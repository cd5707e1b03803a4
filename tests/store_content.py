"""What the tests of the store fill it with, and whether a store holds that."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlc.store import schema
from mlc.store.key import FeatureKey
from mlc.store.layout import Layout
from mlc.store.quantize import decode_numpy, encode
from mlc.store.reader import FeatureStore
from mlc.store.writer import StoreWriter

FEATURES = ("pooled:float32", "tokens:float16")
KEY = FeatureKey(
    backbone="test_resnet",
    weights="0123456789abcdef",
    layers=("pre_logits", "layer3"),
    size_px=64,
    resize="squash",
    interpolation="bilinear",
    decode="pillow",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.25, 0.5),
    precision="float32",
    engine="torch",
    views=("orig", "hflip"),
    features=FEATURES,
)
SHAPES = {
    "pre_logits/pooled": (5,),
    "pre_logits/tokens": (4, 5),
    "pre_logits/prefix": (1, 5),
    "layer3/pooled": (3,),
    "layer3/tokens": (2, 3),
}
IDS = ("z/1.jpg", "a b;c.jpg", "über.png", "写真/猫.jpg", "🦩.gif", "42", " lead.jpg")
REASONS = {2: "broken image: truncated", 5: "No such file or directory"}
SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]

Part = tuple[range, dict[str, NDArray[np.float32]], NDArray[np.str_], NDArray[np.str_]]


@dataclass(frozen=True)
class Content:
    """What a store is filled with; the features of bad images are rubbish that must not arrive."""

    layout: Layout
    features: dict[str, NDArray[np.float32]]
    content_hash: NDArray[np.str_]
    error: NDArray[np.str_]

    def part(self, shard: range) -> Part:
        rows = slice(shard.start, shard.stop)
        features = {array: values[rows] for array, values in self.features.items()}
        return shard, features, self.content_hash[rows], self.error[rows]

    def first(self, rows: int) -> "Content":
        """Return the content of a store of the first rows only."""
        layout = replace(
            self.layout, image_id=self.layout.image_id[:rows], file=self.layout.file[:rows]
        )
        _, *part = self.part(range(rows))
        return Content(layout, *part)

    def encoded(self, array: str) -> tuple[NDArray[Any], NDArray[np.uint32]]:
        """Return what must be stored (N, V, ...), and how many numbers are clipped (N, V)."""
        bad = (self.error != "").reshape(-1, *[1] * (self.features[array].ndim - 1))
        values = torch.from_numpy(np.where(bad, np.float32(0), self.features[array]))
        scale = self.layout.scales.get(array)
        given = None if scale is None else torch.from_numpy(scale)
        stored, clipped = encode(values, self.layout.dtype(array).name, given)
        return stored.numpy(), clipped.numpy().astype(np.uint32)

    def expected(self, array: str) -> NDArray[np.float32]:
        """Return what must be read (N, V, ...)."""
        return decode_numpy(self.encoded(array)[0], self.layout.scales.get(array))


def content(
    ids: Sequence[str] = IDS,
    shard_rows: int = 3,
    *,
    key: FeatureKey = KEY,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    reasons: Mapping[int, str] = REASONS,
    seed: int = 0,
) -> Content:
    """Return made-up content; of the shapes, those are taken that the key asks for."""
    generator = np.random.default_rng(seed)
    error = np.array([reasons.get(row, "") for row in range(len(ids))])
    kinds = schema.array_dtypes(key.to_json())
    names = [schema.feature(layer, kind) for layer in key.layers for kind in kinds]
    shapes = {name: shapes[name] for name in names if name in shapes}
    features = {
        name: generator.normal(size=(len(ids), len(key.views), *shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    for values in features.values():
        values[error != ""] = np.nan
    layout = Layout(
        key=key,
        image_id=np.array(ids),
        file=np.array([f"photos/{each}" for each in ids]),
        arrays=shapes,
        batch_size=8,
        shard_rows=shard_rows,
        made_by={"command": "mlc extract --out Bücher.zarr", "commit": None},
        grids={"pre_logits": (2, 2), "layer3": (1, 2)},
    )
    scales = {
        name: generator.uniform(0.005, 0.02, shape[-1:]).astype(np.float32)
        for name, shape in shapes.items()
        if layout.dtype(name) == np.int8
    }
    hashes = np.array([generator.bytes(16).hex() for _ in ids])
    return Content(replace(layout, scales=scales), features, hashes, error)


def key_of(*features: str, layers: tuple[str, ...] = KEY.layers) -> FeatureKey:
    """Return a key of some kinds and dtypes of features."""
    return replace(KEY, features=features, layers=layers)


def numbered(rows: int) -> list[str]:
    """Return distinct ids that are not in order."""
    return [f"{row * 7919 % rows}.jpg" for row in range(rows)]


@contextmanager
def writing(path: Path, layout: Layout) -> Iterator[StoreWriter]:
    writer = StoreWriter.create_or_resume(path, layout)
    try:
        yield writer
    finally:
        writer.close()


def fill(path: Path, what: Content, shards: Sequence[int] | None = None) -> Path:
    """Write some shards, or all that are pending and finish."""
    with writing(path, what.layout) as writer:
        for shard in pending(writer) if shards is None else [writer.shards()[i] for i in shards]:
            writer.write_shard(*what.part(shard))
        if shards is None:
            writer.finish()
    return path


def pending(writer: StoreWriter) -> list[range]:
    """Return the shards of which rows are still to be written."""
    return [
        shard
        for shard in writer.shards()
        if (writer.status[shard.start : shard.stop] == schema.PENDING).any()
    ]


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return every array of a store, as its format gives it back."""
    backend = schema.format_of(path).open(path)
    try:
        return {name: backend.read(name) for name in sorted(backend.names())}
    finally:
        backend.close()


def assert_same_store(got: Path, want: Path) -> None:
    """Every array of two stores is the same to the last bit, and so are their attributes."""
    got_arrays, want_arrays = arrays(got), arrays(want)
    assert got_arrays.keys() == want_arrays.keys()
    for name, values in want_arrays.items():
        np.testing.assert_array_equal(got_arrays[name], values, err_msg=name)
        assert got_arrays[name].dtype == values.dtype, name
        if values.dtype.kind != "U":
            assert got_arrays[name].tobytes() == values.tobytes(), name
    with FeatureStore(got) as one, FeatureStore(want) as other:
        assert one.key == other.key
        assert one.batch_size == other.batch_size


def assert_holds(path: Path, what: Content) -> None:
    """A finished store holds exactly some content, in every view of every array."""
    with FeatureStore(path) as store:
        np.testing.assert_array_equal(store.image_id, what.layout.image_id)
        np.testing.assert_array_equal(store.file, what.layout.file)
        np.testing.assert_array_equal(store.content_hash(), what.content_hash)
        good = np.where(what.error == "", schema.OK, schema.BAD)
        np.testing.assert_array_equal(store.status, good)
        assert list(store.arrays) == list(what.features)
        for name in what.features:
            array = store.features(*name.rsplit("/", 1))
            for view in range(len(what.layout.key.views)):
                want = what.expected(name)[:, view]
                np.testing.assert_array_equal(array.read_all(view), want, err_msg=name)
