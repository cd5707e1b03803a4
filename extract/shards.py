"""Shards: what is to be extracted, cut as stores are written, and leased where others write too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone
from mlc.extract.stream import FeatureBatch
from mlc.store import schema
from mlc.store.lease import Lease, Leases
from mlc.store.writer import StoreWriter


@dataclass(frozen=True)
class Share:
    """Which of a store's shards a worker fills: ``index``, ``index + count``, ...

    Attributes:
        index: from 0.
        count: of workers.
    """

    index: int = 0
    count: int = 1

    def has(self, shard: int) -> bool:
        """Return whether a shard is of this share."""
        return shard % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


ALONE = Share()


@dataclass(frozen=True)
class Target:
    """A store that is to be filled.

    Attributes:
        writer: of the store.
        backbone: what extracts its features.
        wanted: (N,) bool, the rows that are to be extracted.
        leases: held while a shard is written, if others write too.
        left: is told of shards that another worker holds.
    """

    writer: StoreWriter
    backbone: Backbone
    wanted: NDArray[np.bool_]
    leases: Leases | None = None
    left: list[str] = field(default_factory=list)

    def lease(self, index: int, shard: range) -> Lease | None:
        """Take a shard; one that another worker holds is not wanted any more."""
        if self.leases is None:
            return None
        rows = slice(shard.start, shard.stop)
        if not self.wanted[rows].any():
            return None
        lease = self.leases.acquire(index)
        if lease is None:
            self.left.append(f"shard {index}: {self.leases.holder(index)}")
            self.wanted[rows] = False
            return None
        # What another worker has done since is not done again.
        self.writer.refresh(shard)
        self.wanted[rows] &= self.writer.status[rows] != schema.OK
        return lease

    def mark(self, shard: range, parts: Sequence[FeatureBatch], lease: Lease | None) -> None:
        """Mark a shard done whose batches these are, and give its lease back."""
        wanted = self.wanted[shard.start : shard.stop]
        if wanted.any():
            content_hash = np.full(len(shard), "", dtype=f"<U{schema.HASH_CHARS}")
            error = np.full(len(shard), "", dtype=object)
            for part in parts:
                places = slice(part.rows.start - shard.start, part.rows.stop - shard.start)
                content_hash[places] = part.content_hash
                error[places] = part.error
            if lease is not None:
                lease.require_held()
            self.writer.mark(shard, content_hash, error.astype(np.str_), wanted)
        if lease is not None:
            self.writer.drain()
            lease.release()


@dataclass(frozen=True)
class _Open:
    """A shard that is worked on, and each target's lease on it."""

    rows: range
    leases: list[Lease | None]


class Shards:
    """The shards that hold rows wanted by some store, in order.

    Args:
        targets: stores of the same rows, in shards and batches of the same size.
        share: of the shards.

    Raises:
        MlcError: another worker is on this share.
    """

    def __init__(self, targets: Sequence[Target], share: Share) -> None:
        self._targets, self._share = targets, share
        self.batch_size = targets[0].writer.batch_size
        self._todo = {
            index: shard
            for index, shard in enumerate(targets[0].writer.shards())
            if share.has(index) and self.wanted(shard).any()
        }
        self.total = sum(int(self.wanted(shard).sum()) for shard in self._todo.values())
        self._open: dict[int, _Open] = {}  # by the stop of its last batch
        for target in targets:
            self._require_free(target)

    def wanted(self, rows: range) -> NDArray[np.bool_]:
        """Return which of some rows any store wants."""
        wanted = np.zeros(len(rows), dtype=np.bool_)
        for target in self._targets:
            wanted |= target.wanted[rows.start : rows.stop]
        return wanted

    def batches(self) -> Iterator[range]:
        """Yield the batches with a wanted row of each shard that no other worker holds."""
        for index, shard in self._todo.items():
            leases = [target.lease(index, shard) for target in self._targets]
            batches = [
                batch for batch in batches_of(shard, self.batch_size) if self.wanted(batch).any()
            ]
            if batches:
                self._open[batches[-1].stop] = _Open(shard, leases)
            else:
                for lease in leases:
                    if lease is not None:
                        lease.release()
            yield from batches

    def end_with(self, rows: range) -> bool:
        """Return whether a batch is the last of its shard."""
        return rows.stop in self._open

    def mark(self, parts: Sequence[Sequence[FeatureBatch]]) -> None:
        """Mark the shard done, in each store, whose batches these are."""
        shard = self._open.pop(parts[-1][0].rows.stop)
        for index, (target, lease) in enumerate(zip(self._targets, shard.leases, strict=True)):
            target.mark(shard.rows, [part[index] for part in parts], lease)

    def _require_free(self, target: Target) -> None:
        """Raise if a shard that is left is in another worker's hands."""
        leases = target.leases
        holders = {index: leases.holder(index) for index in self._todo} if leases else {}
        for index, holder in holders.items():
            if holder is not None:
                raise MlcError(
                    f"{target.writer.path}: another worker is on share {self._share}, it holds "
                    f"shard {index} ({holder}); wait for it, or give each worker a share of its own"
                )


def batches_of(rows: range, batch_size: int) -> list[range]:
    """Cut rows into batches, the last of which may be smaller."""
    return [
        range(start, min(start + batch_size, rows.stop))
        for start in range(rows.start, rows.stop, batch_size)
    ]
