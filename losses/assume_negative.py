"""Losses that take every label which is not an observed positive for a negative."""

import math
from functools import partial

import torch
from torch import Tensor

from mlc.losses.bce import SMOOTHING, cross_entropy, smooth
from mlc.losses.method import Method


def an(logits: Tensor, labels: Tensor) -> Tensor:
    """Assume negative (AN): binary cross-entropy with unknown labels taken for negatives.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 observed positive; all else is assumed negative.

    Returns:
        (..., B, L) cells, not reduced.

    Source: Cole et al. 2021, section 3; ``loss_an`` of the release.
    """
    return cross_entropy(logits, *an_weights(labels, logits.dtype))


def an_ls(logits: Tensor, labels: Tensor, *, smoothing: float | Tensor = SMOOTHING) -> Tensor:
    """Assume negative with label smoothing, of observed positives and assumed negatives alike.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 observed positive; all else is assumed negative.
        smoothing: weight off the target; 0.1 as released, where the paper's text means 0.05.

    Returns:
        (..., B, L) cells, not reduced.

    Source: Cole et al. 2021, section 3; ``loss_an_ls`` of the release.
    """
    return cross_entropy(logits, *an_weights(labels, logits.dtype, smoothing=smoothing))


def wan(logits: Tensor, labels: Tensor, *, negative_weight: float | Tensor | None = None) -> Tensor:
    """Weak assume negative (WAN): AN whose assumed negatives together weigh one positive.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 observed positive; all else is assumed negative.
        negative_weight: by default the paper's 1 / (L - 1).

    Returns:
        (..., B, L) cells, not reduced.

    Source: Cole et al. 2021, section 3; ``loss_wan`` of the release.
    """
    weights = wan_weights(labels, logits.dtype, negative_weight=negative_weight)
    return cross_entropy(logits, *weights)


def an_weights(
    labels: Tensor, dtype: torch.dtype, *, smoothing: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the weights that make ``cross_entropy`` AN or AN-LS; see ``bce_weights``."""
    positive = (labels == 1).to(dtype)
    return smooth(positive, 1 - positive, smoothing)


def wan_weights(
    labels: Tensor, dtype: torch.dtype, *, negative_weight: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the weights that make ``cross_entropy`` WAN; see ``bce_weights``."""
    if negative_weight is None:
        negative_weight = 1 / max(1, labels.shape[-1] - 1)
    positive = (labels == 1).to(dtype)
    return positive, negative_weight * (1 - positive)


METHODS = {
    "an": Method(an, "single-positive", observed_negatives="refused", weights=an_weights),
    "an_ls": Method(
        an_ls,
        "single-positive",
        observed_negatives="refused",
        ranges={"smoothing": (0.0, 1.0)},
        weights=partial(an_weights, smoothing=SMOOTHING),
    ),
    "wan": Method(
        wan,
        "single-positive",
        observed_negatives="refused",
        ranges={"negative_weight": (0.0, math.inf)},
        weights=wan_weights,
    ),
}
