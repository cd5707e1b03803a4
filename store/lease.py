"""Leases of shards: several workers, on any hosts, write one store, each the shards it holds."""

import json
import os
import secrets
import socket
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from mlc.configs.errors import MlcError

# Several missed heartbeats: an NFS client may show one a minute late.
EXPIRY_SECONDS = 120.0
HEARTBEATS = 4


def lease_folder(store: Path) -> Path:
    """Return the folder of a store's leases; it may go when no worker writes any more."""
    store = store.resolve()
    return store.with_name(f".{store.name}.leases")


@dataclass(frozen=True)
class Holder:
    """Who holds a lease: the content of its file.

    Attributes:
        host: name of the machine.
        pid: number of the process.
        pid_space: where such numbers mean the same, as containers may share a host's name and
            boots do; empty where the system does not say.
        started: when the process started, in clock ticks since boot: numbers are used again;
            None where the system does not say.
        shard: number of the shard.
        token: random, no two leases have the same.
    """

    host: str
    pid: int
    pid_space: str
    started: int | None
    shard: int
    token: str

    @classmethod
    def here(cls, shard: int) -> Self:
        """Return this process as the holder of a new lease."""
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            pid=pid,
            pid_space=_pid_space(),
            started=_started(pid),
            shard=shard,
            token=secrets.token_hex(8),
        )

    def is_dead(self) -> bool:
        """Say whether the process is known to have ended; of other hosts' nothing is known."""
        if (self.host, self.pid_space) != (socket.gethostname(), _pid_space()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # It runs, as another user.
        return _started(self.pid) not in (None, self.started)


def _pid_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; -1 if it has ended since.

    One that was killed and that its parent has not noticed yet still has its number.
    None where the system does not say.
    """
    try:
        # The name, in brackets, may hold spaces and brackets itself; man 5 proc counts from 1.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in (b"Z", b"X") else int(fields[19])


@dataclass(frozen=True)
class Claim:
    """The newest generation of a shard's lease, as it was when it was looked at.

    Attributes:
        generation: 0 for the shard's first lease.
        holder: None where the file is not whole: its worker is writing it, or was killed then.
        age_seconds: time since the last heartbeat, by the clock of the file system.
    """

    generation: int
    holder: Holder | None
    age_seconds: float

    def is_alive(self) -> bool:
        """Say whether a living worker holds it."""
        dead = self.holder is not None and self.holder.is_dead()
        return self.age_seconds < EXPIRY_SECONDS and not dead

    def describe(self) -> str:
        """Return e.g. ``host n7, pid 123, seen 5 s ago``."""
        who = f"host {self.holder.host}, pid {self.holder.pid}" if self.holder else "a new worker"
        return f"{who}, seen {max(0.0, self.age_seconds):.0f} s ago"


class Leases:
    """The leases that this worker holds on shards of one store; close it to give them back.

    A lease is a file ``SHARD.GENERATION`` in the store's lease folder. It is taken by creating
    the file, which only one worker can, and lives while its worker touches it now and then.
    A lease that was given back or whose worker died is never removed, but followed by the next
    generation: removing and creating it again would let one contender remove what another has
    just created. No file locks, which network file systems lack, and no clocks of hosts, which
    differ: a touched file gets the time of the file system, and is compared with another.
    """

    def __init__(self, store: Path) -> None:
        self.store = store.resolve()
        self._folder = lease_folder(store)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease heartbeat", daemon=True)
        self._heart.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def acquire(self, shard: int) -> "Lease | None":
        """Take the lease of a shard; None if a living worker holds it, this one included.

        Look at the shard's status only then: the last holder may just have finished it.
        """
        newest = self._look(shard)
        if newest is not None and newest.is_alive():
            return None
        path = self._path(shard, newest.generation + 1 if newest else 0)
        holder = Holder.here(shard)
        try:
            with path.open("x") as file:
                json.dump(asdict(holder), file)
        except FileExistsError:
            return None  # Another worker was quicker.
        with self._lock:
            self._held.add(path)
        return Lease(self, path, holder)

    def holder(self, shard: int) -> str | None:
        """Return who holds a shard, ``host n7, pid 123, seen 5 s ago``; None if it is free."""
        newest = self._look(shard)
        return newest.describe() if newest is not None and newest.is_alive() else None

    def close(self) -> None:
        """Give back all leases."""
        self._closed.set()
        self._heart.join()
        for path in tuple(self._held):
            self._release(path)

    def _path(self, shard: int, generation: int) -> Path:
        return self._folder / f"{shard}.{generation}"

    def _look(self, shard: int) -> Claim | None:
        """Return the newest claim on a shard, None if it never had one."""
        generation = 0
        try:
            # Touched first: that also makes an NFS client forget what it knew of the folder.
            os.utime(self._folder)
            now = self._folder.stat().st_mtime
            while self._path(shard, generation).exists():
                generation += 1
            if generation == 0:
                return None
            with self._path(shard, generation - 1).open() as file:
                return Claim(generation - 1, _read(file), now - os.fstat(file.fileno()).st_mtime)
        except FileNotFoundError:
            raise MlcError(
                f"{self._folder}: is gone, the store was removed while this worker wrote to it; "
                "run the same command again"
            ) from None

    def _beat(self) -> None:
        while not self._closed.wait(EXPIRY_SECONDS / HEARTBEATS):
            for path in tuple(self._held):
                self._touch(path)

    def _touch(self, path: Path) -> None:
        with self._lock:  # else it could bring a lease back to life that is being given back
            if path in self._held:
                # A file system that is away may come back in time; require_held finds out.
                with suppress(OSError):
                    os.utime(path)

    def _release(self, path: Path) -> None:
        with self._lock:
            self._held.discard(path)
            with suppress(OSError):  # It expires instead.
                os.utime(path, (0, 0))


def _read(file: IO[str]) -> Holder | None:
    try:
        return Holder(**json.load(file))
    except (ValueError, TypeError):
        return None


class Lease:
    """The right to write one shard, until it is released or, at last, its worker falls silent."""

    def __init__(self, leases: Leases, path: Path, holder: Holder) -> None:
        self._leases = leases
        self._path = path
        self._holder = holder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def held(self) -> bool:
        """Say whether the lease is still this worker's: a suspended one may have lost it.

        A worker that takes it over in the same moment may be missed. Both then write the shard,
        with the same bytes, so this wastes work but harms nothing.
        """
        self._leases._touch(self._path)
        newest = self._newest()
        return newest is not None and newest.holder == self._holder

    def require_held(self) -> None:
        """Raise unless the lease is still this worker's; call it before marking a shard done.

        Raises:
            MlcError: it was released, or another worker has taken it over.
        """
        if self.held():
            return
        newest = self._newest()
        who = newest.describe() if newest is not None else "nobody"
        raise MlcError(
            f"{self._leases.store}: the lease of shard {self._holder.shard} was lost, it is held "
            f"by {who}; run the same command again"
        )

    def release(self) -> None:
        """Give the shard back, so that any worker can take it at once."""
        self._leases._release(self._path)

    def _newest(self) -> Claim | None:
        if self._path not in self._leases._held:
            return None
        return self._leases._look(self._holder.shard)


def require_no_worker(store: Path) -> None:
    """Raise an MlcError if a worker, maybe of another host, holds a lease."""
    if not lease_folder(store).is_dir():
        return
    shards = {name.partition(".")[0] for name in os.listdir(lease_folder(store))}
    with Leases(store) as leases:
        for shard in sorted(int(each) for each in shards if each.isdecimal()):
            holder = leases.holder(shard)
            if holder is not None:
                raise MlcError(f"{store}: shard {shard} is being written by {holder}; wait for it")
