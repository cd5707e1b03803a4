"""keep_freed_memory(): freed blocks are handed out again instead of going back to the kernel."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from mlc.configs.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    np.empty(1 << 26, np.uint8).fill(1)
step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""


def page_faults(what: str) -> int:
    command = [sys.executable, "-c", FAULTS, what]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_used_again() -> None:
    kept, given_back = page_faults("keep"), page_faults("leave")
    assert kept < 20
    assert given_back > 10 * max(kept, 1)
