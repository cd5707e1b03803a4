"""Batched L-BFGS for the problems of ``logistic.py``: many at once, each for itself.

The first guess of a Hessian is h v_d + 1 / (C T) on the diagonal, with v_d the variances of the
rotated features and h one number per problem, the mean curvature of the loss, read off its last
step. On correlated features that saves most of the steps.

Problems sit in slots that all take their steps together, as two matrix products a step. A slot
walks a class's strengths upward, each from the optimum and the history of the one before; when it
is done it takes the next class, or is dropped.

Source: Nocedal and Wright, Numerical Optimization, chapter 7.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlc.heads.logistic import (
    HISTORY,
    Problems,
    Rotated,
    Slots,
    Track,
    gradient,
    gradient_norm,
    inverse,
    loss,
    raise_strength,
    residual,
    start,
)

ARMIJO, WOLFE = 1e-4, 0.9  # of the slope: decrease that a step must reach, slope that it may leave
TRIALS = 40  # step lengths
PATIENCE = 40  # steps without a smaller gradient, after which rounding is taken to hide the rest
REFRESH = 32  # steps between two logits from scratch: updated ones gather rounding errors


@dataclass(frozen=True)
class Solved:
    """Problems that are done, P of them.

    Attributes:
        position: (P,) index of the strength.
        column: (P,) class.
        weight: (P, D), in rotated coordinates.
        bias: (P,), for centred features.
        iterations: (P,) steps taken.
        converged: (P,) bool; else the steps ran out, or rounding hid any further decrease.
    """

    position: Tensor
    column: Tensor
    weight: Tensor
    bias: Tensor
    iterations: Tensor
    converged: Tensor


def solve(
    problems: Problems,
    tracks: Sequence[Track],
    slots: int,
    tolerance: float,
    max_iter: int,
) -> Iterator[Solved]:
    """Solve every strength of every track; yield problems as they are done.

    Args:
        problems: to be solved.
        tracks: in the order in which slots take them.
        slots: problems under way at once, at most.
        tolerance: a problem is done when the Euclidean norm of the gradient of f by the raw
            features' weights and bias is at most this.
        max_iter: steps of a problem.
    """
    queue = list(tracks)
    now = start(problems, [queue.pop(0) for _ in queue[:slots]])
    iteration = 0
    while len(now):
        norm = gradient_norm(problems.features, now)
        now.least_at = torch.where(norm < now.least, now.steps, now.least_at)
        now.least = torch.minimum(norm, now.least)
        now.stalled |= now.steps - now.least_at >= PATIENCE
        converged = norm <= tolerance
        done = converged | now.stalled | (now.steps >= max_iter)
        if bool(done.any()):
            yield _solved(now, done, converged)
            now = _go_on(problems, queue, now, done)
        else:
            iteration += 1
            _step(problems.features, now, iteration)


def _solved(slots: Slots, done: Tensor, converged: Tensor) -> Solved:
    return Solved(
        position=slots.position[done],
        column=slots.column[done],
        weight=slots.unknowns[done, :-1],
        bias=slots.unknowns[done, -1],
        iterations=slots.steps[done],
        converged=converged[done],
    )


def _go_on(problems: Problems, queue: list[Track], slots: Slots, done: Tensor) -> Slots:
    """Move the slots that are done to their next strength, else to a new track, else drop them."""
    ended = done & (slots.position + 1 == slots.stop)
    raise_strength(problems, slots, torch.nonzero(done & ~ended).flatten())
    rows = torch.nonzero(ended).flatten()
    taken = [queue.pop(0) for _ in queue[: len(rows)]]
    if taken:
        slots.put(rows[: len(taken)], start(problems, taken))
    if len(taken) == len(rows):
        return slots
    keep = torch.ones_like(done)
    keep[rows[len(taken) :]] = False
    return slots.rows(keep)


def _step(features: Rotated, slots: Slots, iteration: int) -> None:
    """Take one step in every slot."""
    direction = _direction(features, slots, iteration)
    along = direction[:, :-1] @ features.values.T + direction[:, -1:]
    length, slots.stalled = _search(slots, direction, along)
    move = length[:, None] * direction
    slots.unknowns += move
    slots.steps += 1
    if iteration % REFRESH:
        slots.logits.addcmul_(length[:, None], along)
    else:
        slots.logits = slots.unknowns[:, :-1] @ features.values.T + slots.unknowns[:, -1:]
    before, slots.gradient = slots.gradient, gradient(features, slots)
    _remember(features, slots, move, slots.gradient - before, iteration % HISTORY)


def _direction(features: Rotated, slots: Slots, iteration: int) -> Tensor:
    """Return (P, D + 1): minus the inverse Hessian's estimate times the gradient.

    Two-loop recursion, algorithm 7.4. A pair that is not there has the factor 0.
    """
    scale = slots.curvature[:, None]
    diagonal = torch.cat([scale * features.variance + slots.l2[:, None], scale], dim=1)
    ring = [(iteration - back) % HISTORY for back in range(1, HISTORY + 1)]
    result = -slots.gradient
    factors = []
    for pair in ring:
        factor = slots.inverse[:, pair] * (slots.moves[:, pair] * result).sum(dim=1)
        result.addcmul_(factor[:, None], slots.changes[:, pair], value=-1)
        factors.append(factor)
    result /= diagonal
    for pair, factor in zip(reversed(ring), reversed(factors), strict=True):
        factor = factor - slots.inverse[:, pair] * (slots.changes[:, pair] * result).sum(dim=1)
        result.addcmul_(factor[:, None], slots.moves[:, pair])
    return result


def _remember(features: Rotated, slots: Slots, move: Tensor, change: Tensor, place: int) -> None:
    """Put a step into the ring, and read the mean curvature off it."""
    product = (move * change).sum(dim=1)
    slots.moves[:, place], slots.changes[:, place] = move, change
    slots.inverse[:, place] = inverse(product)
    squares = move.square()
    spread = (features.variance * squares[:, :-1]).sum(dim=1) + squares[:, -1]
    curvature = (product - slots.l2 * squares[:, :-1].sum(dim=1)) / spread
    slots.curvature = torch.where(curvature > 0, curvature, slots.curvature)


def _search(slots: Slots, direction: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step length of each slot, and whether none was found (it is 0 then).

    Weak Wolfe conditions by doubling and bisection, from 1. Logits are linear in the length, so
    that a trial costs no matrix product; only slots that have not found theirs try again.

    Args:
        slots: P problems.
        direction: (P, D + 1).
        along: (P, N), what the direction adds to the logits.
    """
    length = torch.ones_like(slots.l2)
    low, high = torch.zeros_like(length), torch.full_like(length, torch.inf)
    linear = slots.l2 * (slots.unknowns * direction)[:, :-1].sum(dim=1)
    square = slots.l2 * direction[:, :-1].square().sum(dim=1)
    begin = loss(slots.logits, slots.present, slots.absent)
    slope = (slots.gradient * direction).sum(dim=1)
    slack = 8 * torch.finfo(begin.dtype).eps * begin  # of rounding, near the optimum
    rows = torch.arange(len(slots), device=length.device)
    for _ in range(TRIALS):
        step, present, absent = length[rows], slots.present[rows], slots.absent[rows]
        logits = torch.addcmul(slots.logits[rows], step[:, None], along[rows])
        change = loss(logits, present, absent) - begin[rows]
        change += step * linear[rows] + step.square() / 2 * square[rows]
        left = (residual(logits, present, absent) * along[rows]).sum(dim=1)
        left += linear[rows] + step * square[rows]
        far = ~(change <= ARMIJO * step * slope[rows] + slack[rows])
        near = ~far & (left < WOLFE * slope[rows])
        high[rows] = torch.where(far, step, high[rows])
        low[rows] = torch.where(near, step, low[rows])
        rows = rows[far | near]
        if not len(rows):
            break
        middle = (low[rows] + high[rows]) / 2
        length[rows] = torch.where(middle.isinf(), 2 * step[far | near], middle)
    length[rows] = 0
    stalled = torch.zeros_like(slots.stalled)
    stalled[rows] = True
    return length, stalled
