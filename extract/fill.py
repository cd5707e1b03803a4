"""fill(): the rows of a store that are wanted, through the backbone into the store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlc.configs.cores import usable_cores
from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress
from mlc.extract.backbone import Backbone
from mlc.extract.pace import Machine, Pace
from mlc.extract.profile import span
from mlc.extract.stream import FeatureBatch, stream_features
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


@dataclass(frozen=True)
class Work:
    """Rows that are to be extracted.

    Attributes:
        backbone: what extracts them.
        files: of every row of the store; only those of wanted rows are read.
        wanted: (N,) bool.
        workers: threads that decode.
        stop_at_bad: raise at a bad image.
        share: whose shards.
        leases: held while a shard is written, if others write too.
    """

    backbone: Backbone
    files: Sequence[Path]
    wanted: NDArray[np.bool_]
    workers: int
    stop_at_bad: bool = False
    share: Share = Share()
    leases: Leases | None = None


@dataclass
class Filled:
    """What was done.

    Attributes:
        extracted: rows that went through the backbone, or whose image is bad.
        copied: rows that took their features from another of the same photo.
        left: shards that another worker holds.
        pace: of it, as ``Pace.summary`` says.
        warning: what slowed it down, and what to do about it.
    """

    extracted: int = 0
    copied: int = 0
    left: list[str] = field(default_factory=list)
    pace: dict[str, Any] = field(default_factory=dict)
    warning: str | None = None


def fill(writer: StoreWriter, work: Work, progress: Progress) -> Filled:
    """Extract the wanted rows, shard by shard; each shard is marked done when it is written.

    A batch is always the same rows of a shard, whichever of them are wanted: so features do not
    depend on what was there before. A photo that the store has, by content hash, is copied.

    Raises:
        MlcError: a bad image, if asked to stop there; the disk is full; or all shards that are
            left are held by other workers.
    """
    done = Filled()
    shards = _Shards(writer, work, done.left)
    first_row = _rows_by_hash(writer)
    on_gpu = work.backbone.device.type == "cuda"
    machine = Machine(work.workers, usable_cores(), torch.get_num_threads(), on_gpu)
    pace = Pace(shards.total, machine)
    stream = stream_features(
        work.backbone,
        work.files,
        shards.batches(),
        work.workers,
        wanted=work.wanted,
        known=first_row.__contains__,
    )
    parts: list[FeatureBatch] = []
    for part in stream:
        wanted = work.wanted[part.rows.start : part.rows.stop]
        for row, error in zip(part.rows, part.error, strict=True):
            if error and work.stop_at_bad:
                raise MlcError(f"{work.files[row]}: {error}; mend it, or pass --on-error skip")
        waited = perf_counter()
        with span("write"):
            done.copied += _write(writer, part, wanted, first_row)
            parts.append(part)
            if shards.ends_with(part.rows):
                shards.mark(parts)
                parts = []
        seconds = part.seconds | {"write": perf_counter() - waited}
        pace.add(int(wanted.sum()), seconds, int((part.error != "").sum()))
        done.extracted += int(wanted.sum())
        progress(done.extracted, shards.total, pace.line())
    writer.drain()
    done.extracted -= done.copied
    done.pace, done.warning = pace.summary(), pace.warning()
    return done


def batches_of(rows: range, batch_size: int) -> list[range]:
    """Cut rows into batches, the last of which may be smaller."""
    return [
        range(start, min(start + batch_size, rows.stop))
        for start in range(rows.start, rows.stop, batch_size)
    ]


class _Shards:
    """The shards that hold wanted rows, in order, each leased while it is worked on."""

    def __init__(self, writer: StoreWriter, work: Work, left: list[str]) -> None:
        self._writer, self._work, self._left = writer, work, left
        self._todo = {
            index: shard
            for index, shard in enumerate(writer.shards())
            if work.share.has(index) and work.wanted[shard.start : shard.stop].any()
        }
        self.total = sum(
            int(work.wanted[each.start : each.stop].sum()) for each in self._todo.values()
        )
        self._open: dict[int, tuple[int, range, Lease | None]] = {}  # by the stop of its last batch
        self._require_free()

    def batches(self) -> Iterator[range]:
        """Yield the batches with a wanted row of each shard that no other worker holds."""
        for index, shard in self._todo.items():
            lease = None
            if self._work.leases is not None:
                lease = self._work.leases.acquire(index)
                if lease is None:
                    self._left.append(f"shard {index}: {self._work.leases.holder(index)}")
                    continue
                # What another worker has done since is not done again.
                self._writer.refresh(shard)
                rows = slice(shard.start, shard.stop)
                self._work.wanted[rows] &= self._writer.status[rows] != schema.OK
            batches = [
                batch
                for batch in batches_of(shard, self._writer.batch_size)
                if self._work.wanted[batch.start : batch.stop].any()
            ]
            if batches:
                self._open[batches[-1].stop] = index, shard, lease
            elif lease is not None:
                lease.release()
            yield from batches

    def ends_with(self, rows: range) -> bool:
        """Return whether a batch is the last of its shard."""
        return rows.stop in self._open

    def mark(self, parts: Sequence[FeatureBatch]) -> None:
        """Mark the shard done whose batches these are."""
        _, shard, lease = self._open.pop(parts[-1].rows.stop)
        content_hash = np.full(len(shard), "", dtype=f"<U{schema.HASH_CHARS}")
        error = np.full(len(shard), "", dtype=object)
        for part in parts:
            places = slice(part.rows.start - shard.start, part.rows.stop - shard.start)
            content_hash[places] = part.content_hash
            error[places] = part.error
        if lease is not None:
            lease.require_held()
        wanted = self._work.wanted[shard.start : shard.stop]
        self._writer.mark(shard, content_hash, error.astype(np.str_), wanted)
        if lease is not None:
            self._writer.drain()
            lease.release()

    def _require_free(self) -> None:
        """Raise if the first shard that is left is in another worker's hands."""
        leases = self._work.leases
        holders = {index: leases.holder(index) for index in self._todo} if leases else {}
        for index, holder in holders.items():
            if holder is not None:
                raise MlcError(
                    f"{self._writer.path}: another worker is on share {self._work.share}, it holds "
                    f"shard {index} ({holder}); wait for it, or give each worker a share of its own"
                )


