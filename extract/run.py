"""extract(): the images of a data set through backbones into stores, resumable."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress, silent
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import save_labels
from mlc.datasets.source import DataConfig, read_images
from mlc.extract.calibration import calibrate_arrays
from mlc.extract.config import ExtractConfig, check_config, worker_count
from mlc.extract.existing import (
    find_mended,
    from_anywhere,
    look_for_changes,
)
from mlc.extract.fill import Work, fill
from mlc.extract.forecast import Forecast, Planned, forecast
from mlc.extract.job import ExtractReport, Job, agree_on_batches, plan_job, require_own_paths
from mlc.extract.profile import profile
from mlc.extract.shards import ALONE, Share, Target
from mlc.store import schema
from mlc.store.layout import rows_of
from mlc.store.lease import Leases, require_no_worker
from mlc.store.lock import writer_lock
from mlc.store.reader import labels_path
from mlc.store.writer import StoreWriter

# Settings that are of the pass over the images, not of one store.
OF_THE_PASS = (
    *DataConfig.model_fields,
    *("decode", "device", "workers", "on_error", "on_changed", "shard", "forecast", "profile"),
)


def extract(
    config: ExtractConfig,
    progress: Progress = silent,
    tell: Callable[[Forecast], None] = lambda _: None,
) -> ExtractReport:
    """Extract what is missing of a data set's features; see ``extract_each``."""
    return extract_each([config], progress, tell)[0]


def extract_each(
    configs: Sequence[ExtractConfig],
    progress: Progress = silent,
    tell: Callable[[Forecast], None] = lambda _: None,
) -> list[ExtractReport]:
    """Extract what is missing of a data set's features, into several stores in one pass.

    Each photo is read and decoded once for all of them. A killed call loses the shards in flight
    at most; the same call goes on. Images that a store lacks become new rows. Bad images of an
    earlier call are tried again. The label table is written beside each store.

    Args:
        configs: what to extract, for each store; they agree in what is ``OF_THE_PASS``.
        progress: told after each batch.
        tell: given the forecast, unless there is nothing to do.

    Returns:
        What was done, for each store.

    Raises:
        MlcError: see ``read_images``, ``load_backbone`` and ``StoreWriter.create_or_resume``;
            it does not fit on the disk; a stored photo is not the one that is there now; an image
            is bad and ``on_error`` is "raise"; another worker is on the same share; or stores
            cannot be filled in one pass.
        KeyboardInterrupt: with a message that says what is kept.
    """
    share = _check_each(configs)
    images = read_images(configs[0])
    images.check_files()
    jobs = [plan_job(config, images, progress) for config in configs]
    require_own_paths(jobs)
    agree_on_batches(jobs)
    planned = [
        Planned(job.backbone, job.layout, job.path, job.lacking) for job in jobs if job.lacking
    ]
    if planned:
        tell(forecast(planned, worker_count(configs[0].workers)))
    if not configs[0].forecast:
        with ExitStack() as opened:
            _extract_all(opened, jobs, images, share, progress)
        for job in jobs:
            job.report.complete = share is None
    return [job.report for job in jobs]


def _check_each(configs: Sequence[ExtractConfig]) -> Share | None:
    """Refuse what can be seen to be wrong before images and weights are read."""
    shares = [check_config(config) for config in configs]
    for name in OF_THE_PASS:
        values = [getattr(config, name) for config in configs]
        if any(value != values[0] for value in values):
            raise MlcError(
                f"{name}: is the same for all stores of one pass, got "
                f"{', '.join(map(repr, values))}; extract each with a command of its own"
            )
    return shares[0]


def _extract_all(
    opened: ExitStack,
    jobs: Sequence[Job],
    images: ImageSet,
    share: Share | None,
    progress: Progress,
) -> None:
    """Open the stores and fill them."""
    for job in jobs:
        opened.enter_context(writer_lock(job.path, shared=share is not None))
    targets = []
    for job in jobs:
        writer = _open(job, images, share, progress)
        opened.enter_context(writer.filling(finish=share is None))
        if share is None:
            require_no_worker(job.path)
        targets.append(_target(job, writer, images, share))
    _fill(jobs, targets, images, share, progress)
    for job, target in zip(jobs, targets, strict=True):
        _describe(target.writer, job.report)


def _open(job: Job, images: ImageSet, share: Share | None, progress: Progress) -> StoreWriter:
    """Open a job's store, which is laid out if it is not there."""
    if job.path.exists():
        layout = from_anywhere(job.layout, job.path, images.root)
    else:
        workers = worker_count(job.config.workers)
        layout = calibrate_arrays(job.layout, job.backbone, images, workers, progress)
    return StoreWriter.create_or_resume(job.path, layout, alone=share is None)


def _target(job: Job, writer: StoreWriter, images: ImageSet, share: Share | None) -> Target:
    """Return what is to be extracted: rows that are pending, and bad images that are mended."""
    files, asked = _files(writer, images)
    look_for_changes(writer, images.root, files, asked, job.config.on_changed)
    save_labels(job.labels, labels_path(writer.path))
    bad = asked & (writer.status == schema.BAD)
    mended = find_mended(bad, files, job.backbone, job.config.on_error)
    if share is None and mended.any():  # it is not complete while they are written again
        writer.set_pending(np.flatnonzero(mended))
    wanted = mended | asked & (writer.status == schema.PENDING)
    backbone = job.backbone.for_batches(writer.batch_size) if wanted.any() else job.backbone
    leases = None if share is None else Leases(writer.path)
    return Target(writer, backbone, wanted, leases, job.report.left)


def _files(writer: StoreWriter, images: ImageSet) -> tuple[list[Path], np.ndarray]:
    """Return the file of each row of a store, and which rows (N,) are of these images."""
    rows = rows_of(writer.image_id, images.image_id)
    files = [Path()] * len(writer.image_id)
    for row, name in zip(rows.tolist(), images.file.tolist(), strict=True):
        files[row] = images.root / name
    asked = np.zeros(len(files), dtype=np.bool_)
    asked[rows] = True
    return files, asked


def _fill(
    jobs: Sequence[Job],
    targets: Sequence[Target],
    images: ImageSet,
    share: Share | None,
    progress: Progress,
) -> None:
    """Fill the stores that lack something, and report it."""
    config, notes = jobs[0].config, jobs[0].report.notes
    filled = [pair for pair in zip(jobs, targets, strict=True) if pair[1].wanted.any()]
    with ExitStack() as closing:
        for target in targets:
            if target.leases is not None:
                closing.callback(target.leases.close)
        step = closing.enter_context(profile(config.profile, notes.append))
        if not filled:
            return

        def told(done: int, total: int, note: str = "") -> None:
            progress(done, total, note)
            step()

        work = Work(
            _files(filled[0][1].writer, images)[0],
            worker_count(config.workers),
            stop_at_bad=config.on_error == "raise",
            share=share or ALONE,
        )
        done = fill([target for _, target in filled], work, told)
    for index, (job, target) in enumerate(filled):
        report = job.report
        report.extracted, report.copied = done.extracted[index], done.copied[index]
        report.pace = done.pace
        if share is None:
            target.writer.record(done.pace)
    if done.warning:
        notes.append(done.warning)


def _describe(writer: StoreWriter, report: ExtractReport) -> None:
    report.rows = len(writer.status)
    report.bad = writer.errors()
    for array, counts in writer.clipped().items():
        if counts.any():
            report.clipped[array] = int((counts > 0).any(axis=1).sum()), int(counts.sum())
