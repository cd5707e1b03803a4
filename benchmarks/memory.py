"""What the machine's memory can do, and how much of it a job takes."""

import ctypes
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mlc.configs.free_memory import free_memory

TRIAD_BYTES = 2**28  # of each of three arrays: far more than any cache
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def triad_bandwidth(threads: int, device: str = "cpu", repeats: int = 5) -> float:
    """Return bytes a second of ``a = b + s * c``, the best of some repeats.

    Two arrays are read and one is written; that a CPU may read the written one too is not counted,
    as in STREAM.

    Args:
        threads: of torch; on a GPU without effect.
        device: where the arrays lie.
        repeats: tries.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b, c = (torch.ones(TRIAD_BYTES // 4, device=device) for _ in range(3))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.add(b, c, alpha=3.0, out=a)
        a[0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return 3 * TRIAD_BYTES / min(seconds)


def peak_bytes(job: Callable[[], object]) -> int | None:
    """Return the most memory that a job takes beyond what the process held before it.

    Only Linux with glibc can set the high-water mark back, and give back what was freed before,
    which the job would else use again unseen; None elsewhere.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET_PEAK.write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status_bytes("VmRSS")
    job()
    return max(0, _status_bytes("VmHWM") - before)


def peak_of_process() -> int:
    """Return the high-water mark of the process in bytes, since it was last set back."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status_bytes(name: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def back_memory() -> None:
    """Touch half of what is free, so that it is as fast for one job as for the next.

    The host of a virtual machine takes back memory that is free for some seconds, and to have it
    again takes as long as to write it to a disk: whoever runs after a large file was removed, or a
    page cache dropped, would win.
    """
    np.ones(free_memory() // 2, np.uint8)


def may_drop_caches() -> bool:
    """Say whether the whole page cache can be dropped, as root can."""
    return os.access(DROP_CACHES, os.W_OK)


def drop_cache(folder: Path, _: str = "") -> None:
    """Have the next reads of the files of a folder, all written out, come from the disk."""
    if may_drop_caches():
        DROP_CACHES.write_text("1")
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
