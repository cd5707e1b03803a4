"""What explains a result: how good estimated labels are, and which classes gain."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = ("rare", "medium", "frequent")


def estimated_positives(probs: Tensor) -> float:
    """Return the mean number of positives of an image that probabilities amount to.

    Args:
        probs: (N, L) in [0, 1], of a head or of a label estimator. To compare with the constant k
            of EPR and ROLE, and with the true mean.
    """
    return float(probs.sum(dtype=torch.float64)) / len(probs)


def estimator_quality(
    estimates: Tensor, observed: Tensor, true: NDArray[np.bool_] | Tensor
) -> dict[str, float]:
    """Precision and recall of estimated labels on the hidden positives, in per cent.

    Only cells that are not observed count: those that training is told would flatter an estimator
    that is clamped to them. A positive is estimated above 0.5. 0/0 is 0.

    Args:
        estimates: (N, L) probabilities.
        observed: (N, L), +1 observed positive, 0 unknown, -1 observed negative.
        true: (N, L) bool.

    Returns:
        ``hidden_precision``: true positives among the hidden cells that are estimated positive.
        ``hidden_recall``: estimated positives among the hidden cells that are positive.
    """
    hidden = observed == 0
    positive = hidden & torch.as_tensor(true, device=estimates.device)
    guessed = hidden & (estimates > 0.5)
    hits = int((guessed & positive).sum())
    return {
        "hidden_precision": 100 * hits / max(1, int(guessed.sum())),
        "hidden_recall": 100 * hits / max(1, int(positive.sum())),
    }


def frequency_bins(
    positives: NDArray[np.integer[Any]], per_class_ap: NDArray[np.floating[Any]]
) -> dict[str, dict[str, float]]:
    """Mean AP of the rare, the medium and the frequent third of the classes.

    Classes are ranked by their training positives, equal ones in their own order; thirds differ by
    one class at most, the rarer ones get it. A class without test positives counts 0, as in mAP,
    so that the mean of the thirds, weighted by their classes, is the mAP.

    Args:
        positives: (L,) training images of each class, by the truth where it is known.
        per_class_ap: (L,) in per cent, 0 or NaN for a class without test positives.

    Returns:
        For "rare", "medium" and "frequent" (fewer if there are fewer classes): ``mAP`` in per
        cent, ``classes``, and the ``fewest`` and ``most`` positives of one of them.
    """
    order = np.argsort(positives, kind="stable")
    return {
        name: {
            "mAP": float(np.nan_to_num(per_class_ap[rows]).mean()),
            "classes": len(rows),
            "fewest": int(positives[rows[0]]),
            "most": int(positives[rows[-1]]),
        }
        for name, rows in zip(BINS, np.array_split(order, len(BINS)), strict=True)
        if len(rows)
    }
