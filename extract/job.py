"""Job: one store of an extraction, planned before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress
from mlc.configs.provenance import made_by
from mlc.datasets.images import ImageSet
from mlc.datasets.source import DataConfig, absolute_data
from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone
from mlc.extract.config import ExtractConfig, store_path
from mlc.extract.engines import AUTO, ENGINES
from mlc.extract.existing import Found, compare_with_store, recorded_engine
from mlc.store.layout import Layout, shard_rows_for


@dataclass
class ExtractReport:
    """What an extraction did.

    Attributes:
        path: the store.
        backbone: its full name.
        weights: hash of its tensors.
        size_px: side of the square that it sees.
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
    size_px: int
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
        found: what there is of it.
        report: of what is done.
    """

    config: ExtractConfig
    backbone: Backbone
    path: Path
    layout: Layout
    found: Found
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
    backbone, path = _backbone_of_store(config, images)
    key = backbone.key
    report = ExtractReport(
        path=path,
        backbone=backbone.name,
        weights=key.weights,
        size_px=key.size_px,
        engine=key.engine,
        licence=backbone.licence,
        images=len(images.file),
    )
    if backbone.note:
        report.notes.append(backbone.note)
    found = compare_with_store(path, images, key)
    return Job(config, backbone, path, _layout(config, images, backbone), found, report)


def require_own_paths(jobs: Sequence[Job]) -> None:
    """Raise an MlcError if two jobs are about the same store."""
    paths = [job.path.resolve() for job in jobs]
    for path in paths:
        if paths.count(path) > 1:
            raise MlcError(f"{path}: is asked for more than once; name each store once")


def agree_on_batches(jobs: Sequence[Job]) -> None:
    """Have stores that are made in one pass take batches and shards of one size.

    One that is there keeps its own. New ones follow the first of those, one that lacks something
    before the others, or else the smallest batch among them.
    """
    there = sorted(
        (job for job in jobs if job.found.batches is not None),
        key=lambda job: not job.found.lacking,
    )
    smallest = min(job.layout.batch_size for job in jobs)
    of_new = there[0].found.batches if there else None
    for job in jobs:
        new = of_new or (smallest, job.layout.shard_rows)
        size, shard_rows = job.found.batches or new
        job.layout = replace(job.layout, batch_size=size, shard_rows=shard_rows)
        if job.found.lacking:
            job.backbone = job.backbone.for_batches(size)


def require_one_pass(jobs: Sequence[Job]) -> None:
    """Raise an MlcError if stores cannot be filled together: their batches are not the same."""
    for other in jobs[1:]:
        first = jobs[0]
        if not np.array_equal(first.found.image_id, other.found.image_id):
            reason = "has its images in another order than"
        elif first.layout.shard_rows != other.layout.shard_rows:
            reason = f"has shards of {other.layout.shard_rows}, not {first.layout.shard_rows} as"
        elif first.layout.batch_size != other.layout.batch_size:
            reason = f"has batches of {other.layout.batch_size}, not {first.layout.batch_size} as"
        else:
            continue
        raise MlcError(
            f"{other.path}: {reason} {first.path}, and so they cannot be filled in one pass; "
            "extract each with a command of its own"
        )


def _backbone_of_store(config: ExtractConfig, images: ImageSet) -> tuple[Backbone, Path]:
    """Load a backbone, by "auto" with the engine of the store that is there; return both."""
    auto, out = config.engine == AUTO, config.out
    if auto and out is not None and out.exists() and recorded_engine(out) in ENGINES:
        config = config.model_copy(update={"engine": recorded_engine(out)})
    backbone = load_backbone(config, config.batch_size)
    path = store_path(config, images, backbone.key)
    if auto and not path.exists():
        for engine in ENGINES:
            other = store_path(config, images, replace(backbone.key, engine=engine))
            if other.exists():
                asked = config.model_copy(update={"engine": engine})
                return load_backbone(asked, config.batch_size), other
    return backbone, path


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
        shard_rows=config.shard_rows or shard_rows_for(len(images.image_id)),
        made_by=recorded,
        grids=backbone.grids,
    )
