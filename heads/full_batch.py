"""Full-batch linear heads: the convex losses to their optimum, on a path of L2 strengths.

The baseline of a scikit-learn user: one-versus-rest logistic regression, its strength chosen on
the validation split. Where ``LogisticRegression`` takes +1 and -1, any labels of the convex losses
and any weights of their cells will do.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from threading import Event, Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlc.configs.device import one_thread
from mlc.configs.errors import MlcError, choose
from mlc.configs.progress import Progress, silent
from mlc.heads.lbfgs import Solved, solve
from mlc.heads.logistic import Problems, Rotated, Track, bytes_per_slot, rotate
from mlc.losses.table import LOSSES, check_knobs

STRENGTHS = tuple(float(value) for value in np.logspace(-6, 5, 45))
MAX_BYTES = 1 << 30  # of the problems under way
LEAST_SLOTS = 32  # of a core: a matrix product of fewer columns wastes it

CONVEX = {
    name: method.weights
    for name, method in LOSSES.items()
    if method.weights is not None and method.batch_term is None
}


@dataclass(frozen=True)
class StrengthPath:
    """Linear heads, one for each of S strengths.

    Attributes:
        strengths: S values of C, in the order asked for.
        weight: (S, L, D), of the features as given.
        bias: (S, L).
        iterations: (S, L) int64, steps from the optimum of the strength before.
        converged: (S, L) bool.
    """

    strengths: tuple[float, ...]
    weight: Tensor
    bias: Tensor
    iterations: Tensor
    converged: Tensor

    def logits(self, features: Tensor, index: int) -> Tensor:
        """Return the logits (N, L) of features (N, D) at one strength."""
        return torch.nn.functional.linear(features, self.weight[index], self.bias[index])


def cell_weights(
    loss: str, labels: Tensor, knobs: Mapping[str, Any], weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write a convex loss as ``a softplus(-z) + b softplus(z)`` in every cell.

    The exact log-loss: the losses of ``LOSSES`` compute -log(p + 1e-5), as the MLSPL release
    does, which is not convex. The two differ where a probability is below 1e-3 or so.

    Args:
        loss: a key of CONVEX.
        labels: (..., L), +1 positive, 0 unknown, -1 negative, as the loss takes them.
        knobs: of the loss; its own defaults fill in.
        weights: (..., L) of the cells, >= 0.

    Returns:
        a and b, each (..., L) float64, >= 0.

    Raises:
        MlcError: the loss is not one of these, or a knob or a weight makes it concave.
    """
    method = choose(CONVEX, loss, "full-batch loss")
    check_knobs(loss, knobs)
    present, absent = method(labels, torch.float64, **knobs)
    if weights is None:
        return present, absent
    if not bool((weights >= 0).all()):
        raise MlcError(f"weights: should not be negative or NaN, got {float(weights.min())}")
    return present * weights, absent * weights


def fit_path(
    features: Tensor,
    labels: Tensor,
    loss: str,
    strengths: Sequence[float] = STRENGTHS,
    *,
    knobs: Mapping[str, Any],
    weights: Tensor | None = None,
    max_iter: int = 500,
    tolerance: float = 1e-5,
    max_bytes: int = MAX_BYTES,
    progress: Progress = silent,
) -> StrengthPath:
    """Train a linear head for each strength to the optimum, all classes at once.

    For each class and strength C, minimises ``|w|^2 / 2 + C sum_n cell_n``: scikit-learn's
    ``LogisticRegression(C=C)`` on raw features, its bias not regularised. Each of these problems
    converges for itself, when the gradient of the objective over C sum(a + b) has a Euclidean
    norm of at most ``tolerance``; scikit-learn's ``tol`` is that of the largest entry, so the same
    number is stricter here. At the default, objectives of 1,280 features of length 16 were within
    5e-7 of the least, relatively, for C <= 0.1, and within 2e-5 for C = 1.

    A class without positives (or without negatives) has no optimum: its weights are 0 and its bias
    goes as far as the tolerance asks, about log(tolerance). A class without labels gets zeros.

    On a CPU each of torch's threads has classes of its own; answers agree to the tolerance, not to
    the bit, whatever their number. Memory: ``max_bytes``, a copy of the features, the result.

    Args:
        features: (N, D) float32 or float64, the precision of the work.
        labels: (N, L) of +1, 0, -1, on the same device.
        loss: a key of CONVEX.
        strengths: S values of C, any order; by default the 45 of DINOv2's and DINOv3's
            evaluation by logistic regression, 1e-6 to 1e5.
        knobs: of the loss.
        weights: (N, L) of the cells, >= 0.
        max_iter: steps of a problem; one that runs out of them is not ``converged``.
        tolerance: see above.
        max_bytes: of the problems under way; it bounds their number, one at least on each core.
        progress: told how many problems are done.

    Raises:
        MlcError: see ``cell_weights``; or features, strengths or tolerance make no sense.
    """
    _check(features, labels, strengths, tolerance, max_iter)
    cells = _cells(labels, loss, knobs, weights, features.dtype)
    (images, width), classes = features.shape, labels.shape[1]
    order = torch.tensor(strengths, dtype=torch.float64).argsort()
    ascending = torch.tensor(strengths, dtype=torch.float64)[order].to(features)
    path = _empty(features, classes, strengths)
    results = _Results(path, order.to(features.device), progress)
    workers = torch.get_num_threads() if features.device.type == "cpu" else 1
    tracks = _tracks(classes, len(strengths), LEAST_SLOTS * workers)
    room = max_bytes // workers // bytes_per_slot(images, width, features.element_size())
    shares = [tracks[first::workers] for first in range(min(workers, len(tracks)))]
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        problems = Problems(rotate(features), cells, ascending)

        def work(share: list[Track]) -> None:
            for solved in solve(problems, share, max(1, room), tolerance, max_iter):
                results.keep(solved)

        results.wait([pool.submit(work, share) for share in shares])
        _turn_back(path, problems.features)
    return path


