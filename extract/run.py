"""extract(): the images of a data set through backbones into stores, resumable."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress, silent
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import save_labels
from mlc.datasets.source import DataConfig, read_images
from mlc.extract.calibration import calibrate_arrays
from mlc.extract.config import ExtractConfig, check_config, worker_count
from mlc.extract.existing import files_of, find_again, from_anywhere
from mlc.extract.fill import Work, fill
from mlc.extract.forecast import Forecast, Planned, forecast
from mlc.extract.job import (
    ExtractReport,
    Job,
    agree_on_batches,
    plan_job,
    require_one_pass,
    require_own_paths,
)
from mlc.extract.profile import profile
from mlc.extract.shards import ALONE, Share, Target
from mlc.store import schema
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
    lacking = [job for job in jobs if job.found.lacking]
    if lacking:
        planned = [
            Planned(job.backbone, job.layout, job.path, job.found.lacking) for job in lacking
        ]
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
    """Fill the stores; what can be refused is, before any of them is written to."""
    for job in jobs:
        opened.enter_context(writer_lock(job.path, shared=share is not None))
    again = [
        find_again(job.path, images, job.backbone, job.config.on_changed, job.config.on_error)
        for job in jobs
    ]
    require_one_pass(
        [job for job, ids in zip(jobs, again, strict=True) if job.found.lacking or len(ids)]
    )
    if share is None:
        for job in jobs:
            require_no_worker(job.path)
    targets = [
        _open(opened, job, images, ids, share, progress)
        for job, ids in zip(jobs, again, strict=True)
    ]
    with profile(jobs[0].config.profile, jobs[0].report.notes.append) as step:

        def told(done: int, total: int, note: str = "") -> None:
            progress(done, total, note)
            step()

        _fill(jobs, targets, images, share, told)
    for job, target in zip(jobs, targets, strict=True):
        _describe(target.writer, job.report)


def _open(
    opened: ExitStack,
    job: Job,
    images: ImageSet,
    again: NDArray[np.str_],
    share: Share | None,
    progress: Progress,
) -> Target:
    """Open a job's store, laid out if it is not there; its rows that are pending are wanted."""
    if job.path.exists():
        layout = from_anywhere(job.layout, job.path, images.root)
    else:
        workers = worker_count(job.config.workers)
        layout = calibrate_arrays(job.layout, job.backbone, images, workers, progress)
    writer = StoreWriter.create_or_resume(job.path, layout, alone=share is None)
    opened.enter_context(writer.filling(finish=share is None))
    save_labels(job.found.labels, labels_path(job.path))
    wanted = np.isin(writer.image_id, again)
    if share is None and wanted.any():  # it is not complete while they are written again
        writer.set_pending(np.flatnonzero(wanted))
    wanted |= np.isin(writer.image_id, images.image_id) & (writer.status == schema.PENDING)
    backbone = job.backbone.for_batches(writer.batch_size) if wanted.any() else job.backbone
    leases = None
    if share is not None:
        leases = Leases(writer.path)
        opened.callback(leases.close)
    return Target(writer, backbone, wanted, leases, job.report.left)


def _fill(
    jobs: Sequence[Job],
    targets: Sequence[Target],
    images: ImageSet,
    share: Share | None,
    progress: Progress,
) -> None:
    """Fill the stores that lack something, and report it."""
    config = jobs[0].config
    pairs = zip(jobs, targets, strict=True)
    filled = [(job, target) for job, target in pairs if target.wanted.any()]
    if not filled:
        return
    files, _ = files_of(filled[0][1].writer.image_id, images)
    stop = config.on_error == "raise"
    work = Work(files, worker_count(config.workers), stop_at_bad=stop, share=share or ALONE)
    done = fill([target for _, target in filled], work, progress)
    for index, (job, target) in enumerate(filled):
        job.report.extracted, job.report.copied = done.extracted[index], done.copied[index]
        job.report.pace = done.pace
        if share is None:
            target.writer.record(done.pace)
    if done.warning:
        jobs[0].report.notes.append(done.warning)


def _describe(writer: StoreWriter, report: ExtractReport) -> None:
    report.rows = len(writer.status)
    report.bad = writer.errors()
    for array, counts in writer.clipped().items():
        if counts.any():
            report.clipped[array] = int((counts > 0).any(axis=1).sum()), int(counts.sum())
