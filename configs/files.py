"""Files that are whole or absent: written aside, then renamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlc.configs.errors import MlcError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of ``path`` if the block succeeds.

    Raises:
        MlcError: a folder is at the path.
    """
    path = path.absolute()
    if path.is_dir():
        raise MlcError(f"{path}: is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Return where a file is written before it is renamed; a killed process leaves it there."""
    return path.with_name(f".{path.name}.partial")
