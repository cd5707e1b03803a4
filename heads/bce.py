"""Losses for full labels: binary cross-entropy, and its label-smoothed form.

Also the numerics that all MLSPL losses share: they act on probabilities, with 1e-5 added inside
the logarithm, so that a cell costs 11.51 at most and its gradient vanishes at the extremes.
``binary_cross_entropy_with_logits`` differs there.
"""

import torch
from torch import Tensor

LOG_EPSILON = 1e-5


def negative_log(probs: Tensor) -> Tensor:
    """Return -log(p + 1e-5), in nats, as the MLSPL release computes it."""
    return -torch.log(probs + LOG_EPSILON)


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of the labels that are known.

    With p = sigmoid(logit): ``-log p`` where the label is +1, ``-log(1 - p)`` where it is -1,
    nothing where it is 0.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 positive, 0 unknown, -1 negative.

    Returns:
        (..., B, L) cells, not reduced.

    Source: ``loss_bce`` of the MLSPL release; there labels are 0 and 1.
    """
    return bce_ls(logits, labels, smoothing=0.0)


def bce_ls(logits: Tensor, labels: Tensor, *, smoothing: float | Tensor = 0.1) -> Tensor:
    """Label-smoothed binary cross-entropy of the labels that are known.

    ``(1 - s) nl(p) + s nl(1 - p)`` where the label is +1, the reverse where it is -1.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 positive, 0 unknown, -1 negative.
        smoothing: s, the weight off the target. The released code uses 0.1, which is followed
            here; the paper's text means half of it.

    Returns:
        (..., B, L) cells, not reduced.

    Source: ``loss_bce_ls`` of the MLSPL release.
    """
    probs = torch.sigmoid(logits)
    present, absent = negative_log(probs), negative_log(1 - probs)
    positive = (1 - smoothing) * present + smoothing * absent
    negative = (1 - smoothing) * absent + smoothing * present
    return torch.where(labels == 1, positive, torch.where(labels == -1, negative, 0.0))
