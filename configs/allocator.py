"""keep_freed_memory(): the C library hands memory that a step has freed to the next step."""

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
TOP_PAD_BYTES = 256 << 20


@cache
def keep_freed_memory() -> bool:
    """Keep freed memory in the process from now on, where the C library is glibc.

    It gives large blocks back to the kernel at once, and a step of a transformer on a CPU takes and
    frees a gigabyte of them: where fresh pages are dear, as in a virtual machine, they cost as much
    as the arithmetic. What the process takes at most stays the same; it keeps that to its end.

    Returns:
        Whether it could be asked for.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, TOP_PAD_BYTES))
    return all([mallopt(option, value) == 1 for option, value in settings])
