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
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import LabelTable
from mlc.datasets.source import DataConfig, read_images
from mlc.heads.evaluate import choose_split, evaluate_on_store, labels_of_run
from mlc.heads.inputs import LabelsConfig
from mlc.heads.metrics import evaluate
from mlc.heads.run_folder import Run, read_run, record_test
from mlc.heads.train import probabilities
from mlc.models.official import ImportOptions, import_checkpoint
from mlc.models.whole import load_whole

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
        MlcError: see ``evaluate_on_store`` and ``evaluate_on_images``.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if run.is_finetuned and not given.keys() & {"data", "features"}:
        given = run.config.model_dump(include=set(DataConfig.model_fields)) | given
    choose_split(split)
    run = _at_threshold(run, threshold)
    if "data" not in given:
        if weights is not None:
            raise MlcError("evaluate: --weights is for images; pass --data too")
        config = load(LabelsConfig, "evaluate", flags=given)
        return evaluate_on_store(run, config, split, device or "auto"), {}
    images = _read_images(given)
    return evaluate_on_images(run, images, split, weights=weights, device=device, progress=progress)


def evaluate_on_images(
    run: Run,
    images: ImageSet,
    split: str = "test",
    *,
    weights: Path | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the metrics of a run on a split of a data set, and its bad images.

    Of an imported checkpoint the test split's metrics and scores go into its run folder, so that
    it can be reported beside runs that were trained here.

    Args:
        run: see ``evaluate_run``, like all that follows the split.
        images: with their labels.
        split: "train", "val", "test" or "all".
        weights: of the backbone.
        device: by default the GPU if there is one.
        progress: told while images are read.

    Raises:
        MlcError: the data set lacks a class of the run or rows of the split; see ``load_whole``;
            or every image is bad.
    """
    table = labels_of_run(run, images.labels, split).part(split)
    model = load_whole(run, weights, device or "auto")
    files = [images.root / str(name) for name in table.file]
    logits, bad = model.logits(files, progress)
    good = np.array([row not in bad for row in range(len(files))])
    if not good.any():
        raise MlcError(f"{images.root}: none of the {len(files)} images can be read")
    scored, logits = table.rows(good), logits[good]
    metrics = evaluate(probabilities(logits), scored.targets(), run.classes, run.config.threshold)
    if run.is_imported and split == "test":
        _record(run, scored, logits, metrics)
    return metrics, {str(table.file[row]): reason for row, reason in bad.items()}


def _read_images(given: Mapping[str, Any]) -> ImageSet:
    """Return the images and labels that flags name, none of which may be for stores."""
    for name, flag in OF_STORES.items():
        if name in given:
            raise MlcError(
                f"evaluate: got --data, which reads images, and {flag}; pass one of them"
            )
    return read_images(load(DataConfig, "evaluate", flags=given))


def _at_threshold(run: Run, threshold: float | None) -> Run:
    if threshold is None:
        return run
    return replace(run, config=run.config.model_copy(update={"threshold": threshold}))


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
        MlcError: see ``import_checkpoint`` and ``evaluate_run``; what is wrong with the images is
            found before the import.
    """
    choose_split(split)
    given = {name: value for name, value in flags.items() if value is not None}
    if not given.keys() & {"data", "features"}:
        given["data"] = "coco"
    images = _read_images(given) if "data" in given else None
    run = import_checkpoint(checkpoint, options)
    if images is None:
        metrics, bad = evaluate_run(run, given, split, threshold=threshold, device=device)
    else:
        chosen = _at_threshold(run, threshold)
        metrics, bad = evaluate_on_images(chosen, images, split, device=device, progress=progress)
    return read_run(run.path), metrics, bad
