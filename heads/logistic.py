"""L2-regularised logistic problems that share their features: what they are, and their gradient.

Each problem has its own weights a, b >= 0 of the images and its own strength C, and minimises::

    f(w, c) = sum_n [a_n softplus(-z_n) + b_n softplus(z_n)] / T + |w|^2 / (2 C T)
    z_n = w . x_n + c,    T = sum_n (a_n + b_n)

which is scikit-learn's ``LogisticRegression(C=C)`` over C T: the same optimum, and a gradient of
the same size. The bias c is not regularised.

Features are centred and turned onto the eigenvectors of their covariance. Both are exact changes
of variables (a turn keeps |w|, the bias takes up the shift), and there the Hessian is nearly
diagonal, which ``lbfgs.py`` builds on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

HISTORY = 10  # pairs of steps and gradient changes
BLOCK = 8192  # images centred at a time


@dataclass(frozen=True)
class Rotated:
    """Features in the coordinates of their principal axes.

    Attributes:
        values: (N, D), centred and rotated.
        mean: (D,), of the features.
        rotation: (D, D) orthonormal; ``values = (features - mean) @ rotation``.
        variance: (D,), of ``values``, >= 0.
        turned_mean: (D,), ``mean @ rotation``.
    """

    values: Tensor
    mean: Tensor
    rotation: Tensor
    variance: Tensor
    turned_mean: Tensor


@dataclass(frozen=True)
class Problems:
    """One problem for each strength and class.

    Attributes:
        features: of N images.
        cells: (P,) classes -> a and b, each (P, N).
        strengths: (S,) C, ascending.
    """

    features: Rotated
    cells: Callable[[Tensor], tuple[Tensor, Tensor]]
    strengths: Tensor


@dataclass(frozen=True)
class Track:
    """What a slot walks: strengths ``start`` to ``stop`` - 1 of one class."""

    column: int
    start: int
    stop: int


@dataclass
class Slots:
    """P problems under way; the first axis of every field is the slot.

    Attributes:
        column: (P,) class.
        position: (P,) index of the strength.
        stop: (P,) where the track ends.
        steps: (P,) taken at this strength.
        stalled: (P,) bool, no step length was found.
        least: (P,) norm of the gradient, at this strength, and ``least_at``, after which step.
        total: (P,) T.
        l2: (P,) 1 / (C T).
        curvature: (P,) mean second derivative of the loss by the logits.
        present: (P, N) a / T.
        absent: (P, N) b / T.
        unknowns: (P, D + 1) weights in rotated coordinates, and the bias for centred features.
        gradient: (P, D + 1) of f.
        logits: (P, N).
        moves: (P, m, D + 1) the last steps, in a ring.
        changes: (P, m, D + 1) of the gradient over these steps.
        inverse: (P, m) 1 / (move . change); 0 where there is no pair.
    """

    column: Tensor
    position: Tensor
    stop: Tensor
    steps: Tensor
    stalled: Tensor
    least: Tensor
    least_at: Tensor
    total: Tensor
    l2: Tensor
    curvature: Tensor
    present: Tensor
    absent: Tensor
    unknowns: Tensor
    gradient: Tensor
    logits: Tensor
    moves: Tensor
    changes: Tensor
    inverse: Tensor

    def __len__(self) -> int:
        return len(self.column)

    def rows(self, keep: Tensor) -> "Slots":
        """Return the slots of a mask or of indices."""
        return replace(self, **{each.name: getattr(self, each.name)[keep] for each in fields(self)})

    def put(self, rows: Tensor, new: "Slots") -> None:
        """Replace the slots of some rows."""
        for each in fields(self):
            getattr(self, each.name)[rows] = getattr(new, each.name)


def rotate(features: Tensor) -> Rotated:
    """Centre features and turn them onto their principal axes, with one copy of them.

    Args:
        features: (N, D) float32 or float64, finite.
    """
    mean = features.mean(dim=0)
    covariance = features.new_zeros(features.shape[1], features.shape[1])
    for block in torch.split(features, BLOCK):
        covariance += (block - mean).T @ (block - mean) / len(features)
    variance, rotation = torch.linalg.eigh(covariance)
    values = torch.empty_like(features)
    for block, out in zip(torch.split(features, BLOCK), torch.split(values, BLOCK), strict=True):
        torch.matmul(block - mean, rotation, out=out)
    return Rotated(values, mean, rotation, variance.clamp(min=0), mean @ rotation)


def bytes_per_slot(images: int, width: int, itemsize: int) -> int:
    """Return what a slot takes at most: 12 numbers an image, 2 m + 12 an unknown.

    Args:
        images: N.
        width: D.
        itemsize: bytes of a number.
    """
    return itemsize * (12 * images + (2 * HISTORY + 12) * (width + 1))


def start(problems: Problems, tracks: Sequence[Track]) -> Slots:
    """Return slots at w = 0 and the bias that is best for it, within half an image of infinity."""
    values = problems.features.values
    images, width = values.shape
    column, position, stop = (
        torch.tensor([getattr(track, name) for track in tracks], device=values.device)
        for name in ("column", "start", "stop")
    )
    present, absent = problems.cells(column)
    total = (present + absent).sum(dim=1)
    total = torch.where(total > 0, total, 1)  # a class without labels: f is |w|^2 alone
    present, absent = present / total[:, None], absent / total[:, None]
    share = (1 + present.sum(dim=1) - absent.sum(dim=1)) / 2  # 1/2 without labels
    share = share.clamp(0.5 / images, 1 - 0.5 / images)
    unknowns = values.new_zeros(len(tracks), width + 1)
    unknowns[:, -1] = torch.logit(share)
    slots = Slots(
        column=column,
        position=position,
        stop=stop,
        steps=torch.zeros_like(column),
        stalled=torch.zeros_like(column, dtype=torch.bool),
        least=torch.full_like(total, torch.inf),
        least_at=torch.zeros_like(column),
        total=total,
        l2=1 / (problems.strengths[position] * total),
        curvature=share * (1 - share),
        present=present,
        absent=absent,
        unknowns=unknowns,
        gradient=unknowns,  # until it is known
        logits=unknowns[:, -1:].repeat(1, images),
        moves=values.new_zeros(len(tracks), HISTORY, width + 1),
        changes=values.new_zeros(len(tracks), HISTORY, width + 1),
        inverse=values.new_zeros(len(tracks), HISTORY),
    )
    slots.gradient = gradient(problems.features, slots)
    return slots


def raise_strength(problems: Problems, slots: Slots, rows: Tensor) -> None:
    """Go on to the next strength in some rows of the slots, from where they are.

    Gradient and history change by the regulariser's part alone, so that they stay exact.
    """
    slots.position[rows] += 1
    l2 = 1 / (problems.strengths[slots.position[rows]] * slots.total[rows])
    change = (l2 - slots.l2[rows])[:, None]
    slots.l2[rows] = l2
    slots.gradient[rows, :-1] += change * slots.unknowns[rows, :-1]
    moves, changes = slots.moves[rows], slots.changes[rows]
    changes[:, :, :-1] += change[:, :, None] * moves[:, :, :-1]
    products = (moves * changes).sum(dim=2)
    slots.changes[rows] = changes
    slots.inverse[rows] = torch.where(slots.inverse[rows] > 0, inverse(products), 0)
    slots.steps[rows] = 0
    slots.stalled[rows] = False
    slots.least[rows] = torch.inf


def inverse(product: Tensor) -> Tensor:
    """Return 1 / product; 0 where it is not positive, or too small for that."""
    tiny = torch.finfo(product.dtype).tiny
    return torch.where(product > tiny, 1 / product.clamp(min=tiny), 0)


def gradient(features: Rotated, slots: Slots) -> Tensor:
    """Return (P, D + 1): the gradient of f by the rotated weights and the bias."""
    by_logits = residual(slots.logits, slots.present, slots.absent)
    by_weight = by_logits @ features.values + slots.l2[:, None] * slots.unknowns[:, :-1]
    return torch.cat([by_weight, by_logits.sum(dim=1, keepdim=True)], dim=1)


def gradient_norm(features: Rotated, slots: Slots) -> Tensor:
    """Return (P,): the norm of the gradient by the weights and bias of the raw features.

    There the bias' gradient is the same, and the weights' is larger by it times the mean.
    """
    by_weight, by_bias = slots.gradient[:, :-1], slots.gradient[:, -1:]
    raw = by_weight + by_bias * features.turned_mean
    return torch.sqrt(raw.square().sum(dim=1) + by_bias[:, 0].square())


def loss(logits: Tensor, present: Tensor, absent: Tensor) -> Tensor:
    """Return (P,): a softplus(-z) + b softplus(z), summed over images.

    softplus(z) is softplus(-|z|) + max(z, 0): no large numbers are subtracted.
    """
    shared = softplus(-logits.abs()).mul_(present + absent)
    return shared.addcmul_(absent, logits.relu()).addcmul_(present, (-logits).relu_()).sum(dim=1)


def residual(logits: Tensor, present: Tensor, absent: Tensor) -> Tensor:
    """Return (P, N): the loss's derivative by the logits, as precise where it is small."""
    return (torch.sigmoid(logits) * absent).addcmul_(torch.sigmoid(-logits), present, value=-1)
