"""The label estimator's table, under dense Adam at the cost of the rows that are visited.

Dense Adam moves every row at every step: the moments of a row that is not in the batch decay and
go on pushing it. What a row will do from step T on, if no gradient came any more, is a sum that is
known beforehand::

    displacement(T, m, v) = m * sum_j w_j / (sqrt(v) r_j + eps),   j = 0, 1, 2, ...
    w_j = b1^j / (1 - b1^(T + j)),   r_j = sqrt(b2^j / (1 - b2^(T + j)))

with the moments m and v decayed to step T. So instead of its logits the table keeps where each row
would come to **rest**, and a row is touched only when it is visited, at step T::

    logits = rest + lr displacement(T, m b1^age, v b2^age)     age: steps since the last visit
    (gradient g)      m = m b1^age + (1 - b1) g,   v = v b2^age + (1 - b2) g^2
    rest = logits - lr displacement(T, m, v)

Nothing is left out: eps is where Adam has it, and the bias corrections are those of each skipped
step. The sum is a Gauss quadrature (Golub & Welsch 1969): the nodes and weights that integrate
polynomials in r against w exactly, up to degree 15, depend on T alone and serve all rows and heads.
Its relative error is 1e-6 at T = 1, 3e-11 at T = 20, and rounding from T = 100 on.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch's defaults, and the authors'
NODES = 8
TERMS = 300  # 0.9 ** 300 is below the rounding of float64
VECTOR_CELLS = 64  # no CPU's vector loop takes more numbers at once
ROWS_AT_ONCE = 4096  # of a whole table, NODES numbers for each of its cells
CHUNK = 1024  # steps whose nodes are made together
SETTLED = 20_000  # from here on the bias corrections are 1, to 2e-9


class Visits(NamedTuple):
    """What visits need; a leading axis of steps, or none for one step.

    Attributes:
        decay: (steps, B, 3, 1, 1), what the steps since a row's last visit left of its place of
            rest (all), its first moment (b1^age) and its second (b2^age).
        nodes: (steps, NODES, 1, 1, 1), where the quadrature looks.
        weights: (steps, NODES, 1, H, 1), of the nodes, times the learning rates.
    """

    decay: Tensor
    nodes: Tensor
    weights: Tensor

    def at(self, step: int) -> "Visits":
        """Return the visits of one step."""
        return Visits(*(each[step] for each in self))


class Estimator:
    """Tables of label logits (N, L), one for each of H heads that see the same batches.

    Args:
        start: (H, N, L), the logits at first.
        lr: (H,), of Adam.
    """

    def __init__(self, start: Tensor, lr: Tensor) -> None:
        heads, images, classes = start.shape
        # Row by row, so that a visit reads and writes one piece of memory: rest, m, v.
        self.table = start.new_zeros(images, 3, heads, classes)
        self.table[:, 0] = start.transpose(0, 1)
        self.last_visit = torch.zeros(images, dtype=torch.long)
        self.steps = 0
        self.lr = lr

    def schedule(self, batches: Tensor) -> Visits:
        """Return the visits of an epoch, and count its steps as taken.

        Args:
            batches: (steps, B) rows on the CPU; a row is in one of them at most.
        """
        now = torch.arange(self.steps + 1, self.steps + len(batches) + 1)
        visits = self._visits(batches, now)
        self.last_visit[batches] = now[:, None].expand_as(batches)
        self.steps += len(batches)
        return visits

    def read(self, rows: Tensor, visit: Visits) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits (B, H, L) of some rows, and their moments decayed to this step."""
        rest, m, v = (self.table.index_select(0, rows) * visit.decay).unbind(1)
        return rest + displacement(m, v, visit), m, v

    def update(
        self, rows: Tensor, visit: Visits, logits: Tensor, m: Tensor, v: Tensor, gradient: Tensor
    ) -> None:
        """Take a step of Adam for the rows that ``read`` gave, their gradient (B, H, L)."""
        m = torch.add(m, gradient, alpha=1 - BETA1)
        v = torch.addcmul(v, gradient, gradient, value=1 - BETA2)
        rest = logits - displacement(m, v, visit)
        self.table.index_copy_(0, rows, torch.stack([rest, m, v], dim=1))

    def logits(self, head: int) -> Tensor:
        """Return all logits (N, L) of a head as they are after the last step."""
        logits = self.table[:, 0, head].clone()
        now = torch.tensor([self.steps + 1])
        moving = torch.nonzero((now - self.last_visit <= TERMS) & (self.last_visit > 0))[:, 0]
        for some in torch.split(moving, ROWS_AT_ONCE):
            visit = self._visits(some[None], now).at(0)
            visit = visit._replace(weights=visit.weights[:, :, head : head + 1])
            rows = some.to(self.table.device)
            rest, m, v = (self.table[rows, :, head : head + 1] * visit.decay).unbind(1)
            logits[rows] = (rest + displacement(m, v, visit))[:, 0]
        return logits

    def _visits(self, batches: Tensor, now: Tensor) -> Visits:
        age = (now[:, None] - self.last_visit[batches]).double()
        decay = torch.stack([torch.ones_like(age), BETA1**age, BETA2**age], dim=2)
        nodes, weights = quadrature(int(now[0]), len(now))
        lr = self.lr.cpu().double().view(-1, 1)
        shaped = (
            decay[..., None, None],
            nodes[..., None, None, None],
            weights[..., None, None, None],
        )
        return Visits(*(each.to(self.table) for each in (shaped[0], shaped[1], shaped[2] * lr)))


