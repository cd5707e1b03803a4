"""Prepared, what a head is trained on; and write_trained(), what is written of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlc.configs.provenance import made_by
from mlc.datasets.labels import LabelTable
from mlc.heads.config import TrainConfig
from mlc.heads.explain import frequency_bins
from mlc.heads.inputs import Split
from mlc.heads.metrics import evaluate
from mlc.heads.run_folder import write_files
from mlc.heads.train import probabilities
from mlc.heads.trained import TrainedHead, selection_targets
from mlc.heads.training_labels import label_gaps


@dataclass(frozen=True)
class Prepared:
    """Labels as one protocol shows them, joined with features.

    Attributes:
        source: hash of the table as read.
        table: the label table, its splits assigned.
        splits: "train", "val" and "test", on the device of training, their features as the affine
            map of the head sees them.
    """

    source: str
    table: LabelTable
    splits: dict[str, Split]

    def notes(self, val_labels: str) -> list[str]:
        """Return sentences on what the labels lack that train, and those that select."""
        observed = self.splits["train"].observed.cpu().numpy()
        sentences = label_gaps(observed, self.table.classes)
        if not selection_targets(self.splits["val"], val_labels).any():
            sentences.append(
                "labels: no image of the validation split has a positive, so that every epoch is "
                "as good as any other"
            )
        return sentences


def write_trained(
    folder: Path,
    config: TrainConfig,
    trained: TrainedHead,
    prepared: Prepared,
    made: Mapping[str, Any],
) -> None:
    """Write the files of a run into a folder that is there.

    Args:
        folder: to be filled.
        config: resolved.
        trained: the head.
        prepared: labels and splits that it was trained on.
        made: what ``results.json`` says of the features that it reads.
    """
    test, train = prepared.splits["test"], prepared.splits["train"]
    scores = {
        "image_id": test.image_id,
        "logits": trained.logits["test"],
        "true": test.true,
        "observed": test.observed.cpu().numpy(),
    }
    estimates = None
    if trained.estimates is not None:
        estimates = {"image_id": train.image_id, "probabilities": trained.estimates}
    results = _results(config, prepared, trained, made)
    write_files(folder, config, trained.state, trained.history, scores, results, estimates)


def _results(
    config: TrainConfig, prepared: Prepared, trained: TrainedHead, made: Mapping[str, Any]
) -> dict[str, Any]:
    table, splits, source = prepared.table, prepared.splits, prepared.source
    metrics = {
        name: evaluate(
            probabilities(trained.logits[name]), splits[name].true, table.classes, config.threshold
        )
        for name in ("val", "test")
    }
    positives = splits["train"].true.sum(axis=0)
    per_class_ap = np.array(list(metrics["test"]["per_class_ap"].values()))
    best = trained.history[trained.best_epoch - 1]
    return {
        "best_epoch": trained.best_epoch,
        **({} if config.select_on == "val" else {"selected_on": config.select_on}),
        "selection_mAP": best["val_mAP"],
        **{name: best[name] for name in ("strength", "converged") if name in best},
        **metrics,
        "mAP_by_frequency": frequency_bins(positives, per_class_ap),
        "train_positives": dict(zip(table.classes, positives.tolist(), strict=True)),
        "train_images": len(splits["train"].image_id),
        "dataset": table.dataset,
        "truth_known": table.true is not None,
        "classes": list(table.classes),
        "labels_digest": source,
        "features": dict(made),
        "made_by": made_by(),
    }
