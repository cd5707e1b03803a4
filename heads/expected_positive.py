"""Expected positive regularisation (EPR): positives only, and a known number of them an image."""

from torch import Tensor

from mlc.heads.bce import bce


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


def epr_term(logits: Tensor, *, expected_positives: float | Tensor) -> Tensor:
    """Squared distance of the batch's mean number of positives from the expected one.

    ``((mean over images of the sum of p) - k)^2 / L^2``. The mean is over the mini-batch, so a
    larger batch is another, weaker regulariser.

    Args:
        logits: (..., B, L), unbounded.
        expected_positives: k, positives of an image; 2.9 on COCO. A number, or (...).

    Returns:
        (...) regularisers.

    Source: Cole et al. 2021, equation 6; ``expected_positive_regularizer`` of the release.
    """
    found = logits.sigmoid().sum(dim=-1).mean(dim=-1)
    return ((found - expected_positives) / logits.shape[-1]) ** 2
