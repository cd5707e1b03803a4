"""Forecast: what an extraction will take, told before it begins."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone
from mlc.extract.lanes import fewest
from mlc.extract.stream import Asked, stream_each
from mlc.store.layout import Layout
from mlc.store.schema import ROW_ARRAYS

PROBE_SECONDS = 2.0
PROBE_BATCHES = 8  # at most, in each lane; the first is not timed: it pays for what is set up
BLOCK_BYTES = 4096  # of a disk: a file takes whole ones
ROW_BYTES = 700  # of text, status and checksums, at most


@dataclass(frozen=True)
class Planned:
    """A store that lacks something.

    Attributes:
        backbone: what will run.
        layout: of the store.
        path: of the store.
        files: the images that are to be extracted.
    """

    backbone: Backbone
    layout: Layout
    path: Path
    files: Sequence[Path]

    def store_bytes(self) -> int:
        """Return what it will take on the disk, to some files' last blocks."""
        layout, images = self.layout, len(self.files)
        shards = -(-images // layout.shard_rows)
        blocks = BLOCK_BYTES * shards * (len(ROW_ARRAYS) + 3 * len(layout.arrays))
        return images * (layout.row_bytes() + ROW_BYTES) + blocks


@dataclass(frozen=True)
class Forecast:
    """What an extraction will take.

    Attributes:
        images: to be extracted.
        store_bytes: that they will take on the disk, in all stores.
        free_bytes: that are free where the first store is.
        seconds: that they will take, None if there are so few that no probe was run.
        stores: that are filled.
    """

    images: int
    store_bytes: int
    free_bytes: int
    seconds: float | None
    stores: int = 1

    def __str__(self) -> str:
        into = "" if self.stores == 1 else f" into {self.stores} stores"
        time = "" if self.seconds is None else f", about {_duration(self.seconds)}"
        return (
            f"{self.images:,} images to extract{into}: {_size(self.store_bytes)}{time}; "
            f"{_size(self.free_bytes)} are free"
        )


def forecast(planned: Sequence[Planned], workers: int) -> Forecast:
    """Foretell the space, and the time from a probe on the first images.

    Args:
        planned: stores that are filled in one pass.
        workers: threads that decode.

    Raises:
        MlcError: they do not fit on the disk.
    """
    _require_space(planned)
    files = list(dict.fromkeys(file for each in planned for file in each.files))
    return Forecast(
        images=len(files),
        store_bytes=sum(each.store_bytes() for each in planned),
        free_bytes=shutil.disk_usage(_existing(planned[0].path)).free,
        seconds=_probe(planned, files, workers),
        stores=len(planned),
    )


def _require_space(planned: Sequence[Planned]) -> None:
    """Raise if what goes to one disk, in the order of the stores, does not fit there."""
    needed: Counter[int] = Counter()
    for each in planned:
        folder = _existing(each.path)
        needed[folder.stat().st_dev] += each.store_bytes()
        total, free_bytes = needed[folder.stat().st_dev], shutil.disk_usage(folder).free
        if total > free_bytes:
            more = (
                "" if total == each.store_bytes() else f", with the stores before it {_size(total)}"
            )
            raise MlcError(
                f"{each.path}: {len(each.files):,} images need {_size(each.store_bytes())}{more}, "
                f"{_size(free_bytes)} are free there; {_advice(each.layout)}name a folder on "
                "another disk with --out"
            )


def _probe(planned: Sequence[Planned], files: Sequence[Path], workers: int) -> float | None:
    """Return the seconds that all images will take at the pace of the first."""
    size = planned[0].layout.batch_size
    lanes = fewest(each.backbone.lanes for each in planned).count
    images = PROBE_BATCHES * lanes * size
    if len(files) < 4 * images:
        return None
    batches = [range(start, start + size) for start in range(0, images, size)]
    asked = [Asked(each.backbone) for each in planned]
    started, timed = 0.0, 0
    for number, parts in enumerate(stream_each(asked, files, batches, workers), 1):
        if number <= lanes:
            started = perf_counter()
            continue
        timed += len(parts[0].rows)
        if perf_counter() - started > PROBE_SECONDS:
            break
    return (perf_counter() - started) / timed * len(files)


def _advice(layout: Layout) -> str:
    """Return how the features could be made smaller, or nothing."""
    items = layout.key.features
    if any(item.startswith("tokens") and not item.endswith("int8") for item in items):
        return "store fewer bytes with --features tokens:int8, or "
    if "pooled:float32" in items:
        return "store half of it with --features pooled:float16, or "
    return ""


def _existing(path: Path) -> Path:
    """Return the nearest folder above a path that is there."""
    return next(each for each in path.absolute().parents if each.is_dir())


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds % 60:02.0f} s"
