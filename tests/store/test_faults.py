"""Faults: killed writers, full disks, damaged files. Nothing is silent, nothing else is lost."""

import contextlib
import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from store_content import (
    Content,
    arrays,
    assert_holds,
    assert_same_store,
    content,
    fill,
    key_of,
    numbered,
    pending,
    writing,
)

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.reader import FeatureStore
from mlc.store.writer import StoreWriter
from mlc.store.zarr_v3 import ZarrBackend

ONE_LAYER = key_of("pooled:float32", "tokens:float16", layers=("layer3",))

# --- killed writers ------------------------------------------------------------------------------

NURSERY = """
import os, pickle, sys, time
from pathlib import Path
from mlc.store.writer import StoreWriter
from mlc.store.zarr_v3 import ZarrBackend
layout, parts = pickle.load(sys.stdin.buffer)
for line in sys.stdin:
    process = os.fork()
    if process == 0:
        print("creating", os.getpid(), flush=True)
        writer = StoreWriter.create_or_resume(Path(line.strip()), layout)
        for part in parts:
            writer.write_shard(*part)
            print("written", flush=True)
        time.sleep(600)  # until it is killed
    os.waitpid(process, 0)
    print("ended", flush=True)
"""
SHARDS = 12
QUICK_KILLS, KILLS = 4, 24


class Nursery:
    """A process that forks writers of some content, one after the other, to be killed."""

    def __init__(self, what: Content) -> None:
        shard_rows, rows = what.layout.shard_rows, len(what.error)
        parts = [
            what.part(range(start, min(start + shard_rows, rows)))
            for start in range(0, rows, shard_rows)
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], **pipes)
        self._send(pickle.dumps((what.layout, parts)))

    def _send(self, data: bytes) -> None:
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def _said(self) -> str:
        return self.process.stdout.readline().decode().strip()

    def kill_writer(self, path: Path, after: int, seconds: float) -> int:
        """Kill a writer some time after so many shards, 0 while it opens the store.

        Returns:
            How many shards it had written by its own account.
        """
        self._send(f"{path}\n".encode())
        word, pid = self._said().split()
        assert word == "creating"
        for _ in range(after):
            assert self._said() == "written"
        time.sleep(seconds)
        os.kill(int(pid), signal.SIGKILL)
        # The writer may be killed between a word and the end of its line.
        while not (said := self._said()).endswith("ended"):
            assert said == "written"
            after += 1
        return after


@contextmanager
def nursery(what: Content) -> Iterator[Nursery]:
    forks = Nursery(what)
    try:
        yield forks
    finally:
        forks.process.kill()
        forks.process.communicate()


