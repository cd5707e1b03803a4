"""One writer to a store: a lock that the operating system drops when its process dies."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlc.configs.errors import MlcError

# What file systems of clusters say that are mounted without locks, Lustre and NFS among them.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def writer_lock(store: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the right to write to a store, whether it exists yet or not.

    Args:
        store: path of the store.
        shared: hold it together with the other workers of a store, each of which writes only the
            shards that it holds a lease of; it keeps out the one writer of all shards. Where the
            file system has no locks, workers go without: their leases need none.

    Raises:
        MlcError: another process holds it, or the store's folder cannot be written to.
    """
    store = store.resolve()
    path = store.with_name(f".{store.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w+")
    except OSError as error:
        raise MlcError(
            f"{path}: cannot be opened for writing ({error.strerror}); "
            "name a store in another folder with --out"
        ) from None
    with file:
        _lock(file.fileno(), store, shared)
        if not _is_at(path, file.fileno()):
            raise MlcError(f"{store}: was removed at this moment; run the same command again")
        yield
        # Left in place, but by the removal of a store: two processes could else hold locks on
        # different files.


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether the file at a path is the one that was opened."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _lock(descriptor: int, store: Path, shared: bool) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        if shared:
            raise MlcError(
                f"{store}: another process is writing to the whole of it, not to shards; "
                "wait for it"
            ) from None
        raise MlcError(f"{store}: another process is writing to it; wait for it") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if not shared:
            raise MlcError(
                f"{store}: its file system has no locks ({error.strerror}); name a store on "
                "another with --out, or make a .zarr store with --shard, whose leases need none"
            ) from None
