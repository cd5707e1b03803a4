"""ROLE: regularised online label estimation, a head and a table of label estimates in turn.

The table holds a logit for each cell of the training split. It is trained with the head, by the
same dense Adam at ten times the learning rate.
"""

import math

import torch
from torch import Tensor

from mlc.losses.bce import bce_weights, cross_entropy, cross_entropy_slope
from mlc.losses.expected_positive import epr_term, term_slope
from mlc.losses.method import Method

ESTIMATOR_LR_FACTOR = 10.0
UNKNOWN_LOGIT = math.log(0.6 / 0.4)  # unknown cells start uniform in logits, between 0.4 and 0.6
OBSERVED_LOGIT = math.log(0.995 / 0.005)


def role(logits: Tensor, labels: Tensor, *, estimator_logits: Tensor) -> Tensor:
    """Cells of ROLE: head and estimator each fit the observed labels and the other.

    With p and q the probabilities of head and estimator, sg a stopped gradient and
    ``H(a, t) = t nl(a) + (1 - t) nl(1 - a)``::

        1/2 (observed cross-entropy of p and of q + H(p, sg q) + H(q, sg p))

    The cross terms run over all cells, the observed ones too.

    Args:
        logits: (..., B, L) of the head.
        labels: (..., B, L), +1 observed positive, 0 unknown. The release refuses observed
            negatives; here -1 costs ``-log(1 - p)``.
        estimator_logits: (..., B, L), the table's rows of these images.

    Returns:
        (..., B, L) cells, not reduced.

    Source: Cole et al. 2021, equations 7 to 9; ``loss_role`` of the release.
    """
    positive, negative = bce_weights(labels, logits.dtype)
    probs, estimates = logits.detach().sigmoid(), estimator_logits.detach().sigmoid()
    head = cross_entropy(logits, positive + estimates, negative + (1 - estimates))
    estimator = cross_entropy(estimator_logits, positive + probs, negative + (1 - probs))
    return (head + estimator) / 2


def role_term(
    logits: Tensor,
    labels: Tensor,
    *,
    estimator_logits: Tensor,
    expected_positives: float | Tensor,
) -> Tensor:
    """Mean of EPR's regulariser of the head and of the estimator, (...)."""
    head = epr_term(logits, labels, expected_positives=expected_positives)
    estimator = epr_term(estimator_logits, labels, expected_positives=expected_positives)
    return (head + estimator) / 2


def role_gradient(
    logits: Tensor,
    labels: Tensor,
    *,
    estimator_logits: Tensor,
    expected_positives: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ROLE's loss by head and estimator, cells and term, in closed form.

    Each is the other's teacher in the same formula, so both go through it at once.
    """
    probs = torch.stack([logits, estimator_logits]).sigmoid()
    other = probs.flip(0)
    positive, negative = bce_weights(labels, logits.dtype)
    cells = cross_entropy_slope(probs, positive + other, (negative + 1) - other)
    slope = torch.add(
        term_slope(probs, expected_positives), cells, alpha=1 / (probs.shape[-2] * probs.shape[-1])
    )
    gradient = slope * probs * (1 - probs) / 2
    return gradient[0], gradient[1]


def initial_estimator_logits(observed: Tensor, generator: torch.Generator) -> Tensor:
    """Return the table's start, (N, L) float32.

    Unknown cells are uniform in logit space between logit(0.4) and logit(0.6), observed positives
    logit(0.995), observed negatives logit(0.005); all are trained.

    Args:
        observed: (N, L), +1, 0, -1: the training split, row for row.
        generator: of the uniform draws, on the CPU.
    """
    uniform = torch.rand(observed.shape, generator=generator) * 2 - 1
    start = torch.where(observed == 0, uniform * UNKNOWN_LOGIT, observed * OBSERVED_LOGIT)
    return start.float()


METHODS = {
    "role": Method(
        role,
        "single-positive",
        role_term,
        ranges={"expected_positives": (0.0, math.inf)},
        gradient=role_gradient,
    ),
}