def displacement(m: Tensor, v: Tensor, visit: Visits) -> Tensor:
    """Return how far Adam would yet move rows without gradients, (B, H, L).

    Args:
        m: (B, H, L), first moments, decayed to the step of the visit.
        v: (B, H, L), second moments, likewise.
        visit: of that step.
    """
    return m * _sum_of_nodes(visit.weights / (v.sqrt() * visit.nodes + EPS))


def _sum_of_nodes(parts: Tensor) -> Tensor:
    """Sum (NODES, B, H, L) over the nodes, each head's cells in the same order whatever H is.

    torch adds in another order in the last columns of an array that do not fill whole vectors.
    Where a head's cells do fill them there are none such; elsewhere additions of halves do it.
    """
    _, images, _, classes = parts.shape
    if images * classes % VECTOR_CELLS == 0:
        return parts.sum(dim=0)
    while len(parts) > 1:
        first, second = parts.chunk(2)
        parts = first + second
    return parts[0]


def quadrature(first: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights (steps, NODES), float64, of the steps from ``first`` (>= 1) on."""
    wanted = np.minimum(np.arange(first, first + steps), SETTLED)
    pieces = [_chunk(index) for index in range(wanted[0] // CHUNK, wanted[-1] // CHUNK + 1)]
    rows = wanted - wanted[0] // CHUNK * CHUNK
    nodes, weights = (
        torch.from_numpy(np.concatenate(each)[rows]) for each in zip(*pieces, strict=True)
    )
    return nodes, weights


@cache
def _chunk(index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the quadratures of the steps from ``index * CHUNK`` on; there is none of step 0."""
    step = np.maximum(1, index * CHUNK + np.arange(CHUNK))[:, None]
    term = np.arange(TERMS)
    w = BETA1**term / (1 - BETA1 ** (step + term))
    r = np.sqrt(BETA2**term / (1 - BETA2 ** (step + term)))
    diagonal, beside = _lanczos(w, r)
    matrix = np.zeros((CHUNK, NODES, NODES))
    at = np.arange(NODES)
    matrix[:, at, at] = diagonal
    matrix[:, at[1:], at[:-1]] = beside
    nodes, vectors = np.linalg.eigh(matrix)
    return nodes, vectors[:, 0] ** 2 * w.sum(axis=1, keepdims=True)


def _lanczos(
    w: NDArray[np.float64], r: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the Jacobi matrices of measures with weights w at r, both (steps, TERMS).

    As their diagonals (steps, NODES) and the entries beside them (steps, NODES - 1).
    """
    vector = np.sqrt(w / w.sum(axis=1, keepdims=True))
    basis: list[NDArray[np.float64]] = []
    diagonal, beside = [], []
    for _ in range(NODES):
        basis.append(vector)
        following = r * vector
        diagonal.append((following * vector).sum(axis=1))
        for _ in range(2):  # once more: what is left can be as small as rounding
            for each in basis:
                following -= (following * each).sum(axis=1, keepdims=True) * each
        length = np.sqrt((following**2).sum(axis=1))
        beside.append(length)
        vector = following / length[:, None]
    return np.stack(diagonal, axis=1), np.stack(beside[:-1], axis=1)