def check_strengths(strengths: Sequence[float]) -> None:
    """Raise an MlcError if there is no strength, or one is not a positive number."""
    if not len(strengths):
        raise MlcError("strengths: is empty; give at least one")
    for value in strengths:
        if not (value > 0 and math.isfinite(value)):
            raise MlcError(f"strengths: should be positive numbers, got {value}")


def _check(
    features: Tensor, labels: Tensor, strengths: Sequence[float], tolerance: float, max_iter: int
) -> None:
    """Raise an MlcError for what would give no answer, or a wrong one."""
    if len(features) != len(labels):
        raise MlcError(f"labels: should be of {len(features)} images, got {len(labels)}")
    bad = torch.nonzero(~torch.isfinite(features.sum(dim=1))).flatten().tolist()
    if bad:
        rows = ", ".join(str(row) for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise MlcError(f"features: {len(bad)} of {len(features)} rows are not finite: {rows}")
    check_strengths(strengths)
    if not tolerance > 0:
        raise MlcError(f"tolerance: should be a positive number, got {tolerance}")
    if max_iter < 1:
        raise MlcError(f"max_iter: should be at least 1, got {max_iter}")


def _cells(
    labels: Tensor,
    loss: str,
    knobs: Mapping[str, Any],
    weights: Tensor | None,
    dtype: torch.dtype,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what gives a and b, each (P, N), of a few classes; refuse at once what is wrong."""
    if loss == "wan":  # its default depends on L, and classes are taken a few at a time
        knobs = {"negative_weight": 1 / max(1, labels.shape[1] - 1)} | dict(knobs)
    cell_weights(loss, labels[:1], knobs, weights)

    def cells(columns: Tensor) -> tuple[Tensor, Tensor]:
        some = None if weights is None else weights[:, columns]
        present, absent = cell_weights(loss, labels[:, columns], knobs, some)
        return present.T.to(dtype).contiguous(), absent.T.to(dtype).contiguous()

    return cells


def _tracks(classes: int, strengths: int, least: int) -> list[Track]:
    """Return each class's path, cut into as many parts as it takes to have enough of them."""
    parts = min(strengths, math.ceil(least / classes))
    bounds = [round(part * strengths / parts) for part in range(parts + 1)]
    return [
        Track(column, start, stop) for start, stop in pairwise(bounds) for column in range(classes)
    ]


def _empty(features: Tensor, classes: int, strengths: Sequence[float]) -> StrengthPath:
    shape = (len(strengths), classes)
    return StrengthPath(
        strengths=tuple(float(value) for value in strengths),
        weight=features.new_empty(*shape, features.shape[1]),
        bias=features.new_empty(shape),
        iterations=torch.zeros(shape, dtype=torch.int64, device=features.device),
        converged=torch.zeros(shape, dtype=torch.bool, device=features.device),
    )


class _Results:
    """Takes what several threads solve, and tells one progress of it."""

    def __init__(self, path: StrengthPath, order: Tensor, progress: Progress) -> None:
        self._path, self._order, self._progress = path, order, progress
        self._lock, self._stop = Lock(), Event()
        self._done, self._short = 0, 0

    def keep(self, solved: Solved) -> None:
        """Put problems where they belong."""
        path, at = self._path, (self._order[solved.position], solved.column)
        with self._lock:
            if self._stop.is_set():
                raise InterruptedError
            path.weight[at], path.bias[at] = solved.weight, solved.bias
            path.iterations[at], path.converged[at] = solved.iterations, solved.converged
            self._done += len(solved.column)
            self._short += int((~solved.converged).sum())
            note = f"{self._short} did not converge" if self._short else ""
            self._progress(self._done, path.converged.numel(), note)

    def wait(self, futures: Sequence[Future[None]]) -> None:
        """Wait for all threads; if one fails or the user interrupts, the others stop too."""
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            self._stop.set()
            raise


def _turn_back(path: StrengthPath, rotated: Rotated) -> None:
    """Take weights and biases from rotated and centred features back to those given."""
    for weight, bias in zip(path.weight, path.bias, strict=True):
        weight.copy_(weight @ rotated.rotation.T)
        bias -= weight @ rotated.mean
