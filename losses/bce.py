"""Losses for full labels: binary cross-entropy, and its label-smoothed form.

Also the numerics that all MLSPL losses share: they act on probabilities, with 1e-5 added inside
the logarithm, so that a cell costs 11.51 at most and its gradient vanishes at the extremes.
``binary_cross_entropy_with_logits`` differs there.
"""

from functools import partial

import torch
from torch import Tensor

from mlc.losses.method import Method

LOG_EPSILON = 1e-5
SMOOTHING = 0.1  # of the release; the paper's text means half of it


def negative_log(probs: Tensor) -> Tensor:
    """Return -log(p + 1e-5), in nats, as the MLSPL release computes it."""
    return -torch.log(probs + LOG_EPSILON)


def cross_entropy(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Return ``positive nl(p) + negative nl(1 - p)``, p = sigmoid(logit), nl = ``negative_log``.

    Args:
        logits: (..., B, L), unbounded.
        positive: weights of the label +1, that broadcast to (..., B, L).
        negative: weights of the label -1, likewise.
    """
    probs = torch.sigmoid(logits)
    return positive * negative_log(probs) + negative * negative_log(1 - probs)


def cross_entropy_slope(probs: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Return the derivative of each cell of ``cross_entropy`` by its logit, over p (1 - p).

    Training spends as long on each operation as on the arithmetic of a batch, and autograd needs
    three times as many.

    Args:
        probs: (..., B, L), the sigmoid of the logits.
        positive: see ``cross_entropy``; taken for constants.
        negative: likewise.
    """
    return negative / (1 - probs + LOG_EPSILON) - positive / (probs + LOG_EPSILON)


def bce_weights(
    labels: Tensor, dtype: torch.dtype, *, smoothing: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the weights that make ``cross_entropy`` of the labels that are known.

    Args:
        labels: (..., B, L), +1 positive, 0 unknown, -1 negative.
        dtype: of the weights.
        smoothing: see ``bce_ls``.
    """
    positive, negative = ((labels == value).to(dtype) for value in (1, -1))
    return smooth(positive, negative, smoothing)


def smooth(positive: Tensor, negative: Tensor, smoothing: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of both labels, a share of each moved to the other."""
    if isinstance(smoothing, float) and smoothing == 0:
        return positive, negative
    return torch.lerp(positive, negative, smoothing), torch.lerp(negative, positive, smoothing)


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
    return cross_entropy(logits, *bce_weights(labels, logits.dtype))


def bce_ls(logits: Tensor, labels: Tensor, *, smoothing: float | Tensor = SMOOTHING) -> Tensor:
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
    return cross_entropy(logits, *bce_weights(labels, logits.dtype, smoothing=smoothing))


METHODS = {
    "bce": Method(bce, "full", observed_negatives="needed", weights=bce_weights),
    "bce_ls": Method(
        bce_ls,
        "full",
        observed_negatives="needed",
        ranges={"smoothing": (0.0, 1.0)},
        weights=partial(bce_weights, smoothing=SMOOTHING),
    ),
}
