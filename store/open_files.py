"""OpenFiles: files that are opened once and read by many threads."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OpenFiles:
    """Descriptors of files, kept until the block ends; of any more than it may keep, for a read.

    Opening and closing takes as long as reading 100 kB, and each call into the system has threads
    wait for one another.
    """

    def __init__(self, most: int | None = None) -> None:
        """Keep nothing yet.

        Args:
            most: files to keep; by default a quarter of those that the system lets a process open.
        """
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = limit // 4 if most is None else most
        self._kept: dict[Path, int] = {}

    @contextmanager
    def opened(self, path: Path) -> Iterator[int]:
        """Yield the descriptor of a file for reading."""
        kept = self._kept.get(path)
        if kept is not None:
            yield kept
            return
        descriptor = os.open(path, os.O_RDONLY)
        room = len(self._kept) < self._most
        if room and self._kept.setdefault(path, descriptor) == descriptor:
            yield descriptor
            return
        try:  # no room, or another thread has opened it at the same moment
            yield descriptor
        finally:
            os.close(descriptor)

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._kept.values():
            os.close(descriptor)
        self._kept.clear()
