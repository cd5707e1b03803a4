"""Forecast: what an extraction will take, told before it begins."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone
from mlc.extract.stream import stream_features
from mlc.store.layout import Layout
from mlc.store.schema import ROW_ARRAYS

PROBE_SECONDS = 2.0
PROBE_BATCHES = 8  # at most; the first is not timed, as it pays for what is set up once
BLOCK_BYTES = 4096  # of a disk: a file takes whole ones
ROW_BYTES = 700  # of text, status and checksums, at most


@dataclass(frozen=True)
class Forecast:
    """What an extraction will take.

    Attributes:
        images: to be extracted.
        store_bytes: that they will take on the disk.
        free_bytes: that are free there.
        seconds: that they will take, None if there are so few that no probe was run.
    """

    images: int
    store_bytes: int
    free_bytes: int
    seconds: float | None

    def __str__(self) -> str:
        time = "" if self.seconds is None else f", about {_duration(self.seconds)}"
        return (
            f"{self.images:,} images to extract: {_size(self.store_bytes)}{time}; "
            f"{_size(self.free_bytes)} are free"
        )


def forecast(
    backbone: Backbone, layout: Layout, path: Path, files: Sequence[Path], workers: int
) -> Forecast:
    """Foretell space, to some files' last blocks, and time, from a probe on the first images.

    Args:
        backbone: what will run.
        layout: of the store.
        path: of the store.
        files: the images that are to be extracted.
        workers: threads that decode.

    Raises:
        MlcError: it does not fit on the disk.
    """
    shards = -(-len(files) // layout.shard_rows)
    blocks = BLOCK_BYTES * shards * (len(ROW_ARRAYS) + 3 * len(layout.arrays))
    store_bytes = len(files) * (layout.row_bytes() + ROW_BYTES) + blocks
    free_bytes = shutil.disk_usage(_existing(path)).free
    if store_bytes > free_bytes:
        raise MlcError(
            f"{path}: {len(files):,} images need {_size(store_bytes)}, "
            f"{_size(free_bytes)} are free there; {_advice(layout)}name a folder on another disk "
            "with --out"
        )
    return Forecast(len(files), store_bytes, free_bytes, _probe(backbone, layout, files, workers))


def _probe(backbone: Backbone, layout: Layout, files: Sequence[Path], workers: int) -> float | None:
    """Return the seconds that all images will take at the pace of the first."""
    size = layout.batch_size
    if len(files) < 4 * size * PROBE_BATCHES:
        return None
    batches = [range(start, start + size) for start in range(0, PROBE_BATCHES * size, size)]
    started, timed = 0.0, 0
    for number, batch in enumerate(stream_features(backbone, files, batches, workers)):
        if number == 0:
            started = perf_counter()
            continue
        timed += len(batch.rows)
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
