"""extract(): the images of a data set through a backbone into a store, resumable."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError, choose
from mlc.configs.progress import Progress, silent
from mlc.configs.provenance import made_by
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import save_labels
from mlc.datasets.source import DataConfig, read_images
from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone
from mlc.extract.images import hash_content, load_image
from mlc.extract.stream import FeatureBatch, stream_features
from mlc.store import schema
from mlc.store.lock import writer_lock
from mlc.store.reader import labels_path
from mlc.store.writer import Layout, StoreWriter

STAGES = ("read", "decode", "infer", "write")


class ExtractConfig(DataConfig, BackboneConfig):
    """Images, backbone and store of one extraction.

    Attributes:
        out: path of the store; by default ``features/`` and a name that carries its key's hash.
        format: "zarr" or "hdf5"; by default what ``out`` ends in, else Zarr.
        dtype: of the stored features.
        batch_size: images in one forward pass; by default 8 on a CPU, whose caches it should
            fit, and 64 on a GPU.
        shard_rows: images written and marked done together: what a killed process may lose.
        workers: threads that read and decode; by default one for each core.
        on_error: "skip" records a bad image and goes on, "raise" stops at it.
    """

    out: Path | None = None
    format: str | None = None
    dtype: Literal["float32", "float16"] = "float32"
    batch_size: int | None = None
    shard_rows: int = 256
    workers: int | None = None
    on_error: Literal["skip", "raise"] = "skip"


@dataclass
class ExtractReport:
    """What an extraction did.

    Attributes:
        path: the store.
        backbone: its full name.
        weights: hash of its tensors.
        licence: of its weights.
        images: rows of the store.
        extracted: rows extracted by this call; the others were there.
        bad: reason by file of every bad image in the store.
        wall_seconds: from the first image to the last.
        seconds: busy time of each of ``STAGES``, summed over threads.
    """

    path: Path
    backbone: str
    weights: str
    licence: str
    images: int
    extracted: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    wall_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


def extract(config: ExtractConfig, progress: Progress = silent) -> ExtractReport:
    """Extract what is missing of a data set's features.

    A killed call loses the shards in flight at most; the same call goes on. Bad images of an
    earlier call are tried again. The label table is written beside the store.

    Raises:
        MlcError: see ``read_images``, ``load_backbone`` and ``StoreWriter.create_or_resume``;
            a stored photo is not the one that is there now; or an image is bad and
            ``on_error`` is "raise".
        KeyboardInterrupt: with a message that says what is kept.
    """
    _check(config)
    images = read_images(config)
    images.check_files()
    progress(0, len(images.file), f"loading {config.backbone}")
    backbone = load_backbone(config, config.dtype)
    path = store_path(config, images, backbone)
    report = ExtractReport(
        path, backbone.name, backbone.key.weights, backbone.licence, len(images.file)
    )
    with writer_lock(path):
        writer = StoreWriter.create_or_resume(path, _layout(config, images, backbone))
        with writer.filling():
            _require_same_photos(writer, path, images)
            save_labels(images.labels, labels_path(path))
            _fill(writer, config, images, backbone, report, progress)
    return report


def store_path(config: ExtractConfig, images: ImageSet, backbone: Backbone) -> Path:
    """Return where the store of this request is: the same request, the same path."""
    if config.out is not None:
        return config.out
    suffix, key = schema.FORMATS[config.format or "zarr"].suffix, backbone.key
    return (
        Path("features")
        / f"{images.labels.dataset}-{key.backbone}-{key.size_px}-{key.digest()}{suffix}"
    )


def batches_of(rows: range, batch_size: int) -> list[range]:
    """Cut rows into batches, the last of which may be smaller."""
    return [
        range(start, min(start + batch_size, rows.stop))
        for start in range(rows.start, rows.stop, batch_size)
    ]


def worker_count(workers: int | None) -> int:
    """Return the number of decoding threads: as asked, else a thread for each usable core."""
    if workers is not None:
        return workers
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _check(config: ExtractConfig) -> None:
    """Refuse what can be seen to be wrong before images and weights are read."""
    if config.out is not None:
        schema.format_of(config.out)
    if config.format is not None:
        suffix = choose(schema.FORMATS, config.format, "format").suffix
        if config.out is not None and config.out.suffix != suffix:
            raise MlcError(
                f"out: {config.out} does not end in {suffix}, as --format {config.format} asks"
            )
    for name in ("batch_size", "shard_rows", "workers", "size_px"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise MlcError(f"{name}: should be at least 1, got {value}")


def _layout(config: ExtractConfig, images: ImageSet, backbone: Backbone) -> Layout:
    settings = config.model_dump(mode="json", include=set(BackboneConfig.model_fields))
    if config.weights:
        settings["weights"] = str(config.weights.resolve())
    recorded: dict[str, Any] = made_by() | {
        "backbone": backbone.name,
        "weights_licence": backbone.licence,
        "backbone_config": settings,
        "data": config.data,
        "root": str(images.root.resolve()),
    }
    return Layout(
        key=backbone.key,
        image_id=images.image_id,
        file=images.file,
        widths=dict.fromkeys(backbone.key.layers, backbone.width),
        batch_size=config.batch_size or backbone.default_batch,
        shard_rows=config.shard_rows,
        made_by=recorded,
    )


def _require_same_photos(writer: StoreWriter, path: Path, images: ImageSet) -> None:
    """Refuse to take stored features for those of another photo of the same name.

    Files that are newer than the store are compared with it by content hash; all of them, if the
    store was made from another folder.
    """
    moved = writer.made_by["root"] != str(images.root.resolve())
    created, stored = writer.made_by["created"], writer.content_hash()
    for row in np.flatnonzero(writer.status == schema.OK).tolist():
        file = images.root / str(images.file[row])
        try:
            if moved or file.stat().st_mtime >= created:
                same = hash_content(file.read_bytes()) == stored[row]
            else:
                same = True
        except OSError:
            continue  # it is gone: its features are kept
        if not same:
            raise MlcError(
                f"{path}: holds features of another photo than {file}, by its content; "
                "name another store with --out"
            )


def _fill(
    writer: StoreWriter,
    config: ExtractConfig,
    images: ImageSet,
    backbone: Backbone,
    report: ExtractReport,
    progress: Progress,
) -> None:
    """Extract the pending shards and those with a bad image that has been mended."""
    files = [images.root / str(name) for name in images.file]
    mended = _mended(writer, config, files, backbone)
    pending = mended | (writer.status == schema.PENDING)
    todo = [shard for shard in writer.shards() if pending[shard.start : shard.stop].any()]
    total = sum(len(shard) for shard in todo)
    batches = [batch for shard in todo for batch in batches_of(shard, writer.batch_size)]
    stream = stream_features(backbone, files, batches, worker_count(config.workers))
    start, bad = perf_counter(), 0
    for shard in todo:
        parts: list[FeatureBatch] = []
        for part in _take(stream, shard):
            parts.append(part)
            for stage, seconds in part.seconds.items():
                report.seconds[stage] += seconds
            report.extracted += len(part.rows)
            bad += int((part.error != "").sum())
            progress(report.extracted, total, f"{bad} bad" if bad else "")
            for row, error in zip(part.rows, part.error, strict=True):
                _stop_at_bad(config, files[row], error)
        _write(writer, shard, backbone, parts, report)
    report.wall_seconds = perf_counter() - start
    report.bad = writer.errors()


def _mended(
    writer: StoreWriter, config: ExtractConfig, files: Sequence[Path], backbone: Backbone
) -> NDArray[np.bool_]:
    """Return which images were bad in an earlier call and can be read now."""
    size_px = backbone.key.size_px
    scratch = np.zeros((size_px, size_px, 3), dtype=np.uint8)
    mended = np.zeros(len(files), dtype=np.bool_)
    for row in np.flatnonzero(writer.status == schema.BAD).tolist():
        error = load_image(files[row], backbone.key.interpolation, scratch).error
        _stop_at_bad(config, files[row], error)
        mended[row] = not error
    return mended


def _take(stream: Iterator[FeatureBatch], shard: range) -> Iterator[FeatureBatch]:
    """Yield the batches of one shard: no batch crosses its end."""
    for part in stream:
        yield part
        if part.rows.stop == shard.stop:
            return


def _stop_at_bad(config: ExtractConfig, file: Path, error: str) -> None:
    if error and config.on_error == "raise":
        raise MlcError(f"{file}: {error}; mend it, or pass --on-error skip")


def _write(
    writer: StoreWriter,
    shard: range,
    backbone: Backbone,
    parts: Sequence[FeatureBatch],
    report: ExtractReport,
) -> None:
    start = perf_counter()
    features = np.concatenate([part.features for part in parts])[:, None]
    writer.write_shard(
        shard,
        dict.fromkeys(backbone.key.layers, features),
        np.concatenate([part.content_hash for part in parts]),
        np.concatenate([part.error for part in parts]),
    )
    report.seconds["write"] += perf_counter() - start
