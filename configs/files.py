"""Files that are whole or absent: written aside, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlc.configs.errors import MlcError


@contextmanager
def written_aside(path: Path, *, by_several: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of ``path`` if the block succeeds.

    Args:
        path: of the file.
        by_several: several processes may write the same file at once; the last one's stays.

    Raises:
        MlcError: a folder is at the path.
    """
    path = path.absolute()
    if path.is_dir():
        raise MlcError(f"{path}: is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    if by_several:
        partial = partial.with_name(f"{partial.name}-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Return where a file is written before it is renamed; a killed process leaves it there."""
    return path.with_name(f".{path.name}.partial")
