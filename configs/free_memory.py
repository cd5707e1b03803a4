"""free_memory(): how much more a process may take, by the kernel's and a container's word."""

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # version 2; inside a container it is the container's own


def free_memory() -> int:
    """Return the bytes of memory that can be used before something must be paged out or killed.

    Raises:
        OSError: there is no ``/proc/meminfo``: not Linux.
    """
    lines = (line.split() for line in MEMINFO.read_text().splitlines())
    available = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        cached = _field(CGROUP / "memory.stat", "inactive_file")
    except (OSError, ValueError):
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used + cached))


def _field(path: Path, name: str) -> int:
    return next(
        int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name)
    )
