"""The journal: a file that was being changed when its process died is as it was before."""

import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlc.configs.errors import MlcError
from mlc.store import journal as module
from mlc.store.journal import JournaledFile, journal_path, journaled, roll_back

OLD = bytes(range(256)) * 100  # 25,600 bytes: six blocks and a part of one


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.h5"
    path.write_bytes(OLD)
    return path


def put(file: JournaledFile, start: int, data: bytes) -> None:
    file.seek(start)
    assert file.write(data) == len(data)


def left(path: Path, start: int = 5000, data: bytes = b"new" * 100) -> None:
    """Change a file and die."""
    with JournaledFile(path) as file:
        put(file, start, data)


def change_and_fail(path: Path, error: BaseException) -> None:
    with journaled(path) as file:
        put(file, 100, b"new" * 5000)
        file.truncate(200)
        put(file, 30000, b"new")
        raise error


def only_the_file(path: Path) -> bool:
    return list(path.parent.iterdir()) == [path]


# --- plain files ---------------------------------------------------------------------------------


def test_a_change_that_ends_well_is_final(path: Path) -> None:
    with journaled(path) as file:
        put(file, 10, b"new")
        put(file, len(OLD) - 1, b"longer")
        assert journal_path(path) == path.with_name(".a.h5.journal")
        assert journal_path(path).exists()
    assert path.read_bytes() == OLD[:10] + b"new" + OLD[13:-1] + b"longer"
    assert only_the_file(path)
    assert not roll_back(path)


@pytest.mark.parametrize("error", [KeyError(), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_change_that_fails_is_undone(path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        change_and_fail(path, error)
    assert path.read_bytes() == OLD
    assert only_the_file(path)


def test_a_change_that_was_cut_off_is_undone_when_asked(path: Path) -> None:
    left(path)
    assert path.read_bytes() != OLD
    assert roll_back(path)
    assert path.read_bytes() == OLD
    assert only_the_file(path)
    assert not roll_back(path)


def test_a_change_that_was_cut_off_is_undone_before_the_next(path: Path) -> None:
    left(path)
    with journaled(path) as file:
        put(file, 0, b"N")
    assert path.read_bytes() == b"N" + OLD[1:]


def test_a_second_change_does_not_take_the_journal_of_the_first(path: Path) -> None:
    left(path)
    with pytest.raises(FileExistsError):
        JournaledFile(path)
    assert roll_back(path)
    assert path.read_bytes() == OLD


def test_what_was_kept_or_is_new_is_not_kept_again(path: Path) -> None:
    with journaled(path) as file:
        sizes = [journal_path(path).stat().st_size]
        for start, data in ((5000, b"a"), (5001, b"bc"), (len(OLD), b"d" * 9999), (4096, b"e")):
            put(file, start, data)
            sizes.append(journal_path(path).stat().st_size)
        put(file, 4096, b"f" * 4097)
        sizes.append(journal_path(path).stat().st_size)
    record = module.BLOCK_BYTES + module.RECORD.size
    assert np.diff(sizes).tolist() == [record, 0, 0, 0, record]


def test_a_record_is_of_one_range_and_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECORD_BLOCKS", 3)
    runs = list(module._runs([1, 4, 5, 6, 7, 8, 9, 10, 12]))
    assert runs == [range(1, 2), range(4, 7), range(7, 10), range(10, 11), range(12, 13)]


def test_a_link_to_the_file_has_the_same_journal(path: Path) -> None:
    link = path.with_name("link.h5")
    link.symlink_to(path)
    left(link)
    assert roll_back(path)
    assert path.read_bytes() == OLD


# --- any change, cut off anywhere ----------------------------------------------------------------

CHANGES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 60), st.binary(max_size=30)),  # write: start, bytes
        st.tuples(st.integers(0, 60), st.none()),  # truncate: size
    ),
    max_size=8,
)


def apply(file: JournaledFile, start: int, data: bytes | None) -> None:
    if data is None:
        assert file.truncate(start) == start
    else:
        put(file, start, data)


