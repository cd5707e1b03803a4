"""Losses of the labels that are observed, positives and negatives: IUN and IU.

Both are binary cross-entropy of the labels that are known, bit for bit ``bce``. What sets them
apart is which labels the protocol shows them.
"""

from torch import Tensor

from mlc.losses.bce import bce, bce_weights
from mlc.losses.method import Method


def iun(logits: Tensor, labels: Tensor) -> Tensor:
    """Ignore unobserved positives (IUN): one positive of an image and all its true negatives.

    The oracle among the single-positive methods, as it knows what is negative: labels as
    ``one-positive-all-negatives`` shows them.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 observed positive, -1 true negative, 0 true positive that is not
            observed, which costs nothing.

    Returns:
        (..., B, L) cells, not reduced; the mean is over all B * L of them.

    Source: Cole et al. 2021, section 3. This is the paper's meaning: ``loss_iun`` of the release
    looks for true labels of -1 in a matrix of 0 and 1, finds none, and so trains on the positives
    alone.
    """
    return bce(logits, labels)


def iu(logits: Tensor, labels: Tensor) -> Tensor:
    """Ignore unobserved (IU): one positive and one negative of an image, nothing else.

    Labels as ``one-positive-one-negative`` shows them.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 observed positive, -1 observed negative, 0 unknown, which costs
            nothing.

    Returns:
        (..., B, L) cells, not reduced; the mean is over all B * L of them.

    Source: Cole et al. 2021, section 3; ``loss_iu`` of the release, which asks every batch for an
    observed positive and an observed negative.
    """
    return bce(logits, labels)


METHODS = {
    "iun": Method(
        iun, "one-positive-all-negatives", observed_negatives="needed", weights=bce_weights
    ),
    "iu": Method(iu, "one-positive-one-negative", observed_negatives="needed", weights=bce_weights),
}
