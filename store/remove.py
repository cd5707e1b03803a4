"""remove_store(): a store and all that belongs to it, and nothing that is not one."""

import os
import shutil
from pathlib import Path

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.catalog import REMOVED, beside, disk_usage, find_beside
from mlc.store.journal import journal_path, roll_back
from mlc.store.lease import require_no_worker
from mlc.store.lock import writer_lock
from mlc.store.problems import BROKEN

ATTRIBUTES = ("schema_version", "key", "complete", "made_by")  # what tells a store from a Zarr


def remove_store(path: Path) -> int:
    """Remove a store with its labels, leases and lock, or one leftover of a killed process.

    The store is renamed before it is deleted: a process that is killed in between leaves
    ``.NAME.removed`` and no half store, and the same call goes on.

    Args:
        path: the store, even if only what lies beside it is left, or a path of
            ``find_leftovers``.

    Returns:
        The bytes that the disk got back.

    Raises:
        MlcError: nothing is there, it is not a store, a process writes to it, or the system does
            not let it be removed.
    """
    part = beside(path)
    if part is None:
        return _remove_all(path)
    if not os.path.lexists(path):
        raise MlcError(f"{path}: nothing there")
    if not part.is_leftover():
        raise MlcError(f"{path}: belongs to {part.store}, which is there; remove that")
    with writer_lock(part.store):
        require_no_worker(part.store)
        freed = _delete(path)
        return freed if part.store.exists() else freed + _delete_lock(part.store)


def _remove_all(store: Path) -> int:
    schema.format_of(store)
    if store.is_symlink():
        raise MlcError(f"{store}: is a link to {store.readlink()}; remove that, then the link")
    if not store.exists() and not find_beside(store):
        raise MlcError(f"{store}: no such store")
    if store.exists() and not journal_path(store).exists():
        _require_store(store)  # before the lock too, which makes a file
    with writer_lock(store):
        require_no_worker(store)
        freed = _rename_and_delete(store) if store.exists() else 0
        parts = [part for part in find_beside(store) if part.kind != "lock"]
        freed += sum(_delete(part.path) for part in parts)
        return freed + _delete_lock(store)


def _rename_and_delete(store: Path) -> int:
    roll_back(store)
    _require_store(store)
    aside = store.with_name(f".{store.name}.{REMOVED}")
    freed = _delete(aside)
    try:
        store.rename(aside)
    except OSError as error:
        raise MlcError(f"{store}: cannot be removed ({error.strerror})") from None
    return freed + _delete(aside)


def _require_store(path: Path) -> None:
    """Raise an MlcError if what is at a path is not a store of mlc, of whatever version."""
    try:
        backend = schema.format_of(path).open(path)
        try:
            missing = sorted(set(ATTRIBUTES) - backend.attributes().keys())
        finally:
            backend.close()
    except MlcError as error:
        raise MlcError(f"{error}; if it is to go, delete it yourself") from None
    except BROKEN as error:
        raise MlcError(f"{path}: damaged ({error}); if it is to go, delete it yourself") from None
    if missing:
        raise MlcError(
            f"{path}: not a feature store, it has no {', '.join(missing)}; if it is to go, "
            "delete it yourself"
        )


def _delete(path: Path) -> int:
    """Delete a file or folder if it is there; return the bytes that the disk got back."""
    freed = disk_usage(path).allocated_bytes
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise MlcError(f"{path}: cannot be removed ({error.strerror}); see who owns it") from None
    return freed


def _delete_lock(store: Path) -> int:
    """Delete the lock, held by this process, of a store that is there no more."""
    return sum(_delete(part.path) for part in find_beside(store) if part.kind == "lock")
