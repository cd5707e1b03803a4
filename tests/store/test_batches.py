"""Batches: the order is the seed's, the values are the store's, memory is bounded."""

import gc
import itertools
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_content import content, fill, key_of, numbered

from mlc.configs.errors import MlcError
from mlc.store import batches as module
from mlc.store.batches import (
    DiskBatches,
    HeldBatches,
    open_batches,
    place_for,
    shuffled,
)
from mlc.store.features import FeatureArray
from mlc.store.reader import FeatureStore

CPU = torch.device("cpu")
UNITS = 48
FEATURES = ("pooled:float32", "tokens:float32"), ("tokens:float16",), ("tokens:int8",)
NAMES = ["float32", "float16", "int8"]


def opened(path: Path, features: tuple[str, ...] = FEATURES[1]) -> FeatureArray:
    key = key_of(*features, layers=("layer3",))
    fill(path, content(numbered(UNITS // 2), key=key, reasons={}))
    with FeatureStore(path) as store:
        return store.features("layer3", "tokens")


def off_disk(array: FeatureArray, batch_size: int = 4, ahead: int = 5) -> DiskBatches:
    nbytes = ahead * batch_size * array.unit_bytes
    return DiskBatches(array, CPU, batch_size, nbytes, check=True)


def reading_threads() -> int:
    return sum(thread.name.startswith("read") for thread in threading.enumerate())


# --- order ---------------------------------------------------------------------------------------


def test_the_order_depends_on_the_seed_and_the_epoch_alone() -> None:
    units = np.arange(3, 103)
    first = shuffled(units, 8, seed=1, epoch=2)
    assert [len(batch) for batch in first] == [8] * 12 + [4]
    assert sorted(np.concatenate(first)) == units.tolist()
    for batch, again in zip(first, shuffled(units, 8, seed=1, epoch=2), strict=True):
        np.testing.assert_array_equal(batch, again)
    whole = np.concatenate(first)
    np.testing.assert_array_equal(whole, np.concatenate(shuffled(units, 100, seed=1, epoch=2)))
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        other = np.concatenate(shuffled(units, 8, seed=seed, epoch=epoch))
        assert (other != whole).any()
    assert shuffled(units[:0], 8, seed=0, epoch=0) == []


def test_the_order_is_a_fair_shuffle() -> None:
    """Each unit comes first about as often as any other: not a shuffle of blocks."""
    first = [shuffled(np.arange(10), 3, seed=seed, epoch=0)[0][0] for seed in range(2000)]
    counts = np.bincount(first, minlength=10)
    assert (np.abs(counts - 200) < 6 * np.sqrt(200)).all()


# --- place ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "place", "sentence"),
    [
        (600, "ram", r"^0\.00 GB of features are held in memory, of which 0\.0 GB are free$"),
        (601, "disk", r"^0\.00 GB of features are read off the disk in each epoch, as 0\.0 GB of"),
    ],
)
def test_features_are_held_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, nbytes: int, place: str, sentence: str
) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 1000)
    got, why = place_for(nbytes, CPU)
    assert got == place
    assert re.search(sentence, why)


@pytest.mark.parametrize(
    ("free_gpu", "free_ram", "place"), [(1000, 0, "gpu"), (999, 1000, "ram"), (0, 999, "disk")]
)
def test_a_gpu_comes_first(
    monkeypatch: pytest.MonkeyPatch, free_gpu: int, free_ram: int, place: str
) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: free_ram)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gpu, 10**6))
    assert place_for(600, torch.device("cuda:0"))[0] == place


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", FEATURES, ids=NAMES)
@pytest.mark.parametrize("place", ["ram", "disk"])
def test_batches_are_the_units_as_stored_in_their_order(
    path: Path, features: tuple[str, ...], place: Any
) -> None:
    array = opened(path, features)
    asked = shuffled(np.arange(0, UNITS, 2), 5, seed=0, epoch=0)
    held = open_batches(array, np.arange(0, UNITS, 2), CPU, place, batch_size=5)
    assert isinstance(held, DiskBatches if place == "disk" else HeldBatches)
    for _ in range(2):  # an epoch leaves nothing behind
        got = [batch.clone() for batch in held.read(asked)]
        assert [len(batch) for batch in got] == [5, 5, 5, 5, 4]
        for batch, which in zip(got, asked, strict=True):
            assert batch.numpy().dtype == array.dtype
            np.testing.assert_array_equal(batch.numpy(), array.read(which))


def test_a_batch_may_have_a_unit_twice(path: Path) -> None:
    array = opened(path)
    asked = [np.array([5, 5, 1]), np.array([1, 5, 5])]
    for held in (
        off_disk(array),
        open_batches(array, np.array([5, 1, 5]), CPU, "ram", batch_size=3),
    ):
        for batch, which in zip(held.read(asked), asked, strict=True):
            np.testing.assert_array_equal(batch.numpy(), array.read(which))


def test_only_the_units_that_are_asked_for_are_held(path: Path) -> None:
    array = opened(path)
    held = open_batches(array, np.array([7, 3, 7]), CPU, "ram", batch_size=2)
    assert isinstance(held, HeldBatches)
    assert held.values.shape == (2, 2, 3)


