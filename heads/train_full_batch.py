"""train_full_batch(): a convex head at its optimum, its L2 strength chosen by validation."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.progress import Progress, silent
from mlc.heads.config import TrainConfig
from mlc.heads.explain import estimated_positives
from mlc.heads.full_batch import STRENGTHS, StrengthPath, fit_path
from mlc.heads.inputs import EvalViews, Split, mean_of_views
from mlc.heads.metrics import mean_ap
from mlc.heads.trained import TrainedHead, selection_targets


def train_full_batch(
    config: TrainConfig, splits: Mapping[str, Split], progress: Progress = silent
) -> TrainedHead:
    """Solve for each strength on "train", choose one on "val", score "val" and "test" with it.

    Args:
        config: checked, its knobs settled, its solver "lbfgs".
        splits: "train", "val" and "test", on the device of training.
        progress: told how many problems, of a class and a strength, are solved.

    Returns:
        The head; its history has a line for each strength in the place of epochs.
    """
    strengths = STRENGTHS if config.strengths is None else config.strengths
    train, val = splits["train"], splits["val"]
    path = fit_path(
        train.features,
        train.observed,
        config.loss,
        strengths,
        knobs=config.knobs,
        progress=progress,
    )
    targets = selection_targets(val, config.val_labels)
    history = []
    for index, strength in enumerate(strengths):
        probs = _logits(path, val, index, config.eval_views).sigmoid().cpu()
        history.append(
            {
                "strength": strength,
                "converged": float(path.converged[index].float().mean()),
                "val_mAP": mean_ap(probs.numpy(), targets),
                "val_estimated_positives": estimated_positives(probs),
            }
        )
    best = int(np.argmax([line["val_mAP"] for line in history]))
    logits: dict[str, NDArray[np.float32]] = {
        name: _logits(path, splits[name], best, config.eval_views).float().cpu().numpy()
        for name in ("val", "test")
    }
    state = {"weight": path.weight[best], "bias": path.bias[best]}
    state = {name: each.float().cpu().contiguous() for name, each in state.items()}
    return TrainedHead(state, best + 1, history, logits)


def _logits(path: StrengthPath, split: Split, index: int, eval_views: EvalViews) -> Tensor:
    """Return the logits (n, L) of a split at one strength."""
    views = split.scored_views(eval_views)
    return mean_of_views([path.logits(features, index) for features in views])