def _rows_by_hash(writer: StoreWriter) -> dict[str, int]:
    """Return the first good row of each photo, by content hash."""
    hashes = writer.content_hash()
    good = np.flatnonzero(writer.status == schema.OK)
    return {str(hashes[row]): int(row) for row in reversed(good.tolist())}


def _write(
    writer: StoreWriter,
    part: FeatureBatch,
    wanted: NDArray[np.bool_],
    first_row: dict[str, int],
) -> int:
    """Write a batch, zeros for bad images; return how many rows were copied of another.

    Which row a copy is taken from depends on the order of rows alone: all earlier ones are in
    ``first_row`` by now.
    """
    copies = {}
    for place in np.flatnonzero(wanted & (part.error == "")).tolist():
        row = part.rows[place]
        source = first_row.setdefault(str(part.content_hash[place]), row)
        if source != row:
            copies[row] = source
    rows = np.asarray(part.rows, np.intp)
    mine = wanted & ~np.isin(rows, list(copies))
    good = torch.from_numpy(part.error == "")
    features = part.features
    if not good.all():
        features = {
            array: torch.where(_like(good, values), values, 0) for array, values in features.items()
        }
    if not mine.all():
        features = {array: values[torch.from_numpy(mine)] for array, values in features.items()}
    if mine.any():
        writer.write(rows[mine], features)
    for row, source in copies.items():
        writer.copy(source, row)
    return len(copies)


def _like(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return rows.to(values.device).reshape(-1, *[1] * (values.ndim - 1))
