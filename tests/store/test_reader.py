"""FeatureStore: what a store tells its readers, and what is no store."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from store_content import (
    IDS,
    KEY,
    REASONS,
    assert_holds,
    content,
    fill,
    key_of,
    numbered,
)

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.lock import writer_lock
from mlc.store.reader import FeatureStore, find_store, labels_path
from mlc.store.writer import StoreWriter

# --- what is written is read ---------------------------------------------------------------------


def test_what_is_written_is_read(path: Path) -> None:
    what = content()
    assert_holds(fill(path, what), what)


@pytest.mark.parametrize(
    ("features", "arrays"),
    [
        (("pooled:float32",), {"pre_logits/pooled": "f4", "layer3/pooled": "f4"}),
        (
            ("tokens:int8",),
            {"pre_logits/tokens": "i1", "pre_logits/prefix": "i1", "layer3/tokens": "i1"},
        ),
        (
            ("pooled:float16", "tokens:float32"),
            {
                "pre_logits/pooled": "f2",
                "pre_logits/tokens": "f4",
                "pre_logits/prefix": "f4",
                "layer3/pooled": "f2",
                "layer3/tokens": "f4",
            },
        ),
    ],
    ids=lambda each: "/".join(each) if isinstance(each, tuple) else "",
)
def test_a_store_has_the_arrays_of_its_key(
    path: Path, features: tuple[str, ...], arrays: dict[str, str]
) -> None:
    what = content(key=key_of(*features))
    assert_holds(fill(path, what), what)
    with FeatureStore(path) as store:
        assert list(store.arrays.items()) == [(name, np.dtype(of)) for name, of in arrays.items()]


def test_attributes_are_kept(path: Path) -> None:
    what = content()
    with FeatureStore(fill(path, what)) as store:
        assert store.path == path
        assert store.complete
        assert store.key == KEY.to_json()
        assert store.layers == ("pre_logits", "layer3")
        assert store.made_by == what.layout.made_by
        assert store.batch_size == 8
        assert store.grids == {"pre_logits": [2, 2], "layer3": [1, 2]}


def test_default_layer_and_view_are_the_first(path: Path) -> None:
    what = content()
    with FeatureStore(fill(path, what)) as store:
        want = what.expected("pre_logits/pooled")
        np.testing.assert_array_equal(store.pooled(), want[:, 0])
        np.testing.assert_array_equal(store.pooled(view="hflip"), want[:, 1])
        want = what.expected("layer3/pooled")
        np.testing.assert_array_equal(store.pooled("layer3"), want[:, 0])
        assert store.features().name == "pre_logits/pooled"


def test_features_are_read_as_contiguous_float32(path: Path) -> None:
    with FeatureStore(fill(path, content(key=key_of("pooled:float16")))) as store:
        values = store.pooled(view="hflip")
    assert values.dtype == np.float32
    assert values.flags.c_contiguous


def test_an_array_that_is_not_stored_is_named_with_those_that_are(path: Path) -> None:
    with FeatureStore(fill(path, content())) as store:
        with pytest.raises(MlcError, match=r"unknown layer .* 'layer4'; did you mean 'layer3'"):
            store.features("layer4")
        expected = (
            rf"{path.name}: has no layer3/prefix, it has pre_logits/pooled, .*; run mlc extract "
            "with --features prefix"
        )
        with pytest.raises(MlcError, match=expected):
            store.features("layer3", "prefix")


def test_rows_keep_the_order_they_are_listed_in(path: Path) -> None:
    ids = numbered(10)
    assert ids != sorted(ids)
    with FeatureStore(fill(path, content(ids, reasons={}))) as store:
        assert store.image_id.tolist() == ids


def test_reasons_are_read_by_file(path: Path) -> None:
    want = {f"photos/{IDS[row]}": reason for row, reason in REASONS.items()}
    with FeatureStore(fill(path, content())) as store:
        assert store.errors() == want


def test_an_open_array_goes_to_other_processes_and_needs_no_open_store(path: Path) -> None:
    what = content()
    with FeatureStore(fill(path, what)) as store:
        array = store.features("layer3", "tokens")
    again = pickle.loads(pickle.dumps(array))
    np.testing.assert_array_equal(again.read_all(1), what.expected("layer3/tokens")[:, 1])


# --- unfinished ----------------------------------------------------------------------------------


def test_an_unfinished_store_opens_only_when_asked_for(path: Path) -> None:
    what = content()
    fill(path, what, shards=[1])
    with pytest.raises(MlcError, match="unfinished, 3 of 7 images are extracted"):
        FeatureStore(path)
    with FeatureStore(path, unfinished=True) as store:
        assert not store.complete
        done = store.status != schema.PENDING
        assert done.tolist() == [False] * 3 + [True] * 3 + [False]
        array = store.features("pre_logits", "tokens")
        read = array.read(array.units_of(np.flatnonzero(done), 1))
        np.testing.assert_array_equal(read, what.expected("pre_logits/tokens")[3:6, 1])


def test_pending_rows_are_not_taken_for_features(path: Path) -> None:
    fill(path, content(), shards=[1])
    with FeatureStore(path, unfinished=True) as store, pytest.raises(MlcError, match=r"z/1\.jpg"):
        store.pooled()


def test_a_store_that_is_refused_is_not_kept_open(path: Path) -> None:
    what = content()
    fill(path, what, shards=[1])
    with pytest.raises(MlcError) as caught:
        FeatureStore(path)
    assert_holds(fill(path, what), what)
    assert "unfinished" in str(caught.value)  # its traceback, and so the reader, is still alive


# --- what is no store ----------------------------------------------------------------------------


def text_file(path: Path) -> None:
    path.write_text("not a store\n" * 100)


def empty_file(path: Path) -> None:
    path.touch()


def empty_folder(path: Path) -> None:
    path.mkdir()


def folder_of_files(path: Path) -> None:
    path.mkdir()
    for name in ("zarr.json", "a.txt"):
        (path / name).write_text('["not", "a", "group"]')


def bare_hdf5(path: Path) -> None:
    h5py.File(path, "w").close()


def foreign_hdf5_with_text(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["title"] = "somebody's data"


def foreign_hdf5_with_numbers(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["scale"] = 0.5
        file["data"] = np.arange(3)


def foreign_zarr_group(path: Path) -> None:
    zarr.open_group(path, mode="w", zarr_format=3).attrs["title"] = "somebody's data"


def zarr_of_version_2(path: Path) -> None:
    zarr.open_group(path, mode="w", zarr_format=2)


def zarr_array(path: Path) -> None:
    zarr.create_array(path, shape=(3,), dtype="f4")


JUNK = (
    text_file,
    empty_file,
    empty_folder,
    folder_of_files,
    bare_hdf5,
    foreign_hdf5_with_text,
    foreign_hdf5_with_numbers,
    foreign_zarr_group,
    zarr_of_version_2,
    zarr_array,
)


@pytest.mark.parametrize("make", JUNK, ids=lambda make: make.__name__)
def test_what_is_no_store_is_neither_read_nor_written_to(
    path: Path, make: Callable[[Path], None]
) -> None:
    make(path)
    with pytest.raises(MlcError, match=path.name):
        FeatureStore(path)
    with pytest.raises(MlcError, match=path.name):
        StoreWriter.create_or_resume(path, content().layout)
    with pytest.raises(MlcError, match=path.name):
        StoreWriter.open(path)


@pytest.mark.parametrize("name", [schema.STATUS, schema.IMAGE_ID, "layer3/pooled"])
def test_a_store_without_one_of_its_arrays_is_damaged(path: Path, name: str) -> None:
    fill(path, content())
    if path.suffix == ".zarr":
        group: Any = zarr.open_group(path, mode="r+")
        del group[name]
    else:
        with h5py.File(path, "r+") as file:
            del file[name]
    expected = f"{path.name}: damaged, it has no array '{name}'"
    with pytest.raises(MlcError, match=expected), FeatureStore(path) as store:
        store.pooled("layer3")


def test_a_missing_store_is_said_to_be_missing(path: Path) -> None:
    with pytest.raises(MlcError, match="no such store"):
        FeatureStore(path)
    with pytest.raises(MlcError, match="no such store"):
        StoreWriter.open(path)


def test_an_unknown_suffix_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    path = tmp_path / "store.npz"
    expected = r"store\.npz: a store's name ends in \.h5 or \.zarr"
    with pytest.raises(MlcError, match=expected):
        FeatureStore(path)
    with pytest.raises(MlcError, match=expected):
        StoreWriter.create_or_resume(path, content().layout)
    assert list(tmp_path.iterdir()) == []


# --- finding one ---------------------------------------------------------------------------------


def test_a_named_store_is_taken_as_it_is(tmp_path: Path) -> None:
    assert find_store(Path("elsewhere.h5"), tmp_path) == Path("elsewhere.h5")


def test_the_only_store_of_a_folder_is_found(path: Path) -> None:
    what = content()
    with writer_lock(path):
        fill(path, what)
    labels_path(path).touch()
    assert find_store(None, path.parent) == path


@pytest.mark.parametrize("name", [".", "not-there"])
def test_a_folder_without_a_store_says_how_to_get_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(MlcError, match=r"no feature store there; run mlc extract"):
        find_store(None, tmp_path / name)


def test_several_stores_are_listed_and_none_is_guessed(tmp_path: Path) -> None:
    paths = [tmp_path / "a.zarr", tmp_path / "b.zarr", tmp_path / "c.h5"]
    for path in paths:
        path.mkdir()
    with pytest.raises(MlcError, match="several stores are there") as caught:
        find_store(None, tmp_path)
    assert all(str(path) in str(caught.value) for path in paths)


def test_labels_lie_beside_the_store(path: Path) -> None:
    assert labels_path(path) == path.with_name(f"{path.name}.labels.npz")
