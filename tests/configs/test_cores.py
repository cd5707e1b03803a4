"""How many cores a process may use: by affinity and by the quotas of made control groups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlc.configs import cores
from mlc.configs.cores import THREADS, limit_threads, usable_cores

HOST = 64
PERIOD = 100_000  # microseconds


class Machine:
    """Made files of the kernel, on a machine of ``HOST`` cores."""

    def __init__(self, folder: Path) -> None:
        self.root, self.own = folder / "cgroup", folder / "self"
        self.root.mkdir()

    def place(self, *lines: str) -> None:
        self.own.write_text("".join(f"{line}\n" for line in lines))

    def limit(self, group: str, text: str) -> None:
        """Limit a group of version 2."""
        self._write(group, "cpu.max", text)

    def limit_v1(self, group: str, quota: int) -> None:
        self._write(group, "cpu.cfs_quota_us", str(quota))
        self._write(group, "cpu.cfs_period_us", str(PERIOD))

    def _write(self, group: str, name: str, text: str) -> None:
        folder = self.root / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(cores, "CGROUP", made.root)
    monkeypatch.setattr(cores, "OWN_CGROUP", made.own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(HOST)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2 * HOST)
    return made


def test_without_control_groups_it_is_the_affinity_not_the_count_of_the_host(
    machine: Machine,
) -> None:
    assert not machine.own.exists()
    assert usable_cores() == HOST


def test_where_no_affinity_is_known_it_is_the_count(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 2 * HOST
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (f"max {PERIOD}", HOST),
        (f"200000 {PERIOD}", 2),
        (f"150000 {PERIOD}", 2),  # the half is worth a thread
        (f"1000 {PERIOD}", 1),
        ("150000 50000", 3),  # the period is not always the same
        (f"{1000 * PERIOD} {PERIOD}", HOST),  # a quota beyond the machine
        ("nonsense", HOST),
        ("", HOST),
    ],
)
def test_a_container_of_version_2_has_its_quota_at_the_root(
    machine: Machine, text: str, want: int
) -> None:
    machine.place("0::/")
    machine.limit("", text)
    assert usable_cores() == want


def test_the_affinity_may_be_the_smaller(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.place("0::/")
    machine.limit("", f"800000 {PERIOD}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 7, 9})
    assert usable_cores() == 3


@pytest.mark.parametrize(
    ("group", "limited", "want"),
    [
        ("/kube/pod/box", "kube/pod/box", 4),
        ("/kube/pod/box", "kube/pod", 4),  # the pod's limit holds for its containers
        ("/kube/pod/box", "kube", 4),
        ("/kube/pod/box", "kube/pod/other", HOST),  # a neighbour's does not
        ("/kube/pod/box", "kube/pod/box/below", HOST),
        ("/docker/of-the-host", "", 4),  # no cgroup namespace: the path is not to be seen here
        ("/../../elsewhere", "", 4),  # outside of the namespace's root
    ],
)
def test_quotas_of_the_own_group_and_of_those_above_hold(
    machine: Machine, group: str, limited: str, want: int
) -> None:
    machine.place(f"0::{group}")
    machine.limit(limited, f"{4 * PERIOD} {PERIOD}")
    assert usable_cores() == want


def test_the_smallest_of_several_quotas_holds(machine: Machine) -> None:
    machine.place("0::/a/b")
    machine.limit("a", f"{3 * PERIOD} {PERIOD}")
    machine.limit("a/b", f"{5 * PERIOD} {PERIOD}")
    assert usable_cores() == 3
    machine.limit("a/b", f"{2 * PERIOD} {PERIOD}")
    assert usable_cores() == 2


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize(("quota", "want"), [(250_000, 3), (1_000, 1), (-1, HOST), (0, HOST)])
def test_version_1_has_two_files_below_its_controller(
    machine: Machine, mount: str, quota: int, want: int
) -> None:
    machine.place("5:memory:/box", "4:cpu,cpuacct:/box", "0::/")
    machine.limit_v1(f"{mount}/box", quota)
    assert usable_cores() == want


def test_the_path_of_version_1_is_that_of_its_cpu_controller(machine: Machine) -> None:
    machine.place("5:memory:/a", "4:cpu:/b:with-colon", "3:cpuset:/c")
    for group in ("a", "c"):
        machine.limit_v1(f"cpu/{group}", PERIOD)
    assert usable_cores() == HOST
    machine.limit_v1("cpu/b:with-colon", 7 * PERIOD)
    assert usable_cores() == 7


def test_version_2_may_be_mounted_beside_version_1(machine: Machine) -> None:
    machine.place("4:memory:/", "0::/slice")
    machine.limit("unified/slice", f"{6 * PERIOD} {PERIOD}")
    assert usable_cores() == 6


def test_this_machine_has_an_answer() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


# --- threads -------------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Torch with 8 threads and an environment that says nothing; what it is told is listed."""
    monkeypatch.setenv(THREADS, "")  # so that what a test leaves there is taken back
    monkeypatch.delenv(THREADS)
    told: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


@pytest.mark.parametrize(("quota", "want"), [(3, 3), (12, 8)])
def test_threads_keep_within_the_quota(
    machine: Machine, threads: list[int], quota: int, want: int
) -> None:
    machine.place("0::/")
    machine.limit("", f"{quota * PERIOD} {PERIOD}")
    limit_threads()
    assert os.environ[THREADS] == str(quota)
    assert threads == [want]  # 8 physical cores are no more for a larger quota


def test_without_a_quota_nothing_is_changed(machine: Machine, threads: list[int]) -> None:
    machine.place("0::/")
    machine.limit("", f"max {PERIOD}")
    limit_threads()
    assert THREADS not in os.environ
    assert threads == []


def test_the_users_own_number_of_threads_stays(
    machine: Machine, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.place("0::/")
    machine.limit("", f"{PERIOD} {PERIOD}")
    monkeypatch.setenv(THREADS, "5")
    limit_threads()
    assert os.environ[THREADS] == "5"
    assert threads == []


def test_torch_that_is_loaded_later_takes_it(machine: Machine) -> None:
    """In a process of its own: there ``limit_threads`` does not load torch either."""
    machine.place("0::/")
    machine.limit("", f"{PERIOD} {PERIOD}")
    code = (
        "import os, sys; from pathlib import Path; from mlc.configs import cores\n"
        f"cores.CGROUP = Path({str(machine.root)!r})\n"
        f"cores.OWN_CGROUP = Path({str(machine.own)!r})\n"
        "os.sched_getaffinity = lambda _: {0, 1}\n"
        "cores.limit_threads(); assert 'torch' not in sys.modules\n"
        "import torch; print(torch.get_num_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != THREADS}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1"
