"""Run folders of made-up scores, for the tests of reports."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlc.heads.config import TrainConfig
from mlc.heads.metrics import mean_ap, step_ap
from mlc.heads.run_folder import BACKBONE, OFFICIAL, Run, folder_aside, read_run, write_files
from mlc.heads.train import probabilities

IMAGES, CLASSES = 80, 3
TRUE = np.random.default_rng(0).random((IMAGES, CLASSES)) < 0.3
KEY = {"backbone": "stub", "size_px": 64, "precision": "float32"}


def logits_of(skill: float, seed: int = 0, true: np.ndarray = TRUE) -> np.ndarray:
    """Return float32 scores that know ``skill`` standard deviations of the truth."""
    noise = np.random.default_rng(100 + seed).standard_normal(true.shape)
    return (skill * true + noise).astype(np.float32)


def write(
    folder: Path,
    name: str,
    *,
    skill: float = 1.0,
    val: float = 50.0,
    true: np.ndarray = TRUE,
    ids: np.ndarray | None = None,
    key: dict[str, Any] = KEY,
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """Write a run folder of made-up scores; its test mAP is what these scores have.

    ``more`` is added to its results.
    """
    config = TrainConfig(**({"loss": "an"} | settings))
    logits = logits_of(skill, config.seed, true)
    scores = {
        "image_id": np.arange(len(true)).astype(str) if ids is None else ids,
        "logits": logits,
        "true": true,
        "observed": np.where(true, 1, -1).astype(np.int8),
    }
    probs = probabilities(logits)
    classes = [f"class {column}" for column in range(true.shape[1])]
    ap = 100 * np.nan_to_num(step_ap(probs, true))
    results = {
        "best_epoch": 1,
        "val": {"mAP": val},
        "test": {
            "mAP": mean_ap(probs, true),
            "per_class_ap": dict(zip(classes, ap.tolist(), strict=True)),
        },
        "classes": classes,
        "features": {"backbone": key["backbone"], "key": key, "digest": "photos"},
        "labels_digest": "table",
        "selection_mAP": val,
        "truth_known": True,
        **(more or {}),
    }
    state = {"weight": torch.zeros(true.shape[1], 2), "bias": torch.zeros(true.shape[1])}
    with folder_aside(folder / name) as partial:
        write_files(partial, config, state, [], scores, results)
    if OFFICIAL in results:  # such a run has its backbone beside its head
        (folder / name / BACKBONE).touch()
    return read_run(folder / name)
