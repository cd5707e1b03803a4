"""usable_cores(): how many cores a process may use, by the kernel's and a container's word."""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

OWN_CGROUP = Path("/proc/self/cgroup")
CGROUP = Path("/sys/fs/cgroup")  # version 2, or the folders of version 1's controllers
THREADS = "OMP_NUM_THREADS"  # what OpenMP, MKL and OpenBLAS ask when they are loaded


def usable_cores() -> int:
    """Return the cores that this process can keep busy, at least 1.

    The smaller of those it may be scheduled on (taskset, Slurm, ``docker --cpuset-cpus``) and of
    the CPU time that its control group and those above it may take (``docker --cpus``, Kubernetes'
    limits), in cores, rounded up: of 1.5 cores the half is worth a thread. The host's count says
    nothing in a container: threads beyond the quota are stopped all together until its period
    (mostly 100 ms) is over.
    """
    quotas = [math.ceil(quota) for folder in _cgroups() for quota in _quotas(folder)]
    return max(1, min([_schedulable_cores(), *quotas]))


def limit_threads() -> None:
    """Keep torch, and whatever else runs OpenMP or a BLAS, within a container's quota.

    They count the cores that they may be scheduled on and know nothing of quotas. Called once, by
    the command line, before torch is loaded: the environment reaches the processes that are
    started, too. The user's own ``OMP_NUM_THREADS`` has the last word, and where there is no quota
    nothing is changed: torch then takes one thread for each physical core.
    """
    cores = usable_cores()
    if THREADS in os.environ or cores >= _schedulable_cores():
        return
    os.environ[THREADS] = str(cores)
    if "torch" in sys.modules:  # it has read the environment already
        import torch

        torch.set_num_threads(min(torch.get_num_threads(), cores))


def _schedulable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cgroups() -> Iterator[Path]:
    """Yield the folders of this process's control group and of those above it, if they are there.

    A container without a cgroup namespace sees the host's path in ``/proc`` and its own group at
    the root of the mount: so folders that are missing are no error, and the root is always one.
    """
    for mount, path in _own_paths():
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for depth in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:depth])
            if folder.is_dir():
                yield folder


def _own_paths() -> Iterator[tuple[Path, str]]:
    """Yield where groups that limit CPU time may be mounted, and the path of our own below it."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, alone or beside version 1
            yield CGROUP, path
            yield CGROUP / "unified", path
        elif "cpu" in controllers.split(","):
            yield CGROUP / controllers, path
            yield CGROUP / "cpu", path


def _quotas(folder: Path) -> Iterator[float]:
    """Yield the limit of a control group in cores, as each version of the kernel's files says it.

    Version 2 writes ``max 100000`` and version 1 ``-1`` where there is no limit.
    """
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        yield int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        runtime = int((folder / "cpu.cfs_quota_us").read_text())
        if runtime > 0:
            yield runtime / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        pass