def kill_and_resume(folder: Path, suffix: str, kills: int, seed: int) -> None:
    """Kill writers at random moments; each store resumed is as one that was never stopped."""
    bad = dict.fromkeys(range(0, 2 * SHARDS, 10), "bad")
    what = content(numbered(2 * SHARDS), 2, key=ONE_LAYER, reasons=bad)
    whole = fill(folder / f"whole{suffix}", what)
    generator = np.random.default_rng(seed)
    afters = [0, *generator.integers(0, SHARDS // 2, kills - 1).tolist()]
    with nursery(what) as forks:
        for turn, after in enumerate(afters):
            path = folder / f"killed{turn}{suffix}"
            written = forks.kill_writer(path, after, generator.uniform(0, 0.02))
            with writing(path, what.layout) as writer:
                left = pending(writer)
                assert left, "the writer was done before it was killed"
                assert written <= SHARDS - len(left) <= written + 1
            assert_same_store(fill(path, what), whole)
            assert not list(folder.glob(".*partial*"))
            assert not list(folder.rglob("*.partial"))


def test_a_killed_writer_loses_the_shard_in_flight_at_most(tmp_path: Path, suffix: str) -> None:
    kill_and_resume(tmp_path, suffix, QUICK_KILLS, seed=20261123)


@pytest.mark.slow
def test_of_many_killed_writers_none_loses_more(tmp_path: Path, suffix: str) -> None:
    kill_and_resume(tmp_path, suffix, KILLS, seed=24)


def kill_growth(folder: Path, suffix: str, kills: int, seed: int) -> None:
    """Kill writers that add images; what they leave is what was there, or that and empty rows."""
    what = content(numbered(20), key=ONE_LAYER, reasons={})
    old = what.first(10)
    small = fill(folder / f"small{suffix}", old)
    whole = fill(folder / f"whole{suffix}", what)
    generator = np.random.default_rng(seed)
    with nursery(what) as forks:
        for turn in range(kills):
            path = folder / f"grown{turn}{suffix}"
            (shutil.copytree if small.is_dir() else shutil.copy)(small, path)
            forks.kill_writer(path, 0, generator.uniform(0, 0.15))
            StoreWriter.open(path).close()  # undoes a growth that was cut off
            with FeatureStore(path, unfinished=True) as store:
                rows = len(store.image_id)
                assert (store.status[:10] == schema.OK).all()
            assert rows in (10, 20)
            if rows == 10:
                assert_holds(fill(path, old), old)
            assert_same_store(fill(path, what), whole)


def test_a_growth_that_is_killed_leaves_the_old_store_or_the_new(
    tmp_path: Path, suffix: str
) -> None:
    kill_growth(tmp_path, suffix, QUICK_KILLS, seed=2)


@pytest.mark.slow
def test_of_many_growths_that_are_killed_none_leaves_anything_else(
    tmp_path: Path, suffix: str
) -> None:
    kill_growth(tmp_path, suffix, KILLS, seed=24)


class Killed(BaseException):
    """Stands for kill -9 between two steps."""


GROWTH_STEPS = 16  # and one more, after which nothing is cut off


@pytest.mark.parametrize("step", [0, 1, 2, 8, 12, 13, 14, 15, GROWTH_STEPS])
def test_a_growth_of_zarr_may_be_cut_off_between_any_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    what = content(reasons={}, key=ONE_LAYER)
    old = what.first(4)
    path = fill(tmp_path / "a.zarr", old)
    steps = iter(range(1000))

    def cut(done: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(steps) == step:
                raise Killed
            return done(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(ZarrBackend, "write", cut(ZarrBackend.write))
        patch.setattr(ZarrBackend, "set_attribute", cut(ZarrBackend.set_attribute))
        patch.setattr(zarr.Array, "resize", cut(zarr.Array.resize))
        grown = False
        with contextlib.suppress(Killed):
            StoreWriter.create_or_resume(path, what.layout).close()
            grown = True
    assert grown == (step >= GROWTH_STEPS), "each of the steps is cut off once"
    with FeatureStore(path, unfinished=True) as store:
        assert len(store.image_id) == (7 if grown else 4)
        array = store.features("layer3", "tokens")
        np.testing.assert_array_equal(array.read(np.arange(8)), encoded_units(old, array.name))
    if not grown:  # the same images, fewer, or others may be asked for next
        assert_holds(fill(path, old), old)
        ids = [*old.layout.image_id.tolist(), "other.jpg", "not", "asked for"]
        other = content(ids, reasons={}, key=ONE_LAYER).first(5)
        assert_holds(fill(path, other), other)
    else:
        assert_holds(fill(path, what), what)


def encoded_units(what: Content, name: str) -> np.ndarray:
    """Return the units (N*V, ...) of an array as they must be stored."""
    stored = what.encoded(name)[0]
    return stored.reshape(-1, *stored.shape[2:])


# --- full disks ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where it may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def ballast(disk: Path, free_bytes: int) -> Path:
    """Leave so much of a disk free."""
    path = disk / "ballast"
    path.unlink(missing_ok=True)
    status = os.statvfs(disk)
    with path.open("wb") as file:
        file.write(b"x" * (status.f_bavail * status.f_bsize - free_bytes))
    return path


FREE_KB = (0, 12, 64, 150, 200, 300)


@pytest.mark.parametrize("free_kb", FREE_KB)
def test_a_full_disk_says_what_is_kept_and_the_rest_follows(
    small_disk: Path, tmp_path: Path, suffix: str, free_kb: int
) -> None:
    wide = {"layer3/pooled": (700,), "layer3/tokens": (9, 700)}
    what = content(numbered(24), 4, key=ONE_LAYER, shapes=wide, reasons={3: "broken"})
    whole = fill(tmp_path / f"whole{suffix}", what)
    path = small_disk / f"a{suffix}"
    filler = ballast(small_disk, free_kb * 1024)
    with pytest.raises(MlcError, match=r"the disk is full, .*free space"):
        fill(path, what)
    filler.unlink()
    if path.exists():
        with FeatureStore(path, unfinished=True) as store:
            done = np.flatnonzero(store.status != schema.PENDING)
            array = store.features("layer3", "tokens")
            want = encoded_units(what, array.name)
            for unit in array.units_of(done, 1).tolist():
                np.testing.assert_array_equal(array.read(np.array([unit]))[0], want[unit])
    assert_same_store(fill(path, what), whole)


@pytest.mark.parametrize("free_kb", [0, 12, 64])
def test_a_growth_on_a_full_disk_keeps_what_was_there(
    small_disk: Path, tmp_path: Path, suffix: str, free_kb: int
) -> None:
    wide = {"layer3/pooled": (300,), "layer3/tokens": (3, 300)}
    what = content(numbered(24), 4, key=ONE_LAYER, shapes=wide, reasons={3: "broken"})
    whole = fill(tmp_path / f"whole{suffix}", what)
    path = fill(small_disk / f"a{suffix}", what.first(8))
    filler = ballast(small_disk, free_kb * 1024)
    with pytest.raises(MlcError, match=r"the disk is full, .*free space"):
        fill(path, what)
    filler.unlink()
    with StoreWriter.open(path).filling(finish=False):
        pass
    with FeatureStore(path, unfinished=True) as store:
        read = store.features("layer3", "tokens").read(np.arange(16))
        np.testing.assert_array_equal(
            read, what.encoded("layer3/tokens")[0][:8].reshape(16, 3, 300)
        )
    assert_same_store(fill(path, what), whole)


@pytest.mark.parametrize("call", range(6))
def test_a_write_that_finds_no_space_is_said_where_no_disk_can_be_mounted(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    what = content(key=ONE_LAYER)
    pwritev, calls = os.pwritev, iter(range(1000))

    def full(*args: Any) -> int:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwritev(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        kept = 3 * (call // 2)  # two arrays a shard
        expected = (
            rf"{path.name}: the disk is full, {kept} of 7 images are kept; free space, the sa"
        )
        with pytest.raises(MlcError, match=expected):
            fill(path, what)
    assert_same_store(fill(path, what), fill(path.with_name(f"whole{path.suffix}"), what))


# --- damaged features ----------------------------------------------------------------------------


def place_of(path: Path, name: str, row: int, view: int) -> tuple[Path, int]:
    """Return the file and the offset of the bytes of a unit."""
    with FeatureStore(path) as store:
        units = store.features(*name.rsplit("/", 1)).units
    unit = row * units.views + view
    return units.files[units.file[unit]], int(units.offset[unit])


def flip(file: Path, offset: int, bit: int = 3) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("name", ["pre_logits/pooled", "layer3/tokens", "pre_logits/prefix"])
@pytest.mark.parametrize("byte", [0, -1], ids=["first", "last"])
def test_a_flipped_byte_is_told_by_image_and_by_nothing_else(
    path: Path, name: str, byte: int
) -> None:
    what = content()
    fill(path, what)
    layer, kind = name.split("/")
    file, offset = place_of(path, name, 4, 1)
    stored = what.encoded(name)[0]
    flip(file, offset + byte % stored[0, 0].nbytes)
    where = (
        rf"{path.name}: damaged, {name} of image 🦩.gif \(row 4, view hflip\): not as it was "
        "written; see all with mlc store verify, mend it with mlc store repair"
    )
    with FeatureStore(path) as store:
        array = store.features(layer, kind)
        with pytest.raises(MlcError, match=where):
            array.read_all(1)
        with pytest.raises(MlcError, match=where):
            array.read(np.array([3, 9, 2]))
        np.testing.assert_array_equal(array.read_all(0), what.expected(name)[:, 0])
        others = np.delete(np.arange(14), 9)
        np.testing.assert_array_equal(
            array.read(others), stored.reshape(14, *stored.shape[2:])[others]
        )
        unchecked = array.read(np.array([9]), check=False)
        assert (unchecked != stored[4, 1]).sum() == 1


def test_pooled_features_that_are_damaged_are_refused_unless_asked_for(path: Path) -> None:
    what = content()
    file, offset = place_of(fill(path, what), "pre_logits/pooled", 0, 0)
    flip(file, offset)
    with FeatureStore(path) as store:
        with pytest.raises(MlcError, match=r"pre_logits/pooled of image z/1\.jpg \(row 0, view or"):
            store.pooled()
        assert np.flatnonzero(
            (store.pooled(check=False) != what.expected("pre_logits/pooled")[:, 0]).any(axis=1)
        ).tolist() == [0]


def test_several_damaged_units_are_counted(path: Path) -> None:
    fill(path, content())
    for row in (1, 3, 4):
        flip(*place_of(path, "layer3/tokens", row, 0))
    with (
        FeatureStore(path) as store,
        pytest.raises(MlcError, match=r"image a b;c.jpg \(row 1, view orig\) and 2 more: not as"),
    ):
        store.features("layer3", "tokens").read_all()


# --- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_hdf5_file_is_damaged(tmp_path: Path, share: float) -> None:
    path = fill(tmp_path / "a.h5", content())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(MlcError, match="damaged"):
        FeatureStore(path)
    with pytest.raises(MlcError, match="damaged"):
        StoreWriter.create_or_resume(path, content().layout)


@pytest.mark.parametrize("name", ["pre_logits/pooled", "layer3/tokens"])
def test_a_truncated_file_of_features_is_damage(tmp_path: Path, name: str) -> None:
    what = content()
    path = fill(tmp_path / "a.zarr", what)
    file, _ = place_of(path, name, 4, 1)
    file.write_bytes(file.read_bytes()[:-3])
    with FeatureStore(path) as store:
        array = store.features(*name.split("/"))
        with pytest.raises(
            MlcError, match=rf"damaged, {name} of image 42 \(row 5, view hflip\).*tr"
        ):
            array.read(np.array([11]))
        first = what.encoded(name)[0].reshape(14, *array.unit_shape)[:6]
        np.testing.assert_array_equal(array.read(np.arange(6)), first)


@pytest.mark.parametrize(
    "name",
    [
        *("pre_logits/pooled", "layer3/tokens", "status", "image_id", "content_hash"),
        *("row_crc32c", "layer3/tokens_crc32c", "layer3/tokens_scale"),
    ],
)
def test_a_lost_chunk_is_damage_and_not_zeros(tmp_path: Path, name: str) -> None:
    path = fill(tmp_path / "a.zarr", content(key=key_of("pooled:float32", "tokens:int8")))
    next(chunk for chunk in (path / name / "c").rglob("*") if chunk.is_file()).unlink()
    with (
        pytest.raises(MlcError, match=rf"{path.name}: damaged, .*mlc store repair"),
        FeatureStore(path) as store,
    ):
        store.features("layer3", "tokens").read_all()


def test_a_shard_that_is_lost_while_a_store_is_open_is_damage(tmp_path: Path) -> None:
    path = fill(tmp_path / "a.zarr", content())
    with FeatureStore(path) as store:
        array = store.features("layer3", "tokens")
        place_of(path, "layer3/tokens", 4, 1)[0].unlink()
        with pytest.raises(MlcError, match=r"image 写真/猫.jpg \(row 3, view orig\).*: missing; "):
            array.read_all()


@pytest.mark.parametrize("byte", [0, 8, 20, -5, -1])
def test_a_damaged_index_of_a_shard_is_told_and_the_other_shards_are_read(
    tmp_path: Path, byte: int
) -> None:
    what = content()
    path = fill(tmp_path / "a.zarr", what)
    file, offset = place_of(path, "layer3/tokens", 3, 0)
    flip(file, byte % offset)
    with FeatureStore(path) as store:
        array = store.features("layer3", "tokens")
        with pytest.raises(
            MlcError, match=r"image 🦩.gif \(row 4, .*: its index is damaged; see all"
        ):
            array.read(np.array([9]))
        want = what.encoded("layer3/tokens")[0].reshape(14, 2, 3)
        good = np.array([13, 0, 5])
        np.testing.assert_array_equal(array.read(good), want[good])


def small_files(path: Path) -> list[Path]:
    """The chunks of the arrays of a Zarr store that are not features."""
    features = {"pooled", "tokens", "prefix"}
    chunks = [each for each in path.rglob("c/**/*") if each.is_file()]
    return sorted(each for each in chunks if not features & set(each.parts))


def outcome(path: Path, what: Content) -> str:
    """Return what a read of everything says is wrong, "same" if it is as it was, else "silent"."""
    try:
        with FeatureStore(path) as store:  # rows are compared when features are asked for
            store.features(*next(iter(store.arrays)).rsplit("/", 1))
        assert_holds(path, what)
    except MlcError as error:
        return str(error)
    except AssertionError:
        return "silent"
    return "same"


def test_a_flipped_byte_in_any_small_chunk_of_zarr_is_never_silent(tmp_path: Path) -> None:
    key = key_of("tokens:int8", layers=("layer3",))
    what = content(key=key, shard_rows=7)
    path = fill(tmp_path / "a.zarr", what)
    generator = np.random.default_rng(0)
    outcomes = {}
    for file in small_files(path):
        for offset in generator.choice(size := file.stat().st_size, min(size, 6), replace=False):
            flip(file, int(offset), bit=0)
            outcomes[f"{file.relative_to(path)} at {offset} of {size}"] = outcome(path, what)
            flip(file, int(offset), bit=0)
    assert not [where for where, each in outcomes.items() if each == "silent"]
    assert any(f"{path.name}: damaged" in each for each in outcomes.values())


def test_a_flipped_byte_in_a_small_array_of_hdf5_is_never_silent(tmp_path: Path) -> None:
    what = content(key=key_of("tokens:int8", layers=("layer3",)), shard_rows=7)
    path = fill(tmp_path / "a.h5", what)
    counts = ["layer3/tokens_crc32c", "layer3/tokens_clipped", "layer3/tokens_scale"]
    places = {}
    with h5py.File(path) as file:
        for name in (*schema.ROW_ARRAYS, *counts):
            offset = file[name].id.get_chunk_info(0).byte_offset
            places[name] = offset + file[name].dtype.itemsize  # of the second number or text
    for name, place in places.items():
        flip(path, place, bit=0)
        assert f"{path.name}: damaged" in outcome(path, what), name
        flip(path, place, bit=0)
    assert outcome(path, what) == "same"


# --- read only -----------------------------------------------------------------------------------


@pytest.fixture
def read_only(path: Path) -> Iterator[Path]:
    """A finished store in a folder that is mounted read-only."""
    folder = path.parent / "read-only"
    folder.mkdir()
    path = fill(folder / path.name, content())
    binds = [
        ["mount", "--bind", str(folder), str(folder)],
        ["mount", "-o", "remount,ro,bind", str(folder)],
    ]
    if shutil.which("mount") is None or any(
        subprocess.run(bind, capture_output=True).returncode for bind in binds
    ):
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)
        pytest.skip("may not mount a folder read-only")
    yield path
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_store_is_read(read_only: Path) -> None:
    assert_holds(read_only, content())


def test_a_read_only_store_is_not_written_to_and_says_so(read_only: Path) -> None:
    expected = rf"{read_only.name}: (?!.*damaged).*(permission|[Rr]ead-only)"
    with pytest.raises(MlcError, match=expected):
        fill(read_only, content([*content().layout.image_id.tolist(), "new.jpg"]))
    before = arrays(read_only)
    np.testing.assert_array_equal(before[schema.IMAGE_ID], content().layout.image_id)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write whatever the mode")
def test_a_store_without_write_permission_is_read_and_not_written_to(path: Path) -> None:
    what = content()
    fill(path, what)
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    for file in files:
        file.chmod(0o555 if file.is_dir() else 0o444)
    try:
        assert_holds(path, what)
        with pytest.raises(MlcError, match=rf"{path.name}: .*permission"):
            fill(path, content([*what.layout.image_id.tolist(), "new.jpg"]))
    finally:
        for file in files:
            file.chmod(0o755)
