"""Positioned reads and writes: any units, in any order, in any number of files."""

import os
import threading
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlc.store import units as module
from mlc.store.units import LOST, DamagedUnits, Units, crc32c, read_units, sync, write_units

SHAPE = (3, 2)
UNIT_BYTES = 24


def made_units(folder: Path, order: list[int], gaps: list[int], files: int = 2) -> Units:
    """Lay units out in some files, in an order, with gaps of some bytes before them."""
    count = len(order)
    file = np.zeros(count, np.intp)
    offset = np.zeros(count, np.int64)
    ends = [0] * files
    for place, unit in enumerate(order):
        where = place * files // count
        offset[unit] = ends[where] + gaps[place]
        file[unit] = where
        ends[where] = int(offset[unit]) + UNIT_BYTES
    paths = tuple(folder / f"{index}.bin" for index in range(files))
    for path, end in zip(paths, ends, strict=True):
        path.write_bytes(b"\xee" * (end + 5))
    return Units(paths, file, offset, 1, SHAPE, np.dtype(np.float32))


def values_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


@pytest.fixture
def units(tmp_path: Path) -> Units:
    """Ten units in two files of five, one after the other."""
    return made_units(tmp_path, list(range(10)), [0] * 10)


@settings(max_examples=40, deadline=None, database=None)
@given(data=st.data())
def test_any_units_are_read_as_they_were_written_and_nothing_else_changes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 12))
    order = data.draw(st.permutations(range(count)))
    gaps = data.draw(st.lists(st.sampled_from([0, 0, 0, 1, 24]), min_size=count, max_size=count))
    units = made_units(tmp_path_factory.mktemp("units"), order, gaps, data.draw(st.integers(1, 3)))
    want = values_of(count)
    write_units(units, np.arange(count), want)
    again = np.array(data.draw(st.lists(st.integers(0, count - 1), unique=True)), np.intp)
    if len(again):
        want[again] = values_of(len(again), seed=1)
        write_units(units, again, want[again])
    which = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1)), np.intp)
    out = units.empty(len(which))
    read_units(units, which, out)
    np.testing.assert_array_equal(out, want[which])
    held = sum(path.read_bytes().count(b"\xee") for path in units.files)
    sizes = sum(path.stat().st_size for path in units.files)
    assert held >= sizes - count * UNIT_BYTES  # the gaps are as they were


def test_units_of_rows_are_those_of_a_view_or_of_all(tmp_path: Path) -> None:
    file, offset = np.zeros(6, np.intp), np.arange(6, dtype=np.int64)
    units = Units((), file, offset, 3, SHAPE, np.dtype(np.int8))
    rows = np.array([1, 0])
    assert units.of_rows(rows, 2).tolist() == [5, 2]
    assert units.of_rows(rows).tolist() == [3, 4, 5, 0, 1, 2]
    assert units.unit_bytes == 6


def test_a_file_does_not_go_on_where_another_ends(tmp_path: Path) -> None:
    """The second file's first unit lies just beyond the offset of the first file's last."""
    units = made_units(tmp_path, list(range(4)), [0, 0, 2 * UNIT_BYTES, 0])
    want = values_of(4)
    write_units(units, np.arange(4), want)
    out = units.empty(4)
    read_units(units, np.arange(4), out)
    np.testing.assert_array_equal(out, want)
    assert units.files[0].stat().st_size == 2 * UNIT_BYTES + 5


