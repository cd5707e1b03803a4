"""Leases: of the workers of a store, one holds a shard, and a dead one's shard is free again."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mlc.configs.errors import MlcError
from mlc.store import lease as module
from mlc.store.lease import Holder, Leases, lease_folder
from mlc.store.lock import writer_lock

EXPIRED = 200  # seconds ago

WORKER = """
import sys, time
from pathlib import Path
from mlc.configs.errors import MlcError
from mlc.store import lease

def acquire(shard):
    taken[shard] = leases.acquire(shard)
    return taken[shard] is not None

def require(shard):
    try:
        taken[shard].require_held()
    except MlcError as error:
        return error
    return "held"

def race(rounds):
    begin = float(sys.stdin.readline())
    for shard in range(rounds):
        while time.monotonic() < begin + 0.004 * shard:
            pass
        acquire(shard)
    return [shard for shard in range(rounds) if taken[shard]]

lease.EXPIRY_SECONDS = float(sys.argv[2])
leases, taken = lease.Leases(Path(sys.argv[1])), {}
print("ready", flush=True)
for line in sys.stdin:
    verb, number = line.split()
    print({"acquire": acquire, "require": require, "race": race}[verb](int(number)), flush=True)
"""


class Worker:
    """Another process that holds leases of a store."""

    def __init__(self, store: Path, expiry_seconds: float = 1000) -> None:
        command = [sys.executable, "-c", WORKER, str(store), str(expiry_seconds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, text=True)

    def say(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.say(line)
        return self.answer()


@contextmanager
def workers(store: Path, count: int = 1, expiry_seconds: float = 1000) -> Iterator[list[Worker]]:
    started = [Worker(store, expiry_seconds) for _ in range(count)]
    try:
        assert [worker.answer() for worker in started] == ["ready"] * count
        yield started
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.communicate()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "a.zarr"


@pytest.fixture
def leases(store: Path) -> Iterator[Leases]:
    with Leases(store) as leases:
        yield leases


def names(store: Path) -> list[str]:
    return sorted(path.name for path in lease_folder(store).iterdir())


def plant(store: Path, shard: int, holder: Holder, age_seconds: float = 0) -> Path:
    """Leave a lease as a worker of some other time or place would."""
    path = lease_folder(store) / f"{shard}.0"
    path.write_text(json.dumps(asdict(holder)))
    then = path.stat().st_mtime - age_seconds
    os.utime(path, (then, then))
    return path


def foreign(shard: int = 0) -> Holder:
    return replace(Holder.here(shard), host="n7", pid=123, pid_space="another boot")


def ended_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


# --- one holder ----------------------------------------------------------------------------------


def test_a_held_shard_is_refused_and_others_are_not(store: Path, leases: Leases) -> None:
    held = leases.acquire(3)
    assert held is not None
    assert held.held()
    held.require_held()
    with Leases(store) as others:
        assert others.acquire(3) is None
        assert others.acquire(4) is not None
    assert leases.acquire(3) is None, "its own holder takes it twice"
    with workers(store) as [worker]:
        assert worker.ask("acquire 3") == "False"
        assert worker.ask("acquire 5") == "True"
        assert leases.acquire(5) is None


def test_the_holder_is_told(leases: Leases) -> None:
    assert leases.holder(3) is None
    held = leases.acquire(3)
    host = os.uname().nodename
    assert leases.holder(3) == f"host {host}, pid {os.getpid()}, seen 0 s ago"
    held.release()
    assert leases.holder(3) is None


def test_a_released_shard_is_free_at_once(store: Path, leases: Leases) -> None:
    with workers(store) as [worker]:
        for generation in range(3):
            with leases.acquire(0) as held:
                assert worker.ask("acquire 0") == "False"
                assert held.held()
            assert not held.held()
            assert names(store)[-1] == f"0.{generation}"
        assert worker.ask("acquire 0") == "True"
        assert leases.acquire(0) is None
    assert names(store) == ["0.0", "0.1", "0.2", "0.3"], "a generation went, or came again"


def test_a_heartbeat_does_not_wake_a_released_lease(store: Path, leases: Leases) -> None:
    held = leases.acquire(0)
    held.release()
    leases._touch(lease_folder(store) / "0.0")
    assert not held.held()
    assert leases.holder(0) is None


def test_closing_gives_all_back(store: Path, leases: Leases) -> None:
    with Leases(store) as others:
        assert all(others.acquire(shard) for shard in range(3))
        assert not any(leases.acquire(shard) for shard in range(3))
    assert all(leases.acquire(shard) for shard in range(3))


def fail(leases: Leases) -> None:
    with leases:
        assert leases.acquire(0)
        raise KeyError


def test_an_error_gives_all_back(store: Path, leases: Leases) -> None:
    with pytest.raises(KeyError):
        fail(Leases(store))
    assert leases.acquire(0)


def test_stores_in_one_folder_do_not_meet(store: Path, leases: Leases) -> None:
    assert leases.acquire(0)
    with Leases(store.with_name("b.zarr")) as others:
        assert others.acquire(0)


# --- races ---------------------------------------------------------------------------------------


def expire(store: Path, rounds: int) -> None:
    for shard in range(rounds):
        plant(store, shard, foreign(shard), age_seconds=EXPIRED)


@pytest.mark.parametrize("taken_over", [False, True])
def test_one_of_several_workers_wins_each_race(
    store: Path, leases: Leases, taken_over: bool
) -> None:
    rounds = 150
    if taken_over:
        expire(store, rounds)
    with workers(store, count=3, expiry_seconds=100) as racers:
        for racer in racers:
            racer.say(f"race {rounds}")
            racer.say(str(time.monotonic() + 0.1))
        won = [json.loads(racer.answer()) for racer in racers]
        assert sorted(shard for shards in won for shard in shards) == list(range(rounds))
        assert sum(bool(shards) for shards in won) > 1, f"no race: {won}"
        generation = int(taken_over)
        assert {name for name in names(store) if name.endswith(f".{generation}")} == {
            f"{shard}.{generation}" for shard in range(rounds)
        }


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_worker_that_is_overtaken_between_look_and_take_is_refused(
    store: Path, leases: Leases, taken_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if taken_over:
        expire(store, 1)
    with Leases(store) as others:

        def look_and_be_overtaken(shard: int) -> module.Claim | None:
            seen = Leases._look(leases, shard)
            if not rivals:
                rivals.append(others.acquire(shard))
            return seen

        rivals: list[module.Lease | None] = []
        monkeypatch.setattr(leases, "_look", look_and_be_overtaken)
        assert leases.acquire(0) is None
        assert rivals[0].held()


# --- dead holders --------------------------------------------------------------------------------


def test_a_killed_workers_shard_is_free_at_once(store: Path, leases: Leases) -> None:
    with workers(store) as [worker]:
        assert worker.ask("acquire 0") == "True"
        assert leases.acquire(0) is None
        worker.process.kill()
        os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)
        held = leases.acquire(0)  # its parent, this process, has not asked how it ended yet
        assert held
        held.release()
    assert leases.acquire(0)


def test_the_shard_of_an_ended_process_is_free_without_proc(
    store: Path, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_started", lambda pid: None)
    plant(store, 0, replace(Holder.here(0), pid=ended_pid()))
    assert leases.acquire(0)
    plant(store, 1, Holder.here(1))
    assert leases.acquire(1) is None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_that_got_the_number_of_a_dead_worker_is_not_it(
    store: Path, leases: Leases
) -> None:
    me = Holder.here(0)
    plant(store, 0, replace(me, started=me.started - 1))
    assert leases.acquire(0)
    plant(store, 1, me)
    assert leases.acquire(1) is None


def test_a_process_of_another_user_runs(
    store: Path, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    plant(store, 0, Holder.here(0))
    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(module, "_started", lambda pid: None)  # /proc may hide it
    assert leases.acquire(0) is None


@pytest.mark.parametrize("elsewhere", [{"host": "n7"}, {"pid_space": "another container"}])
def test_elsewhere_only_the_heartbeat_counts(
    store: Path, leases: Leases, elsewhere: dict[str, str]
) -> None:
    holder = replace(Holder.here(0), pid=ended_pid(), **elsewhere)
    plant(store, 0, holder, age_seconds=module.EXPIRY_SECONDS - 20)
    assert leases.acquire(0) is None
    assert leases.holder(0).endswith("seen 100 s ago")
    plant(store, 1, holder, age_seconds=module.EXPIRY_SECONDS + 1)
    assert leases.holder(1) is None
    assert leases.acquire(1)


def test_the_clock_of_the_host_does_not_count(
    store: Path, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(store, 0, foreign())
    plant(store, 1, foreign(), age_seconds=EXPIRED)
    for name in ("time", "time_ns"):
        now = getattr(time, name)()
        skewed = now + (3600 if name == "time" else 3600 * 10**9)
        monkeypatch.setattr(time, name, lambda skewed=skewed: skewed)
    assert leases.acquire(0) is None
    assert leases.acquire(1)


@pytest.mark.parametrize("text", ["", '{"host": "n7", "pi', '{"host": "n7"}', "[1]"])
def test_a_lease_that_is_not_whole_counts_by_its_heartbeat(
    store: Path, leases: Leases, text: str
) -> None:
    path = plant(store, 0, foreign())
    path.write_text(text)
    assert leases.acquire(0) is None
    assert leases.holder(0) == "a new worker, seen 0 s ago"
    then = path.stat().st_mtime - EXPIRED
    os.utime(path, (then, then))
    assert leases.acquire(0)


def test_heartbeats_keep_a_lease(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXPIRY_SECONDS", 1.5)
    with workers(store, expiry_seconds=1.5) as [worker], Leases(store) as leases:
        # As if on another host, where only heartbeats count.
        monkeypatch.setattr(module, "_pid_space", lambda: "another container")
        assert worker.ask("acquire 0") == "True"
        for _ in range(18):
            assert leases.acquire(0) is None
            time.sleep(0.1)
        worker.process.kill()
        assert leases.acquire(0) is None
        time.sleep(1.6)
        assert leases.acquire(0)


# --- lost leases ---------------------------------------------------------------------------------


@contextmanager
def suspended(worker: Worker, seconds: float) -> Iterator[None]:
    worker.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, worker.process.pid, os.WSTOPPED)
    time.sleep(seconds)
    yield
    worker.process.send_signal(signal.SIGCONT)


def test_a_suspended_worker_finds_out_that_it_lost_its_shard(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXPIRY_SECONDS", 1.5)
    with workers(store, expiry_seconds=1.5) as [worker], Leases(store) as leases:
        assert worker.ask("acquire 0") == "True"
        assert worker.ask("acquire 1") == "True"
        with suspended(worker, 1.7):
            held = leases.acquire(0)
            assert held
        me = f"host {os.uname().nodename}, pid {os.getpid()}, seen"
        expected = f"{store}: the lease of shard 0 was lost, it is held by {me}"
        assert worker.ask("require 0").startswith(expected)
        assert held.held()
        assert worker.ask("require 1") == "held", "nobody took it over"
        assert leases.acquire(1) is None


def test_a_lease_that_nobody_took_over_is_renewed(store: Path, leases: Leases) -> None:
    held = leases.acquire(0)
    os.utime(lease_folder(store) / "0.0", (1, 1))
    assert leases.holder(0) is None
    assert held.held()
    assert leases.holder(0) is not None


def test_releasing_a_lost_lease_leaves_the_new_one(store: Path, leases: Leases) -> None:
    lost = leases.acquire(0)
    os.utime(lease_folder(store) / "0.0", (0, 0))
    with Leases(store) as others:
        new = others.acquire(0)
        assert not lost.held()
        lost.release()
        assert new.held()
        assert leases.acquire(0) is None


def test_a_released_lease_is_not_held(leases: Leases) -> None:
    held = leases.acquire(0)
    held.release()
    with pytest.raises(MlcError, match=r"the lease of shard 0 was lost, it is held by nobody"):
        held.require_held()


def test_a_lease_of_an_earlier_folder_is_lost(store: Path, leases: Leases) -> None:
    held = leases.acquire(0)
    (lease_folder(store) / "0.0").unlink()
    with Leases(store) as others:
        assert others.acquire(0)
        assert names(store) == ["0.0"]
        assert not held.held()


def test_a_folder_that_is_gone_is_an_error(store: Path, leases: Leases) -> None:
    held = leases.acquire(0)
    (lease_folder(store) / "0.0").unlink()
    lease_folder(store).rmdir()
    for act in (held.require_held, lambda: leases.acquire(1), lambda: leases.holder(0)):
        with pytest.raises(MlcError, match=r"\.a\.zarr\.leases: is gone, the store was removed"):
            act()


# --- the lock of all shards ----------------------------------------------------------------------

HOLD_LOCK = """
import sys
from pathlib import Path
from mlc.store.lock import writer_lock
with writer_lock(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("theirs", ["shared", "exclusive"])
def test_workers_share_a_lock_that_keeps_the_one_writer_out(store: Path, theirs: str) -> None:
    command = [sys.executable, "-c", HOLD_LOCK, str(store), theirs]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(MlcError, match=r"a\.zarr: another process is writing to it; wait"),
            writer_lock(store),
        ):
            pytest.fail("two writers of all shards")
        if theirs == "shared":
            with writer_lock(store, shared=True):
                pass
        else:
            with (
                pytest.raises(MlcError, match=r"is writing to the whole of it, not to shards;"),
                writer_lock(store, shared=True),
            ):
                pytest.fail("a worker beside the writer of all shards")
        process.stdin.close()
    with writer_lock(store):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_no_locks_are_only_workers_write(
    store: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with writer_lock(store, shared=True):
        pass
    with pytest.raises(MlcError, match="its file system has no locks"), writer_lock(store):
        pytest.fail("a writer without a lock")


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = tmp_path / "file" / "a.zarr"
    expected = r"\.a\.zarr\.lock: cannot be opened for writing \(.+\); name a store in another"
    with pytest.raises(MlcError, match=expected), writer_lock(store):
        pytest.fail("a lock in a file")
