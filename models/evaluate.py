"""evaluate_run(): a trained head on a store, or on images through its backbone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlc.configs import load
from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress, silent
from mlc.datasets.source import DataConfig, read_images
from mlc.heads.evaluate import choose_split, evaluate_on_store, labels_of_run
from mlc.heads.inputs import LabelsConfig
from mlc.heads.metrics import evaluate
from mlc.heads.run_folder import Run
from mlc.heads.train import probabilities
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
        device: by default the GPU if there is one.
        progress: told while images are read.

    Raises:
        MlcError: see ``evaluate_on_store``, ``load_whole`` and ``evaluate_on_images``.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    choose_split(split)
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
    probs = probabilities(logits[good])
    metrics = evaluate(probs, table.targets()[good], model.run.classes, model.run.config.threshold)
    return metrics, {str(table.file[row]): reason for row, reason in bad.items()}