def applied(old: bytes, start: int, data: bytes | None) -> bytes:
    """Return what a plain file would hold."""
    if data is None:
        return old[:start].ljust(start, b"\0")
    if not data:
        return old
    return old[:start].ljust(start, b"\0") + data + old[start + len(data) :]


@settings(max_examples=80, deadline=None, database=None)
@given(old=st.binary(max_size=50), changes=CHANGES, torn=st.integers(0, 40))
def test_any_change_is_undone(old: bytes, changes: list[tuple], torn: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(module, "BLOCK_BYTES", 4),
        patch.object(module, "RECORD_BLOCKS", 3),
    ):
        path = Path(folder) / "a"
        path.write_bytes(old)
        expected = old
        with JournaledFile(path) as file:
            for start, data in changes:
                apply(file, start, data)
                expected = applied(expected, start, data)
                assert path.read_bytes() == expected
        # A kill in the middle of a record: 24 bytes of head, 12 of 16 old bytes.
        with journal_path(path).open("ab") as journal:
            journal.write(module._record(0, b"x" * 16)[: min(torn, 39)])
        assert roll_back(path)
        assert path.read_bytes() == old
        assert only_the_file(path)


@contextmanager
def power_cuts(path: Path, old: bytes) -> Iterator[list[int]]:
    """At each moment before an fsync, check that what is on the disk by then is enough.

    Yields:
        Sizes of the journal on the disk; whoever changes the file checks its last one.
    """
    durable = [0]
    real = os.fsync

    def fsync(descriptor: int) -> None:
        require_enough(path, old, durable[-1])
        real(descriptor)
        if os.path.samestat(os.fstat(descriptor), journal_path(path).stat()):
            durable.append(os.fstat(descriptor).st_size)

    with patch.object(os, "fsync", fsync):
        yield durable