@pytest.mark.parametrize("most", [1, 2, 3])
def test_neighbours_are_read_with_one_call_of_some_buffers_at_most(
    units: Units, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    want = values_of(10)
    write_units(units, np.arange(10), want)
    monkeypatch.setattr(module, "MOST_BUFFERS", most)
    calls, preadv = [], os.preadv

    def counted(fd: int, parts: list[Any], offset: int) -> int:
        calls.append(sum(memoryview(part).nbytes for part in parts) // UNIT_BYTES)
        return preadv(fd, parts, offset)

    monkeypatch.setattr(os, "preadv", counted)
    which = np.array([9, 8, 7, 6, 5, 0, 1, 2, 3, 4])
    out = units.empty(10)
    read_units(units, which, out)
    np.testing.assert_array_equal(out, want[which])
    assert sum(calls) == 10
    assert len(calls) == 2 * -(-5 // most)


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
@pytest.mark.parametrize("at_most", [1, 7, 24, 50])
def test_what_the_system_cuts_short_is_gone_on_with(
    units: Units, monkeypatch: pytest.MonkeyPatch, name: str, at_most: int
) -> None:
    call = getattr(os, name)

    def short(fd: int, parts: list[Any], offset: int) -> int:
        first = memoryview(parts[0]).cast("B")[:at_most]
        return call(fd, [first], offset)

    want = values_of(10)
    out = units.empty(10)
    monkeypatch.setattr(os, name, short)
    write_units(units, np.arange(10), want)
    read_units(units, np.arange(10), out)
    np.testing.assert_array_equal(out, want)


def test_the_files_that_were_written_to_are_told_and_synced(
    units: Units, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write_units(units, np.array([7]), values_of(1)) == {units.files[1]}
    touched = write_units(units, np.arange(10), values_of(10))
    assert touched == set(units.files)
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
    sync(touched)
    assert len(synced) == 2


def test_a_missing_file_is_told_with_the_units_that_were_asked_of_it(units: Units) -> None:
    units.files[1].unlink()
    with pytest.raises(DamagedUnits, match=r"1\.bin: missing") as caught:
        read_units(units, np.array([0, 8, 1, 9]), units.empty(4))
    assert caught.value.units.tolist() == [8, 9]
    assert caught.value.file == units.files[1]
    with pytest.raises(FileNotFoundError):
        write_units(units, np.array([8]), values_of(1))


def test_a_file_that_ends_too_early_is_told(units: Units) -> None:
    os.truncate(units.files[0], 4 * UNIT_BYTES + 23)
    read_units(units, np.arange(4), units.empty(4))
    with pytest.raises(DamagedUnits, match="truncated") as caught:
        read_units(units, np.array([4]), units.empty(1))
    assert caught.value.units.tolist() == [4]


def test_a_unit_whose_place_is_lost_is_told(units: Units) -> None:
    units.offset[3] = LOST
    read_units(units, np.array([2, 4]), units.empty(2))
    with pytest.raises(DamagedUnits, match="its index is damaged") as caught:
        read_units(units, np.array([2, 3]), units.empty(2))
    assert caught.value.units.tolist() == [3]


def test_what_the_system_says_is_passed_on(units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(DamagedUnits, match="Input/output error"):
        read_units(units, np.array([0]), units.empty(1))


@pytest.mark.parametrize(
    "values",
    [np.zeros((1, 3, 2)), np.zeros((1, 2, 3), np.float32), np.zeros((1, 6), np.float32)],
    ids=lambda each: f"{each.dtype}{each.shape}",
)
def test_other_numbers_than_units_are_a_bug(units: Units, values: np.ndarray) -> None:
    with pytest.raises(TypeError, match="is not units of float32"):
        write_units(units, np.array([0]), values)
    with pytest.raises(TypeError, match="is not units of float32"):
        read_units(units, np.array([0]), values)


def test_no_units_are_no_work(units: Units) -> None:
    read_units(units, np.zeros(0, np.intp), units.empty(0))
    assert write_units(units, np.zeros(0, np.intp), units.empty(0)) == set()


def test_room_that_is_not_contiguous_is_not_silently_left_unfilled(units: Units) -> None:
    want = values_of(2)
    write_units(units, np.arange(2), want)
    out = np.zeros((2, 2, *SHAPE), np.float32)[:, 1]
    try:
        read_units(units, np.arange(2), out)
    except (TypeError, ValueError):
        return
    np.testing.assert_array_equal(out, want)


def test_threads_read_and_write_at_the_same_time(tmp_path: Path) -> None:
    count = 64
    units = made_units(tmp_path, list(range(count)), [0] * count)
    want = values_of(count)

    def work(first: int) -> None:
        mine = np.arange(first, count, 4)
        write_units(units, mine, want[mine])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out = units.empty(count)
    read_units(units, np.arange(count), out)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_checksums_are_those_of_each_item(dtype: Any) -> None:
    values = (values_of(5) * 30).astype(dtype)
    want = [google_crc32c.value(each.tobytes()) for each in values]
    assert crc32c(values).tolist() == want
    assert crc32c(values[:, ::-1]).tolist() == [
        google_crc32c.value(each.tobytes()) for each in values[:, ::-1]
    ]
    assert crc32c(values).dtype == np.uint32
    assert values.flags.writeable
    assert crc32c(np.frombuffer(b"123456789", np.uint8)[None]).tolist() == [0xE3069283]
