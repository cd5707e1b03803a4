"""One writer to a store: a lock that the operating system drops when its process dies."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlc.configs.errors import MlcError


@contextmanager
def writer_lock(store: Path) -> Iterator[None]:
    """Hold the right to write to a store, whether it exists yet or not.

    Raises:
        MlcError: another process holds it.
    """
    store = store.resolve()
    path = store.with_name(f".{store.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MlcError(f"{store}: another process is writing to it; wait for it") from None
        yield
        # Left in place: removing it would let two processes hold locks on different files.
