"""full_disk(): a disk without space, said in a sentence instead of in an error of a library."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlc.configs.errors import MlcError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def full_disk(path: Path, kept: str) -> Iterator[None]:
    """Raise an MlcError for what libraries raise in a block when the disk is full.

    Args:
        path: of the store.
        kept: what is kept, and what the next call does.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # HDF5 raises RuntimeError when a file is closed
        if not is_full(error):
            raise
        raise MlcError(f"{path}: the disk is full, {kept}") from None


def is_full(error: BaseException | None) -> bool:
    """Return whether an error says that the disk is full."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return isinstance(error, OSError | RuntimeError) and f"errno = {errno.ENOSPC}," in str(error)
