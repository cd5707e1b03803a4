"""extract(): the images of a data set through a backbone into a store, resumable."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlc.configs.cores import usable_cores
from mlc.configs.errors import MlcError, choose
from mlc.configs.progress import Progress, silent
from mlc.configs.provenance import made_by
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import save_labels
from mlc.datasets.source import DataConfig, absolute_data, read_images
from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone
from mlc.extract.calibration import calibrate_arrays
from mlc.extract.existing import (
    OnChanged,
    OnError,
    compare_with_store,
    find_mended,
    from_anywhere,
    look_for_changes,
)
from mlc.extract.fill import Share, Work, fill
from mlc.extract.forecast import Forecast, forecast
from mlc.extract.profile import check_trace_path, profile
from mlc.store import schema
from mlc.store.layout import Layout, rows_of
from mlc.store.lease import Leases, require_no_worker
from mlc.store.lock import writer_lock
from mlc.store.reader import labels_path
from mlc.store.writer import StoreWriter


class ExtractConfig(DataConfig, BackboneConfig):
    """Images, backbone and store of one extraction.

    Attributes:
        out: path of the store; by default ``features/`` and a name that carries its key's hash.
        format: "zarr" or "hdf5"; by default what ``out`` ends in, else Zarr.
        batch_size: images in one forward pass; by default 8 on a CPU, whose caches it should
            fit, and 64 on a GPU.
        shard_rows: images written and marked done together: what a killed process may lose.
        workers: threads that read and decode; by default one for each core.
        on_error: "skip" records a bad image and goes on, "raise" stops at it.
        on_changed: what to do where the store has features of another photo of the same name:
            "raise" stops, "extract" takes the photo that is there now.
        shard: "i/n": fill the i-th of n shares of the store's shards, from 0; the other workers,
            on this host or others, fill theirs. ``mlc store finish`` then ends the store.
        forecast: tell what it will take, and do nothing.
        profile: write a trace of some batches here, .json or .json.gz.
    """

    out: Path | None = None
    format: str | None = None
    batch_size: int | None = None
    shard_rows: int = 256
    workers: int | None = None
    on_error: OnError = "skip"
    on_changed: OnChanged = "raise"
    shard: str | None = None
    forecast: bool = False
    profile: Path | None = None


@dataclass
class ExtractReport:
    """What an extraction did.

    Attributes:
        path: the store.
        backbone: its full name.
        weights: hash of its tensors.
        licence: of its weights.
        images: of the data set.
        rows: of the store, which may hold more.
        extracted: rows extracted by this call; the others were there.
        copied: rows whose photo the store had already.
        bad: reason by file of every bad image in the store.
        clipped: images with numbers that the stored dtype cannot hold, and how many such numbers,
            by array.
        left: shards that other workers held.
        complete: the store is.
        pace: of what was extracted, as ``Pace.summary`` says.
        notes: sentences for the user: what slowed it down, where the profile is.
    """

    path: Path
    backbone: str
    weights: str
    licence: str
    images: int
    rows: int = 0
    extracted: int = 0
    copied: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    clipped: dict[str, tuple[int, int]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    complete: bool = False
    pace: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def extract(
    config: ExtractConfig,
    progress: Progress = silent,
    tell: Callable[[Forecast], None] = lambda _: None,
) -> ExtractReport:
    """Extract what is missing of a data set's features.

    A killed call loses the shards in flight at most; the same call goes on. Images that the store
    lacks become new rows. Bad images of an earlier call are tried again. The label table is
    written beside the store.

    Args:
        config: what to extract.
        progress: told after each batch.
        tell: given the forecast, unless there is nothing to do.

    Raises:
        MlcError: see ``read_images``, ``load_backbone`` and ``StoreWriter.create_or_resume``;
            it does not fit on the disk; a stored photo is not the one that is there now; an image
            is bad and ``on_error`` is "raise"; or another worker is on the same share.
        KeyboardInterrupt: with a message that says what is kept.
    """
    share = _check(config)
    images = read_images(config)
    images.check_files()
    progress(0, len(images.file), f"loading {config.backbone}")
    backbone = load_backbone(config)
    path = store_path(config, images, backbone)
    report = ExtractReport(
        path, backbone.name, backbone.key.weights, backbone.licence, len(images.file)
    )
    layout = _layout(config, images, backbone)
    labels, files = compare_with_store(path, images)
    if files:
        tell(forecast(backbone, layout, path, files, worker_count(config.workers)))
    if config.forecast:
        return report
    with writer_lock(path, shared=share is not None):
        if path.exists():
            layout = from_anywhere(layout, path, images.root)
        else:
            layout = calibrate_arrays(
                layout, backbone, images, worker_count(config.workers), progress
            )
        writer = StoreWriter.create_or_resume(path, layout, alone=share is None)
        with writer.filling(finish=share is None):
            if share is None:
                require_no_worker(path)
            _fill(writer, config, replace(images, labels=labels), backbone, share, report, progress)
            _describe(writer, report)
        report.complete = share is None
    return report


def store_path(config: ExtractConfig, images: ImageSet, backbone: Backbone) -> Path:
    """Return where the store of this request is: the same request, the same path."""
    if config.out is not None:
        return config.out
    suffix, key = schema.FORMATS[config.format or "zarr"].suffix, backbone.key
    name = key.backbone.replace(":", "-")
    return Path("features") / f"{images.labels.dataset}-{name}-{key.size_px}-{key.digest()}{suffix}"


def worker_count(workers: int | None) -> int:
    """Return the number of decoding threads: as asked, else a thread for each usable core."""
    return usable_cores() if workers is None else workers


def read_share(text: str) -> Share:
    """Read "i/n" as a share of a store's shards.

    Raises:
        MlcError: it is not two such numbers, 0 <= i < n.
    """
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return Share(int(index), int(count))
    raise MlcError(
        f"shard: should be i/n with i from 0 to n - 1, as 0/4 to 3/4 for four workers, got {text!r}"
    )


def _check(config: ExtractConfig) -> Share | None:
    """Refuse what can be seen to be wrong before images and weights are read."""
    if config.out is not None:
        schema.format_of(config.out)
    if config.format is not None:
        suffix = choose(schema.FORMATS, config.format, "format").suffix
        if config.out is not None and config.out.suffix != suffix:
            raise MlcError(
                f"out: {config.out} does not end in {suffix}, as --format {config.format} asks"
            )
    if config.profile is not None:
        check_trace_path(config.profile)
    for name in ("batch_size", "shard_rows", "workers", "size_px"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise MlcError(f"{name}: should be at least 1, got {value}")
    if config.shard is None:
        return None
    if config.format == "hdf5" or (config.out is not None and config.out.suffix == ".h5"):
        raise MlcError("shard: an HDF5 file has one writer; several workers write a .zarr store")
    if config.on_changed == "extract":
        raise MlcError("on_changed: photos are not taken anew by --shard workers; leave one out")
    return read_share(config.shard)


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
        "data_config": config.model_dump(mode="json", include=set(DataConfig.model_fields))
        | {"data": absolute_data(config.data), "root": str(images.root.resolve())},
    }
    return Layout(
        key=backbone.key,
        image_id=images.image_id,
        file=images.file,
        arrays=backbone.arrays,
        batch_size=config.batch_size or backbone.default_batch,
        shard_rows=config.shard_rows,
        made_by=recorded,
        grids=backbone.grids,
    )


def _fill(
    writer: StoreWriter,
    config: ExtractConfig,
    images: ImageSet,
    backbone: Backbone,
    share: Share | None,
    report: ExtractReport,
    progress: Progress,
) -> None:
    """Extract the rows that are pending and those of bad images that have been mended."""
    rows = rows_of(writer.image_id, images.image_id)
    files = [Path()] * len(writer.image_id)
    for row, name in zip(rows.tolist(), images.file.tolist(), strict=True):
        files[row] = images.root / name
    asked = np.zeros(len(files), dtype=np.bool_)
    asked[rows] = True
    if share is not None:
        for index, shard in enumerate(writer.shards()):
            asked[shard.start : shard.stop] &= share.has(index)
    look_for_changes(writer, images.root, files, asked, config.on_changed)
    save_labels(images.labels, labels_path(writer.path))
    mended = find_mended(asked & (writer.status == schema.BAD), files, backbone, config.on_error)
    if share is None and mended.any():  # it is not complete while they are written again
        writer.set_pending(np.flatnonzero(mended))
    wanted = mended | asked & (writer.status == schema.PENDING)
    leases = None if share is None else Leases(writer.path)
    work = Work(
        backbone,
        files,
        wanted,
        worker_count(config.workers),
        stop_at_bad=config.on_error == "raise",
        share=share or Share(),
        leases=leases,
    )
    try:
        with profile(config.profile, report.notes.append) as step:

            def told(done: int, total: int, note: str = "") -> None:
                progress(done, total, note)
                step()

            done = fill(writer, work, told)
    finally:
        if leases is not None:
            leases.close()
    report.extracted, report.copied, report.left = done.extracted, done.copied, done.left
    report.pace = done.pace
    if done.warning:
        report.notes.append(done.warning)


def _describe(writer: StoreWriter, report: ExtractReport) -> None:
    report.rows = len(writer.status)
    report.bad = writer.errors()
    for array, counts in writer.clipped().items():
        if counts.any():
            report.clipped[array] = int((counts > 0).any(axis=1).sum()), int(counts.sum())
