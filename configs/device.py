"""Where tensors live, "auto" or a torch device by name, and how many cores work on them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from mlc.configs.errors import MlcError


def choose_device(device: str) -> torch.device:
    """Return a device by name, "auto" being the GPU if there is one; never a silent fallback.

    Raises:
        MlcError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
        if chosen.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise MlcError(f"device: {device!r} is not to be had here ({reason})") from None
    return chosen


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Have torch work with so many threads, in threads that are started meanwhile too."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """Keep torch on one core: the matrices of a step are too small to be worth sharing.

    Two threads are no faster, and several times slower when something else runs beside them; a
    sweep gives each core a block of its own instead.
    """
    return torch_threads(1)
