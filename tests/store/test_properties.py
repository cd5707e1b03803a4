"""What is read is what was written: any shapes, dtypes, orders, growth, in both formats."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_content import KEY, SUFFIXES, Content, assert_holds, content, writing

from mlc.store.batches import open_batches, shuffled
from mlc.store.features import FeatureArray
from mlc.store.reader import FeatureStore

CPU = torch.device("cpu")
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
DTYPES = st.sampled_from(["float32", "float16", "int8"])
SOME = settings(
    max_examples=10,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def contents(draw: st.DrawFn, ids: st.SearchStrategy[str] = TEXT) -> Content:
    """Images with features of any shapes, kinds and dtypes."""
    names = draw(
        st.lists(ids, min_size=1, max_size=draw(st.sampled_from([4, 12, 40])), unique=True)
    )
    kinds = draw(st.lists(st.sampled_from(["pooled", "tokens"]), min_size=1, unique=True))
    layers = ("a", "b.c")[: draw(st.integers(1, 2))]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        tokens, channels, prefix = (draw(st.integers(low, 7)) for low in (1, 1, 0))
        shapes[f"{layer}/pooled"] = (channels,)
        shapes[f"{layer}/tokens"] = (tokens, channels)
        if prefix:
            shapes[f"{layer}/prefix"] = (prefix, channels)
    key = replace(
        KEY,
        layers=layers,
        views=("orig", "hflip", "five")[: draw(st.integers(1, 3))],
        features=tuple(f"{kind}:{draw(DTYPES)}" for kind in sorted(kinds)),
    )
    reasons = draw(st.dictionaries(st.integers(0, len(names) - 1), TEXT, max_size=3))
    shard_rows = draw(st.sampled_from([1, 2, 3, 5, 16, 64]))
    seed = draw(st.integers(0, 9))
    return content(names, shard_rows, key=key, shapes=shapes, reasons=reasons, seed=seed)


def fill_in_any_order(data: st.DataObject, path: Path, what: Content) -> None:
    """Write the pending shards in a drawn order, by one writer or one for each."""
    with writing(path, what.layout) as writer:
        shards = data.draw(st.permutations(writer.shards()))
    together = data.draw(st.booleans())
    for some in [shards] if together else [[shard] for shard in shards]:
        with writing(path, what.layout) as writer:
            for shard in some:
                writer.write_shard(*what.part(shard))
    with writing(path, what.layout) as writer:
        writer.finish()


@SOME
@pytest.mark.parametrize("suffix", SUFFIXES)
@given(data=st.data())
def test_any_content_in_any_order_reads_back_as_written(suffix: str, data: st.DataObject) -> None:
    what = data.draw(contents())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        fill_in_any_order(data, path, what)
        assert_holds(path, what)
        for name in what.features:
            assert_libraries_agree(path, name, what.encoded(name)[0])
            with FeatureStore(path) as store:
                array = store.features(*name.rsplit("/", 1))
            assert_units_agree(data, array, what.encoded(name)[0])


def assert_libraries_agree(path: Path, name: str, stored: np.ndarray) -> None:
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            np.testing.assert_array_equal(file[name][:], stored)
        return
    found: Any = zarr.open_group(path, mode="r")[name]
    np.testing.assert_array_equal(found[:], stored)


def assert_units_agree(data: st.DataObject, array: FeatureArray, stored: np.ndarray) -> None:
    units = stored.reshape(-1, *stored.shape[2:])
    which = st.lists(st.integers(0, len(units) - 1), min_size=1, max_size=30)
    asked = np.array(data.draw(which), np.intp)
    np.testing.assert_array_equal(array.read(asked), units[asked])
    batch_size = data.draw(st.integers(1, len(asked) + 1))
    ahead = data.draw(st.integers(3, 9)) * batch_size * array.unit_bytes
    order = shuffled(asked, batch_size, seed=data.draw(st.integers(0, 3)), epoch=1)
    for place in ("ram", "disk"):
        held = open_batches(array, asked, CPU, place, batch_size=batch_size, read_ahead_bytes=ahead)
        for batch, wanted in zip(held.read(order), order, strict=True):
            np.testing.assert_array_equal(batch.numpy(), units[wanted])


@SOME
@pytest.mark.parametrize("suffix", SUFFIXES)
@given(data=st.data())
def test_growth_in_any_steps_ends_as_if_all_had_been_there_at_once(
    suffix: str, data: st.DataObject
) -> None:
    what = data.draw(contents())
    rows = len(what.error)
    cuts = st.lists(st.integers(1, rows), max_size=3, unique=True)
    steps = [*sorted(data.draw(cuts)), rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        for step in dict.fromkeys(steps):
            some = what.first(step)
            if step == rows or data.draw(st.booleans()):
                fill_in_any_order(data, path, some)
                assert_holds(path, some)
            else:  # only the rows are added, or some of them are written
                with writing(path, some.layout) as writer:
                    for shard in writer.shards()[:: data.draw(st.integers(1, 3))]:
                        writer.write_shard(*some.part(shard))
        for name in what.features:
            assert_libraries_agree(path, name, what.encoded(name)[0])
