"""Journal: a file that is changed in place, and is as it was if the change does not end well.

An HDF5 file that grows changes bytes all over the file. A process that is killed in the middle
leaves a file that may not open any more, with everything that was in it. So the bytes that a
change overwrites are kept beside the file, on the disk, before they are overwritten.

The journal ``.NAME.journal``: a header (magic, size of the file before the change, CRC-32), then
records (offset, length, CRC-32 of the bytes, CRC-32 of these three; the bytes). It is there from
before the first byte of the file is changed until after the last.
"""

import fcntl
import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mlc.configs.errors import MlcError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MAGIC = b"mlcundo1"
HEADER = struct.Struct("<8sQI")
RECORD = struct.Struct("<QQII")
CRC = struct.Struct("<I")
BLOCK_BYTES = 4096  # kept at once, even for a change of one byte
RECORD_BLOCKS = 4096  # in one record at most, which bounds memory


def journal_path(path: Path) -> Path:
    """Return where the journal of a file is while a change is under way."""
    path = path.resolve()
    return path.with_name(f".{path.name}.journal")


@contextmanager
def journaled(path: Path) -> Iterator["JournaledFile"]:
    """Change a file in place: wholly if the block ends well, not at all otherwise.

    HDF5 writes through it with ``with journaled(path) as raw, h5py.File(raw, "r+") as file:``.
    A process that is killed in the block leaves the change to ``roll_back``, which is also done
    here before a new one begins. Hold the file's ``writer_lock``.

    Raises:
        MlcError: another process has the file open, or a journal was left that is damaged.
    """
    roll_back(path)
    file = JournaledFile(path)
    try:
        yield file
        file.commit()
    except BaseException:
        file.close()
        roll_back(path)
        if file.failure is not None:  # HDF5 goes on after it, and raises what comes of that
            raise file.failure from None
        raise


def roll_back(path: Path) -> bool:
    """Undo the change that a killed process left in a file; may be killed itself, and repeated.

    Returns:
        Whether there was one.

    Raises:
        MlcError: the journal is damaged or of another file, and nothing was changed; or another
            process has the file open.
    """
    journal = journal_path(path)
    if not journal.exists():
        return False
    with journal.open("rb") as records:
        old_bytes = _read_header(journal, records)
        if old_bytes is not None:  # else not even the header was whole, and no change had begun
            _restore(path, old_bytes, journal, records)
    _remove(journal)
    return True


