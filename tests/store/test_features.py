"""FeatureArray: any units in any order, checked, and never by another way than is right."""

import threading
from pathlib import Path

import numpy as np
import pytest
from store_content import KEY, content, fill, key_of, numbered

from mlc.configs.errors import MlcError
from mlc.store import features as module
from mlc.store.features import FeatureArray
from mlc.store.quantize import decode_numpy
from mlc.store.reader import FeatureStore

INT8 = key_of("pooled:int8", "tokens:int8")
FLOAT16 = key_of("pooled:float16", "tokens:float32")


def opened(path: Path, layer: str = "layer3", kind: str = "tokens") -> FeatureArray:
    with FeatureStore(path) as store:
        return store.features(layer, kind)


def test_what_an_array_says_of_itself(path: Path) -> None:
    what = content(key=INT8)
    array = opened(fill(path, what))
    assert array.path == path
    assert array.name == "layer3/tokens"
    assert array.shape == (7, 2, 2, 3)
    assert array.dtype == np.int8
    assert array.unit_shape == (2, 3)
    assert array.unit_bytes == 6
    assert array.views == ("orig", "hflip")
    np.testing.assert_array_equal(array.scale, what.layout.scales["layer3/tokens"])
    np.testing.assert_array_equal(array.image_id, what.layout.image_id)
    assert opened(fill(path.with_name(f"b{path.suffix}"), content())).scale is None


def test_units_are_of_rows_and_views(path: Path) -> None:
    array = opened(fill(path, content()))
    rows = np.array([3, 0, 6])
    assert array.units_of(rows).tolist() == [6, 0, 12]
    assert array.units_of(rows, 1).tolist() == [7, 1, 13]
    assert array.units_of(rows, np.array([1, 0, 1])).tolist() == [7, 0, 13]


@pytest.mark.parametrize("key", [KEY, INT8, FLOAT16], ids=["default", "int8", "float16"])
def test_units_are_read_as_stored_in_any_order_and_again(path: Path, key) -> None:
    what = content(numbered(9), key=key)
    fill(path, what)
    which = np.random.default_rng(0).integers(0, 18, 50)
    for name in what.features:
        array = opened(path, *name.split("/"))
        want = what.encoded(name)[0].reshape(18, *array.unit_shape)[which]
        for read in (array.read, array.read_many):
            got = read(which)
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want, err_msg=name)
        out = np.empty_like(want)
        assert array.read(which, out) is out
        np.testing.assert_array_equal(out, want)


def test_no_units_are_an_empty_array(path: Path) -> None:
    array = opened(fill(path, content()))
    none = np.zeros(0, np.intp)
    assert array.read(none).shape == (0, 2, 3)
    assert array.read_many(none).shape == (0, 2, 3)


@pytest.mark.parametrize("key", [KEY, INT8, FLOAT16], ids=["default", "int8", "float16"])
def test_all_rows_are_read_as_float32(path: Path, key) -> None:
    what = content(key=key)
    fill(path, what)
    for name in what.features:
        array = opened(path, *name.split("/"))
        for view in range(2):
            stored = what.encoded(name)[0][:, view]
            got = array.read_all(view)
            assert got.dtype == np.float32
            assert got.flags.c_contiguous
            np.testing.assert_array_equal(got, decode_numpy(stored, array.scale), err_msg=name)


@pytest.mark.parametrize("piece", [1, 13, 24, 100])
@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_and_threads_change_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, threads: int
) -> None:
    what = content(numbered(20))
    array = opened(fill(path, what))
    monkeypatch.setattr(module, "PIECE_BYTES", piece)
    monkeypatch.setattr(module, "THREADS", threads)
    np.testing.assert_array_equal(array.read_all(1), what.expected("layer3/tokens")[:, 1])
    which = np.arange(40)[::-1].copy()
    want = what.encoded("layer3/tokens")[0].reshape(40, 2, 3)[::-1]
    np.testing.assert_array_equal(array.read_many(which), want)


@pytest.mark.parametrize("key", [KEY, INT8], ids=["float16", "int8"])
def test_whole_arrays_are_read_by_several_threads(
    path: Path, monkeypatch: pytest.MonkeyPatch, key
) -> None:
    array = opened(fill(path, content(numbered(24), key=key)))
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    met = threading.Barrier(4, timeout=20)
    read_units = module.read_units

    def meet(*args) -> None:
        met.wait()  # breaks unless four read at once
        read_units(*args)

    monkeypatch.setattr(module, "read_units", meet)
    array.read_all()


def test_an_error_of_a_thread_is_that_of_the_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = opened(fill(path, content(numbered(24))))
    array.crc32c[2 * 17] ^= 1
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    with pytest.raises(MlcError, match=r"\(row 17, view orig\): not as it was written"):
        array.read_all()
    with pytest.raises(MlcError, match=r"\(row 17, view orig\): not as it was written"):
        array.read_many(np.arange(48))
    array.read_all(1)
    array.read_all(check=False)
