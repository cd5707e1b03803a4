"""Chunks that are read and written as files: the same as by zarr-python, in both directions."""

import errno
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.core.metadata import ArrayV3Metadata

from mlc.store.zarr_chunks import Chunks, plain_chunks

WORDS = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4), min_size=1
)
ROWS, CHUNK = 10, 4


def opened(path: Path, **settings: Any) -> tuple["zarr.Array[Any]", Chunks | None]:
    array = zarr.create_array(
        path, **({"shape": (ROWS,), "chunks": (CHUNK,), "compressors": None} | settings)
    )
    assert isinstance(array.metadata, ArrayV3Metadata)
    zeros = [0] * (array.ndim - 1)
    name = array.metadata.chunk_key_encoding.encode_chunk_key
    return array, plain_chunks(array.metadata, lambda chunk: path / name((chunk, *zeros)))


def chunks_of(path: Path, **settings: Any) -> tuple["zarr.Array[Any]", Chunks]:
    array, chunks = opened(path, **settings)
    assert chunks is not None
    return array, chunks


@given(texts=WORDS, rows=st.integers(1, 7), start=st.integers(0, 5), data=st.data())
def test_text_is_what_zarr_says(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], rows: int, start: int, data: Any
) -> None:
    count = start + len(texts)
    folder = tmp_path_factory.mktemp("text") / "a.zarr"
    array, chunks = chunks_of(folder, shape=(count,), chunks=(rows,), dtype=str)
    array[:] = np.array([f"é{row}" for row in range(count)])
    chunks.write(start, np.array(texts))
    want = [f"é{row}" for row in range(start)] + texts
    assert array[:].tolist() == want
    first, last = sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    assert chunks.read(first, last).tolist() == want[first:last]
    assert chunks.read(first, last).dtype.kind == "U"


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "float32", "float16"])
@pytest.mark.parametrize("item", [(), (3,), (2, 3)])
def test_numbers_are_what_zarr_says(tmp_path: Path, dtype: str, item: tuple[int, ...]) -> None:
    shape = {"shape": (ROWS, *item), "chunks": (CHUNK, *item)}
    array, chunks = chunks_of(tmp_path / "a.zarr", dtype=dtype, **shape)
    values = np.random.default_rng(0).integers(0, 200, (ROWS, *item)).astype(dtype)
    array[:] = values
    for start, stop in ((0, ROWS), (3, 9), (4, 8), (9, 10), (5, 5)):
        got = chunks.read(start, stop)
        np.testing.assert_array_equal(got, values[start:stop])
        assert got.dtype == values.dtype
        chunks.write(start, values[start:stop] + 1)
        assert (array[start:stop] == values[start:stop] + 1).all()
        array[:] = values


def test_a_chunk_that_is_not_there_is_zeros_or_no_text(tmp_path: Path) -> None:
    _, numbers = chunks_of(tmp_path / "a.zarr", dtype="uint32")
    _, text = chunks_of(tmp_path / "b.zarr", dtype=str)
    assert numbers.read(0, ROWS).tolist() == [0] * ROWS
    assert text.read(0, ROWS).tolist() == [""] * ROWS
    numbers.write(5, np.array([7], np.uint32))
    assert numbers.read(3, 7).tolist() == [0, 0, 7, 0]


@pytest.mark.parametrize("size", [0, 1, 15, 17, 32])
def test_a_chunk_of_another_length_is_refused(tmp_path: Path, size: int) -> None:
    _, chunks = chunks_of(tmp_path / "a.zarr", dtype="uint32")
    chunks.write(0, np.ones(ROWS, np.uint32))
    chunks.file(1).write_bytes(b"\1" * size)
    with pytest.raises(ValueError, match=f"expected 16 bytes, got {size}"):
        chunks.read(0, ROWS)
    assert chunks.read(0, CHUNK).tolist() == [1] * CHUNK


def test_text_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    _, chunks = chunks_of(tmp_path / "a.zarr", dtype=str)
    chunks.write(0, np.array(["abc"] * ROWS))
    whole = chunks.file(0).read_bytes()
    for size in range(len(whole)):
        chunks.file(0).write_bytes(whole[:size])
        with pytest.raises((ValueError, RuntimeError)):
            chunks.read(0, ROWS)


@pytest.mark.parametrize("byte", [0x10, 0x7F, 0xFF])
def test_a_damaged_count_of_texts_takes_no_memory(tmp_path: Path, byte: int) -> None:
    _, chunks = chunks_of(tmp_path / "a.zarr", dtype=str)
    chunks.write(0, np.array(["abc"] * ROWS))
    data = bytearray(chunks.file(0).read_bytes())
    data[3] = byte
    chunks.file(0).write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match="expected 4 texts, got "):
        chunks.read(0, ROWS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_write_that_fails_leaves_the_old_chunk_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, chunks = chunks_of(tmp_path / "a.zarr", dtype="uint32")
    chunks.write(0, np.ones(ROWS, np.uint32))
    before = sorted(tmp_path.rglob("*"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        chunks.write(0, np.zeros(ROWS, np.uint32))
    assert chunks.read(0, ROWS).tolist() == [1] * ROWS
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "uint32", "compressors": "auto"},
        {"dtype": str, "compressors": "auto"},
        {"dtype": ">u4"},
        {"dtype": "uint32", "fill_value": 1},
        {"dtype": "uint32", "shape": (4, 4), "chunks": (2, 2)},
        {"dtype": "uint32", "shape": (8,), "chunks": (2,), "shards": (4,)},
    ],
    ids=str,
)
def test_what_is_stored_otherwise_is_left_to_zarr(tmp_path: Path, settings: Any) -> None:
    assert opened(tmp_path / "a.zarr", **settings)[1] is None
