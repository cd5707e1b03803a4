"""The losses as the papers write them, in loops of Python, and the slopes of a function."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

K = 1.5  # expected positives of an image


@dataclass(frozen=True)
class Cell:
    """One cell of a batch: logit, label and estimator's logit, the row it is in, and knobs.

    ``target`` and ``estimator_target`` are the logits behind a stopped gradient: held where they
    were while the others are varied.
    """

    logit: float
    z: int
    estimator: float
    target: float
    estimator_target: float
    row: list[tuple[float, int]]
    knobs: dict[str, float]

    @property
    def p(self) -> float:
        return sigmoid(self.logit)

    def knob(self, name: str, default: float) -> float:
        return self.knobs.get(name, default)

    def by_label(self, positive: float, unknown: float, negative: float) -> float:
        return {1: positive, 0: unknown, -1: negative}[self.z]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nl(p: float) -> float:
    return -math.log(p + 1e-5)


def slow_bce(c: Cell) -> float:
    return c.by_label(nl(c.p), 0.0, nl(1 - c.p))


def slow_bce_ls(c: Cell) -> float:
    s = c.knob("smoothing", 0.1)
    return c.by_label((1 - s) * nl(c.p) + s * nl(1 - c.p), 0.0, (1 - s) * nl(1 - c.p) + s * nl(c.p))


def assumed_negative(c: Cell) -> Cell:
    return replace(c, z=1 if c.z == 1 else -1)


def slow_wan(c: Cell) -> float:
    weight = c.knob("negative_weight", 1 / (len(c.row) - 1))
    return nl(c.p) if c.z == 1 else weight * nl(1 - c.p)


def slow_pr(c: Cell) -> float:
    hinges = [max(0.0, 1 - c.p + sigmoid(logit)) for logit, z in c.row if z == 0]
    return sum(hinges) if c.z == 1 else 0.0


def slow_role(c: Cell) -> float:
    q, sg_p, sg_q = sigmoid(c.estimator), sigmoid(c.target), sigmoid(c.estimator_target)
    observed = c.by_label(nl(c.p) + nl(q), 0.0, nl(1 - c.p) + nl(1 - q))
    head = sg_q * nl(c.p) + (1 - sg_q) * nl(1 - c.p)
    estimator = sg_p * nl(q) + (1 - sg_p) * nl(1 - q)
    return 0.5 * (observed + head + estimator)


def slow_focal(c: Cell) -> float:
    gamma, alpha = c.knob("gamma", 2.0), c.knobs.get("alpha")
    weights = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    return c.by_label(
        -weights[0] * (1 - c.p) ** gamma * math.log(c.p),
        0.0,
        -weights[1] * c.p**gamma * math.log(1 - c.p),
    )


def slow_asl(c: Cell) -> float:
    clip, epsilon = c.knob("clip", 0.05), c.knob("epsilon", 1e-8)
    moves = c.knob("focus_gradient", 1.0)
    gammas = {1: c.knob("gamma_pos", 1.0), 0: 0.0, -1: c.knob("gamma_neg", 4.0)}

    def given(logit: float) -> float:
        p = sigmoid(logit)
        return p if c.z == 1 else min(1 - p + clip, 1.0)

    moving, held = ((1 - given(logit)) ** gammas[c.z] for logit in (c.logit, c.target))
    weight = moves * moving + (1 - moves) * held
    cell = -weight * math.log(max(given(c.logit), epsilon))
    return c.by_label(cell, 0.0, cell)


def slow_em(c: Cell) -> float:
    entropy = c.p * nl(c.p) + (1 - c.p) * nl(1 - c.p)
    return c.by_label(nl(c.p), -c.knob("alpha", 0.1) * entropy, nl(1 - c.p))


def slow_em_apl(c: Cell) -> float:
    target = c.knob("soft_negatives", -1.0)
    if c.z != 0 or target < 0:
        return slow_em(c)
    return c.knob("beta", 0.9) * (target * nl(c.p) + (1 - target) * nl(1 - c.p))


def slow_large_loss(c: Cell, large: float) -> float:
    """``large``: the label of an unknown one of large loss, 0 where it has no part."""
    positive, negative = -math.log(c.p), -math.log(1 - c.p)
    if c.knobs.get("is_large"):
        return positive if large == 1 else 0.0
    return positive if c.z == 1 else negative


def slow_hill(c: Cell) -> float:
    m = sigmoid(c.logit - c.knob("margin", 1.0))
    positive = -((1 - m) ** c.knob("gamma", 2.0)) * math.log(m)
    return positive if c.z == 1 else (c.knob("height", 1.5) - c.p) * c.p**2


def slow_splc(c: Cell) -> float:
    gamma = c.knob("gamma", 2.0)
    if c.z == 1:
        m = sigmoid(c.logit - c.knob("margin", 1.0))
        return -((1 - m) ** gamma) * math.log(m)
    if c.knob("corrects", 0.0) and sigmoid(c.target) > c.knob("threshold", 0.6):
        return -((1 - c.p) ** gamma) * math.log(c.p)
    return -(c.p**gamma) * math.log(1 - c.p)


def slow_gr(c: Cell) -> float:
    q2, q3 = c.knob("q2", 0.01), c.knob("q3", 1.0)
    held = sigmoid(c.target)
    missed = sigmoid(c.knob("slope", 0.0) * held + c.knob("offset", -2.0))
    weight = math.exp(-0.5 * ((held - c.knob("centre", 0.5)) / c.knob("spread", 2.0)) ** 2)
    negative = (1 - (1 - c.p) ** q3) / q3
    unknown = weight * (missed * (1 - c.p**q2) / q2 + (1 - missed) * negative)
    return c.by_label(-math.log(c.p + 1e-7), unknown, negative)


def large_cells(logits: np.ndarray, labels: np.ndarray, share: float) -> np.ndarray:
    """Which unknown cells cost at least as much as the K-th costliest of them."""
    costs = np.where(labels == 0, -np.log(1 - 1 / (1 + np.exp(-logits))), -np.inf)
    count = math.ceil(logits.size * share)
    if count == 0:
        return np.zeros(logits.shape, dtype=bool)
    return (labels == 0) & (costs >= np.sort(costs, axis=None)[::-1][count - 1])


SLOW: dict[str, Callable[[Cell], float]] = {
    "bce": slow_bce,
    "bce_ls": slow_bce_ls,
    "iun": slow_bce,
    "iu": slow_bce,
    "pr": slow_pr,
    "an": lambda c: slow_bce(assumed_negative(c)),
    "an_ls": lambda c: slow_bce_ls(assumed_negative(c)),
    "wan": slow_wan,
    "epr": slow_bce,
    "role": slow_role,
    "focal": slow_focal,
    "asl": slow_asl,
    "em": slow_em,
    "em_apl": slow_em_apl,
    "ll_r": lambda c: slow_large_loss(c, 0),
    "ll_ct": lambda c: slow_large_loss(c, 1),
    "ll_cp": lambda c: slow_large_loss(c, 1),
    "hill": slow_hill,
    "splc": slow_splc,
    "gr": slow_gr,
    "crisp": lambda c: 0.0 if "class_priors" in c.knobs else slow_bce(assumed_negative(c)),
    "nnpu": lambda c: 0.0 if "class_priors" in c.knobs else slow_bce(assumed_negative(c)),
}


def slow_crisp(positive: list[float], all_of: list[float], pi: float, n: float) -> float:
    missed = sum(1 - sigmoid(x) for x in positive) / n if n else 0.0
    return 2 * pi * missed + abs(sum(map(sigmoid, all_of)) / len(all_of) - pi)


def slow_nnpu(positive: list[float], all_of: list[float], pi: float, n: float) -> float:
    yes = pi * sum(-math.log(sigmoid(x)) for x in positive) / n if n else 0.0
    no = pi * sum(-math.log(1 - sigmoid(x)) for x in positive) / n if n else 0.0
    return yes + max(0.0, sum(-math.log(1 - sigmoid(x)) for x in all_of) / len(all_of) - no)


def slow_risk(name: str, logits: np.ndarray, labels: np.ndarray, knobs: dict) -> float:
    """CRISP and nnPU, class by class; ``n`` positives are expected in a batch."""
    risk = {"crisp": slow_crisp, "nnpu": slow_nnpu}[name]
    priors, shares = (
        np.ravel(np.asarray(knobs[each])) for each in ("class_priors", "labelled_shares")
    )
    costs = [
        risk(
            list(logits[labels[:, j] == 1, j]),
            list(logits[:, j]),
            priors[j],
            shares[j] * len(logits),
        )
        for j in range(logits.shape[1])
    ]
    return sum(costs) / len(costs)


def slow_term(
    name: str, logits: np.ndarray, estimator: np.ndarray, labels=None, knobs=None
) -> float:
    if name in ("crisp", "nnpu") and "class_priors" in (knobs or {}):
        return slow_risk(name, logits, labels, knobs)

    def distance(x: np.ndarray) -> float:
        return (sum(sigmoid(each) for each in x.flat) / len(x) - K) ** 2 / x.shape[1] ** 2

    if name == "epr":
        return distance(logits)
    return (distance(logits) + distance(estimator)) / 2 if name == "role" else 0.0


@dataclass(frozen=True)
class SlowLoss:
    """A loss in loops of Python, its stopped gradients held at the logits it is made with."""

    name: str
    labels: np.ndarray
    target: np.ndarray
    estimator_target: np.ndarray
    knobs: dict[str, float]

    def cells(self, logits: np.ndarray, estimator: np.ndarray) -> np.ndarray:
        cells = np.empty_like(logits)
        large = large_cells(self.target, self.labels, self.knobs.get("large_share", 0.0))
        for n, i in np.ndindex(logits.shape):
            cells[n, i] = SLOW[self.name](
                Cell(
                    logits[n, i],
                    int(self.labels[n, i]),
                    estimator[n, i],
                    self.target[n, i],
                    self.estimator_target[n, i],
                    [(logits[n, j], int(self.labels[n, j])) for j in range(logits.shape[1])],
                    {
                        name: float(each[n, i]) if getattr(each, "shape", ())[:1] == (5,) else each
                        for name, each in self.knobs.items()
                    }
                    | {"is_large": bool(large[n, i])},
                )
            )
        return cells

    def __call__(self, logits: np.ndarray, estimator: np.ndarray) -> float:
        term = slow_term(self.name, logits, estimator, self.labels, self.knobs)
        return self.cells(logits, estimator).mean() + term


def slopes(function: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    """Numeric gradient: central differences."""
    result = np.empty_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-5
        result[index] = (function(x + step) - function(x - step)) / 2e-5
    return result
