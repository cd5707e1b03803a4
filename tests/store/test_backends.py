"""The two formats on the disk: other tools read them, and what other tools wrote is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from store_content import (
    KEY,
    arrays,
    assert_holds,
    content,
    fill,
    key_of,
    numbered,
)
from zarr.codecs import BytesCodec, ShardingCodec

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.journal import journal_path
from mlc.store.layout import open_for_writing
from mlc.store.reader import FeatureStore
from mlc.store.units import LOST
from mlc.store.writer import StoreWriter

INT8 = key_of("pooled:int8", "tokens:int8")


def by_library(path: Path, name: str) -> np.ndarray:
    """Read an array with nothing of ours."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return file[name][:]
    array: Any = zarr.open_group(path, mode="r")[name]
    return array[:]


# --- our files, their tools ----------------------------------------------------------------------


@pytest.mark.parametrize("key", [KEY, INT8], ids=["float", "int8"])
def test_the_libraries_read_what_is_stored(path: Path, key: Any) -> None:
    what = content(key=key)
    fill(path, what)
    for name in what.features:
        np.testing.assert_array_equal(by_library(path, name), what.encoded(name)[0], err_msg=name)


def test_the_bytes_of_each_unit_lie_where_the_store_says(path: Path) -> None:
    what = content(numbered(8))
    fill(path, what)
    with FeatureStore(path) as store:
        for name in what.features:
            units = store.features(*name.rsplit("/", 1)).units
            stored = what.encoded(name)[0]
            assert len(units.file) == len(units.offset) == 8 * 2
            for row, view in np.ndindex(8, 2):
                unit = row * 2 + view
                with units.files[units.file[unit]].open("rb") as file:
                    file.seek(units.offset[unit])
                    assert file.read(units.unit_bytes) == stored[row, view].tobytes(), name


def test_tokens_of_one_image_and_view_are_a_chunk(path: Path) -> None:
    what = content()
    fill(path, what)
    for name in ("layer3/tokens", "pre_logits/prefix"):
        unit = (1, 1, *what.layout.arrays[name])
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                assert file[name].chunks == unit
                assert file[name].compression is None
        else:
            array: Any = zarr.open_group(path, mode="r")[name]
            assert array.chunks == unit
            assert array.shards == (3, 2, *unit[2:])


