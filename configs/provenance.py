"""What a store or a run was made by: recorded in it, never compared."""

import platform
import shlex
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlc

LIBRARIES = ("torch", "timm", "numpy", "pillow", "h5py", "zarr")


def made_by() -> dict[str, Any]:
    """Return versions, mlc's git commit (None outside a checkout), command line and time."""
    return {
        "mlc": mlc.__version__,
        "commit": _commit(),
        "command": shlex.join(sys.argv),
        "created": time.time(),
        "python": platform.python_version(),
        **_versions(),
    }


@cache  # a sweep asks for each of its heads
def _versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


@cache
def _commit() -> str | None:
    folder = Path(mlc.__file__).parent
    if not (folder / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
