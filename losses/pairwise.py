"""Pairwise ranking (PR): every observed positive above every unknown label of its image."""

import torch
from torch import Tensor

from mlc.losses.method import Method


def pr(logits: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Cost of ranking an image's unknown labels against its observed positives.

    With p = sigmoid(logit), the cell of an observed positive i is::

        sum over unknown j of max(0, 1 - p_i + p_j)  =  n (1 - p_i) + sum over unknown j of p_j

    for n unknown labels in the image: probabilities differ by 1 at most, so the hinge never
    bends and no pair has to be looked at. All other cells are 0.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 observed positive, 0 unknown. The release refuses observed
            negatives; here a label of -1 takes no part.
        weights: (..., B, L) of the unknown labels, here because their costs lie in the cells of
            the positives: with those of the positives, which ``loss_value`` applies, a pair
            weighs w_i w_j, and a label of weight 0 has no gradient. By default 1.

    Returns:
        (..., B, L) cells, not reduced; the mean is over all B * L of them.

    Source: ``loss_pr`` of the MLSPL release, a loop over pairs; not in the paper's main table.
    """
    probs = torch.sigmoid(logits)
    unknown = (labels == 0).to(logits.dtype)
    if weights is not None:
        unknown = unknown * weights
    count = unknown.sum(dim=-1, keepdim=True)
    total = (unknown * probs).sum(dim=-1, keepdim=True)
    return torch.where(labels == 1, count * (1 - probs) + total, 0.0)


METHODS = {"pr": Method(pr, "single-positive", observed_negatives="refused")}
