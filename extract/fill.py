"""fill(): the rows of stores that are wanted, through their backbones into the stores."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlc.configs.cores import usable_cores
from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress
from mlc.extract.lanes import fewest
from mlc.extract.pace import INFER, WRITE, Machine, Pace
from mlc.extract.profile import span
from mlc.extract.shards import ALONE, Shards, Share, Target
from mlc.extract.stream import Asked, FeatureBatch, stream_each
from mlc.store import schema
from mlc.store.writer import StoreWriter


@dataclass(frozen=True)
class Work:
    """How stores are to be filled.

    Attributes:
        files: of every row; only those of wanted rows are read.
        workers: threads that decode.
        stop_at_bad: raise at a bad image.
        share: whose shards.
    """

    files: Sequence[Path]
    workers: int
    stop_at_bad: bool = False
    share: Share = ALONE


@dataclass
class Filled:
    """What was done.

    Attributes:
        extracted: rows of each store that went through its backbone, or whose image is bad.
        copied: rows of each store that took their features from another of the same photo.
        pace: of all of it, as ``Pace.summary`` says.
        warning: what slowed it down, and what to do about it.
    """

    extracted: list[int]
    copied: list[int]
    pace: dict[str, Any] = field(default_factory=dict)
    warning: str | None = None


def fill(targets: Sequence[Target], work: Work, progress: Progress) -> Filled:
    """Extract the wanted rows, shard by shard; each shard is marked done when it is written.

    A batch is always the same rows of a shard, whichever of them are wanted: so features do not
    depend on what was there before. A photo that a store has, by content hash, is copied. Stores
    that are filled together have the same rows, shards and batches.

    Raises:
        MlcError: a bad image, if asked to stop there; the disk is full; or another worker is on
            the same share.
    """
    shards = Shards(targets, work.share)
    first_rows = [_rows_by_hash(target.writer) for target in targets]
    asked = [
        Asked(target.backbone, target.wanted, first_row.__contains__)
        for target, first_row in zip(targets, first_rows, strict=True)
    ]
    done = Filled([0] * len(targets), [0] * len(targets))
    pace, images = Pace(shards.total, _machine(targets, work)), 0
    waiting: list[list[FeatureBatch]] = []
    for parts in stream_each(asked, work.files, shards.batches(), work.workers):
        if work.stop_at_bad:
            _require_good(parts, work.files)
        started = perf_counter()
        with span("write"):
            for index, (target, part) in enumerate(zip(targets, parts, strict=True)):
                copied = _write(target, part, first_rows[index])
                done.copied[index] += copied
                done.extracted[index] += int(asked[index].wants(part.rows).sum()) - copied
            waiting.append([replace(part, features={}) for part in parts])  # they are written
            if shards.end_with(parts[0].rows):
                shards.mark(waiting)
                waiting = []
        new = int(shards.wanted(parts[0].rows).sum())
        pace.add(new, _seconds(parts) | {WRITE: perf_counter() - started}, _bad(parts))
        images += new
        progress(images, shards.total, pace.line())
    for target in targets:
        target.writer.drain()
    done.pace, done.warning = pace.summary(), pace.warning()
    return done


def _machine(targets: Sequence[Target], work: Work) -> Machine:
    lanes = fewest(target.backbone.lanes for target in targets)
    on_gpu = targets[0].backbone.device.type == "cuda"
    return Machine(work.workers, usable_cores(), lanes.threads, lanes.count, on_gpu)


def _seconds(parts: Sequence[FeatureBatch]) -> dict[str, float]:
    """Return the time of a batch's stages; reading and decoding are shared by all backbones."""
    return parts[0].seconds | {INFER: sum(part.seconds[INFER] for part in parts)}


def _bad(parts: Sequence[FeatureBatch]) -> int:
    return int(np.logical_or.reduce([part.error != "" for part in parts]).sum())


def _require_good(parts: Sequence[FeatureBatch], files: Sequence[Path]) -> None:
    for part in parts:
        for row, error in zip(part.rows, part.error, strict=True):
            if error:
                raise MlcError(f"{files[row]}: {error}; mend it, or pass --on-error skip")


def _rows_by_hash(writer: StoreWriter) -> dict[str, int]:
    """Return the first good row of each photo, by content hash."""
    hashes = writer.content_hash()
    good = np.flatnonzero(writer.status == schema.OK)
    return {str(hashes[row]): int(row) for row in reversed(good.tolist())}


def _write(target: Target, part: FeatureBatch, first_row: dict[str, int]) -> int:
    """Write a batch, zeros for bad images; return how many rows were copied of another.

    Which row a copy is taken from depends on the order of rows alone: all earlier ones are in
    ``first_row`` by now.
    """
    wanted = target.wanted[part.rows.start : part.rows.stop]
    copies = {}
    for place in np.flatnonzero(wanted & (part.error == "")).tolist():
        row = part.rows[place]
        source = first_row.setdefault(str(part.content_hash[place]), row)
        if source != row:
            copies[row] = source
    rows = np.asarray(part.rows, np.intp)
    mine = wanted & ~np.isin(rows, list(copies))
    if mine.any():
        target.writer.write(rows[mine], _chosen(part, mine))
    for row, source in copies.items():
        target.writer.copy(source, row)
    return len(copies)


def _chosen(part: FeatureBatch, mine: NDArray[np.bool_]) -> dict[str, torch.Tensor]:
    """Return the features of some images of a batch, zeros for bad ones."""
    features, good = part.features, torch.from_numpy(part.error == "")
    if not good.all():
        features = {
            array: torch.where(_like(good, values), values, 0) for array, values in features.items()
        }
    if not mine.all():
        features = {array: values[torch.from_numpy(mine)] for array, values in features.items()}
    return features


def _like(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return rows.to(values.device).reshape(-1, *[1] * (values.ndim - 1))