def test_units_that_are_not_held_are_no_other_units_silently(path: Path) -> None:
    held = open_batches(opened(path), np.array([7, 3]), CPU, "ram", batch_size=2)
    with pytest.raises((IndexError, KeyError, ValueError, MlcError)):
        next(iter(held.read([np.array([3, 4])])))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_neither_order_nor_values_depend_on_the_number_of_threads(
    path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    array = opened(path)
    asked = shuffled(np.arange(UNITS), 7, seed=3, epoch=1)
    monkeypatch.setattr(module, "THREADS", threads)
    generator, read = np.random.default_rng(threads), FeatureArray.read

    def late(self: FeatureArray, *args: Any, **options: Any) -> Any:
        time.sleep(generator.uniform(0, 0.003))  # threads finish in any order
        return read(self, *args, **options)

    monkeypatch.setattr(FeatureArray, "read", late)
    got = [batch.clone() for batch in off_disk(array, 7).read(asked)]
    for batch, which in zip(got, asked, strict=True):
        np.testing.assert_array_equal(batch.numpy(), read(array, which))


# --- off the disk --------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [3, 4, 9])
def test_the_batches_that_a_caller_holds_are_not_overwritten(path: Path, ahead: int) -> None:
    array = opened(path)
    asked = shuffled(np.arange(UNITS), 4, seed=0, epoch=0)
    previous: torch.Tensor | None = None
    for turn, batch in enumerate(off_disk(array, 4, ahead).read(asked)):
        time.sleep(0.002)  # let threads run into it
        np.testing.assert_array_equal(batch.numpy(), array.read(asked[turn]))
        if previous is not None:
            np.testing.assert_array_equal(previous.numpy(), array.read(asked[turn - 1]))
        previous = batch


@pytest.mark.parametrize(("ahead", "rest"), [(3, 0), (5, 1), (8, 23)])
def test_memory_is_what_was_allowed(path: Path, ahead: int, rest: int) -> None:
    array = opened(path)
    batch_bytes = 4 * array.unit_bytes
    disk = DiskBatches(array, CPU, 4, ahead * batch_bytes + rest, check=True)
    batches = disk.read(shuffled(np.arange(UNITS), 4, seed=0, epoch=0))
    room = {batch.data_ptr() for batch in batches}
    assert len(room) == ahead  # used again, and no other
    assert max(room) - min(room) == (ahead - 1) * batch_bytes


def test_batches_are_read_ahead_and_no_further_than_memory_goes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = opened(path)
    started: list[int] = []
    asked = [np.arange(start, start + 4) for start in range(0, UNITS, 4)]

    def listed():
        for turn, batch in enumerate(asked):
            started.append(turn)
            yield batch

    reading = off_disk(array, 4, ahead=6).read(listed())
    for turn in range(len(asked)):
        next(reading)
        assert max(started) <= turn + 6 - 2  # the ring less the two that the caller has
        assert max(started) >= min(turn + 6 - 3, len(asked) - 1)
    reading.close()


def test_too_little_memory_is_refused_with_what_would_do(path: Path) -> None:
    array = opened(path)
    need = 3 * 4 * array.unit_bytes
    expected = (
        rf"read_ahead_bytes: three batches of 4 take {need} bytes, got {need - 1}; allow more, or "
        "take a smaller batch"
    )
    with pytest.raises(MlcError, match=expected):
        open_batches(array, np.arange(4), CPU, "disk", batch_size=4, read_ahead_bytes=need - 1)
    open_batches(array, np.arange(4), CPU, "disk", batch_size=4, read_ahead_bytes=need)


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_damage_reaches_the_caller_and_no_thread_is_left(path: Path, place: Any) -> None:
    array = opened(path)
    array.crc32c[30] ^= 1
    asked = [np.arange(start, start + 4) for start in range(0, UNITS, 4)]
    got = []

    def epoch(check: bool) -> None:
        held = open_batches(array, np.arange(UNITS), CPU, place, batch_size=4, check=check)
        for batch in held.read(asked):
            got.append(len(batch))

    with pytest.raises(MlcError, match=r"\(row 15, view orig\): not as it was written"):
        epoch(check=True)
    assert len(got) == (7 if place == "disk" else 0)
    assert reading_threads() == 0
    epoch(check=False)


@pytest.mark.parametrize("how", ["close", "drop", "break", "raise"])
def test_an_abandoned_epoch_stops_its_threads(path: Path, how: str) -> None:
    disk = off_disk(opened(path))
    endless = (np.arange(4) for _ in itertools.count())
    reading = disk.read(endless)
    next(reading)
    assert reading_threads() > 0
    if how == "close":
        reading.close()
    elif how == "raise":
        with pytest.raises(ZeroDivisionError):
            reading.throw(ZeroDivisionError)
    elif how == "break":
        for _ in reading:
            break
    del reading
    gc.collect()
    assert reading_threads() == 0


def test_what_an_abandoned_epoch_had_asked_for_is_not_read_any_more(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = opened(path)
    reads, read = [], FeatureArray.read

    def slow(self: FeatureArray, which: Any, *args: Any, **options: Any) -> Any:
        reads.append(len(which))
        time.sleep(0.02)
        return read(self, which, *args, **options)

    monkeypatch.setattr(FeatureArray, "read", slow)
    reading = off_disk(array, 4, ahead=100).read([np.arange(4)] * 97)
    next(reading)
    reading.close()
    assert len(reads) < 97 * 4 / 2


def test_two_epochs_at_once_do_not_mix(path: Path) -> None:
    """A validation pass in the middle of an epoch reads through the same batches."""
    array = opened(path)
    disk = off_disk(array, 4, ahead=4)
    asked = [np.arange(start, start + 4) for start in range(0, UNITS, 4)]
    try:
        pairs = [
            (one.clone(), other.clone())
            for one, other in zip(disk.read(asked), disk.read(asked[::-1]), strict=True)
        ]
    except (MlcError, RuntimeError):
        return  # refused is as good
    for turn, (one, other) in enumerate(pairs):
        np.testing.assert_array_equal(one.numpy(), array.read(asked[turn]))
        np.testing.assert_array_equal(other.numpy(), array.read(asked[-1 - turn]))