def require_enough(path: Path, old: bytes, durable: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy.write_bytes(path.read_bytes())
        journal_path(copy).write_bytes(journal_path(path).read_bytes()[:durable])
        with patch.object(os, "fsync"):
            assert roll_back(copy)
        assert copy.read_bytes() == old


def test_old_bytes_are_on_the_disk_before_they_are_overwritten(path: Path) -> None:
    generator = random.Random(20261123)
    with power_cuts(path, OLD) as durable, JournaledFile(path) as file:
        for _ in range(40):
            start = generator.randrange(30000)
            data = generator.randbytes(generator.choice([1, 100, 6000]))
            apply(file, start, data if generator.random() < 0.9 else None)
            require_enough(path, OLD, durable[-1])
    assert len(durable) > 5
    assert path.read_bytes() != OLD


def test_the_file_is_on_the_disk_before_its_journal_goes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            synced.append((path.read_bytes(), journal_path(path).exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with journaled(path) as file:
        put(file, 0, b"N")
    left(path)
    assert roll_back(path)
    new = b"N" + OLD[1:]
    assert synced == [(new, True), (new, True)]
    assert path.read_bytes() == new


def test_an_undoing_that_fails_can_be_repeated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left(path, start=0, data=b"new" * 8000)

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken disk")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="broken disk"):
            roll_back(path)
    assert roll_back(path)
    assert path.read_bytes() == OLD


# --- damaged and foreign journals ----------------------------------------------------------------


def test_a_torn_header_means_that_no_change_had_begun(path: Path) -> None:
    for size in range(module.HEADER.size):
        journal_path(path).write_bytes(module._header(10)[:size])
        assert roll_back(path)
        assert path.read_bytes() == OLD
        assert only_the_file(path)


@pytest.mark.parametrize("where", ["header", "head", "old bytes"])
def test_a_damaged_journal_is_refused_and_kept(path: Path, where: str) -> None:
    with JournaledFile(path) as file:
        for start in (0, 8192, 20000):
            put(file, start, b"new")
    changed = path.read_bytes()
    record = module.HEADER.size + module.BLOCK_BYTES + module.RECORD.size  # the second of three
    at = {"header": 9, "head": record + 3, "old bytes": record + module.RECORD.size + 7}[where]
    journal = bytearray(journal_path(path).read_bytes())
    journal[at] ^= 1
    journal_path(path).write_bytes(journal)
    for undo in (roll_back, lambda path: journaled(path).__enter__()):
        with pytest.raises(MlcError, match=r"\.a\.h5\.journal: damaged at byte \d+, so a change"):
            undo(path)
    assert path.read_bytes() == changed
    assert journal_path(path).read_bytes() == journal


def test_a_journal_of_a_file_that_is_gone_is_an_error(path: Path) -> None:
    left(path)
    path.unlink()
    with pytest.raises(MlcError, match=r"a\.h5: not there, but its journal is; delete \S+journal"):
        roll_back(path)


def test_a_journal_of_a_longer_file_is_an_error(path: Path) -> None:
    left(path)
    path.write_bytes(b"another file")
    with pytest.raises(MlcError, match=r"of another file, of 25600 bytes, got \S+a\.h5 of 12;"):
        roll_back(path)
    assert path.read_bytes() == b"another file"


# --- full disks ----------------------------------------------------------------------------------


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """A disk that is full in the middle of the write to the journal after so many."""
    real, count = os.write, 0

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal count
        count += 1
        if count <= after:
            return real(descriptor, data)
        if len(data) > 10:
            return real(descriptor, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch.object(os, "write", write):
        yield


@pytest.mark.parametrize("after", range(5))
def test_a_disk_that_is_full_of_journal_leaves_the_file(tmp_path: Path, after: int) -> None:
    path = make_store(tmp_path / "a.h5")
    old = path.read_bytes()
    with full_disk(after), pytest.raises(OSError, match="No space left on device"):
        grow(path)
    assert path.read_bytes() == old
    assert only_the_file(path)
    grow(path)
    require_grown(path)


def test_a_file_that_cannot_keep_is_not_changed_and_closed(path: Path) -> None:
    with JournaledFile(path) as file:
        put(file, 0, b"N")
        with full_disk(after=0), pytest.raises(OSError, match="No space"):
            put(file, 5000, b"N")
        assert file.closed
    assert path.read_bytes() == b"N" + OLD[1:]
    assert roll_back(path)
    assert path.read_bytes() == OLD


def change_regardless(path: Path, error: Exception | None) -> None:
    """Go on after a failure, as HDF5 does, and raise something else or nothing."""
    with journaled(path) as file:
        put(file, len(OLD), b"longer")
        with suppress(OSError):
            put(file, 0, b"N")
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [None, AttributeError("flush")])
def test_the_first_failure_is_raised_whatever_comes_of_it(
    path: Path, error: Exception | None
) -> None:
    with full_disk(after=1), pytest.raises(OSError, match="No space left on device"):
        change_regardless(path, error)
    assert path.read_bytes() == OLD
    assert only_the_file(path)


FILL = """
import sys
from pathlib import Path
from mlc.store.journal import journaled
path = Path(sys.argv[1])
try:
    with journaled(path) as file:
        file.seek(int(sys.argv[2]))
        for _ in range(8):
            file.write(b"new!" * 25000)
except OSError as error:
    print(error.strerror)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where one can be had: root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("start", [0, 700_000], ids=["journal", "file"])
def test_a_real_disk_that_is_full_leaves_the_file(small_disk: Path, start: int) -> None:
    path = small_disk / "a"
    old = random.Random(1).randbytes(700_000)
    path.write_bytes(old)
    command = [sys.executable, "-c", FILL, str(path), str(start)]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    assert said.stdout == "No space left on device\n"
    assert path.read_bytes() == old
    assert only_the_file(path)


# --- HDF5 ----------------------------------------------------------------------------------------

ROWS, MORE = 3000, 1500


def make_store(path: Path) -> Path:
    """Lay out an HDF5 file that can grow: chunks of one row, all allocated at once."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk((1, 4))
    layout.set_obj_track_times(False)  # else no two files have the same bytes
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "w-") as file:
        for name in ("pooled", "tokens"):
            space = h5py.h5s.create_simple((ROWS, 4), (h5py.h5s.UNLIMITED, 4))
            dtype = h5py.h5t.py_create(np.dtype(np.float32))
            h5py.h5d.create(file.id, name.encode(), dtype, space, dcpl=layout)
            file[name][:] = values(name)
        file.attrs["complete"] = np.bool_(True)
    return path


def values(name: str) -> np.ndarray:
    return np.random.default_rng(len(name)).normal(size=(ROWS, 4)).astype(np.float32)


def grow(path: Path) -> None:
    with journaled(path) as raw, h5py.File(raw, "r+") as file:
        file.attrs.modify("complete", np.bool_(False))
        for name in ("pooled", "tokens"):
            file[name].resize(ROWS + MORE, axis=0)
            file[name][ROWS:] = 1


def require_grown(path: Path) -> None:
    with h5py.File(path) as file:
        assert not file.attrs["complete"]
        for name in ("pooled", "tokens"):
            np.testing.assert_array_equal(file[name][:ROWS], values(name))
            np.testing.assert_array_equal(file[name][ROWS:], np.ones((MORE, 4), np.float32))


def test_an_hdf5_file_grows(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a.h5")
    grow(path)
    require_grown(path)
    assert only_the_file(path)


def test_an_hdf5_file_whose_growth_fails_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "a.h5")
    old = path.read_bytes()

    def resize(self: h5py.Dataset, size: int, axis: int) -> None:
        real(self, size, axis=axis)
        self.file.flush()
        if self.name == "/tokens":
            raise KeyError

    real = h5py.Dataset.resize
    monkeypatch.setattr(h5py.Dataset, "resize", resize)
    with pytest.raises(KeyError):
        grow(path)
    assert path.read_bytes() == old
    assert only_the_file(path)


def test_a_file_that_grows_is_closed_to_others(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a.h5")
    with h5py.File(path), pytest.raises(MlcError, match=r"a\.h5: another process has it open;"):
        grow(path)
    assert only_the_file(path)
    with journaled(path), pytest.raises(BlockingIOError):
        h5py.File(path)
    left(path)
    with JournaledFile.__base__(path, "r+") as reader:
        module._lock(reader.fileno(), path)
        with pytest.raises(MlcError, match="another process has it open"):
            roll_back(path)
    assert roll_back(path)


# One process that forks for each growth: h5py takes longer to import than the file to grow.
GROWER = """
import os, sys
from pathlib import Path
import numpy as np, h5py
from mlc.store.journal import journaled
path, rows = Path(sys.argv[1]), int(sys.argv[2])

def grow():
    os.write(1, b"%d\\n" % os.getpid())
    with journaled(path) as raw, h5py.File(raw, "r+") as file:
        file.attrs.modify("complete", np.bool_(False))
        for name in ("pooled", "tokens"):
            file[name].resize(rows, axis=0)
            file.flush()
            file[name][-100:] = 1

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            grow()
        finally:
            os._exit(0)
    os.write(1, b"%d\\n" % os.waitpid(child, 0)[1])
"""
KILLS = 24


@contextmanager
def grower(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", GROWER, str(path), str(ROWS + MORE)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as process:
        yield process
        process.stdin.close()


def begin_to_grow(process: subprocess.Popen[str]) -> int:
    """Return the pid of a process that grows the file."""
    process.stdin.write("\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def seconds_to_grow(process: subprocess.Popen[str]) -> float:
    begin_to_grow(process)
    begin = time.monotonic()
    assert process.stdout.readline() == "0\n"
    return time.monotonic() - begin


def test_twenty_four_kills_lose_nothing(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a.h5")
    old = path.read_bytes()
    generator = random.Random(20261123)
    undone = 0
    with grower(path) as process:
        seconds = seconds_to_grow(process)
        grown = path.read_bytes()
        for _ in range(KILLS):
            path.write_bytes(old)
            child = begin_to_grow(process)
            time.sleep(generator.uniform(0, seconds))
            with suppress(ProcessLookupError):  # It was quicker this time.
                os.kill(child, signal.SIGKILL)
            assert int(process.stdout.readline()) in (0, signal.SIGKILL)
            undone += roll_back(path)
            assert path.read_bytes() in (old, grown)  # old files opened, so this one does
            assert only_the_file(path)
    assert undone >= KILLS // 4, "too few kills were in time"
