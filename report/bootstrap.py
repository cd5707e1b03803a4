"""Paired bootstrap over images: how sure a difference of two mAPs is."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def resample_weights(images: int, resamples: int, seed: int = 0) -> NDArray[np.int32]:
    """Return (N, R): how often each image is in each resample of N images with replacement."""
    share = np.full(images, 1 / images)
    draws = np.random.default_rng(seed).multinomial(images, share, size=resamples)
    return np.ascontiguousarray(draws.T, dtype=np.int32)


def resampled_map(
    scores: NDArray[np.floating[Any]], targets: NDArray[np.bool_], weights: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Return the MLSPL mAP, in per cent, of each resample.

    The same definition as ``mean_ap``: ties grouped, a class without positives counts 0.

    Args:
        scores: (N, L).
        targets: (N, L) bool.
        weights: (N, R) counts; pass the same to all runs that are compared.

    Returns:
        (R,) float64.
    """
    total = np.zeros(weights.shape[1])
    for values, wanted in zip(scores.T, targets.T, strict=True):
        if wanted.any():
            total += _resampled_ap(values, wanted, weights)
    total *= 100 / scores.shape[1]
    return total


def _resampled_ap(
    scores: NDArray[np.floating[Any]], wanted: NDArray[np.bool_], weights: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Return (R,) AP of one class: only the sums between its positives are needed."""
    order = np.argsort(-scores, kind="stable")
    falling, hits = -scores[order], wanted[order]
    # Where the tie group of each positive ends, and which positive is the first of its group.
    ends, first = np.unique(np.searchsorted(falling, falling[hits], "right"), return_index=True)
    starts = np.concatenate([[0], ends[:-1]])
    above = np.add.reduceat(weights[order[: ends[-1]]], starts).cumsum(axis=0)
    own = np.add.reduceat(weights[order[hits]], first)
    found = own.cumsum(axis=0)
    ap = (own * (found / np.maximum(above, 1))).sum(axis=0) / np.maximum(found[-1], 1)
    return np.asarray(ap, dtype=np.float64)
