"""What the machine's memory can do, and how much of it a job takes."""

import ctypes
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

TRIAD_BYTES = 2**28  # of each of three arrays: far more than any cache
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
