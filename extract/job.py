"""Job: one store of an extraction, planned before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress
from mlc.configs.provenance import made_by
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import LabelTable
from mlc.datasets.source import DataConfig, absolute_data
from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone
from mlc.extract.config import ExtractConfig, store_path
from mlc.extract.existing import compare_with_store, recorded_batches
from mlc.store.layout import Layout


@dataclass
class ExtractReport:
    """What an extraction did.

    Attributes:
        path: the store.
        backbone: its full name.
        weights: hash of its tensors.
        engine: that runs it.
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
        pace: of the pass, as ``Pace.summary`` says; empty if nothing was extracted.
        notes: sentences for the user: which engine is not there, what slowed it down, where the
            profile is.
    """

    path: Path
    backbone: str
    weights: str
    engine: str
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


@dataclass
class Job:
    """One store of an extraction.

    Attributes:
        config: what is asked.
        backbone: of the store.
        path: of the store.
        layout: of the store, if it is not there yet.
        labels: to be written beside it.
        lacking: files whose features it lacks.
        report: of what is done.
    """

    config: ExtractConfig
    backbone: Backbone
    path: Path
    layout: Layout
    labels: LabelTable
    lacking: list[Path]
    report: ExtractReport


def plan_job(config: ExtractConfig, images: ImageSet, progress: Progress) -> Job:
    """Load a backbone, and see what its store lacks.

    Args:
        config: what is asked.
        images: of the data set.
        progress: told what is loaded.

    Raises:
        MlcError: see ``load_backbone`` and ``compare_with_store``.
    """
    progress(0, len(images.file), f"loading {config.backbone}")
    backbone = load_backbone(config, config.batch_size)
    path, key = store_path(config, images, backbone), backbone.key
    report = ExtractReport(
        path, backbone.name, key.weights, key.engine, backbone.licence, len(images.file)
    )
    if backbone.note:
        report.notes.append(backbone.note)
    labels, lacking = compare_with_store(path, images)
    layout = _layout(config, images, backbone)
    return Job(config, backbone, path, layout, labels, lacking, report)


def require_own_paths(jobs: Sequence[Job]) -> None:
    """Raise an MlcError if two jobs are about the same store."""
    paths = [job.path.resolve() for job in jobs]
    for path in paths:
        if paths.count(path) > 1:
            raise MlcError(f"{path}: is asked for more than once; name each store once")


def agree_on_batches(jobs: Sequence[Job]) -> None:
    """Have stores that are filled in one pass take batches and shards of one size.

    One that is there keeps its own; new ones follow it, or the smallest batch among them.
    """
    filled = [job for job in jobs if job.lacking]
    if not filled:
        return
    there = [recorded_batches(job.path) for job in filled if job.path.exists()]
    smallest = min(job.layout.batch_size for job in filled)
    size, shard_rows = there[0] if there else (smallest, filled[0].layout.shard_rows)
    for job in filled:
        job.layout = replace(job.layout, batch_size=size, shard_rows=shard_rows)
        job.backbone = job.backbone.for_batches(size)


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
        batch_size=backbone.batch_size,
        shard_rows=config.shard_rows,
        made_by=recorded,
        grids=backbone.grids,
    )
