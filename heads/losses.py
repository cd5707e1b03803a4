"""LOSSES: the table of methods, and the one place where cells become a number.

A method is at most four pure pieces, written for any leading axes, so that the same function
serves one head and a stack of them; knobs may be numbers or tensors of shape (heads, 1, 1).
To add one: write its file beside ``bce.py``, add a line here; commands and tests follow.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from mlc.configs.errors import MlcError, choose, nearest
from mlc.datasets.protocol import Labels
from mlc.heads.assume_negative import an, an_ls, an_weights, wan, wan_weights
from mlc.heads.bce import SMOOTHING, bce, bce_ls, bce_weights, cross_entropy_slope
from mlc.heads.expected_positive import epr, epr_gradient, epr_term
from mlc.heads.focal import asl, focal
from mlc.heads.observed import iu, iun
from mlc.heads.pairwise import pr
from mlc.heads.role import role, role_gradient, role_term

ESTIMATOR = "estimator_logits"  # the argument through which a method gets its table's rows
WEIGHTS = "weights"  # and the one through which cells that depend on others get their weights


KNOB_RANGES = {  # any finite number where a knob is not named
    "alpha": (0.0, 1.0),
    "clip": (0.0, 1.0),
    "epsilon": (0.0, 1.0),
    "expected_positives": (0.0, math.inf),
    "focus_gradient": (0.0, 1.0),
    "gamma": (0.0, math.inf),
    "gamma_neg": (0.0, math.inf),
    "gamma_pos": (0.0, math.inf),
    "negative_weight": (0.0, math.inf),
    "smoothing": (0.0, 1.0),
}


@dataclass(frozen=True)
class Method:
    """A loss.

    Attributes:
        cells: (logits, labels, **knobs) -> (..., B, L), one cost for each cell.
        labels: what it is made for, the default of a data set of the papers.
        batch_term: (logits, **knobs) -> (...), added to the mean of the cells.
        observed_negatives: what labels of -1 are to it: "refused" where it would make no
            use of them, "needed" where without them it would only ever be told to say yes.
    """

    cells: Callable[..., Tensor]
    labels: Labels
    batch_term: Callable[..., Tensor] | None = None
    observed_negatives: Literal["refused", "allowed", "needed"] = "allowed"
    weights: Callable[..., tuple[Tensor, Tensor]] | None = None
    gradient: Callable[..., tuple[Tensor, ...]] | None = None

    @property
    def has_estimator(self) -> bool:
        """Whether it trains a table of label estimates beside the head."""
        return ESTIMATOR in _keywords(self.cells)

    def knobs(self) -> dict[str, Any]:
        """Return the knobs and their defaults; ``inspect.Parameter.empty`` where there is none."""
        found = {**_keywords(self.cells), **(_keywords(self.batch_term) if self.batch_term else {})}
        return {
            name: default for name, default in found.items() if name not in (ESTIMATOR, WEIGHTS)
        }


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
        method: an entry of ``LOSSES``.
        logits: (..., B, L).
        labels: (..., B, L), +1 positive, 0 unknown, -1 negative.
        knobs: of the method; those that have no default must be there.
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
    cells = method.cells(logits, labels, **_wanted(method.cells, knobs))
    if weights is not None:
        cells = cells * weights
    value = cells.sum(dim=(-2, -1)) / (logits.shape[-2] * logits.shape[-1])
    if method.batch_term is not None:
        value = value + method.batch_term(logits, **_wanted(method.batch_term, knobs))
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
        return method.gradient(logits, labels, **_wanted(method.gradient, knobs))
    if method.weights is not None and method.batch_term is None:
        weights = method.weights(labels, logits.dtype, **_wanted(method.weights, knobs))
        probs = logits.sigmoid()
        slope = cross_entropy_slope(probs, *weights) / (probs.shape[-2] * probs.shape[-1])
        return (slope * probs * (1 - probs),)
    leaves = [logits.detach().requires_grad_()]
    if estimator_logits is not None:
        leaves.append(estimator_logits.detach().requires_grad_())
        knobs = {**knobs, ESTIMATOR: leaves[1]}
    value = loss_value(method, leaves[0], labels, knobs=knobs)
    return torch.autograd.grad(value.sum(), leaves)


def check_knobs(loss: str, knobs: Mapping[str, float]) -> None:
    """Raise an MlcError if a loss is unknown or lacks a knob, before any work starts."""
    known = choose(LOSSES, loss, "loss").knobs()
    for name, value in knobs.items():
        if name not in known:
            hint = nearest(name, known) if known else "it has none"
            raise MlcError(f"knobs: {loss} has no knob {name!r}; {hint}")
        low, high = KNOB_RANGES.get(name, (-math.inf, math.inf))
        if not (low <= value <= high and math.isfinite(value)):
            wanted = f"from {low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"
            wanted = wanted if math.isfinite(low) else "a finite number"
            raise MlcError(f"knobs.{name}: should be {wanted}, got {value}")


@cache  # asked at every step
def _keywords(function: Callable[..., Any]) -> Mapping[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def _wanted(function: Callable[..., Any], knobs: Mapping[str, Any]) -> dict[str, Any]:
    known = _keywords(function)
    return {name: value for name, value in knobs.items() if name in known}


LOSSES: dict[str, Method] = {
    "bce": Method(bce, "full", observed_negatives="needed", weights=bce_weights),
    "bce_ls": Method(
        bce_ls,
        "full",
        observed_negatives="needed",
        weights=partial(bce_weights, smoothing=SMOOTHING),
    ),
    "iun": Method(
        iun, "one-positive-all-negatives", observed_negatives="needed", weights=bce_weights
    ),
    "iu": Method(iu, "one-positive-one-negative", observed_negatives="needed", weights=bce_weights),
    "pr": Method(pr, "single-positive", observed_negatives="refused"),
    "an": Method(an, "single-positive", observed_negatives="refused", weights=an_weights),
    "an_ls": Method(
        an_ls,
        "single-positive",
        observed_negatives="refused",
        weights=partial(an_weights, smoothing=SMOOTHING),
    ),
    "wan": Method(wan, "single-positive", observed_negatives="refused", weights=wan_weights),
    "epr": Method(epr, "single-positive", epr_term, gradient=epr_gradient),
    "role": Method(role, "single-positive", role_term, gradient=role_gradient),
    "focal": Method(focal, "full", observed_negatives="needed"),
    "asl": Method(asl, "full", observed_negatives="needed"),
}
