"""evaluate_on_store(): a trained head on the features of any store that its backbone made."""

from dataclasses import replace
from typing import Any

import numpy as np

from mlc.configs.device import choose_device
from mlc.configs.errors import MlcError, choose
from mlc.datasets.labels import SPLITS, LabelTable, add_classes, select_classes
from mlc.datasets.protocol import assign_splits
from mlc.datasets.source import DATASETS
from mlc.heads.inputs import LabelsConfig, join, read_features, read_labels
from mlc.heads.metrics import evaluate
from mlc.heads.run_folder import Run
from mlc.heads.train import probabilities, score

ALL = "all"  # every row of a table, whatever its split


def evaluate_on_store(
    run: Run, config: LabelsConfig, split: str = "test", device: str = "auto"
) -> dict[str, Any]:
    """Return the metrics of a run on a split of a store.

    Args:
        run: the trained head.
        config: store and labels; by default those that the run was trained with.
        split: "train", "val", "test" or "all".
        device: where the head runs.

    Raises:
        MlcError: the store was made with other settings, or lacks images or classes.
    """
    own = run.config.model_dump(include=set(LabelsConfig.model_fields))
    asked = config.model_dump(exclude_defaults=True)
    if "labels_file" in asked:  # in the place of whatever the run's labels were from
        own = {name: own[name] for name in ("features", "classes")}
    config = LabelsConfig(**(own | asked))
    features = read_features(config.features)
    trained_on = run.results["features"]["key"]
    for field, value in trained_on.items():
        if features.key.get(field) != value:
            raise MlcError(
                f"{features.path}: made with other settings than the features of {run.path}: "
                f"{field}: {features.key.get(field)!r}, the run has {value!r}"
            )
    table = labels_of_run(run, read_labels(config, features.path), choose_split(split))
    rows = join(features, table, choose_device(device), (split,))[split]
    logits = score(run.head().to(rows.features.device), rows, str(run.path))
    return evaluate(probabilities(logits), rows.true, run.classes, run.config.threshold)


def labels_of_run(run: Run, table: LabelTable, split: str) -> LabelTable:
    """Return a table's columns for a run's classes, its splits as in the run's protocol.

    A class of the run that no row of a CSV lists has no positive there.

    Args:
        run: the trained head.
        table: as read.
        split: what will be asked of the table; "all" puts every row into it.

    Raises:
        MlcError: the table lacks a class of the run, or has no row of the split.
    """
    if table.dataset not in DATASETS:
        table = add_classes(table, run.classes)
    table = select_classes(table, run.classes)
    if split == ALL:
        return replace(table, split=np.full(len(table), ALL))
    return assign_splits(table, run.config.split_seed, needed=(split,))


def choose_split(split: str) -> str:
    """Return the split, or raise an MlcError if there is none of that name."""
    return choose({name: name for name in (*SPLITS, ALL)}, split, "split")
