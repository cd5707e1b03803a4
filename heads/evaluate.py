"""evaluate_on_store(): a trained head on the features of any store that its backbone made."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlc.configs.device import choose_device
from mlc.configs.errors import MlcError, choose
from mlc.datasets.labels import SPLITS, LabelTable, add_classes, select_classes
from mlc.datasets.protocol import assign_splits
from mlc.datasets.source import DATASETS
from mlc.heads.inputs import EvalViews, LabelsConfig, join, read_features, read_labels
from mlc.heads.metrics import evaluate
from mlc.heads.modules import HEADS
from mlc.heads.run_folder import Run
from mlc.heads.train import probabilities, score
from mlc.store.key import current_key, feature_dtypes

# Fields of a key in which a store may differ from an imported checkpoint, which had none.
OF_STORING = {"precision", "decode", "features"}
ALL = "all"  # every row of a table, whatever its split
OF_JSON = "json-"  # how the data set of a table begins that is of a JSON, which lists its classes
SHOWN = 5  # names of a list in an error


def evaluate_on_store(
    run: Run, config: LabelsConfig, split: str = "test", device: str = "auto"
) -> dict[str, Any]:
    """Return the metrics of a run on a split of a store, of the layer that it was trained on.

    Args:
        run: the trained head.
        config: store, views and labels; by default those that the run was trained with.
        split: "train", "val", "test" or "all".
        device: where the head runs.

    Raises:
        MlcError: the store was made with other settings, or lacks images or classes.
    """
    config = _with_own(run, config)
    in_views = (split,) if config.eval_views == "mean" else ()
    trained_on = current_key(run.results["features"]["key"])
    layer = run.config.layer or trained_on["layers"][0]
    kind = choose(HEADS, run.config.head, "head").reads
    features = read_features(
        config.features, layer, kind, all_views=bool(in_views), check=config.check
    )
    asked, stored = (
        _read_by_head(key, layer, kind, config.eval_views) for key in (trained_on, features.key)
    )
    for field, value in asked.items():
        if run.is_imported and field in OF_STORING:
            continue
        if stored.get(field) != value:
            raise MlcError(
                f"{features.path}: made with other settings than the features of {run.path}: "
                f"{field}: {stored.get(field)!r}, the run has {value!r}"
            )
    table = labels_of_run(run, read_labels(config, features.path), choose_split(split))
    rows = join(features, table, choose_device(device), (split,), in_all_views=in_views)[split]
    head = run.head().to(rows.features.device)
    logits = score(head, rows, str(run.path), config.eval_views, config.check)
    return evaluate(probabilities(logits), rows.true, run.classes, run.config.threshold)


def _read_by_head(
    key: Mapping[str, Any], layer: str, kind: str, eval_views: EvalViews
) -> dict[str, Any]:
    """Return the fields of a key, of those that list what is stored only what a head reads.

    Not the engine: all give the same features to 1e-5.
    """
    return {name: value for name, value in key.items() if name != "engine"} | {
        "layers": layer,
        "features": feature_dtypes(key["features"])[kind],
        "views": key["views"] if eval_views == "mean" else key["views"][0],
    }


def _with_own(run: Run, config: LabelsConfig) -> LabelsConfig:
    """Return a config that says of a run's features and labels what the given one leaves open."""
    # What is given may be a default: the first view, of a run that takes the mean.
    asked = config.model_dump(exclude_unset=True)
    own = run.config.model_dump(include=set(LabelsConfig.model_fields) - {"check"})
    if "labels_file" in asked:  # in the place of whatever the run's labels were from
        own = {name: own[name] for name in ("features", "eval_views", "classes")}
    return LabelsConfig(**(own | asked))


def labels_of_run(run: Run, table: LabelTable, split: str) -> LabelTable:
    """Return a table's columns for a run's classes, its splits as in the run's protocol.

    A class of the run that no row of a CSV lists has no positive there, as long as any row lists
    a class of the run; a JSON in COCO's format lists them all.

    Args:
        run: the trained head.
        table: as read.
        split: what will be asked of the table; "all" puts every row into it.

    Raises:
        MlcError: the table lacks a class of the run, or has no row of the split.
    """
    table = select_classes(_with_unlisted(run, table), run.classes)
    if split == ALL:
        return replace(table, split=np.full(len(table), ALL))
    if run.config.select_on == "test":
        if split == "val":
            raise MlcError(
                f"split: {run.path} was trained on the images of val too, and selected on those of "
                "test; pass train or test"
            )
        table = assign_splits(table, run.config.split_seed, needed=())
        return replace(table, split=np.where(table.split == "test", "test", "train"))
    return assign_splits(table, run.config.split_seed, needed=(split,))


def _with_unlisted(run: Run, table: LabelTable) -> LabelTable:
    """Return a table with the classes of a run that none of its rows lists, if that can be."""
    missing = [name for name in run.classes if name not in table.classes]
    if not missing or table.dataset in DATASETS:
        return table
    if table.dataset.startswith(OF_JSON):
        raise MlcError(
            f"{table.dataset}: {len(missing)} of the {len(run.classes)} classes of {run.path} are "
            f"no categories of it ({_cut(missing)}), got {_cut(table.classes)}; name them alike"
        )
    if len(missing) == len(run.classes):
        raise MlcError(
            f"{table.dataset}: shares no class with {run.path}, got {_cut(table.classes)} where "
            f"the run has {_cut(run.classes)}; name them alike"
        )
    return add_classes(table, run.classes)


def _cut(names: Sequence[str]) -> str:
    """Return the first of some names as text."""
    more = ", ..." if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def choose_split(split: str) -> str:
    """Return the split, or raise an MlcError if there is none of that name."""
    return choose({name: name for name in (*SPLITS, ALL)}, split, "split")