class JournaledFile(io.FileIO):
    """A file open for reading and writing that keeps in a journal what it overwrites.

    Only what was in the file when it was opened is kept, and only once. When bytes cannot be
    kept, because the disk is full, they are not overwritten. The first failure closes the file:
    whoever goes on regardless, as HDF5 does, must not write the half that still fits.

    Attributes:
        failure: why a write failed; None if none did.
    """

    _journal = -1

    def __init__(self, path: Path) -> None:
        super().__init__(path, "r+")
        self.failure: BaseException | None = None
        self._path = path
        self._kept: set[int] = set()
        try:
            _lock(self.fileno(), path)
            self._old_bytes = os.fstat(self.fileno()).st_size
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            self._journal = os.open(journal_path(path), flags, 0o666)
            self._append([_header(self._old_bytes)])
            _sync_folder(path)
        except BaseException:
            if self._journal >= 0:
                _remove(journal_path(path))
            self.close()
            raise

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all the bytes at the position, and return how many they are."""
        rest = memoryview(data).cast("B")
        total = len(rest)
        with self._closed_by_failure():
            start = self.tell()
            self._keep(start, start + total)
            while rest:
                rest = rest[super().write(rest) :]
        return total

    def truncate(self, size: int | None = None, /) -> int:
        """Cut or extend the file to a size, by default the position."""
        with self._closed_by_failure():
            size = self.tell() if size is None else size
            self._keep(size, self._old_bytes)
            return super().truncate(size)

    def commit(self) -> None:
        """Make the change final: see it through to the disk, then remove the journal."""
        os.fsync(self.fileno())
        self.close()
        _remove(journal_path(self._path))

    def close(self) -> None:
        """Close the file, and leave the journal where it is."""
        super().close()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def _keep(self, start: int, stop: int) -> None:
        """See the old bytes of a range through to the disk, those that are not there yet."""
        stop = min(stop, self._old_bytes)
        if start >= stop:
            return
        blocks = range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
        missing = [block for block in blocks if block not in self._kept]
        if missing:
            self._append(self._record(run) for run in _runs(missing))
            self._kept.update(missing)

    def _record(self, run: range) -> bytes:
        start = run.start * BLOCK_BYTES
        return _record(start, _read_at(self.fileno(), start, self._end(run) - start))

    def _end(self, run: range) -> int:
        return min(run.stop * BLOCK_BYTES, self._old_bytes)

    def _append(self, parts: Iterable[bytes]) -> None:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(self._journal, rest) :]
        os.fsync(self._journal)

    @contextmanager
    def _closed_by_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.failure = self.failure or error
            self.close()
            raise


def _runs(blocks: Sequence[int]) -> Iterator[range]:
    """Split ascending numbers into runs without gaps of ``RECORD_BLOCKS`` at most."""
    first = 0
    for index, block in enumerate(blocks):
        last = index + 1 == len(blocks) or blocks[index + 1] != block + 1
        if last or index + 1 - first == RECORD_BLOCKS:
            yield range(blocks[first], block + 1)
            first = index + 1


def _read_at(descriptor: int, start: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.pread(descriptor, count - len(data), start + len(data))
        if not part:
            raise OSError(f"the file ends at {start + len(data)}: another process has cut it")
        data += part
    return data


def _header(old_bytes: int) -> bytes:
    head = struct.pack("<8sQ", MAGIC, old_bytes)
    return head + CRC.pack(zlib.crc32(head))


def _record(start: int, old: bytes) -> bytes:
    head = struct.pack("<QQI", start, len(old), zlib.crc32(old))
    return head + CRC.pack(zlib.crc32(head)) + old


def _read_header(journal: Path, records: BinaryIO) -> int | None:
    """Return the file's old size; None if the header is torn: no change had begun."""
    head = records.read(HEADER.size)
    if len(head) == HEADER.size:
        magic, old_bytes, crc = HEADER.unpack(head)
        if magic == MAGIC and crc == zlib.crc32(head[: -CRC.size]):
            return int(old_bytes)
    if records.read(1):
        raise _damaged(journal, 0)
    return None


def _read_records(journal: Path, records: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield position and old bytes of each record.

    A torn last one is left out: what it was to keep had not been overwritten.
    """
    size = os.fstat(records.fileno()).st_size
    records.seek(HEADER.size)
    while len(head := records.read(RECORD.size)) == RECORD.size:
        start, count, crc, head_crc = RECORD.unpack(head)
        stop = records.tell() + count
        if head_crc != zlib.crc32(head[: -CRC.size]):
            raise _damaged(journal, records.tell() - RECORD.size)
        old = records.read(count)
        if crc == zlib.crc32(old):
            yield start, old
        elif stop < size:
            raise _damaged(journal, stop - count)


def _restore(path: Path, old_bytes: int, journal: Path, records: BinaryIO) -> None:
    # All records are read before the first byte is changed.
    ends = [start + len(old) for start, old in _read_records(journal, records)]
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        raise MlcError(f"{path}: not there, but its journal is; delete {journal}") from None
    with file:
        _lock(file.fileno(), path)
        size = os.fstat(file.fileno()).st_size
        if max([size, *ends]) < old_bytes:
            raise MlcError(
                f"{journal}: the journal of another file, of {old_bytes} bytes, "
                f"got {path} of {size}; delete the journal"
            )
        for start, old in _read_records(journal, records):
            file.seek(start)
            file.write(old)
        file.truncate(old_bytes)
        os.fsync(file.fileno())


def _damaged(journal: Path, where: int) -> MlcError:
    return MlcError(
        f"{journal}: damaged at byte {where}, so a change that was cut off cannot be undone; "
        "delete it with its file, and make the file again"
    )


def _lock(descriptor: int, path: Path) -> None:
    """Lock a file as HDF5 does, so that neither reads what the other is changing."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MlcError(f"{path}: another process has it open; wait for it") from None
    except OSError:
        pass  # A file system without locks: HDF5 goes on too.


def _remove(journal: Path) -> None:
    journal.unlink()
    _sync_folder(journal)


def _sync_folder(path: Path) -> None:
    """See the name of a file through to the disk."""
    descriptor = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # Some file systems have no such thing for folders.
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