def test_a_shard_of_rows_is_a_file_of_its_own_in_zarr(tmp_path: Path) -> None:
    what = content()
    path = fill(tmp_path / "a.zarr", what)
    for name in what.features:
        with FeatureStore(path) as store:
            units = store.features(*name.rsplit("/", 1)).units
        assert len(units.files) == 3
        np.testing.assert_array_equal(units.file, np.arange(7).repeat(2) // 3)


def test_an_hdf5_file_does_not_change_its_size_while_it_is_filled(tmp_path: Path) -> None:
    what = content()
    path = tmp_path / "a.h5"
    StoreWriter.create_or_resume(path, what.layout).close()
    laid_out = path.stat().st_size
    assert fill(path, what).stat().st_size == laid_out


def test_a_layout_is_whole_or_not_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = content()

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(schema.format_of(path), "create_features", fail)
    with pytest.raises(ZeroDivisionError):
        open_for_writing(path, what.layout, alone=True)
    assert list(path.parent.iterdir()) == []


# --- their files ---------------------------------------------------------------------------------


def compress_hdf5(path: Path, name: str, **options: Any) -> None:
    with h5py.File(path, "r+") as file:
        values = file[name][:]
        del file[name]
        file.create_dataset(name, data=values, **options)


def compress_zarr(path: Path, name: str, **options: Any) -> None:
    group: Any = zarr.open_group(path, mode="r+")
    values = group[name][:]
    del group[name]
    group.create_array(name, data=values, fill_value=0, **options)


REPACKED: dict[str, tuple[str, Callable[[Path, str], None]]] = {
    "gzip": (
        ".h5",
        lambda path, name: compress_hdf5(path, name, compression="gzip"),
    ),
    "shuffle": (
        ".h5",
        lambda path, name: compress_hdf5(path, name, chunks=(1, 1, 2, 3), shuffle=True),
    ),
    "contiguous": (".h5", lambda path, name: compress_hdf5(path, name)),
    "split units": (".h5", lambda path, name: compress_hdf5(path, name, chunks=(2, 1, 1, 3))),
    "zstd": (
        ".zarr",
        lambda path, name: compress_zarr(path, name, compressors="auto", chunks=(2, 1, 2, 3)),
    ),
    "zstd in files like ours": (
        ".zarr",
        lambda path, name: compress_zarr(path, name, compressors="auto", chunks=(3, 2, 2, 3)),
    ),
    "zstd in shards": (
        ".zarr",
        lambda path, name: compress_zarr(
            path, name, compressors="auto", chunks=(1, 1, 2, 3), shards=(4, 2, 2, 3)
        ),
    ),
    "index at the end": (
        ".zarr",
        lambda path, name: compress_zarr(
            path, name, compressors=None, chunks=(1, 1, 2, 3), shards=(4, 2, 2, 3)
        ),
    ),
    "split units in Zarr": (
        ".zarr",
        lambda path, name: compress_zarr(path, name, compressors=None, chunks=(3, 2, 1, 3)),
    ),
    "big-endian": (
        ".zarr",
        lambda path, name: compress_zarr(
            path,
            name,
            compressors=None,
            chunks=(3, 2, 2, 3),
            serializer=BytesCodec(endian="big"),
        ),
    ),
    "big-endian in shards": (
        ".zarr",
        lambda path, name: compress_zarr(
            path,
            name,
            compressors=None,
            chunks=(3, 2, 2, 3),
            serializer=ShardingCodec(
                chunk_shape=(1, 1, 2, 3),
                codecs=[BytesCodec(endian="big")],
                index_location="start",
            ),
        ),
    ),
}


@pytest.mark.parametrize("how", REPACKED)
def test_what_another_tool_repacked_is_read_and_not_written_to(tmp_path: Path, how: str) -> None:
    suffix, repack = REPACKED[how]
    what = content()
    path = fill(tmp_path / f"a{suffix}", what, shards=[0, 1])
    fill(path, what)
    repack(path, "layer3/tokens")
    with FeatureStore(path) as store:
        array = store.features("layer3", "tokens")
        assert array.units is None
        which = np.array([13, 0, 5, 5])
        want = what.encoded("layer3/tokens")[0].reshape(-1, 2, 3)[which]
        np.testing.assert_array_equal(array.read(which), want)
    assert_holds(path, what)
    with pytest.raises(
        MlcError, match=rf"{path.name}: layer3/tokens was rewritten with another codec"
    ):
        StoreWriter.create_or_resume(path, what.layout)


@pytest.mark.parametrize("how", [*REPACKED, "chunks of other rows"])
def test_images_that_could_not_be_written_leave_a_store_as_it_is(tmp_path: Path, how: str) -> None:
    other_rows: Any = (
        ".zarr",
        lambda path, name: compress_zarr(path, name, compressors=None, chunks=(2, 2, 2, 3)),
    )
    suffix, repack = REPACKED.get(how, other_rows)
    what = content()
    path = fill(tmp_path / f"a{suffix}", what.first(4))
    repack(path, "layer3/tokens")
    with pytest.raises(MlcError, match="was rewritten with another codec or chunks"):
        StoreWriter.create_or_resume(path, what.layout)
    assert_holds(path, what.first(4))


def test_what_another_tool_ordered_otherwise_is_read_by_position(tmp_path: Path) -> None:
    """Plain shards that zarr-python wrote: their index says where each unit is."""
    what = content()
    path = fill(tmp_path / "a.zarr", what)
    compress_zarr(
        path,
        "layer3/tokens",
        compressors=None,
        chunks=(2, 2, 2, 3),
        serializer=ShardingCodec(
            chunk_shape=(1, 1, 2, 3), codecs=[BytesCodec()], index_location="start"
        ),
    )
    with FeatureStore(path) as store:
        units = store.features("layer3", "tokens").units
        assert units is not None
        # A chunk of zeros is not written by zarr-python: those are the units of bad images.
        bad = np.flatnonzero(np.repeat(what.error != "", 2))
        assert set(np.flatnonzero(units.offset == LOST)) <= set(bad)


def test_a_repacked_array_that_lost_a_number_is_noticed(tmp_path: Path) -> None:
    path = fill(tmp_path / "a.h5", content())
    compress_hdf5(path, "layer3/tokens", compression="gzip")
    with h5py.File(path, "r+") as file:
        file["layer3/tokens"][4, 1, 0, 0] += 1
    with FeatureStore(path) as store:
        array = store.features("layer3", "tokens")
        array.read(np.array([8]))
        with pytest.raises(MlcError, match=r"layer3/tokens of image 🦩.gif \(row 4, view hflip\)"):
            array.read(np.array([9]))


# --- the journal of a growing file ---------------------------------------------------------------


def test_a_journal_in_which_nothing_was_kept_yet_is_cleared_by_a_reader(tmp_path: Path) -> None:
    what = content()
    path = fill(tmp_path / "a.h5", what.first(4))
    (tmp_path / ".a.h5.journal").write_bytes(b"")
    assert_holds(path, what.first(4))
    assert not journal_path(path).exists()
    assert_holds(fill(path, what), what)


def test_rows_beyond_those_that_count_are_not_read(tmp_path: Path) -> None:
    """A killed growth leaves longer arrays; what is asked for next may be fewer images."""
    what = content(reasons={})
    path = fill(tmp_path / "a.zarr", what.first(4))
    backend = schema.format_of(path).open(path, write=True)
    names = [schema.STATUS, schema.ROW_CRC32C, schema.CONTENT_HASH, schema.ERROR]
    for array in what.features:
        names += [array, schema.crc(array), schema.clipped(array)]
    text = {schema.IMAGE_ID: what.layout.image_id, schema.FILE: what.layout.file}
    backend.grow(7, names, text)
    backend.set_attribute("rows", 4)  # as if it had been killed before its last step
    assert_holds(fill(path, what.first(4)), what.first(4))
    assert_holds(fill(path, what.first(5)), what.first(5))
    assert_holds(fill(path, what), what)
    assert len(arrays(path)[schema.STATUS]) == 7
