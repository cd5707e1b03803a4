"""Expected positive regularisation (EPR): positives only, and a known number of them an image."""

import math

import torch
from torch import Tensor

from mlc.losses.bce import bce, bce_weights, cross_entropy_slope
from mlc.losses.method import Method


def epr(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the observed labels; unknown ones cost nothing.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 observed positive, 0 unknown. The release refuses observed
            negatives; here -1 costs ``-log(1 - p)``.

    Returns:
        (..., B, L) cells, not reduced; the mean is over all B * L of them.

    Source: Cole et al. 2021, section 3; ``loss_epr`` of the release.
    """
    return bce(logits, labels)


def epr_gradient(
    logits: Tensor, labels: Tensor, *, expected_positives: float | Tensor
) -> tuple[Tensor]:
    """Return the gradient (..., B, L) of EPR's loss, cells and term, in closed form."""
    probs = logits.sigmoid()
    cells = cross_entropy_slope(probs, *bce_weights(labels, logits.dtype))
    slope = torch.add(
        term_slope(probs, expected_positives), cells, alpha=1 / (probs.shape[-2] * probs.shape[-1])
    )
    return (slope * probs * (1 - probs),)


def epr_term(logits: Tensor, labels: Tensor, *, expected_positives: float | Tensor) -> Tensor:
    """Squared distance of the batch's mean number of positives from the expected one.

    ``((mean over images of the sum of p) - k)^2 / L^2``. The mean is over the mini-batch, so a
    larger batch is another, weaker regulariser.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), which it has no use for.
        expected_positives: k, positives of an image; 2.9 on COCO.

    Returns:
        (...) regularisers.

    Source: Cole et al. 2021, equation 6; ``expected_positive_regularizer`` of the release.
    """
    found = logits.sigmoid().sum(dim=-1, keepdim=True).mean(dim=-2, keepdim=True)
    cost: Tensor = ((found - expected_positives) / logits.shape[-1]) ** 2
    return cost.squeeze((-2, -1))


def term_slope(probs: Tensor, expected_positives: float | Tensor) -> Tensor:
    """Return the derivative of ``epr_term`` by each logit, over p (1 - p): (..., 1, 1).

    Args:
        probs: (..., B, L), the sigmoid of the logits.
        expected_positives: k.
    """
    images, classes = probs.shape[-2:]
    found = probs.sum(dim=(-2, -1), keepdim=True) / images
    return (found - expected_positives) * (2 / (classes**2 * images))


METHODS = {
    "epr": Method(
        epr,
        "single-positive",
        epr_term,
        ranges={"expected_positives": (0.0, math.inf)},
        gradient=epr_gradient,
    ),
}
