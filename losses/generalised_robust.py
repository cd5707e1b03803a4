"""Generalised robust loss (GR): how likely an unknown label is a missed positive, by its score."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mlc.losses.method import Method

EPSILON = 1e-7  # inside the logarithm of a positive, and nowhere else, as in the released code
# From the first epoch to the last, on COCO: "beta" [0, 2, -2, -2], "alpha" [0.5, 2, 0.8, 0.5].
FIRST = {"slope": 0.0, "offset": -2.0, "centre": 0.5, "spread": 2.0}
LAST = {"slope": 2.0, "offset": -2.0, "centre": 0.8, "spread": 0.5}


def gr(
    logits: Tensor,
    labels: Tensor,
    *,
    q2: float | Tensor = 0.01,
    q3: float | Tensor = 1.0,
    slope: float | Tensor = FIRST["slope"],
    offset: float | Tensor = FIRST["offset"],
    centre: float | Tensor = FIRST["centre"],
    spread: float | Tensor = FIRST["spread"],
) -> Tensor:
    """Weighted robust losses of both answers to an unknown label.

    With p = sigmoid(logit), sg a stopped gradient, K = sigmoid(slope sg(p) + offset) the estimated
    probability that it is a missed positive and V = exp(-((sg(p) - centre) / spread)^2 / 2)::

        V (K (1 - p^q2) / q2 + (1 - K) (1 - (1 - p)^q3) / q3)

    and ``-log(p + 1e-7)`` where the label is +1.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 observed positive, 0 unknown, -1 observed negative, of which the
            paper has none: it has K = 0 and V = 1 here.
        q2: of the loss of a positive: cross-entropy towards 0, absolute error at 1; above 0.
        q3: likewise of a negative.
        slope: of K.
        offset: of K.
        centre: of V.
        spread: of V.

    Returns:
        (..., B, L) cells, not reduced.

    Source: Chen et al., "Boosting single positive multi-label classification with generalized
    robust loss", IJCAI 2024, https://arxiv.org/abs/2405.03501, equations 7 to 10, and its code.
    """
    probs = torch.sigmoid(logits)
    held = probs.detach()
    # powers as exponentials: their gradients stay finite where p rounds to 0 or 1
    if_positive = (1 - torch.exp(q2 * logsigmoid(logits))) / q2
    if_negative = (1 - torch.exp(q3 * logsigmoid(-logits))) / q3
    missed = torch.sigmoid(slope * held + offset)
    weight = torch.exp(-(((held - centre) / spread) ** 2) / 2)
    unknown = weight * (missed * if_positive + (1 - missed) * if_negative)
    known = torch.where(labels == 1, -torch.log(probs + EPSILON), if_negative)
    return torch.where(labels == 0, unknown, known)


def gr_schedule(epoch: int, epochs: int) -> dict[str, float]:
    """Return K and V of an epoch: evenly from ``FIRST`` in the first to ``LAST`` in the last."""
    done = (epoch - 1) / max(1, epochs - 1)
    return {name: (1 - done) * start + done * LAST[name] for name, start in FIRST.items()}


METHODS = {
    "gr": Method(
        gr,
        "single-positive",
        ranges={"q2": (1e-6, 1.0), "q3": (1e-6, 1.0)},
        changing=tuple(FIRST),
        schedule=gr_schedule,
    ),
}
