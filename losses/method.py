"""Method: a loss, as at most a handful of pure functions.

They are written for any leading axes, so that the same function serves one head and a stack of
them. Knobs, the keyword arguments that a user sets, may be numbers or tensors of shape (heads, 1,
1). Keyword arguments that change as training goes on are named in ``changing``.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from torch import Tensor

from mlc.datasets.protocol import Labels

ESTIMATOR = "estimator_logits"  # the argument through which a method gets its table's rows
WEIGHTS = "weights"  # and the one through which cells that depend on others get their weights
WARM_UP = "warm_up"  # the knob that says after how many epochs a method first recomputes


@dataclass(frozen=True)
class Method:
    """A loss.

    Attributes:
        cells: (logits, labels, **knobs) -> (..., B, L), one cost for each cell.
        labels: what it is made for, the default of a data set of the papers.
        batch_term: (logits, labels, **knobs) -> (...), added to the mean of the cells.
        observed_negatives: what labels of -1 are to it: "refused" where it would make no
            use of them, "needed" where without them it would only ever be told to say yes.
        ranges: least and greatest value of knobs; any finite number where a knob is not named.
        per_class: knobs that may also be a list, of a number for each class.
        weights: (labels, dtype, **knobs) -> the two weights that make its cells a cross-entropy,
            see ``bce_weights``: their gradient is then known, and the full-batch solver takes it.
        gradient: (logits, labels, **knobs) -> the gradient of the whole loss, by a formula.
        changing: names of arguments of ``cells`` and ``batch_term`` that are no knobs, as the two
            functions below give them; their defaults are what the first epoch has.
        schedule: (epoch, epochs, **knobs) -> numbers for an epoch, counted from 1.
        recompute: (logits, labels, epoch, epochs, **knobs) -> tensors for an epoch, of all (N, L)
            training cells as they are scored when it begins: one for each cell or for each class,
            (N, L) or (L,). Not in the first ``warm_up`` epochs, if that is a knob.
        rewrite: (logits, labels, **knobs) -> the labels of a batch from its step on.
        of_whole_batch: whether a cell's cost depends on other images of its batch.
    """

    cells: Callable[..., Tensor]
    labels: Labels
    batch_term: Callable[..., Tensor] | None = None
    observed_negatives: Literal["refused", "allowed", "needed"] = "allowed"
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    per_class: tuple[str, ...] = ()
    weights: Callable[..., tuple[Tensor, Tensor]] | None = None
    gradient: Callable[..., tuple[Tensor, ...]] | None = None
    changing: tuple[str, ...] = ()
    schedule: Callable[..., dict[str, float]] | None = None
    recompute: Callable[..., dict[str, Tensor]] | None = None
    rewrite: Callable[..., Tensor] | None = None
    of_whole_batch: bool = False

    @property
    def has_estimator(self) -> bool:
        """Whether it trains a table of label estimates beside the head."""
        return ESTIMATOR in keywords(self.cells)

    @property
    def changes(self) -> bool:
        """Whether anything of it changes as training goes on."""
        return any(each is not None for each in (self.schedule, self.recompute, self.rewrite))

    def knobs(self) -> dict[str, Any]:
        """Return the knobs and their defaults; ``inspect.Parameter.empty`` where there is none."""
        pieces = (self.cells, self.batch_term, self.schedule, self.recompute, self.rewrite)
        found: dict[str, Any] = {}
        for piece in pieces:
            found |= keywords(piece) if piece is not None else {}
        return {
            name: default
            for name, default in found.items()
            if name not in (ESTIMATOR, WEIGHTS, *self.changing)
        }


@cache  # asked at every step
def keywords(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the keyword-only arguments of a function, and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def wanted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some arguments that a function has a use for."""
    known = keywords(function)
    return {name: value for name, value in arguments.items() if name in known}
