"""A trained head, or an official checkpoint, on a store or on images through its backbone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs import load
from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress, silent
from mlc.datasets.labels import LabelTable
from mlc.datasets.source import DataConfig, read_images
from mlc.heads.evaluate import choose_split, evaluate_on_store, labels_of_run
from mlc.heads.inputs import LabelsConfig
from mlc.heads.metrics import evaluate
from mlc.heads.run_folder import Run, read_run, record_test
from mlc.heads.train import probabilities
from mlc.models.official import ImportOptions, import_checkpoint
from mlc.models.whole import WholeModel, load_whole

OF_STORES = {
    "features": "--features",
    "labels_file": "--labels-file",
    "eval_views": "--eval-views",
    "check": "--no-check",
}


def evaluate_run(
    run: Run,
    flags: Mapping[str, Any],
    split: str = "test",
    *,
    weights: Path | None = None,
    threshold: float | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the metrics of a run, and the bad images.

    Args:
        run: the trained head.
        flags: fields of LabelsConfig; with ``data`` the images themselves are read, and scored in
            the views that the run's own ``eval_views`` takes.
        split: "train", "val", "test" or "all".
        weights: of the backbone, if its file moved.
        threshold: of CP to OF1; by default the run's.
        device: by default the GPU if there is one.
        progress: told while images are read.

    Raises:
        MlcError: see ``evaluate_on_store``, ``load_whole`` and ``evaluate_on_images``.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if run.is_finetuned and not given.keys() & {"data", "features"}:
        given = run.config.model_dump(include=set(DataConfig.model_fields)) | given
    choose_split(split)
    if threshold is not None:
        run = replace(run, config=run.config.model_copy(update={"threshold": threshold}))
    if "data" not in given:
        if weights is not None:
            raise MlcError("evaluate: --weights is for images; pass --data too")
        config = load(LabelsConfig, "evaluate", flags=given)
        return evaluate_on_store(run, config, split, device or "auto"), {}
    for name, flag in OF_STORES.items():
        if name in given:
            raise MlcError(
                f"evaluate: got --data, which reads images, and {flag}; pass one of them"
            )
    data = load(DataConfig, "evaluate", flags=given)
    model = load_whole(run, weights, device or "auto")
    return evaluate_on_images(model, data, split, progress)


def evaluate_on_images(
    model: WholeModel, config: DataConfig, split: str = "test", progress: Progress = silent
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the metrics of a whole model on a split of a data set, and its bad images.

    Of an imported checkpoint the test split's metrics and scores go into its run folder, so that
    it can be reported beside runs that were trained here.

    Raises:
        MlcError: the data set is not there or lacks a class of the run, or every image is bad.
    """
    images = read_images(config)
    table = labels_of_run(model.run, images.labels, split).part(split)
    files = [images.root / str(name) for name in table.file]
    logits, bad = model.logits(files, progress)
    good = np.array([row not in bad for row in range(len(files))])
    if not good.any():
        raise MlcError(f"{images.root}: none of the {len(files)} images can be read")
    scored, logits = table.rows(good), logits[good]
    metrics = evaluate(
        probabilities(logits), scored.targets(), model.run.classes, model.run.config.threshold
    )
    if model.run.is_imported and split == "test":
        _record(model.run, scored, logits, metrics)
    return metrics, {str(table.file[row]): reason for row, reason in bad.items()}


def _record(
    run: Run, table: LabelTable, logits: NDArray[np.float32], metrics: Mapping[str, Any]
) -> None:
    """Put the test metrics and scores of an imported checkpoint into its run folder."""
    scores = {
        "image_id": table.image_id,
        "logits": logits,
        "true": table.targets(),
        "observed": table.observed,
    }
    found = {
        "test": metrics,
        "dataset": table.dataset,
        "truth_known": table.true is not None,
        "labels_digest": table.digest(),
    }
    record_test(run, found, scores)


def evaluate_checkpoint(
    checkpoint: Path,
    flags: Mapping[str, Any],
    split: str = "test",
    *,
    options: ImportOptions | None = None,
    threshold: float | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> tuple[Run, dict[str, Any], dict[str, str]]:
    """Import an official Query2Label checkpoint, unless that was done, and evaluate it.

    Args:
        checkpoint: the authors' ``checkpoint.pkl``, or one of its layout.
        flags: see ``evaluate_run``; by default the images of the data set "coco".
        split: "train", "val", "test" or "all".
        options: of the import, see ``ImportOptions``.
        threshold: see ``evaluate_run``.
        device: by default the GPU if there is one.
        progress: told while images are read.

    Returns:
        Its run folder, the metrics, and the bad images.

    Raises:
        MlcError: see ``import_checkpoint`` and ``evaluate_run``.
    """
    choose_split(split)
    given = {name: value for name, value in flags.items() if value is not None}
    if not given.keys() & {"data", "features"}:
        given["data"] = "coco"
    run = import_checkpoint(checkpoint, options)
    metrics, bad = evaluate_run(
        run, given, split, threshold=threshold, device=device, progress=progress
    )
    return read_run(run.path), metrics, bad
