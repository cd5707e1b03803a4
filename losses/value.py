"""The one place where cells become a number, and its gradient."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlc.losses.bce import cross_entropy_slope
from mlc.losses.method import ESTIMATOR, WEIGHTS, Method, wanted


def loss_value(
    method: Method,
    logits: Tensor,
    labels: Tensor,
    *,
    knobs: Mapping[str, Any],
    weights: Tensor | None = None,
    estimator_logits: Tensor | None = None,
) -> Tensor:
    """Return a method's loss: the mean of its cells plus its batch term.

    Args:
        method: an entry of LOSSES.
        logits: (..., B, L).
        labels: (..., B, L), +1 positive, 0 unknown, -1 negative.
        knobs: of the method, those that have no default must be there; and what of it changes
            from epoch to epoch.
        weights: (..., B, L) of the cells; one of weight 0 has no gradient. The divisor stays
            B * L, as in the MLSPL release: cells that cost nothing count in the mean. The batch
            term has no weights, it is of all logits.
        estimator_logits: (..., B, L), for methods that have an estimator.

    Returns:
        (...) losses.
    """
    if estimator_logits is not None:
        knobs = {**knobs, ESTIMATOR: estimator_logits}
    if weights is not None:
        knobs = {**knobs, WEIGHTS: weights}
    cells = method.cells(logits, labels, **wanted(method.cells, knobs))
    if weights is not None:
        cells = cells * weights
    value = cells.sum(dim=(-2, -1)) / (logits.shape[-2] * logits.shape[-1])
    if method.batch_term is not None:
        value = value + method.batch_term(logits, labels, **wanted(method.batch_term, knobs))
    return value


def loss_gradient(
    method: Method,
    logits: Tensor,
    labels: Tensor,
    *,
    knobs: Mapping[str, Any],
    estimator_logits: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradient of ``loss_value`` by logits and, if given, by the estimator's logits.

    By the formula that a method has for it, else by autograd. Arguments as ``loss_value`` has them.
    """
    if estimator_logits is not None:
        knobs = {**knobs, ESTIMATOR: estimator_logits}
    if method.gradient is not None:
        return method.gradient(logits, labels, **wanted(method.gradient, knobs))
    if method.weights is not None and method.batch_term is None:
        weights = method.weights(labels, logits.dtype, **wanted(method.weights, knobs))
        probs = logits.sigmoid()
        slope = cross_entropy_slope(probs, *weights) / (probs.shape[-2] * probs.shape[-1])
        return (slope * probs * (1 - probs),)
    leaves = [logits.detach().requires_grad_()]
    if estimator_logits is not None:
        leaves.append(estimator_logits.detach().requires_grad_())
        knobs = {**knobs, ESTIMATOR: leaves[1]}
    value = loss_value(method, leaves[0], labels, knobs=knobs)
    return torch.autograd.grad(value.sum(), leaves)
